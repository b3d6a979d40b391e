"""Labelled pictures of a set of the catalogue as the validation of a training on captioned ones."""

import pytest

from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.testing import tiny_architecture


@pytest.fixture
def module(tmp_path):
    """Makes a ShardDataModule of training and validation shards."""
    of = {"architecture": tiny_architecture(tmp_path), "batch_size": 4, "num_workers": 0}
    return lambda train, val, classes="imagenet": ShardDataModule(train, val, classes=classes, **of)


def test_labelled_pictures_of_a_known_set_validate_captioned_ones(tmp_path, module):
    pairs = write_shards(tmp_path / "train", 1, 4, txt=lambda number: b"a cat")
    members = {"txt": lambda number: None, "cls": lambda number: str(999 - number).encode()}
    labelled = write_shards(tmp_path / "val", 1, 4, **members)
    data = module(pairs, labelled)
    assert data.class_prompts[0] == "a bad photo of a tench." and len(data.class_names) == 1000
    assert "text" in next(iter(data.train_dataloader())) and data.train_class_prompts is None
    (batch,) = data.val_dataloader()
    assert "text" not in batch and batch["label"].tolist() == [999, 998, 997, 996]


def test_what_has_no_label_or_no_known_names_is_refused(tmp_path, module):
    pairs = write_shards(tmp_path / "val", 1, 4)
    with pytest.raises(ValueError, match=r"needs a label .* below 1000, has None"):
        next(iter(module(None, pairs).val_dataloader()))
    with pytest.raises(ValueError, match="classes 'dtd': that set has its class names in its files"):
        module(None, pairs, "dtd")
