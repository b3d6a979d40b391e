"""Towers against open_clip's with the same weights, and runs over the cache against one masked run."""

import open_clip
import pytest
import torch
from torch.nn import functional as F

from common.attention import KVCache, fused_attention
from common.clip import CLIP, load_architecture
from common.tower import ImageTower, TextTower
from tests.common.towers import undrawn

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_dim": 16}
GROUPS = [(17,), (5, 12), (5, 4, 8), (1, 1, 15)]


def shake(module):
    """Give gains and biases values that matter, so that a misplaced one shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn(parameter.shape))


def random_open_clip(architecture):
    """An open_clip model whose weights are parts of one noise: to draw 428 million takes longer than to use them."""
    theirs = undrawn(lambda: open_clip.CLIP(**architecture))
    length = architecture["text_cfg"]["context_length"]
    theirs.attn_mask = torch.full((length, length), -torch.inf).triu(1)
    noise = 0.02 * torch.randn(1_000_003)  # a prime, so that no two rows of a matrix are alike
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            values = noise.roll(int(torch.randint(len(noise), ())))
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(values[: len(part)])
            if "ln_" in key and key.endswith("weight"):
                parameter.add_(1)
    return theirs


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14"])
@torch.no_grad()
def test_embeddings_equal_open_clips(name, monkeypatch):
    torch.manual_seed(0)
    architecture = load_architecture(name)
    theirs = random_open_clip(architecture)
    for initialisation in ("normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, initialisation, lambda tensor, *_, **__: tensor)
    ours = CLIP(architecture).eval()
    ours.load_weights(theirs.state_dict())
    images, ids = torch.randn(1, 3, 224, 224), ours.tokenizer(["a photo of two owls on a wire"])
    same = {"atol": 1e-5, "rtol": 0}
    for normalize in (True, False):
        image, text = ours.encode_image(images, normalize), ours.encode_text(ids, normalize)
        assert image.isfinite().all() and image.std() > 0.01
        torch.testing.assert_close(image, theirs.encode_image(images, normalize), **same)
        torch.testing.assert_close(text, theirs.encode_text(ids, normalize), **same)


def test_gradients_equal_open_clips():
    torch.manual_seed(0)
    architecture = {
        **CLIP.tiny().architecture,
        "text_cfg": {"width": 64, "heads": 2, "layers": 1, "vocab_size": 9},
    }
    architecture["text_cfg"]["context_length"] = 6
    theirs, ours = open_clip.CLIP(**architecture), CLIP(architecture)
    shake(theirs)
    ours.load_weights(theirs.state_dict())
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[7, 1, 8, 0, 0, 0], [7, 2, 3, 4, 5, 8]])
    for model in (theirs, ours):
        (model.encode_image(images, normalize=True) * model.encode_text(ids, normalize=True)).sum().backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        if key != "logit_scale":
            their_key = key.replace("image_tower.", "visual.").replace("text_tower.", "")
            torch.testing.assert_close(parameter.grad, expected[their_key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_records_gradients_on_a_cpu_computes_in_fp32(autocast, masked):
    mask = torch.randn(37, 37).bfloat16() if masked else None
    inputs = [x.bfloat16().requires_grad_() for x in torch.randn(3, 2, 2, 37, 64)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = fused_attention(*inputs, mask)
    exact = F.scaled_dot_product_attention(*(x.float() for x in inputs), mask.float() if masked else None)
    torch.testing.assert_close(result, exact.bfloat16(), atol=0, rtol=0)
    rounded = F.scaled_dot_product_attention(*inputs, mask)
    assert not torch.equal(rounded, result), "the positive control: the kernel for bf16 rounds otherwise"


@pytest.mark.parametrize("gradients", [False, True])
def test_causal_attention_is_attention_under_a_lower_triangle(gradients):
    query, key, value = torch.randn(3, 2, 2, 37, 64)
    with torch.set_grad_enabled(gradients):
        result = fused_attention(query, key, value, "causal")
        masked = fused_attention(query, key, value, torch.ones(37, 37, dtype=torch.bool).tril())
    torch.testing.assert_close(result, masked, atol=1e-6, rtol=0)


def test_without_gradient_the_result_is_the_same_and_the_input_untouched():
    torch.manual_seed(0)
    tower = ImageTower(**TOWER)
    images = torch.randn(2, 3, 32, 32)
    x = tower.embed(images).detach()
    kept = x.clone()
    expected = tower.pool(tower.run_blocks(x)).detach()
    with torch.no_grad():
        torch.testing.assert_close(tower(images), expected, atol=1e-6, rtol=1e-5)
        tower.run_blocks(x)
        block = tower.transformer.resblocks[0]
        block.attend(x), block.feed_forward(x), block(x), tower.pool(x)
    assert torch.equal(x, kept)


def block_causal(groups):
    """Boolean [N,N]: a token may attend to its own group and the earlier ones."""
    group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    return group[:, None] >= group


def cached_run(tower, x, groups):
    """The blocks group by group over one cache."""
    cache, parts = KVCache(), []
    for part in x.split(groups, dim=1):
        parts.append(tower.run_blocks(part, cache=cache))
    assert cache.tokens == x.shape[1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_a_cached_run_equals_one_masked_run(groups, dtype, tolerance):
    torch.manual_seed(0)
    tower = ImageTower(**TOWER).to(dtype)
    shake(tower)
    x = tower.embed(torch.randn(3, 3, 32, 32, dtype=dtype))
    mask = block_causal(groups)
    masked = tower.run_blocks(x, mask=mask)
    torch.testing.assert_close(cached_run(tower, x, groups), masked, atol=tolerance, rtol=0)
    torch.testing.assert_close(tower.run_blocks(x, mask=tuple(groups)), masked, atol=tolerance, rtol=0)
    additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(tower.run_blocks(x, mask=additive), masked, atol=tolerance, rtol=0)


def test_a_block_causal_pass_has_the_gradients_of_the_masked_one():
    torch.manual_seed(0)
    tower, groups = ImageTower(**TOWER).double(), (5, 12)
    x, weight = torch.randn(3, 17, 64, dtype=torch.float64), torch.randn(3, 17, 64, dtype=torch.float64)
    gradients = []
    for mask in (block_causal(groups), groups):
        entered = x.clone().requires_grad_()
        (tower.run_blocks(entered, mask=mask) * weight).sum().backward()
        gradients.append(entered.grad)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@torch.no_grad()
def test_a_cached_run_in_bf16_points_where_the_masked_one_does(groups):
    torch.manual_seed(0)
    tower = ImageTower(**TOWER).to(torch.bfloat16)
    x = tower.embed(torch.randn(3, 3, 32, 32, dtype=torch.bfloat16))
    masked, cached = tower.run_blocks(x, mask=block_causal(groups)), cached_run(tower, x, groups)
    assert F.cosine_similarity(masked.float(), cached.float(), dim=-1).min() > 0.999
    z, expected = tower.pool(cached), tower.pool(masked)
    assert z.dtype == torch.bfloat16
    assert F.cosine_similarity(z.float(), expected.float(), dim=-1).min() > 0.999


@torch.no_grad()
def test_a_cache_goes_on_with_chosen_rows_and_branches():
    torch.manual_seed(0)
    tower = ImageTower(**TOWER).double()
    first, second, other = (torch.randn(4, tokens, 64, dtype=torch.float64) for tokens in (5, 4, 6))
    cache = KVCache()
    assert cache.tokens == 0
    tower.run_blocks(first, cache=cache)
    rows = torch.tensor([3, 1])
    branches = [
        tower.run_blocks(second[rows], cache=cache.select(rows)),
        tower.run_blocks(second, cache=cache.select())[rows],
        tower.run_blocks(second, cache=cache.select())[rows],  # an older cache stays valid
        cached_run(tower, torch.cat([first, second], dim=1), (5, 4))[rows, 5:],
    ]
    for branch in branches[1:]:
        torch.testing.assert_close(branch, branches[0], atol=1e-12, rtol=0)
    assert cache.tokens == 5
    tower.run_blocks(other, cache=cache)
    assert cache.tokens == 11 and cache.select(rows).tokens == 11
    empty = cache.select(torch.empty(0, dtype=torch.long))
    assert tower.run_blocks(second[:0], cache=empty).shape == (0, 4, 64)


@torch.no_grad()
def test_blocks_run_in_parts():
    torch.manual_seed(0)
    tower = ImageTower(**TOWER).double()
    x = torch.randn(2, 17, 64, dtype=torch.float64)
    by_parts = tower.run_blocks(tower.run_blocks(x, stop=1), start=1)
    by_halves = x
    for layer, block in enumerate(tower.transformer.resblocks):
        by_halves = block.feed_forward(block.attend(by_halves, layer=layer))
    for result in (by_parts, by_halves):
        torch.testing.assert_close(result, tower.run_blocks(x), atol=1e-12, rtol=0)


@torch.no_grad()
def test_text_does_not_look_ahead_and_tokens_end_in_the_embedding():
    torch.manual_seed(0)
    tower = TextTower(8, 20, 64, 2, 2, 16).double()
    ids = torch.tensor([[18, 3, 4, 19, 0, 0, 0, 0], [18, 5, 6, 7, 8, 19, 0, 0]])
    z, tokens = tower(ids, return_tokens=True)
    assert tokens.shape == (2, 8, 16)
    torch.testing.assert_close(z, tokens[torch.arange(2), torch.tensor([3, 5])], atol=1e-12, rtol=0)
    torch.testing.assert_close(tower(ids[:, :6]), z, atol=1e-12, rtol=0)
    changed = ids.clone()
    changed[0, 4:] = torch.tensor([1, 2, 3, 4])  # after end-of-text
    torch.testing.assert_close(tower(changed), z, atol=1e-12, rtol=0)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="image_size 30 is not divisible by patch_size 8; use 24 or 32"):
        ImageTower(**{**TOWER, "image_size": 30})
    with pytest.raises(ValueError, match="width 64 is not divisible by heads 3"):
        ImageTower(**{**TOWER, "heads": 3})
    with pytest.raises(ValueError, match=r"pictures of \(32, 40\) pixels given to a tower for 32"):
        ImageTower(**TOWER)(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="9 text tokens given to a tower of context_length 8"):
        TextTower(8, 20, 64, 1, 2, 16)(torch.zeros(1, 9, dtype=torch.long))
