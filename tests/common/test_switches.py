"""Trainings with changed blocks against the plain ones, step by step."""

import json
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo import register_backend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from common import tower
from common.attention import KVCache
from common.clip import CLIP
from common.switches import CheckpointBlocks, CompileBlocks
from common.testing import TINY_CAPTIONS
from mlip.pretraining import MLIPPretraining

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Observed(Callback):
    """The loss and the gradients of every step."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.losses.append(trainer.callback_metrics["train_loss"])
        self.gradients += [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]


def changed(module, callback):
    """A module as in a training with the callback."""
    callback.on_fit_start(None, module)
    return module


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
        module = MLIPPretraining(str(tmp_path / "tiny.json"), frequency_layers=1, keep_rates={2: 0.5}, warmup_steps=1)
        observed = Observed()
        trainer = lightning.Trainer(
            max_steps=2, enable_checkpointing=False, callbacks=[*callbacks, observed], num_sanity_val_steps=1, **QUIET
        )
        trainer.fit(module, *(DataLoader(batches, batch_size=None) for batches in ([batch, batch], [batch])))
        return module, observed

    return run


@pytest.mark.parametrize("callback", [CheckpointBlocks, partial(CompileBlocks, "aot_eager")])
def test_losses_and_gradients_are_those_of_the_plain_blocks(train, callback):
    torch.compiler.reset()
    module, observed = train(callback())
    plain_module, plain = train()
    torch.testing.assert_close(observed.losses, plain.losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(observed.gradients, plain.gradients, atol=1e-5, rtol=1e-4)
    assert module.state_dict().keys() == plain_module.state_dict().keys()
    for part in module.modules():  # plain again after the fit
        assert "forward" not in vars(part) and part._compiled_call_impl is None


@torch.no_grad()
def test_compiled_blocks_share_their_graphs():
    graphs = []
    register_backend(lambda graph, inputs: graphs.append(graph) or graph.forward, name="counting")
    tower_of_four = tower.Transformer(16, 4, 2, 4.0, quick_gelu=False)
    torch.compiler.reset()
    changed(tower_of_four, CompileBlocks("counting"))
    x = plain = torch.randn(2, 5, 16)
    for layer, block in enumerate(tower_of_four.resblocks):
        x, plain = block(x, None, None, layer), block.forward(plain)
    torch.testing.assert_close(x, plain)
    assert len(graphs) == 1


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
