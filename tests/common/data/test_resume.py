"""A killed run goes on, bit for bit, with the samples that it had not seen, and decodes no others."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from common.data.reader import Decoder
from common.data.shards import ShardDataModule
from common.data.smoke import jpeg, write_shards
from common.pretraining import CLIPPretraining
from common.testing import TINY_CAPTIONS, tiny_architecture

STEPS = 15  # two epochs of 6 batches and half of a third
SAVED = (1, 4, 6, 9)  # in an epoch's midst, after its last batch, in the second one
RESUMED = {"1": 1, "4": 4, "6": 6, "9": 9, "epoch": 6, "exception": 11}  # checkpoint: batches that are done


class Killed(Exception):
    """Stands for a kill: whatever the run does afterwards, only the checkpoints are used."""


class Recorder(Callback):
    """Notes the keys of every batch; saves after some steps; stops the run before or in the midst of a step."""

    def __init__(self, folder: Path | None = None, kill: int | None = None) -> None:
        self.folder, self.kill, self.keys = folder, kill, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.kill:
            raise Killed
        self.keys.append(batch["key"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.folder and trainer.global_step in SAVED:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, module):
        if self.folder:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.folder / "exception.ckpt")


@pytest.fixture
def fit(tmp_path):
    """Trains the tiny CLIP over 4 shards of 6 pairs, two of them damaged; gives its weights and the keys seen."""
    captions = [caption.encode() for caption in TINY_CAPTIONS]
    pattern = write_shards(
        tmp_path / "train",
        4,
        6,
        manifest=True,
        jpg=lambda n: b"damaged" if n in (5, 13) else jpeg(n, 40),
        txt=lambda n: captions[n % 6],
    )
    architecture = tiny_architecture(tmp_path)

    def run(workers, recorder, checkpoint=None, **options):
        seed_everything(0)
        model = CLIPPretraining(architecture, warmup_steps=2)
        options = {"batch_size": 4, "shuffle_buffer": 5, "max_damaged": 0.5, **options}
        data = ShardDataModule(pattern, architecture=architecture, num_workers=workers, **options)
        trainer = Trainer(
            max_steps=STEPS,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[recorder],
        )
        trainer.fit(model, data, ckpt_path=checkpoint)
        assert trainer.global_step == STEPS
        return model.state_dict()

    return run


@pytest.mark.parametrize(("workers", "resumed"), [(0, RESUMED), (2, ("1", "epoch", "exception"))])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, fit, workers, resumed, monkeypatch, recwarn):
    decoded = []
    decode = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, raw, rng: decoded.append(raw) or decode(self, raw, rng))
    whole = Recorder()
    expected = fit(workers, whole)
    assert len(whole.keys) == STEPS and whole.keys[:6] != whole.keys[6:12]
    seen = {key for keys in whole.keys[:6] for key in keys}
    assert len(seen) == 22 and not {"s0-5", "s2-1"} & seen

    folder = tmp_path / "checkpoints"
    with pytest.raises(Killed):
        fit(workers, Recorder(folder, kill=11))
    for name in resumed:
        done, rest = RESUMED[name], Recorder()
        decoded.clear()
        weights = fit(workers, rest, folder / f"{name}.ckpt")
        assert rest.keys == whole.keys[done:], name
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
        if workers == 0:
            assert len(decoded) == 4 * (STEPS - done), "what was skipped is not decoded"
    assert not [warning for warning in recwarn if "resum" in str(warning.message)]
    torch.load(folder / "4.ckpt", weights_only=True)


def test_a_changed_order_is_said(tmp_path, fit):
    folder = tmp_path / "checkpoints"
    with pytest.raises(Killed):
        fit(0, Recorder(folder, kill=5))
    with pytest.warns(UserWarning, match="batch_size was 4, is 3: this epoch continues in another order"):
        fit(0, Recorder(), folder / "4.ckpt", batch_size=3)
