"""The block of 96 px, from drawn answers: what is compared, where thresholds come from, and what is said."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.training import shapes as trained
from benchmarks.waveclip import highres, highres_embedded
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.highres_embedded import STUDENT, TEACHER
from benchmarks.waveclip.saving import saving
from common.early_exit import NEVER

PICTURES = 2000


def drawn(right, seed):
    """Answers of a model whose levels are right with these probabilities; a level is surer where it is right."""
    luck = np.random.default_rng(0).random(PICTURES)  # hard pictures are hard for all
    noise = np.random.default_rng(seed).random((2, len(right), PICTURES))
    correct = 0.8 * luck + 0.2 * noise[0] < np.array(right)[:, None]
    margin = (0.5 * noise[1] + 0.5 * correct)[: max(1, len(right) - 1)].astype(np.float32)
    return Answers(correct, margin, margin)


def family(*right, seeds=3):
    return {split: {seed: drawn(right, seed) for seed in range(seeds)} for split in ("val", "test")}


@pytest.fixture
def families(monkeypatch):
    found = {
        "shapes-teacher": family(0.6, seeds=1),
        "shapes-waveclip": family(0.5, 0.6),
        TEACHER: family(0.7),
        STUDENT: family(0.5, 0.6, 0.72),
    }
    monkeypatch.setattr(trained, "finished", lambda: found)
    return found


def test_levels_meet_the_teacher_of_seed_0_and_more_pixels_the_teacher_of_48_px(families):
    block = highres_embedded.measure(smoke=True)
    rows = {row["row"]: row for row in block["rows"]}
    teacher = families[TEACHER]["test"][0].last.mean()
    for step in range(3):
        row = rows[f"WaveCLIP, 96 px, step {step}"]
        right = np.mean([part.correct[step].mean() for part in families[STUDENT]["test"].values()])
        assert row["seeds"] == 3 and row["difference"][0] == pytest.approx(right - teacher) and "p" in row
    small = families["shapes-teacher"]["test"][0].last.mean()
    spread = rows["teacher, 96 px, all seeds"]
    assert spread["difference"][0] == pytest.approx(spread["accuracy"][0] - small)
    gmacs = [rows[f"WaveCLIP, 96 px, step {step}"]["gmacs"] for step in range(3)]
    assert gmacs == sorted(gmacs) and gmacs[0] < rows["teacher, 96 px, seed 0"]["gmacs"]


def test_a_saving_has_a_threshold_of_val_for_each_seed_and_costs_what_its_levels_do(families):
    block = highres_embedded.measure(smoke=True)
    wave = block["savings"][0]
    priced = highres_embedded.prices(2)
    spent = []
    for part, threshold in zip(families[STUDENT]["test"].values(), wave["thresholds"], strict=True):
        first, second = part.margin
        steps = np.where(first >= threshold, 0, np.where(second >= threshold, 1, 2))
        spent.append(np.array(priced[STUDENT])[steps].mean())
    assert wave["chosen"] and wave["saved"][0] == pytest.approx(1 - np.mean(spent) / priced[TEACHER][0])
    for part in (families[STUDENT], families[TEACHER], families["shapes-teacher"]):
        part["val"] = {seed: replace(each, margin=each.margin / 2) for seed, each in part["val"].items()}
    halved = highres_embedded.measure(smoke=True)["savings"][0]["thresholds"]
    assert halved == [each if each == NEVER else pytest.approx(each / 2) for each in wave["thresholds"]]


def test_a_curve_goes_from_the_first_level_to_the_last_by_thresholds_of_val(families):
    line = highres_embedded.measure(smoke=True)["curves"]["WaveCLIP, 96 px"]
    right = [part.correct.mean(1) for part in families[STUDENT]["test"].values()]
    assert [line["accuracy"][0], line["accuracy"][-1]] == pytest.approx([*np.mean(right, 0)[[0, 2]]])
    gmacs = highres_embedded.prices(2)[STUDENT]
    assert [line["gmacs"][0], line["gmacs"][-1]] == pytest.approx([gmacs[0], gmacs[2]])
    assert line["gmacs"] == sorted(line["gmacs"])


def test_the_block_is_rendered_with_its_headline_or_why_there_is_none(families):
    result = {"conditions": dict.fromkeys(("batch", "rounds", "dtype", "device", "threads", "torch"), 1)}
    price = {"path": "dense", "tokens": 1, "images_per_second": 1.0}
    price |= dict.fromkeys(("gmacs", "gmacs_paper", "level_gmacs", "level_gmacs_paper"), 1.0)
    result["paper_scale"] = [{"image_size": 64, "levels": 2, "rows": [price, price | {"path": "exit 0"}]}]
    result["embedded"] = highres_embedded.measure(smoke=True)
    page = highres.render(json.loads(json.dumps(result)))
    assert "**Headline** (3 training seeds)" in page["md"] and "not run" not in page["md"]
    assert len(page["figures"]["waveclip-highres"].axes) == 2
    assert list(highres.missing(result)) == []
    for split in families[STUDENT].values():
        del split[1], split[2]
    result["embedded"] = highres_embedded.measure(smoke=True)
    assert "One training seed: no headline is drawn" in highres.render(result)["md"]
    assert list(highres.missing(result)) == [("2 of 3 runs of shapes-waveclip96", highres_embedded.COMMANDS[1])]


def test_without_a_training_of_96_px_the_block_is_not_run(families):
    del families[STUDENT]
    assert highres_embedded.measure(smoke=True) is None


def test_one_level_behind_val_s_thresholds_saves_as_in_the_table_of_48_px(families):
    """Both tables have one rule."""
    exits, steps = (
        [make(part) for part in families["shapes-waveclip"]["test"].values()]
        for make in (lambda part: part.exits(part.last), lambda part: part.steps(part.last))
    )
    one, other = (saving(some, some, (1.0, 3.0), 2.5, resamples=30) for some in (exits, steps))
    assert one == other
