"""DynamicViT against its equations in loops over tokens, with dropped tokens really removed."""

import math

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from common.flops import count_macs
from common.tower import ImageTower
from patchrank.dynamicvit import (
    DynamicViTTower,
    gumbel_draw,
    masked_attention,
    ratio_loss,
    token_loss,
)
from patchrank.dynamicvit_training import DynamicViTTraining
from patchrank.reducers.dynamicvit import KeepPredictor, keep_predictors, stage_counts
from tests.patchrank.short_runs import Pictures, fit, moved

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 2, "embed_dim": 16}
PATCHES = 16


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).double().eval()


@pytest.fixture
def dynamic(tower):
    """A tower whose untrained modules tell tokens apart."""
    made = DynamicViTTower(tower, keep=0.7).double()
    with torch.no_grad():
        for weight in made.predictors.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made.eval()


def images(count=3):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def highest(counts):
    """Draws that keep the highest log-probabilities among the tokens that are there, ``counts`` of them in turn."""
    left, there = list(counts), []

    def draw(log_probabilities):
        scores = log_probabilities[..., 0]
        for kept in there:
            scores = scores.masked_fill(kept == 0, -torch.inf)
        places = scores.argsort(1, descending=True)[:, : left.pop(0)]
        there.append(torch.zeros_like(scores).scatter(1, places, 1.0))
        return there[-1]

    return draw


@torch.no_grad()
def test_a_module_reads_each_token_beside_the_mean_of_those_that_are_left():
    torch.manual_seed(0)
    module = KeepPredictor(8).double()
    x, alive = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).double()
    scores = module(x, alive)
    for row in range(2):
        u = [F.gelu(module.enter(F.layer_norm(token, (8,)))) for token in x[row]]
        there = [place for place in range(5) if alive[row, place]]
        mean = sum(u[place][4:] for place in there) / len(there)
        for place in range(5):
            hidden = torch.cat([u[place][:4], mean])
            for linear in (module.to_half, module.to_quarter):
                hidden = F.gelu(linear(hidden))
            keep, drop = module.to_scores(hidden).tolist()
            total = math.log(math.exp(keep) + math.exp(drop))
            assert scores[row, place].tolist() == pytest.approx([keep - total, drop - total])
    torch.testing.assert_close(module(x[1:]), scores[1:])
    torch.testing.assert_close(module(x[:1, [0, 1, 3]]), scores[:1, [0, 1, 3]])


@torch.no_grad()
def test_tokens_do_not_tie_in_half_precision():
    """A module at its start gives nearly equal scores: in bf16 all would be one, and the picture's first rows stay."""
    torch.manual_seed(0)
    module, x = KeepPredictor(64), torch.randn(8, 36, 64)
    exact = module(x)[..., 0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)[..., 0]
    half = module.bfloat16()(x.bfloat16())[..., 0]
    for scores in (mixed, half):
        assert scores.dtype == torch.float32
        for row, known in zip(scores, exact, strict=True):
            assert len(row.unique()) > 30
            assert torch.corrcoef(torch.stack([row, known]))[0, 1] > 0.9


def test_masked_attention_is_its_equation():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, generator=generator)
    alive = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    result = masked_attention(query, key, value, alive)
    for head in range(2):
        for i in range(5):
            seen = [1.0 if j == i else alive[0, j].item() for j in range(5)]
            products = [float(query[0, head, i] @ key[0, head, j]) / 2 for j in range(5)]
            terms = [math.exp(product) * mask for product, mask in zip(products, seen, strict=True)]
            expected = sum(term / sum(terms) * value[0, head, j] for j, term in enumerate(terms))
            torch.testing.assert_close(result[0, head, i], expected)


@torch.no_grad()
def test_masking_a_token_equals_removing_it(dynamic, tower):
    """Kept tokens come out as from the tower without the dropped ones; stages are before blocks 1, 2 and 3."""
    kept = [torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(seed)) < 0.7 for seed in range(3)]
    draws = iter([mask.double() for mask in kept])
    masked = dynamic.masked(images(2), lambda _: next(draws))
    for row in range(2):
        x, there = tower.embed(images()[row : row + 1]), list(range(PATCHES))
        for number, block in enumerate(tower.transformer.resblocks):
            if number:
                stays = [j for j, place in enumerate(there) if kept[number - 1][row, place]]
                x, there = x[:, [0] + [1 + j for j in stays]], [there[j] for j in stays]
            x = block(x)
        torch.testing.assert_close(masked.z[row], tower.pool(x)[0])
        torch.testing.assert_close(masked.patches[row, there], tower.ln_post(x)[0, 1:])
        assert masked.kept[-1, row].nonzero().flatten().tolist() == there


@torch.no_grad()
def test_inference_removes_what_the_highest_scores_would_mask(dynamic):
    masked = dynamic.masked(images(), highest(stage_counts(0.7, 3, PATCHES)))
    assert masked.kept.sum(-1).tolist() == [[11.0] * 3, [7.0] * 3, [5.0] * 3]
    torch.testing.assert_close(dynamic(images()), masked.z)


def test_the_counts_are_the_released_ones():
    assert stage_counts(0.7, 3, 196) == [137, 96, 67] and stage_counts(1.0, 3, 196) == [196] * 3
    assert stage_counts(0.1, 3, 16) == [1, 1, 1]
    with pytest.raises(ValueError, match=r"keep 0 is not in \(0, 1\]"):
        stage_counts(0, 3, 196)


def test_the_stages_stand_at_the_published_places():
    assert list(keep_predictors(8, 12)) == ["3", "6", "9"]
    assert list(keep_predictors(8, 24)) == ["6", "12", "18"] and list(keep_predictors(8, 4)) == ["1", "2", "3"]
    assert list(keep_predictors(8, 2)) == ["0", "1"]
    with pytest.raises(ValueError, match="halves the width twice; 6 is no multiple of 4"):
        KeepPredictor(6)


def test_draws_follow_the_probabilities_and_pass_the_gradient():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 2.0]).repeat(4000, 1)[None].requires_grad_()
    drawn = gumbel_draw(logits.log_softmax(-1))
    assert set(drawn.tolist()[0]) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(1 / (1 + math.exp(2)), abs=0.02)
    drawn.sum().backward()
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1] < 0).all()


def test_the_ratio_loss_by_hand():
    kept = torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]]]).double()  # 2 stages of 2 images
    expected = ((0.8 - 0.75) ** 2 + (0.8 - 0.5) ** 2 + (0.64 - 0.25) ** 2 + (0.64 - 0.5) ** 2) / 4
    assert ratio_loss(kept, 0.8).item() == pytest.approx(expected)


def test_the_token_loss_counts_kept_tokens_alone():
    patches, target = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[1, 0, 1], [0, 0, 1]]).double()
    squares = [float((patches[i, j] - target[i, j]).square().sum()) / 4 for i, j in ((0, 0), (0, 2), (1, 2))]
    assert token_loss(patches, target, kept).item() == pytest.approx(sum(squares) / 3)
    assert token_loss(patches, target, torch.zeros(2, 3)) == 0


def test_the_choice_of_tokens_learns_from_the_embedding_and_from_the_ratio(dynamic):
    for loss in (lambda result: result.z.square().sum(), lambda result: ratio_loss(result.kept, 0.5)):
        dynamic.zero_grad()
        torch.manual_seed(0)
        loss(dynamic.masked(images())).backward()
        for module in dynamic.predictors.values():
            assert module.enter.weight.grad.isfinite().all() and module.enter.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_at_keep_one_it_equals_the_tower(dynamic, tower):
    whole = dynamic.at(1.0)
    torch.testing.assert_close(whole(images()), tower(images()), atol=0, rtol=0)
    torch.testing.assert_close(
        whole.masked(images(), lambda scores: torch.ones_like(scores[..., 0])).z, tower(images())
    )
    torch.testing.assert_close(whole.at(0.7)(images()), dynamic(images()), atol=0, rtol=0)
    assert count_macs(whole, images(1)).gmacs == count_macs(tower, images(1)).gmacs


def test_saved_and_loaded_it_is_the_same(tmp_path):
    clip = CLIP.tiny()
    made = DynamicViTTower(clip.image_tower, keep=0.6)
    made.save(tmp_path / "dynamicvit.safetensors", clip.architecture)
    loaded = DynamicViTTower.load(tmp_path / "dynamicvit.safetensors")
    assert loaded.keep == 0.6
    torch.testing.assert_close(loaded(images().float()), made(images().float()), atol=0, rtol=0)
    clip.save(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="does not describe a DynamicViTTower"):
        DynamicViTTower.load(tmp_path / "clip.safetensors")


def test_a_short_run_trains_tower_and_modules_and_no_teacher(start):
    module = DynamicViTTraining(**start, keep=0.5, warmup_steps=1, learning_rate=1e-4)
    trainer, before = fit(module)
    assert moved(module, before) == {f"model.{name}" for name in module.model.state_dict()}
    assert {"train_cosine", "train_kept", "train_tokens", "train_ratio", "val_cosine"} <= set(trainer.callback_metrics)
    tower, _ = module.deployable()
    assert tower.run(Pictures().images())[0].shape[1] == 1 + 4


def test_training_brings_the_share_of_kept_tokens_to_the_rate(start):
    """By the ratio loss alone, from the half that untrained modules keep."""
    module = DynamicViTTraining(
        **start, keep=0.9, token_weight=0, ratio_weight=50, warmup_steps=1, learning_rate=1e-4, predictor_factor=50
    )
    fit(module, steps=40)
    torch.manual_seed(0)
    with torch.no_grad():
        shares = module.model.masked(Pictures().images()).kept.mean((1, 2))
    assert shares.tolist() == pytest.approx([0.9, 0.81], abs=0.1)


def test_settings_that_cannot_train_are_refused(start):
    with pytest.raises(ValueError, match="ratio_weight -1 is negative"):
        DynamicViTTraining(**start, ratio_weight=-1)
    with pytest.raises(ValueError, match="predictor_factor 0 is not positive"):
        DynamicViTTraining(**start, predictor_factor=0)
    with pytest.raises(ValueError, match=r"keep 1\.5 is not in \(0, 1\]"):
        DynamicViTTraining(**start, keep=1.5)
