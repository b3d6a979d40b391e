"""FLIP's and A-CLIP's rows, from the answers that trainings leave."""

import numpy as np
import pytest

from benchmarks.patchrank import pretraining
from benchmarks.training import shapes
from benchmarks.waveclip.answers import Answers

FLIP = "FLIP without its unmasked tuning"


def answers(share, seed):
    right = np.random.default_rng(seed).random((1, 2000)) < share
    return Answers(right, np.zeros((1, 2000), np.float32), np.zeros((1, 2000), np.float32))


@pytest.fixture
def finished(monkeypatch):
    """FLIP and its control with three seeds, A-CLIP with one and without its control."""
    shares = {"shapes-teacher": (0.8, 3), "shapes-flip": (0.7, 3), "shapes-aclip": (0.5, 1)}
    known = {
        family: {split: {seed: answers(share, seed) for seed in range(seeds)} for split in shapes.SPLITS}
        for family, (share, seeds) in shares.items()
    }
    monkeypatch.setattr(shapes, "finished", lambda families: known)


def test_a_pretraining_stands_beside_the_clip_that_sees_every_patch(finished):
    rows = {row["row"]: row for row in pretraining.run(smoke=True)["rows"]}
    assert rows[FLIP]["difference"][0] == pytest.approx(-0.1, abs=0.03) and rows[FLIP]["seeds"] == 3
    assert rows["A-CLIP"]["test"][0] == pytest.approx(0.5, abs=0.05) and rows["A-CLIP"]["difference"] is None
    assert rows["CLIP, captions alone"]["seeds"] == 0


def test_what_is_not_trained_is_named_with_its_command(finished):
    result = pretraining.run(smoke=True)
    assert (
        "| CLIP, captions alone | 36 patches | 0 | not run | not run | not run | – |"
        in pretraining.render(result)["md"]
    )
    assert dict(pretraining.missing(result)) == {
        "3 of 3 runs are missing: CLIP, captions alone": "make retrain ONLY='shapes-captions-*'",
        "2 of 3 runs are missing: A-CLIP": "make retrain ONLY='shapes-aclip-*'",
    }


def test_the_recipes_train_as_long_as_the_clip_beside_them():
    runs = [run for _, runs in shapes.FEWER_PATCHES for run in runs]
    assert {shapes.read_recipe(run.recipe)["trainer"]["max_steps"] for run in runs} == {shapes.STEPS}
