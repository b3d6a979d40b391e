"""Muon for the blocks' matrices beside AdamW: each part alone, checkpoints, schedules, and who gets which."""

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import AdamW, Muon

from common.clip import CLIP
from common.exact_resume import ExactResume
from common.muon import MuonAdamW, orthonormal
from common.optim import configure, parameter_groups
from common.tower import Block
from tests.patchrank.short_runs import QUIET


def model():
    """A matrix and a bias with the same values every time."""
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def groups(layer):
    """Muon for the matrix, AdamW for the bias."""
    return [
        {"params": [layer.weight], "lr": 0.1, "weight_decay": 0.2, "muon": True},
        {"params": [layer.bias], "lr": 0.3, "weight_decay": 0.0, "muon": False},
    ]


def train(layer, optimizers, steps):
    """Steps on inputs that depend on the step's number alone."""
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        layer(inputs).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def unrounded(monkeypatch):
    """torch's own Muon without its rounding to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


def test_each_part_steps_as_torchs_own_does_alone(unrounded):
    together, apart = model(), model()
    train(together, [MuonAdamW(groups(together), (0.9, 0.98), 1e-6)], range(4))
    muon = Muon([apart.weight], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW([apart.bias], lr=0.3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    train(apart, [muon, adamw], range(4))
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)], ids=["wide", "tall"])
def test_orthonormal_changes_the_singular_values_alone_by_the_printed_polynomial(shape):
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left * values.unsqueeze(1) @ right
    torch.testing.assert_close(orthonormal(matrices).double(), expected, atol=1e-5, rtol=0)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_one_shape_step_as_they_do_apart(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6).to(dtype), nn.Linear(6, 6), nn.Linear(6, 6)]
    apart = copy.deepcopy(layers)

    def step(some):
        loss = sum(layer(torch.ones(2, 6, dtype=layer.weight.dtype)).square().sum() for layer in some)
        loss.backward()
        matrices = {"params": [layer.weight for layer in some], "lr": 0.1, "weight_decay": 0.1, "muon": True}
        others = {"params": [layer.bias for layer in some], "lr": 0.1, "weight_decay": 0.0, "muon": False}
        MuonAdamW([matrices, others], (0.9, 0.98), 1e-6).step()

    step(layers)
    for layer in apart:
        step([layer])
    for one, other in zip(layers, apart, strict=True):
        assert torch.allclose(one.weight, other.weight, atol=1e-6)


def test_a_step_has_the_size_of_adamws():
    """Its root mean square is about .2 times the rate, as AdamW's is in trainings (Liu et al., 2025)."""
    layer = nn.Linear(64, 48)
    before = layer.weight.detach().clone()
    train_groups = groups(layer)
    train_groups[0]["weight_decay"] = 0.0
    optimizer = MuonAdamW(train_groups, (0.9, 0.98), 1e-6)
    layer(torch.randn(256, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    assert (layer.weight - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.3)


def test_a_checkpoint_continues_the_training():
    through, stopped = model(), model()
    train(through, [MuonAdamW(groups(through), (0.9, 0.98), 1e-6)], range(6))
    first = MuonAdamW(groups(stopped), (0.9, 0.98), 1e-6)
    train(stopped, [first], range(3))
    second = MuonAdamW(groups(stopped), (0.9, 0.98), 1e-6)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(stopped, [second], range(3, 6))
    assert torch.equal(through.weight, stopped.weight) and torch.equal(through.bias, stopped.bias)


def test_the_schedule_changes_both_parts_rates_also_after_a_checkpoint():
    layer = model()
    configured = configure(groups(layer), warmup_steps=0, total_steps=10)
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    optimizer.load_state_dict(optimizer.state_dict())
    train(layer, [optimizer], range(1))
    for _ in range(10):
        schedule.step()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    train(layer, [optimizer], range(1, 3))  # at the schedule's end, where rates are 0
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


def test_a_step_returns_what_its_closure_does():
    layer = model()

    def closure():
        loss = layer(torch.ones(1, 5)).square().sum()
        loss.backward()
        return loss

    before = layer.weight.detach().clone()
    with torch.no_grad():
        loss = MuonAdamW(groups(layer), (0.9, 0.98), 1e-6).step(closure)
    assert loss.item() > 0 and not torch.equal(layer.weight, before)


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else():
    clip = CLIP.tiny()
    names = {id(p): name for name, p in clip.named_parameters()}
    split = parameter_groups(clip, 1e-3, 0.2, optimizer="muon")
    stepped = {names[id(p)] for group in split if group["muon"] for p in group["params"]}
    assert stepped == {
        name
        for name, p in clip.named_parameters()
        if p.ndim == 2 and name.split(".")[-2] in ("attn", "out_proj", "c_fc", "c_proj")
    }
    assert {group["muon"] for group in split} == {True, False}
    assert sum(len(group["params"]) for group in split) == len(names)
    assert isinstance(configure(split, 0, 10)["optimizer"], MuonAdamW)


def unfreezing(part, muon, **settings):
    """An optimiser of another layer, to which the part's matrix came later; as BaseFinetuning does it."""
    optimizer = MuonAdamW(groups(model()), (0.9, 0.98), 1e-6)
    optimizer.add_param_group({"params": [part.weight], **settings} | ({"muon": True} if muon else {}))
    return optimizer


@pytest.mark.parametrize("muon", [True, False])
def test_a_part_that_is_unfrozen_later_is_stepped(muon, unrounded):
    """By AdamW unless its group says otherwise."""
    part, alone = model(), model()
    kind = (Muon, {"adjust_lr_fn": "match_rms_adamw"}) if muon else (AdamW, {"betas": (0.9, 0.98), "eps": 1e-6})
    train(part, [unfreezing(part, muon, lr=0.1, weight_decay=0.2)], range(3))
    train(alone, [kind[0]([alone.weight], lr=0.1, weight_decay=0.2, **kind[1])], range(3))
    assert torch.allclose(part.weight, alone.weight, atol=1e-6) and not torch.equal(part.weight, model().weight)


@pytest.mark.parametrize("muon", [True, False])
def test_a_checkpoint_continues_the_training_of_a_part_that_was_unfrozen(muon):
    through, stopped = model(), model()
    train(through, [unfreezing(through, muon, lr=0.1, weight_decay=0.2)], range(5))
    first = unfreezing(stopped, muon, lr=0.1, weight_decay=0.2)
    train(stopped, [first], range(3))
    second = unfreezing(stopped, muon, lr=0.3)  # its rate and decay are the checkpoint's too
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(stopped, [second], range(3, 5))
    assert torch.equal(through.weight, stopped.weight)


@pytest.mark.parametrize("muon", [True, False])
def test_a_part_that_is_unfrozen_has_no_decay_unless_its_group_says_so_and_needs_a_rate(muon):
    layer, part = model(), model()
    optimizer = MuonAdamW(groups(layer), (0.9, 0.98), 1e-6)
    with pytest.raises(ValueError, match='no learning rate of its own; give it "lr"'):
        optimizer.add_param_group({"params": [part.weight], "muon": muon})
    optimizer.add_param_group({"params": [part.weight], "lr": 0.1, "muon": muon})
    part.weight.grad = torch.zeros_like(part.weight)
    optimizer.step()
    assert torch.equal(part.weight, model().weight), "without a gradient, decay alone would move it"


@pytest.mark.parametrize(("theirs", "ours"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_checkpoint_of_the_other_optimiser_is_refused(theirs, ours):
    clip = CLIP.tiny()
    first, second = (
        configure(parameter_groups(clip, 1e-3, 0.1, optimizer=name), 0, 10)["optimizer"] for name in (theirs, ours)
    )
    message = f"made with optimizer {theirs}, this training has optimizer {ours}; set optimizer to {theirs} to go on"
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())


def test_an_optimiser_without_a_name_is_refused():
    with pytest.raises(ValueError, match="optimizer 'sgd' is none of adamw, muon"):
        parameter_groups(model(), 1e-3, 0.1, optimizer="sgd")


def test_muon_without_blocks_to_train_is_refused():
    with pytest.raises(ValueError, match="optimizer muon finds no matrices of transformer blocks to train here"):
        configure(parameter_groups(model(), 1e-3, 0.1, optimizer="muon"), 0, 10)
    clip = CLIP.tiny()
    for tower in (clip.image_tower, clip.text_tower):
        tower.transformer.requires_grad_(False)
    with pytest.raises(ValueError, match="take adamw"):
        configure(parameter_groups(clip, 1e-3, 0.1, optimizer="muon"), 0, 10)


class Training(lightning.LightningModule):
    """A block and a head; the first linear map of the block is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = Block(8, 2), nn.Linear(8, 1)
        self.block.mlp.c_fc.requires_grad_(False)

    def training_step(self, _, index):
        batch = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(index))
        return self.head(self.block(batch)).square().mean()

    def configure_optimizers(self):
        return configure(parameter_groups(self, 1e-2, 0.1, optimizer="muon"), 1, 6)

    def train_dataloader(self):
        return range(12)


def run(folder, steps, checkpoint=None):
    """A training in mixed precision whose steps see two batches each; the file of its last step."""
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = lightning.Trainer(
        max_steps=steps, precision="bf16-mixed", gradient_clip_val=1.0, accumulate_grad_batches=2,
        callbacks=[keep, ExactResume()], **QUIET,
    )  # fmt: skip
    trainer.fit(Training(), ckpt_path=checkpoint, weights_only=True)
    return folder / "last.ckpt"


def test_a_training_in_mixed_precision_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    through = torch.load(run(tmp_path / "through", 6), weights_only=True)
    stopped = run(tmp_path / "stopped", 3)
    resumed = torch.load(run(tmp_path / "resumed", 6, stopped), weights_only=True)
    assert resumed["global_step"] == through["global_step"] == 6
    for name, value in through["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
        assert torch.equal(Training().state_dict()[name], value) == ("c_fc" in name), name
