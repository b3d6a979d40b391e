"""Trainings with changed blocks against the plain ones, step by step."""

import json

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from common import tower
from common.clip import CLIP
from common.switches import CheckpointBlocks
from common.testing import TINY_CAPTIONS
from common.tower import KVCache
from mlip.pretraining import MLIPPretraining

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Observed(Callback):
    """The loss and the gradients of every step."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.losses.append(trainer.callback_metrics["train_loss"])
        self.gradients += [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]


@pytest.fixture
def train(tmp_path):
    """Trains an MLIP for two steps: a Fourier block, one that merges, one that runs whole, and two of the text."""
    architecture = CLIP.tiny().architecture
    architecture["vision_cfg"]["layers"] = 3
    (tmp_path / "tiny.json").write_text(json.dumps(architecture))
    generator = torch.Generator().manual_seed(1)
    text = CLIP.tiny().tokenizer(list(TINY_CAPTIONS))
    batch = {"image": torch.randn(6, 3, 32, 32, generator=generator), "text": text, "caption_id": torch.arange(6)}

    def run(*callbacks):
        lightning.seed_everything(0, verbose=False)
        module = MLIPPretraining(str(tmp_path / "tiny.json"), None, 0, 1, {2: 0.5}, warmup_steps=1)
        observed = Observed()
        trainer = lightning.Trainer(
            max_steps=2, enable_checkpointing=False, callbacks=[*callbacks, observed], num_sanity_val_steps=1, **QUIET
        )
        trainer.fit(module, *(DataLoader(batches, batch_size=None) for batches in ([batch, batch], [batch])))
        return module, observed

    return run


def test_losses_and_gradients_are_those_of_the_plain_blocks(train):
    module, changed = train(CheckpointBlocks())
    plain_module, plain = train()
    torch.testing.assert_close(changed.losses, plain.losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(changed.gradients, plain.gradients, atol=1e-5, rtol=1e-4)
    assert module.state_dict().keys() == plain_module.state_dict().keys()
    assert not any("forward" in vars(part) for part in module.modules())  # plain again after the fit


def changed(block, callback):
    """A block as in a training with the callback."""
    callback.on_fit_start(None, block)
    return block


def block():
    torch.manual_seed(0)
    return tower.Transformer(16, 1, 2, 4.0, quick_gelu=False).resblocks[0]


def test_a_checkpointed_block_saves_its_input_alone():
    x, saved = torch.randn(2, 5, 16, requires_grad=True), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        changed(block(), CheckpointBlocks())(x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]


def test_a_cache_is_filled_once():
    x, cache = torch.randn(2, 5, 16, requires_grad=True), KVCache()
    result = changed(block(), CheckpointBlocks())(x, None, cache)
    result.sum().backward()
    assert cache.tokens == 5
    torch.testing.assert_close(result, block()(x))
