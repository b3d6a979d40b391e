"""The one form of token reducers: no reducer equals the tower, selection and class attention equal slow formulas."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.attention import KVCache
from common.flops import count_macs
from common.reduction import ReducedTower, ReductionContext, run_reduced
from common.tower import ImageTower

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_dim": 16}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).double().eval()


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def keep_first(count):
    def reducer(x, context):
        return context.select(x, torch.arange(count).expand(len(x), -1))

    return reducer


@torch.no_grad()
def test_a_tower_without_reducers_equals_the_tower(tower):
    pictures = images()
    torch.testing.assert_close(ReducedTower(tower, {})(pictures), tower(pictures))


@pytest.mark.parametrize("place", [0, 1, 2, (0, "middle"), (2, "middle")])
@torch.no_grad()
def test_keeping_every_token_in_its_order_changes_nothing(tower, place):
    pictures = images()
    reduced = ReducedTower(tower, {place: keep_first(16)})
    torch.testing.assert_close(reduced(pictures), tower(pictures))


@torch.no_grad()
def test_a_reducer_before_a_block_gathers_what_enters_it(tower):
    pictures, kept = images(), torch.tensor([[3, 0, 9], [15, 2, 2]])
    x = tower.run_blocks(tower.embed(pictures), stop=1)
    rows = torch.arange(2)[:, None]
    expected = torch.cat([x[:, :1], x[rows, 1 + kept]], dim=1)
    reduced = ReducedTower(tower, {1: lambda x, context: context.select(x, kept)})
    torch.testing.assert_close(reduced(pictures), tower.pool(tower.run_blocks(expected, start=1)))
    assert torch.equal(reduced.run(pictures)[1].positions, kept)


@torch.no_grad()
def test_positions_follow_two_reducers(tower):
    reduced = ReducedTower(
        tower,
        {
            0: lambda x, context: context.select(x, torch.tensor([[4, 8, 12]])),
            (1, "middle"): lambda x, context: context.select(x, torch.tensor([[2, 0]])),
        },
    )
    x, context = reduced.run(images(1))
    assert x.shape == (1, 3, 64) and context.positions.tolist() == [[12, 4]]


@pytest.mark.parametrize("place", [1, (1, "middle")])
@torch.no_grad()
def test_class_attention_equals_the_softmax_row_of_that_block(tower, place):
    pictures, seen = images(), []

    def look(x, context):
        seen.append(context.class_attention())
        return x, context

    ReducedTower(tower, {place: look})(pictures)
    block = tower.transformer.resblocks[1]
    entered = block.ln_1(tower.run_blocks(tower.embed(pictures), stop=1))
    query, key, _ = (
        part.unflatten(-1, (2, 32)).transpose(1, 2)
        for part in F.linear(entered, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    )
    full = (query @ key.transpose(-1, -2) / 32**0.5).softmax(-1)
    torch.testing.assert_close(seen[0], full[:, :, 0, 1:].mean(1))


@torch.no_grad()
def test_class_attention_sees_the_bias_that_attention_sees(tower):
    x, block = torch.randn(1, 17, 64, dtype=torch.float64), tower.transformer.resblocks[0]
    bias = torch.zeros(1, 1, 1, 17, dtype=torch.float64)
    bias[..., 5] = -torch.inf
    context = ReductionContext(torch.arange(16)[None], bias=bias, block=block, entered=x)
    attention = context.class_attention()
    assert attention[0, 4] == 0 and (attention > 0).sum() == 15


@torch.no_grad()
def test_keys_are_there_only_between_the_half_steps(tower):
    result = {}

    def look(place):
        def reducer(x, context):
            result[place] = context.keys
            return x, context

        return reducer

    ReducedTower(tower, {1: look("before"), (1, "middle"): look("middle")})(images())
    assert result["before"] is None and result["middle"].shape == (2, 2, 17, 32)


@torch.no_grad()
def test_prompts_at_the_end_and_the_class_token_are_exempt():
    x = torch.arange(6.0).reshape(1, 6, 1)  # class token, three patches, two prompts
    bias = torch.arange(6.0).reshape(1, 1, 1, 6)
    context = ReductionContext(torch.arange(3)[None], sizes=torch.tensor([[1.0, 2.0, 3.0]]), trailing=2, bias=bias)
    y, context = context.select(x, torch.tensor([[2, 1]]))
    assert y.flatten().tolist() == [0, 3, 2, 4, 5] == context.bias.flatten().tolist()
    assert context.sizes.tolist() == [[3.0, 2.0]] and context.patches(y).flatten().tolist() == [3, 2]


@torch.no_grad()
def test_a_bias_from_a_reducer_reaches_the_later_blocks(tower):
    """A token that no other may see is as good as pruned."""
    pictures = images()

    def hide_last(x, context):
        bias = torch.zeros(len(x), 1, 1, x.shape[1], dtype=x.dtype)
        bias[..., -1] = -torch.inf
        return x, replace(context, bias=bias)

    hidden, pruned = ReducedTower(tower, {1: hide_last}), ReducedTower(tower, {1: keep_first(15)})
    torch.testing.assert_close(hidden(pictures), pruned(pictures))


def test_class_attention_costs_what_its_docstring_says():
    torch.manual_seed(0)
    tower = ImageTower(**TOWER).eval()

    def look(x, context):
        return x + 0 * context.class_attention().sum(), context

    picture = torch.randn(1, 3, 32, 32)
    extra = count_macs(ReducedTower(tower, {1: look}), picture).gmacs - count_macs(tower, picture).gmacs
    width, heads, tokens = 64, 2, 17
    norm = 5 * tokens * width
    assert round(extra * 1e9) == tokens * width * heads + 2 * width**2 + norm


def test_reducers_that_are_modules_are_trained_and_saved_with_the_tower(tower):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x, context):
            return x * self.gain, context

    reducer = Scale()
    assert any(parameter is reducer.gain for parameter in ReducedTower(tower, {0: reducer}).parameters())


@pytest.mark.parametrize("place", [3, -1, (0, "end"), (3, "middle")])
def test_an_unknown_place_is_an_error_that_names_the_places(tower, place):
    with pytest.raises(ValueError, match="from 0 to 2"):
        ReducedTower(tower, {place: keep_first(4)})


@pytest.mark.parametrize("place", [1, (1, "middle")])
@torch.no_grad()
def test_class_attention_beside_a_cache_is_the_row_over_cached_and_own_tokens(tower, place):
    """The second half of the tokens, over a cache of the first, attends as in one pass under a block-causal mask."""
    torch.nn.init.normal_(tower.transformer.resblocks[1].attn.in_proj_bias)
    x = torch.randn(2, 14, 64, dtype=torch.float64)
    first, second, seen, cache = x[:, :6], x[:, 6:], [], KVCache()
    tower.run_blocks(first, cache=cache)

    def look(x, context):
        seen.append(context.class_attention())
        return x, context

    context = ReductionContext(torch.arange(7).expand(2, -1))
    result, _ = run_reduced(tower.transformer.resblocks, second, context, {place: look}, cache=cache)
    step = torch.arange(14) >= 6
    mask = step[:, None] >= step[None, :]
    torch.testing.assert_close(result, tower.run_blocks(x, mask=mask)[:, 6:])
    assert cache.tokens == 14
    block = tower.transformer.resblocks[1]
    entered = block.ln_1(tower.run_blocks(x, stop=1, mask=mask))
    query, key, _ = (
        part.unflatten(-1, (2, 32)).transpose(1, 2)
        for part in F.linear(entered, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    )
    row = (query[:, :, 6:7] @ key.transpose(-1, -2) / 32**0.5).softmax(-1)
    torch.testing.assert_close(seen[0], row[:, :, 0, 7:].mean(1))


@torch.no_grad()
def test_keys_beside_a_cache_are_those_of_the_own_tokens(tower):
    x, cache, result = torch.randn(2, 14, 64, dtype=torch.float64), KVCache(), []
    tower.run_blocks(x[:, :6], cache=cache)

    def look(x, context):
        result.append((context.keys.shape, context.past.shape))
        return x, context

    context = ReductionContext(torch.arange(7).expand(2, -1))
    run_reduced(tower.transformer.resblocks, x[:, 6:], context, {(0, "middle"): look}, cache=cache)
    assert result == [((2, 2, 8, 32), (2, 2, 6, 32))]


@torch.no_grad()
def test_a_bias_hides_own_tokens_and_no_cached_ones(tower):
    x = torch.randn(1, 14, 64, dtype=torch.float64)

    def hide_last(x, context):
        bias = torch.zeros(1, 1, 1, x.shape[1], dtype=x.dtype)
        bias[..., -1] = -torch.inf
        return x, replace(context, bias=bias)

    def drop_last(x, context):
        return context.select(x, torch.arange(6)[None])

    results = []
    for reducer in (hide_last, drop_last):
        cache = KVCache()
        tower.run_blocks(x[:, :6], cache=cache)
        context = ReductionContext(torch.arange(7)[None])
        y, _ = run_reduced(tower.transformer.resblocks, x[:, 6:], context, {1: reducer}, cache=cache)
        results.append(y[:, :7])
    torch.testing.assert_close(*results)
