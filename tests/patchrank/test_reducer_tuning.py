"""A tower tuned to a reducer that learns nothing."""

import pytest
import torch

from common.clip import CLIP
from common.reducer_registry import named, setting_for
from common.reduction import ReducedTower
from patchrank.reducer_tuning import ReducerTuning
from tests.patchrank.short_runs import Pictures, fit, moved


def distance(clip, teacher, reducer, keep):
    """1 - cosine of embeddings under a reducer and those of the whole teacher, on the pictures of training."""
    images, tower = Pictures().images(), clip.image_tower
    with torch.no_grad():
        reduced = ReducedTower(tower, named(reducer).reducers(setting_for(tower, keep, 0)))(images)
        return (1 - torch.nn.functional.cosine_similarity(reduced, teacher.image_tower(images), dim=-1)).mean().item()


@pytest.mark.parametrize("reducer", ["tome", "class-attention"])
def test_a_short_run_brings_the_reduced_embedding_nearer_to_the_whole_one(start, reducer):
    module = ReducerTuning(**start, reducer=reducer, keep=0.4, warmup_steps=1, learning_rate=1e-3)
    teacher = module.clip
    untuned = distance(teacher, teacher, reducer, 0.4)
    _, before = fit(module, steps=20)
    assert moved(module, before) <= {
        name for name in module.state_dict() if name.startswith(("tuned.image_tower", "model."))
    }
    tuned, text = module.deployable()
    assert text is None and distance(tuned, teacher, reducer, 0.4) < 0.8 * untuned


def test_a_keep_rate_holds_at_each_of_several_blocks(start):
    model = ReducerTuning(**start, reducer="class-attention", keep=0.5, place=[0, 1]).model
    patches = model.tower.grid**2
    half = model.reducers[0].left(patches)
    assert (half, model.reducers[1].left(half)) == (patches // 2, patches // 4)


def test_what_comes_out_is_a_plain_clip(start, tmp_path):
    tuned, _ = ReducerTuning(**start, keep=0.4).deployable()
    tuned.save(tmp_path / "tuned.safetensors")
    assert type(CLIP.load(tmp_path / "tuned.safetensors")) is CLIP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reducer": "tomm"}, "no reducer 'tomm'; did you mean tome"),
        ({"reducer": "crossget"}, "crossget is trained, and a plain tower has not learned it"),
        ({"keep": 1.5}, r"keep 1\.5 is not in \(0, 1\]"),
        ({"place": 9}, r"places \[9\]: the blocks of this tower are"),
    ],
)
def test_settings_that_cannot_be_are_refused(start, changes, message):
    with pytest.raises(ValueError, match=message):
        ReducerTuning(**start, **changes)
