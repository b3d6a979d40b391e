"""A-CLIP: its masks by loops over cells, and each term on pictures whose masked patches are really not there."""

import math

import lightning
import pytest
import torch
from torch.nn import functional as F

from common.checkpoints import restore
from common.contrastive import info_nce
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.self_supervision import simclr
from common.testing import tiny_architecture
from patchrank.aclip import ACLIPPretraining, attentive_places, follow, momentum_at
from tests.patchrank.pairs import caption, pairs
from tests.patchrank.short_runs import QUIET, moved


@pytest.fixture
def make(tmp_path):
    """Makes a training of the tiny CLIP, of 4 x 4 patches, with small heads."""
    architecture = tiny_architecture(tmp_path)

    def build(**options):
        torch.manual_seed(0)
        return ACLIPPretraining(architecture, warmup_steps=1, hidden_width=12, projection_width=6, **options)

    return build


def slow_places(attention, grid, count):
    """The patches of the ``count`` best cells of one picture's attention, a list of g² numbers."""
    side = grid // 2
    means = {
        (row, column): sum(attention[(2 * row + i) * grid + 2 * column + j] for i in (0, 1) for j in (0, 1)) / 4
        for row in range(side)
        for column in range(side)
    }
    best = sorted(means, key=lambda cell: -means[cell])[:count]
    return sorted((2 * row + i) * grid + 2 * column + j for row, column in best for i in (0, 1) for j in (0, 1))


@pytest.mark.parametrize(("grid", "keep", "cells"), [(14, 0.5, 25), (6, 0.5, 5), (4, 0.3, 2), (4, 1.0, 4)])
def test_the_most_attended_cells_stay(grid, keep, cells):
    """One more than the share, as released: 25 of 49, so 100 of 196 patches."""
    attention = torch.rand(3, grid**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = attentive_places(attention, keep).tolist()
    assert places == [slow_places(row, grid, cells) for row in attention.tolist()]


def test_an_odd_grid_has_no_cells():
    with pytest.raises(ValueError, match="a grid of 7 patches a side has no cells of two by two"):
        attentive_places(torch.rand(1, 49), 0.5)


def test_the_momentum_grows_from_its_start_to_one():
    assert momentum_at(0, 100, 0.996) == pytest.approx(0.996) and momentum_at(100, 100, 0.996) == 1
    assert momentum_at(50, 100, 0.996) == pytest.approx(0.998) and momentum_at(200, 100, 0.996) == 1


def test_the_slow_copy_moves_a_little():
    slow, fast = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * slow.weight.detach() + 0.1 * fast.weight.detach()
    follow(slow, fast, 0.9)
    torch.testing.assert_close(slow.weight.detach(), expected)


def attention_map(tower, picture):
    """The class token's attention [K], mean over all blocks and heads, of whole attention matrices."""
    x, rows = tower.embed(picture[None]), []
    for block in tower.transformer.resblocks:
        query, key, _ = (
            block.attn.project(block.ln_1(x))[0].unflatten(-1, (3, block.attn.heads, -1)).permute(1, 2, 0, 3)
        )
        rows.append((query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)[:, 0, 1:].mean(0))
        x = block(x)
    return sum(rows) / len(rows), tower.ln_post(x)[0, 0]


@torch.no_grad()
def test_each_term_of_a_batch(make):
    module, batch = make(keep=0.5), pairs(2)
    for weight in module.slow_tower.parameters():
        weight.add_(0.1 * torch.randn_like(weight))  # it is no longer the tower
    terms, tower = module.losses(batch), module.clip.image_tower
    features, targets = [], []
    for view in batch["image_views"]:
        rows, wholes = [], []
        for picture in view:
            attention, whole = attention_map(module.slow_tower, picture)
            places = slow_places(attention.tolist(), 4, 3)
            x = tower.run_blocks(tower.embed(picture[None])[:, [0] + [1 + place for place in places]])
            rows.append(tower.ln_post(x)[0, 0])
            wholes.append(whole)
        features.append(torch.stack(rows))
        targets.append(module.slow_head(torch.stack(wholes)))
    text, scale = module.clip.encode_text(batch["text"]), module.clip.logit_scale.exp()
    clip = [info_nce(F.normalize(feature @ tower.proj, dim=-1), text, scale) for feature in features]
    torch.testing.assert_close(terms["clip"], (clip[0] + clip[1]) / 2)
    torch.testing.assert_close(terms["simclr"], simclr(*(module.simclr_head(feature) for feature in features), 0.1))
    byol = 0.0
    for feature, target in zip(features, reversed(targets), strict=True):
        prediction = F.normalize(module.byol_prediction(module.byol_head(feature)), dim=-1)
        byol += (2 - 2 * (prediction * F.normalize(target, dim=-1)).sum(-1)).mean() / 2
    torch.testing.assert_close(terms["byol"], byol)
    torch.testing.assert_close(module.loss(batch), terms["clip"] + terms["simclr"] + 2 * terms["byol"])


@torch.no_grad()
def test_a_pictures_map_does_not_depend_on_its_batch(make):
    module, view = make(), pairs(1)["image_views"][0]
    together, _ = module.observe(view)
    torch.testing.assert_close(module.observe(view[:2])[0], together[:2])


def test_a_short_run_trains_all_but_the_patch_embedding_and_the_copy_follows(make, tmp_path):
    shards = write_shards(tmp_path / "shards", shards=2, samples=8, txt=caption)
    data = ShardDataModule(
        shards, shards, architecture=str(tmp_path / "tiny.json"), batch_size=4, num_workers=0, train_num_samples=16,
        image_views=["aclip", "aclip"],
    )  # fmt: skip
    module = make(learning_rate=1e-3, momentum=0.9)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = lightning.Trainer(max_steps=4, max_epochs=-1, limit_val_batches=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    still = {name for name in before if name.endswith("tower.conv1.weight")}
    assert len(still) == 2 and moved(module, before) == set(before) - still
    assert {"train_clip", "train_simclr", "train_byol", "val_loss"} <= set(trainer.callback_metrics)
    assert not any(weight.requires_grad for weight in module.slow_tower.parameters())
    far = (module.slow_tower.proj - module.clip.image_tower.proj).norm()
    assert 0 < far < (module.clip.image_tower.proj - before["clip.image_tower.proj"]).norm()


def test_what_it_cannot_train_on_is_refused(make):
    with pytest.raises(
        ValueError, match=r"A-CLIP reads 2 further views .* set the data's image_views: \[aclip, aclip\]"
    ):
        make().losses(pairs())
    with pytest.raises(ValueError, match=r"momentum 1 is not in \[0, 1\)"):
        make(momentum=1)
    with pytest.raises(ValueError, match=r"keep 0 is not in \(0, 1\]"):
        make(keep=0)
    with pytest.raises(ValueError, match=r"temperature 0 is not positive; the released one is 0\.1"):
        make(temperature=0)
    for name in ("simclr_weight", "byol_weight"):
        with pytest.raises(ValueError, match=f"{name} -1 is negative; 0 takes the term out"):
            make(**{name: -1})


def test_it_starts_from_weights_that_record_no_activation(make, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(make().clip.state_dict(), weights)
    with pytest.raises(ValueError, match="quick_gelu"):
        make(weights=str(weights), preprocess="clip")
    assert make(weights=str(weights), preprocess="clip", quick_gelu=True).clip.quick_gelu


def test_a_checkpoint_is_whole_without_the_file_that_it_started_from(make, tmp_path):
    weights = tmp_path / "weights.safetensors"
    make().clip.save(weights)
    module = make(weights=str(weights))
    checkpoint = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    weights.unlink()
    again = restore(ACLIPPretraining, checkpoint)
    assert torch.equal(again.clip.image_tower.proj, module.clip.image_tower.proj)
