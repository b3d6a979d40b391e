"""Muon in MLIP's trainings: which parameters it steps, in every training of the family."""

import pytest
import torch

from common.clip import CLIP
from common.optim import configure, parameter_groups
from common.testing import TINY_CAPTIONS, tiny_architecture
from mlip.declip import DeCLIPPretraining
from mlip.filip import FILIPPretraining
from mlip.pretraining import MLIPPretraining
from mlip.slip import SLIPPretraining

MLIP = {"frequency_layers": 1, "keep_rates": {2: 0.5}, "guide": "random", "masking_weight": 0.2}
TRAININGS = [
    (MLIPPretraining, MLIP),
    (SLIPPretraining, {"hidden_width": 12, "projection_width": 6}),
    (DeCLIPPretraining, {"neighbour_queue": 8}),
    (FILIPPretraining, {"token_dim": 8, "keys": 2}),
]


@pytest.fixture
def make(tmp_path):
    """Makes a training of the tiny CLIP's sizes."""
    architecture = tiny_architecture(tmp_path)

    def build(training, options):
        torch.manual_seed(0)
        return training(architecture=architecture, warmup_steps=2, **options)

    return build


def pairs():
    """Captioned pictures with two further views, and every caption twice."""
    generator = torch.Generator().manual_seed(1)
    first, *views = (torch.randn(4, 3, 32, 32, generator=generator) for _ in range(3))
    text = CLIP.tiny().tokenizer(list(TINY_CAPTIONS[:4]), longest=True)
    return {"image": first, "image_views": views, "text": text, "text_view": text, "caption_id": torch.arange(4)}


def split(module):
    """Names of the parameters that Muon steps, and of those that AdamW does."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, 1e-2, 0.1, optimizer=module.optimizer_name)
    return [
        {names[id(p)] for group in groups if group["muon"] is muon for p in group["params"]} for muon in (True, False)
    ]


def test_muon_steps_the_matrices_of_all_kinds_of_blocks_and_no_filter(make):
    module = make(MLIPPretraining, MLIP | {"optimizer": "muon"})
    muon, adamw = split(module)
    tower = "clip.image_tower."
    inside = {
        f"{tower}fourier.0.mlp.c_fc.weight",
        f"{tower}guide_attention.2.key_value.weight",
        f"{tower}vit.transformer.resblocks.0.attn.in_proj_weight",
        "clip.text_tower.transformer.resblocks.1.mlp.c_proj.weight",
    }
    outside = {f"{tower}fourier.0.filter.pieces", f"{tower}frequency_head.1.weight", "masked.head.weight"}
    assert inside <= muon and outside <= adamw
    stacks = ("fourier.", "guide_attention.", "resblocks.")
    matrices = {name for name, p in module.named_parameters() if p.ndim == 2 and p.requires_grad}
    assert muon == {name for name in matrices if any(stack in name for stack in stacks)}
    assert muon | adamw == {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("training", "options"), TRAININGS)
def test_every_training_steps_all_that_it_trains(make, training, options):
    module = make(training, options | {"optimizer": "muon"})
    assert module.hparams.optimizer == "muon"
    groups = parameter_groups(module, 1e-2, 0.1, optimizer=module.optimizer_name)
    optimizer = configure(groups, 0, 10)["optimizer"]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    batch = pairs()
    views = {SLIPPretraining: 2, DeCLIPPretraining: 1}.get(training, 0)
    for _ in range(2):  # what stands behind a projection of zeros has no gradient at first
        optimizer.zero_grad()
        module.loss(batch | {"image_views": batch["image_views"][:views]}).backward()
        optimizer.step()
    still = {name for name, p in module.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert not still


@pytest.mark.parametrize(("training", "options"), TRAININGS)
def test_without_the_option_it_is_adamw(make, training, options):
    module = make(training, options)
    assert module.hparams.optimizer == "adamw"
    assert not any("muon" in group for group in parameter_groups(module, 1e-3, 0.1, optimizer=module.optimizer_name))
