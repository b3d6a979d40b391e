"""Parameter groups, and the schedule's values at the points that matter."""

import importlib.metadata
import math

import pytest
import torch
from torch import nn

from common.clip import CLIP
from common.optim import check_settings, configure, parameter_groups, scheduled, warmup_cosine


def test_matrices_decay_and_the_rest_does_not():
    clip = CLIP.tiny()
    clip.image_tower.proj.requires_grad_(False)
    groups = parameter_groups(clip, 1e-3, 0.2)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trained = [p for p in clip.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(trained)
    assert all(decay[id(p)] == (0.2 if p.ndim >= 2 else 0.0) for p in trained)
    assert decay[id(clip.logit_scale)] == 0.0 and decay[id(clip.image_tower.conv1.weight)] == 0.2
    assert {group["lr"] for group in groups} == {1e-3}


def test_stacks_of_vectors_that_a_module_names_do_not_decay():
    module = nn.Module()
    module.tokens, module.weight = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    module.vectors = ("tokens",)
    decay = {id(p): group["weight_decay"] for group in parameter_groups(module, 1e-3, 0.2) for p in group["params"]}
    assert decay == {id(module.tokens): 0.0, id(module.weight): 0.2}


def test_new_parameters_take_their_own_rate():
    old, new = nn.Linear(3, 3), nn.Linear(3, 3)
    groups = parameter_groups(nn.ModuleList([old, new]), 1e-3, 0.1, new.parameters(), new_factor=4.0)
    result = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert [result[id(p)] for p in (old.weight, old.bias)] == [(1e-3, 0.1), (1e-3, 0.0)]
    assert [result[id(p)] for p in (new.weight, new.bias)] == [(4e-3, 0.1), (4e-3, 0.0)]


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (1, 2), (0, 50)])
def test_schedule_at_its_corners(warmup, total):
    assert math.isclose(warmup_cosine(0, warmup, total), 1 / max(warmup, 1))
    assert math.isclose(warmup_cosine(max(warmup - 1, 0), warmup, total), 1)
    assert math.isclose(warmup_cosine(warmup, warmup, total), 1)
    halfway = warmup + (total - warmup) / 2
    assert math.isclose(warmup_cosine(halfway, warmup, total), 0.5)
    last = math.sin(math.pi / 2 / (total - warmup)) ** 2  # (1 + cos(pi - a)) / 2 = sin²(a / 2)
    assert math.isclose(warmup_cosine(total - 1, warmup, total), last, rel_tol=1e-9)
    assert warmup_cosine(total, warmup, total) == warmup_cosine(total + 9, warmup, total) == 0
    assert math.isclose(warmup_cosine(total, warmup, total, final=0.1), 0.1)
    assert math.isclose(warmup_cosine(warmup, warmup, total, final=0.1), 1)


def test_the_optimiser_follows_the_schedule_in_every_group():
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    groups = parameter_groups(layers, 0.1, 0.2, layers[1].parameters(), new_factor=3.0)
    configured = configure(groups, warmup_steps=4, total_steps=12)
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, torch.optim.AdamW) and configured["lr_scheduler"]["interval"] == "step"
    for step in range(12):
        factor = warmup_cosine(step, 4, 12)
        rates = sorted({round(group["lr"] / factor, 9) for group in optimizer.param_groups})
        assert rates == [0.1, 0.3]
        optimizer.step()
        schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


def test_another_optimiser_gets_the_same_schedule():
    optimizer = torch.optim.SGD(parameter_groups(nn.Linear(2, 2), 0.1, 0.2), lr=0.1, momentum=0.9)
    configured = scheduled(optimizer, warmup_steps=4, total_steps=12)
    assert configured["optimizer"] is optimizer and configured["lr_scheduler"]["interval"] == "step"
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 / 4}


def test_a_schedule_needs_a_length_beyond_its_warmup():
    groups = parameter_groups(nn.Linear(2, 2), 0.1, 0.0)
    for unknown in (-1, 0, math.inf):
        with pytest.raises(ValueError, match=r"trainer\.max_steps or trainer\.max_epochs"):
            configure(groups, 0, unknown)
    with pytest.raises(ValueError, match="warmup_steps 10 is not below the run's 10 steps"):
        configure(groups, 10, 10)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ((-1.0, 0.1, 0), "learning_rate -1.0 must be positive"),
        ((0.0, 0.1, 0), "learning_rate 0.0 must be positive"),
        ((math.nan, 0.1, 0), "learning_rate nan must be positive"),
        ((1e-3, -1.0, 0), "weight_decay -1.0 must not be negative"),
        ((1e-3, 0.1, -1), "warmup_steps -1 must not be negative"),
    ],
)
def test_settings_with_which_nothing_can_be_trained_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        check_settings(*settings)


def test_every_training_checks_them_before_it_builds_anything():
    for point in importlib.metadata.entry_points(group="effclip.trainings"):
        with pytest.raises(ValueError, match=r"learning_rate -1\.0 must be positive"):
            point.load()(learning_rate=-1.0)
