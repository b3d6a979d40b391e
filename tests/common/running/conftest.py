"""A recipe of a tiny CLIP on shards of noise, and a process that runs commands on it."""

import pytest
import yaml

from common.data.smoke import write_shards
from common.testing import TINY_CAPTIONS, tiny_architecture
from tests.common.running.command import STEPS, commands
from tests.common.running.trainings import NoisyPretraining


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a recipe of a tiny CLIP on shards of noise."""
    folder = tmp_path_factory.mktemp("runs")
    captions = [caption.encode() for caption in TINY_CAPTIONS]
    pattern = write_shards(folder / "shards", 4, 6, manifest=True, txt=lambda n: captions[n % 6])
    architecture = tiny_architecture(folder)
    recipe = {
        "model": {
            "class_path": f"{NoisyPretraining.__module__}.NoisyPretraining",
            "init_args": {"architecture": architecture, "warmup_steps": 2, "learning_rate": 1e-3},
        },
        "data": {
            "class_path": "common.data.shards.ShardDataModule",
            "init_args": {
                "train_shards": pattern,
                "val_shards": pattern,
                "architecture": architecture,
                "batch_size": 4,
                "num_workers": 0,
                "shuffle_buffer": 5,
            },
        },
        "trainer": {
            "max_steps": STEPS,
            "max_epochs": -1,
            "accelerator": "cpu",
            "val_check_interval": 4,
            "limit_val_batches": 1,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                 "init_args": {"save_last": True, "save_top_k": 0, "every_n_train_steps": 1000}},
                {"class_path": "common.keep_work.KeepWork", "init_args": {"minutes": 1e-9}},
            ],
        },
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="session")
def run(place):
    """Runs `lightning WORDS` in a process of its own."""
    with commands(place) as run:
        yield run
