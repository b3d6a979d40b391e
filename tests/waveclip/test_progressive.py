"""Batched early exit against every picture on its own and against the masked pass."""

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from waveclip import MarginGate, MaxProbabilityGate, ProgressiveClassifier, WaveTower

PICTURES, CLASSES, SCALE = 6, 5, 20.0


def classifier(gate, levels=1):
    """A classifier in float64 on a random tower and random classes, and pictures of growing contrast."""
    torch.manual_seed(0)
    wave = WaveTower.from_image_tower(CLIP.tiny().image_tower, levels).double()
    classes = F.normalize(torch.randn(CLASSES, 32, dtype=torch.float64), dim=-1)
    contrast = torch.linspace(0.2, 3, PICTURES, dtype=torch.float64)[:, None, None, None]
    images = contrast * torch.randn(PICTURES, 3, 32, 32, dtype=torch.float64)
    return ProgressiveClassifier(wave, classes, SCALE, gate), images


@torch.no_grad()
def all_levels(model, images):
    """Class probabilities of every level [L+1,B,C], written out from the masked pass."""
    z = torch.stack(model.wave(images))
    cosine = torch.einsum("lbe,ce->lbc", z / z.norm(dim=-1, keepdim=True), model.class_embeddings)
    odds = (SCALE * cosine).exp()
    return odds / odds.sum(-1, keepdim=True)


def thresholds(kind, levels):
    """One threshold below, one above and one between each two neighbours of all observed confidences."""
    model, images = classifier(kind(0.0), levels)
    observed = kind(0.0).confidence(all_levels(model, images)[:-1]).flatten().sort().values
    edges = torch.cat([torch.zeros(1), observed, torch.full((1,), 1.5)])
    return ((edges[1:] + edges[:-1]) / 2).tolist()


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("kind", [MarginGate, MaxProbabilityGate])
def test_a_batch_gives_what_each_picture_gives_alone(kind, levels):
    (model, images), exits = classifier(kind(0.0), levels), set()
    for threshold in thresholds(kind, levels):
        model.gate = kind(threshold)
        together = model(images)
        alone = [model(image[None]) for image in images]
        torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), atol=1e-10, rtol=0)
        assert torch.equal(together.exit_step, torch.cat([one.exit_step for one in alone]))
        assert torch.equal(together.tokens, torch.cat([one.tokens for one in alone]))
        exits.add(tuple(together.exit_step.tolist()))
    # From one threshold to the next a picture may go on where it stopped: the cases are not all alike.
    assert len(exits) > PICTURES


@pytest.mark.parametrize("levels", [1, 2])
def test_the_scores_are_those_of_the_level_that_answered(levels):
    middle = thresholds(MarginGate, levels)[PICTURES * levels // 2]
    model, images = classifier(MarginGate(middle), levels)
    prediction, expected = model(images), all_levels(model, images)
    assert len(prediction.exit_step.unique()) > 1
    stops = MarginGate(middle)(expected)
    stops[-1] = True
    first = stops.int().argmax(0)  # the first level whose gate is open
    assert torch.equal(prediction.exit_step, first)
    torch.testing.assert_close(prediction.scores, expected[first, torch.arange(PICTURES)], atol=1e-10, rtol=0)


def test_results_follow_their_pictures_order():
    model, images = classifier(MarginGate(thresholds(MarginGate, 1)[PICTURES // 2]))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    straight, mixed = model(images), model(images[order])
    torch.testing.assert_close(mixed.scores, straight.scores[order], atol=1e-10, rtol=0)
    assert torch.equal(mixed.exit_step, straight.exit_step[order])
    assert torch.equal(mixed.tokens, straight.tokens[order])


@pytest.mark.parametrize("levels", [1, 2])
def test_exactly_the_undecided_pictures_tokens_enter_the_blocks(levels):
    model, images = classifier(MarginGate(thresholds(MarginGate, levels)[PICTURES * levels // 2]), levels)
    entered = []
    block = model.wave.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].shape[0] * inputs[0].shape[1]))
    exit_step = model(images).exit_step
    grids = [1, 1, 4] if levels == 2 else [4, 4]  # places of a band's tokens: 32 px, patch 8
    group = [1 + (3 if step else 1) * places for step, places in enumerate(grids)]
    expected = [int((exit_step >= step).sum()) * tokens for step, tokens in enumerate(group)]
    assert entered == [tokens for tokens in expected if tokens]
    assert 0 < expected[1] < PICTURES * group[1]


def test_an_open_gate_never_refines():
    model, images = classifier(MarginGate(0.0))
    prediction = model(images)
    assert prediction.exit_step.tolist() == [0] * PICTURES
    assert prediction.tokens.tolist() == [5] * PICTURES
    torch.testing.assert_close(prediction.scores, all_levels(model, images)[0], atol=1e-10, rtol=0)


def test_a_shut_gate_always_refines():
    model, images = classifier(MarginGate(1.1), levels=2)
    prediction = model(images)
    assert prediction.exit_step.tolist() == [2] * PICTURES
    assert prediction.tokens.tolist() == [2 + 4 + 13] * PICTURES
    torch.testing.assert_close(prediction.scores, all_levels(model, images)[-1], atol=1e-10, rtol=0)


def test_a_prediction_s_fields():
    model, images = classifier(MarginGate(0.5))
    prediction = model(images)
    assert prediction.scores.shape == (PICTURES, CLASSES) and not prediction.scores.requires_grad
    torch.testing.assert_close(prediction.scores.sum(1), torch.ones(PICTURES, dtype=torch.float64))
    for field in (prediction.exit_step, prediction.tokens):
        assert field.shape == (PICTURES,) and field.dtype == torch.long


def test_no_pictures_give_no_predictions():
    model, images = classifier(MarginGate(0.5))
    assert model(images[:0]).scores.shape == (0, CLASSES)


def test_probabilities_of_a_bf16_tower_are_fp32():
    model, images = classifier(MarginGate(0.5))
    prediction = model.bfloat16()(images.bfloat16())
    assert prediction.scores.dtype == torch.float32
    torch.testing.assert_close(prediction.scores.sum(1), torch.ones(PICTURES))
