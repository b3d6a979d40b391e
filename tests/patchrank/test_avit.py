"""A-ViT against its formulas, token by token, with halted tokens really left out."""

import math

import lightning
import pytest
import torch
from torch import nn

from common.clip import CLIP
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.flops import count_macs
from common.testing import tiny_architecture
from common.tower import ImageTower
from patchrank.avit import AViTTower, Halting, distribution_loss, distribution_target, ponder_loss
from patchrank.avit_training import AViTTraining

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 2, "embed_dim": 16}
EPSILON = 0.01


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).double().eval()


def images(count=3):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slow(tower, picture, scale, shift):
    """One picture [3,S,S] -> z [E], tokens in each block, p and h by token and block, n + r by token."""
    x, blocks = tower.embed(picture[None])[0], tower.transformer.resblocks
    tokens = list(range(len(x)))
    p, n, output, counts = [[0.0] * len(blocks) for _ in tokens], [0] * len(x), 0, []
    scores = [[0.0] * len(blocks) for _ in tokens]
    alive = tokens
    for layer, block in enumerate(blocks):
        counts.append(len(alive))
        if not alive:
            continue
        x = x.clone()
        x[alive] = block(x[alive][None])[0]  # only those that have not halted
        halted = []
        for token in alive:
            n[token] += 1
            score = 1 / (1 + math.exp(-(scale * x[token, 0].item() + shift)))
            p[token][layer] = scores[token][layer] = score
            if layer == len(blocks) - 1 or sum(p[token]) >= 1 - EPSILON:
                halted.append(token)
        for token in halted:
            p[token][layer] = 1 - sum(p[token][:layer])
        output = output + p[0][layer] * x[0]
        alive = [token for token in alive if token not in halted]
    remainders = [p[token][n[token] - 1] for token in tokens]
    z = tower.pool(output[None, None])[0]
    return z, counts, p, scores, [a + b for a, b in zip(n, remainders, strict=True)]


@pytest.mark.parametrize(("scale", "shift"), [(1.0, -1.0), (3.0, -2.0), (0.5, 3.0), (5.0, -10.0)])
@torch.no_grad()
def test_equals_the_formulas_with_halted_tokens_left_out(tower, scale, shift):
    halting = AViTTower(tower, scale, shift).run(images())
    for row, picture in enumerate(images()):
        z, counts, p, scores, ponder = slow(tower, picture, scale, shift)
        torch.testing.assert_close(halting.z[row], z)
        assert halting.active[:, row].sum(-1).tolist() == counts
        torch.testing.assert_close(halting.probability[:, row].T, torch.tensor(p).double())
        torch.testing.assert_close(halting.score[:, row].T, torch.tensor(scores).double())
        torch.testing.assert_close(halting.ponder[row], torch.tensor(ponder).double())
    torch.testing.assert_close(halting.probability.sum(0), torch.ones(3, 17).double())


@torch.no_grad()
def test_pictures_halt_by_themselves(tower):
    avit = AViTTower(tower, 3.0, -2.0)
    together = avit.run(images())
    assert len(together.depth.unique()) > 1
    for row in range(3):
        alone = avit.run(images()[row : row + 1])
        torch.testing.assert_close(alone.z[0], together.z[row])
        assert torch.equal(alone.active[:, 0], together.active[:, row])


@torch.no_grad()
def test_a_shift_that_lets_no_token_halt_equals_the_tower(tower):
    avit = AViTTower(tower, shift=-math.inf)
    torch.testing.assert_close(avit(images()), tower(images()))
    assert avit.run(images()).depth.tolist() == [4.0] * 3


@torch.no_grad()
def test_one_that_halts_all_tokens_at_once_reads_the_first_block(tower):
    avit = AViTTower(tower, shift=math.inf)
    x = tower.run_blocks(tower.embed(images()), stop=1)
    torch.testing.assert_close(avit(images()), tower.pool(x))
    assert ponder_loss(avit.run(images())) == 2  # one block, and a remainder of one


def test_saved_macs_are_those_of_blocks_on_fewer_tokens():
    torch.manual_seed(0)
    tower = ImageTower(**TOWER)
    active = torch.zeros(4, 2, 17, dtype=torch.bool)
    for layer, counts in enumerate([(17, 17), (17, 9), (17, 5), (17, 0)]):
        for row, count in enumerate(counts):
            active[layer, row, :count] = True
    saved, saved_paper = AViTTower(tower).saved_macs(active)
    block = tower.transformer.resblocks[0]
    whole = count_macs(block, torch.randn(1, 17, 64))
    parts = [count_macs(block, torch.randn(1, count, 64)) for count in (9, 5)]
    assert saved[0] == saved_paper[0] == 0
    assert round(saved[1].item()) == round(1e9 * (3 * whole.gmacs - sum(part.gmacs for part in parts)))
    expected = 3 * whole.gmacs_paper - sum(part.gmacs_paper for part in parts)
    assert round(saved_paper[1].item()) == round(1e9 * expected)


def test_masking_is_counted_in_full():
    torch.manual_seed(0)
    tower, picture = ImageTower(**TOWER), torch.randn(1, 3, 32, 32)
    read_out = 5 * 64 * 16  # the dense tower norms its 16 patches too before it reads the class token
    dense = 1e9 * count_macs(tower, picture).gmacs
    assert round(1e9 * count_macs(AViTTower(tower), picture).gmacs) == round(dense) - read_out


def test_the_released_target_of_twelve_blocks():
    """A Gaussian of mean 8 and deviation 1 at 0 to 11, whose first eight values sum to .98."""
    density = [math.exp(-0.5 * (place - 8) ** 2) / math.sqrt(2 * math.pi) for place in range(12)]
    expected = [0.98 / sum(density[:8]) * value for value in density]
    torch.testing.assert_close(distribution_target(12, 8), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("depth", [1.0, 8.0, 16.8, 24.0])
def test_the_distribution_loss_is_finite_in_a_deep_tower(depth):
    halting = Halting(*torch.zeros(4, 1), torch.full((24, 2, 5), 0.04))
    assert distribution_loss(halting, depth).isfinite()


def test_the_distribution_loss_by_hand():
    """Mean scores of two pictures of three tokens over four blocks, of which the last is clamped to .01."""
    scores = torch.rand(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[3] = 1e-6
    halting = Halting(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1), scores)
    means = [float(sum(scores[block].flatten())) / 6 for block in range(4)]
    shares = [min(max(mean / sum(means), 0.01), 0.99) for mean in means]
    target = distribution_target(4, 2.0).tolist()
    expected = sum(t * (math.log(t) - math.log(h)) for t, h in zip(target, shares, strict=True)) / 4
    assert distribution_loss(halting, 2.0).item() == pytest.approx(expected)


@torch.no_grad()
def test_other_tokens_go_on_after_the_class_token_has_halted(tower):
    """As released; the output is then decided, and the rest is only cost."""
    tower.class_embedding[0] = 50.0  # the first channel, so that this token halts in the first block
    active = AViTTower(tower, 3.0, -2.0).run(images()).active
    assert not active[1, :, 0].any() and active[1, :, 1:].any(1).all()


def test_both_losses_teach_the_scores(tower):
    avit = AViTTower(tower, 3.0, -2.0)
    for loss in (ponder_loss, lambda halting: distribution_loss(halting, 2.0)):
        avit.zero_grad()
        loss(avit.run(images())).backward()
        gradient = avit.tower.transformer.resblocks[0].mlp.c_proj.weight.grad
        assert gradient.isfinite().all() and gradient[0].abs().sum() > 0  # the first channel's row


def test_the_original_tower_is_left_alone(tower):
    avit = AViTTower(tower)
    nn.init.zeros_(avit.tower.proj)
    assert tower.proj.abs().sum() > 0


def test_saved_and_loaded_it_is_the_same(tmp_path):
    clip = CLIP.tiny()
    avit = AViTTower(clip.image_tower, 2.0, -1.0, 0.05)
    avit.save(tmp_path / "avit.safetensors", clip.architecture)
    loaded = AViTTower.load(tmp_path / "avit.safetensors")
    assert (loaded.scale, loaded.shift, loaded.epsilon) == (2.0, -1.0, 0.05)
    torch.testing.assert_close(loaded(images().float()), avit(images().float()), atol=0, rtol=0)
    clip.save(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="does not describe an AViTTower"):
        AViTTower.load(tmp_path / "clip.safetensors")


def test_epsilon_is_a_share(tower):
    with pytest.raises(ValueError, match=r"epsilon 0\.0 is not in"):
        AViTTower(tower, epsilon=0.0)


def test_a_short_run_trains_all_but_the_teacher(tmp_path):
    architecture = tiny_architecture(tmp_path)
    shards = write_shards(tmp_path / "shards", shards=2, samples=8)
    data = ShardDataModule(
        shards, shards, architecture=architecture, batch_size=4, num_workers=0, train_num_samples=16, captions=False
    )
    torch.manual_seed(0)
    module = AViTTraining(
        architecture=architecture, depth=1.5, warmup_steps=1, learning_rate=1e-3, distribution_weight=1.0
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_steps=4, max_epochs=-1, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(module, data)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.{name}" for name in module.model.state_dict()}
    assert {"train_cosine", "train_depth", "train_distribution", "train_ponder", "val_depth"} <= set(
        trainer.callback_metrics
    )


def test_a_depth_beyond_the_tower_is_refused(tmp_path):
    with pytest.raises(ValueError, match="depth 3 is not between 1 and this tower's 2 blocks"):
        AViTTraining(architecture=tiny_architecture(tmp_path), depth=3)
    with pytest.raises(ValueError, match="ponder_weight -1 is negative"):
        AViTTraining(architecture=tiny_architecture(tmp_path), depth=2, ponder_weight=-1)
