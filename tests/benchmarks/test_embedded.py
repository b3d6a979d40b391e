"""What the benchmarks of the embedded models share."""

import pytest
import torch

from benchmarks import embedded
from benchmarks.embedded import batches, first_pictures, models, prompts
from common.data.embedded import splits
from common.data.embedded.module import EmbeddedDataModule
from common.data.transforms import to_batch


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(embedded.MODELS, embedded.REVISION, (tmp_path / "none.safetensors",) * 2)
    with pytest.raises(ValueError, match="make retrain"):
        models()


@pytest.mark.parametrize("revision", [1, 2])
def test_pictures_are_those_that_evaluation_reads_from_shards(monkeypatch, tmp_path, revision):
    """Both before the split is packed and after."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setitem(splits.SPLITS, revision, {"val": (6, 3)})
    data = EmbeddedDataModule(batch_size=4, num_workers=0, captions=False, revision=revision)
    drawn_here = first_pictures("val", 4, revision)
    batch = next(iter(data.dataloader("val", train=False)))
    for shown, labels in (drawn_here, first_pictures("val", 4, revision)):
        assert torch.equal(to_batch(shown, data.preprocess), batch["image"]) and torch.equal(labels, batch["label"])


@pytest.mark.parametrize(("revision", "size"), [(1, 96), (2, 24)])
def test_batches_of_the_first_pictures_are_drawn_as_they_are_packed(monkeypatch, tmp_path, revision, size):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setitem(splits.SPLITS, revision, {"val": (6, 3)})
    monkeypatch.setattr(embedded, "_BATCH", 2)
    drawn = list(batches("val", 4, size, revision))
    assert not any(tmp_path.iterdir()), "nothing is packed"
    packed = list(batches("val", None, size, revision))
    assert [len(batch["label"]) for batch in packed] == [2, 2, 2]
    for one, other in zip(drawn, packed[:2], strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def test_prompts_are_those_of_the_data():
    assert prompts(2) == EmbeddedDataModule("common/shapes_clip.json", revision=2).class_prompts != prompts(1)
