"""A module over shards for a tiny architecture, with a trainer's rank and world."""

import json
from types import SimpleNamespace

import pytest

from common.data.shards import ShardDataModule


@pytest.fixture
def architecture(tmp_path):
    file = tmp_path / "tiny.json"
    vision = {"image_size": 8, "patch_size": 4, "width": 64, "layers": 1, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(file)


@pytest.fixture
def module(architecture):
    """Makes a ShardDataModule; ``rank`` and ``world`` stand in for a trainer."""

    def make(train=None, val=None, rank=0, world=1, **options):
        options = {"batch_size": 4, "num_workers": 0, "shuffle_buffer": 5, **options}
        data = ShardDataModule(train, val, architecture=architecture, **options)
        if world > 1:
            progress = SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
            start = {"fit_loop": SimpleNamespace(epoch_loop=progress)}
            start |= {"num_training_batches": 1, "overfit_batches": 0.0}
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world, current_epoch=0, **start)
        return data

    return make
