"""Early exit over several levels: what the real classifier does, and one level's frontier as known."""

import pytest
import torch

from benchmarks.waveclip import exits
from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.levels import Levels, frontier, observe_levels
from common.clip import CLIP
from common.flops import Macs
from common.testing import TINY_CAPTIONS
from common.zeroshot import embed_prompts
from waveclip import MarginGate, ProgressiveClassifier, WaveTower

PROMPTS = list(TINY_CAPTIONS)


def costs(*gmacs):
    return [Cost(value, Macs(value, value, 0.0, {}, 0)) for value in gmacs]


def random_levels(steps, pictures=60):
    generator = torch.Generator().manual_seed(steps)
    right = torch.rand(steps + 1, pictures, generator=generator) < 0.5
    return Levels(torch.rand(steps - 1, pictures, generator=generator), right[1:], right[0])


def test_exits_are_those_of_the_real_classifier():
    torch.manual_seed(0)
    clip = CLIP.tiny().eval()
    wave = WaveTower.from_image_tower(clip.image_tower, levels=2).eval()
    batches = [{"image": torch.randn(8, 3, 32, 32), "label": torch.randint(6, (8,))} for _ in range(2)]
    seen = observe_levels(clip, wave, batches, PROMPTS)
    assert seen.margin.shape == (2, 16) and seen.right.shape == (3, 16) and seen.teacher.shape == (16,)
    classes, scale = embed_prompts(clip, PROMPTS), clip.logit_scale.exp()
    ordered = seen.margin.flatten().sort().values
    for threshold in ((ordered[1:] + ordered[:-1]) / 2)[::4].tolist():
        classify = ProgressiveClassifier(wave, classes, scale, MarginGate(threshold)).eval()
        made = [classify(batch["image"]) for batch in batches]
        correct, shares = seen.at(threshold)
        labels = torch.cat([batch["label"] for batch in batches])
        assert (torch.cat([one.scores.argmax(-1) for one in made]) == labels).tolist() == correct.tolist()
        steps = torch.cat([one.exit_step for one in made])
        assert shares == [float((steps == step).double().mean()) for step in range(3)]


def test_one_level_has_the_frontier_of_figure_1():
    of = random_levels(2)
    found = frontier(of, costs(1.0, 3.0), points=31)
    shares, accuracy = exits.frontier(of.margin[0], *of.right, points=31)
    assert [point["shares"][1] for point in found] == pytest.approx(shares)
    assert [point["accuracy"] for point in found] == pytest.approx(accuracy)
    assert [point["gmacs"] for point in found] == pytest.approx([1 + 2 * share for share in shares])


def test_a_frontier_goes_from_the_first_level_alone_to_the_last():
    of = random_levels(4)
    found = frontier(of, costs(1.0, 2.0, 4.0, 8.0))
    assert found[0]["shares"] == [1, 0, 0, 0] and found[-1]["shares"] == [0, 0, 0, 1]
    for point, right in ((found[0], of.right[0]), (found[-1], of.right[-1])):
        assert point["accuracy"] == pytest.approx(right.double().mean().item())
    gmacs = [point["gmacs"] for point in found]
    assert gmacs == sorted(gmacs) and gmacs[0] == 1.0 and gmacs[-1] == 8.0
