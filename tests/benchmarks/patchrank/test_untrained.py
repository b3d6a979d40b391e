import pytest
import torch

from benchmarks.patchrank.runs import main
from benchmarks.patchrank.tasks import SHAPES, Task, restored
from benchmarks.patchrank.trained_rivals import DROPPING, MERGING, REDUCED, TRAINED_RIVALS, evaluate_untrained
from common.data.pictures import loader
from common.flops import count_macs
from common.preprocess import Preprocess
from common.reducer_registry import named, schedule
from common.reduction import ReducedTower
from common.zeroshot import embed_prompts, similarity
from patchrank.reducers import ClassAttention


@pytest.fixture
def pictures(monkeypatch):
    """The first eight test pictures of scenes of shape, all that a task reads."""
    read = Task.pictures
    monkeypatch.setattr(Task, "pictures", lambda self, split: read(self, split, 8))
    return SHAPES.pictures("test")


def test_class_attention_at_dynamicvits_blocks_is_that_of_the_tasks_own_tower(pictures):
    clip, rate = SHAPES.clip(), TRAINED_RIVALS[DROPPING].rates[SHAPES]
    tower = ReducedTower(clip.image_tower, {block: ClassAttention(rate) for block in (1, 2, 3)}).eval()
    (batch,) = loader(pictures, Preprocess(clip.image_tower.image_size), 8)
    with torch.no_grad():
        scores = similarity(tower(batch["image"]), embed_prompts(clip, SHAPES.module.class_prompts))
    expected = scores.argmax(1).eq(batch["label"])
    assert torch.equal(restored(evaluate_untrained(SHAPES, DROPPING)["test"][REDUCED]), expected)


def test_tome_at_crossgets_blocks_merges_as_its_trained_sibling_in_the_tasks_own_tower(pictures):
    clip, rate = SHAPES.clip(), TRAINED_RIVALS[MERGING].rates[SHAPES]
    tower = ReducedTower(clip.image_tower, schedule(named("tome"), clip.image_tower, rate, [0])).eval()
    (batch,) = loader(pictures, Preprocess(clip.image_tower.image_size), 8)
    with torch.no_grad():
        scores = similarity(tower(batch["image"]), embed_prompts(clip, SHAPES.module.class_prompts))
    found = evaluate_untrained(SHAPES, MERGING)["test"][REDUCED]
    assert torch.equal(restored(found), scores.argmax(1).eq(batch["label"]))
    assert found["gmacs"] == count_macs(tower, batch["image"][:1]).gmacs


@pytest.mark.parametrize("what", ["attention_blocks", "merging_blocks"])
def test_what_needs_no_training_is_listed_with_the_runs(monkeypatch, capsys, what):
    monkeypatch.delenv("PHOTOS", raising=False)
    main(["--list", "--only", f"shapes-{what}"])
    assert f"patchrank/shapes-{what}" in capsys.readouterr().out
