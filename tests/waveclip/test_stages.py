"""A WaveTower as one graph a level: the chain against the tower, its cost against the cached path's."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from benchmarks.waveclip.costs import WavePath
from common.adaptive import path_costs
from common.clip import CLIP
from common.flops import count_macs
from common.stages import run_chain
from waveclip import WaveTower


@pytest.fixture(params=[1, 2])
def wave(request):
    torch.manual_seed(0)
    return WaveTower.from_image_tower(CLIP.tiny().image_tower, request.param).eval()


@torch.no_grad()
def test_the_chain_gives_every_levels_embedding(wave):
    images = torch.randn(3, 3, 32, 32)
    stages = wave.stages()
    assert [stage.name for stage in stages] == [f"level_{step}" for step in range(wave.steps)]
    results = run_chain([stage.module for stage in stages], images)
    for stage, result, z in zip(stages, results, wave(images), strict=True):
        assert len(result) == len(stage.outputs)
        torch.testing.assert_close(result[0], F.normalize(z, dim=-1), atol=1e-5, rtol=0)
    for before, after in pairwise(stages):
        assert before.outputs[1:] == after.inputs
    assert stages[0].inputs == ("images",) and stages[-1].outputs == ("embedding",)
    assert results[0][1].shape[0] == 3 and {"key_1_of_level_0", "band_1_of_level_0"} <= {*stages[1].inputs}
    assert all(not {*stage.inputs} & {*stage.outputs} for stage in stages)


@torch.no_grad()
def test_rows_of_the_state_go_on_alone(wave):
    images, first, second = torch.randn(4, 3, 32, 32), *wave.stages()[:2]
    _, *state = first.module(images)
    rows = torch.tensor([3, 1])
    chosen = second.module(*(tensor[rows] for tensor in state))[0]
    torch.testing.assert_close(chosen, second.module(*state)[0][rows], atol=1e-6, rtol=0)


def test_the_chain_costs_what_the_cached_path_costs(wave):
    costs = [macs.gmacs for macs in path_costs(wave.stages(), 32)]
    expected = [count_macs(WavePath(wave, steps), torch.zeros(1, 3, 32, 32)).gmacs for steps in range(wave.steps)]
    assert costs == expected
