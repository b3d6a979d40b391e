"""Budgets over tiles against the released formulas, written as loops over one picture's views and tokens."""

import math
from fractions import Fraction

import open_clip
import pytest
import torch

from common.adapters import adapt
from common.flops import count_macs
from common.reducer_registry import named, schedule, setting_for
from common.tiles import TiledTower
from patchrank.reducers import DivPrune
from patchrank.reducers.base import Call
from patchrank.reducers.tiles import apportioned, areas
from tests.patchrank.reducers.slow import PATCHES, TOWER, class_row, projections, slow_attention, small_tower

SIZE, GRID, LAYERS = TOWER["image_size"], 4, TOWER["layers"]
BUDGETS = ("class-attention", "globalcom2", "hired")
each = pytest.mark.parametrize("name", BUDGETS)


@pytest.fixture(scope="module")
def tower():
    built = small_tower()
    with torch.no_grad():
        for parameter in built.parameters():  # biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def pictures(tiles, count=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIZE * tiles, SIZE * tiles, dtype=torch.float64, generator=generator)
    images[:, :, : SIZE // 2] *= 3  # so that tiles differ
    return images


def tiled(tower, name, keep, layer, tiles):
    return TiledTower(tower, SIZE * tiles, schedule(named(name), tower, keep, [layer], tiles)).eval()


def views_of(picture, tiles):
    """The thumbnail and the tiles of one picture [3,mS,mS], row by row."""
    thumbnail = torch.zeros(3, SIZE, SIZE, dtype=picture.dtype)
    for row in range(SIZE):
        for column in range(SIZE):
            cell = picture[:, row * tiles : (row + 1) * tiles, column * tiles : (column + 1) * tiles]
            thumbnail[:, row, column] = cell.mean((1, 2))
    starts = [SIZE * i for i in range(tiles)]
    return [thumbnail] + [picture[:, top : top + SIZE, left : left + SIZE] for top in starts for left in starts]


def shown(place, tile, tiles):
    """The part of a thumbnail's patch that a tile shows, exactly; edges between tiles may run through patches."""
    part = Fraction(1)
    for index, number in zip(divmod(place, GRID), divmod(tile, tiles), strict=True):
        first, last = Fraction(index, GRID), Fraction(index + 1, GRID)
        part *= max(min(last, Fraction(number + 1, tiles)) - max(first, Fraction(number, tiles)), 0) * GRID
    return part


def seats(quotas, total):
    """Webster's method, seat by seat: each to the tile that is furthest behind its quota, those without one last."""
    given = [0] * len(quotas)
    for _ in range(total):
        free = [tile for tile, count in enumerate(given) if count < PATCHES]
        wanting = [tile for tile in free if quotas[tile]] or free
        given[min(wanting, key=lambda tile: (given[tile] + 0.5) / (quotas[tile] or 1))] += 1
    return given


def highest(scores, count):
    return sorted(sorted(range(PATCHES), key=lambda place: -scores[place])[:count])


def hired(early, late, keep, tiles):
    """HiRED's tokens by view: ``early`` and ``late`` class attention [V][K]; the quota of every tile."""
    total = int((1 + tiles**2) * PATCHES * keep)
    first = min(int(total * 0.5), PATCHES)
    top = highest(early[0], int(PATCHES * 0.5))
    quotas = [sum(shown(place, tile, tiles) for place in top) for tile in range(tiles**2)]
    counts = [first, *seats(quotas, min(total - first, tiles**2 * PATCHES))]
    return [highest(scores, count) for scores, count in zip(late, counts, strict=True)], quotas


def globalcom2(scores, keep, tiles):
    """GlobalCom²'s tokens by view: class logits [V][K], mean over heads; the quota of every tile."""
    sums = [sum(scores[0][p] * float(shown(p, tile, tiles)) for p in range(PATCHES)) for tile in range(tiles**2)]
    powers = [math.exp((value - max(sums)) / 10) for value in sums]
    shares = [power / sum(powers) for power in powers]
    mean = sum(shares) / len(shares)
    quotas = [PATCHES * min(1.0, keep * (1 + share - mean)) for share in shares]
    kept = [highest(scores[0], int(PATCHES * keep))]
    for tile, count in enumerate(seats(quotas, int(tiles**2 * PATCHES * keep))):
        own = scores[1 + tile]
        above = [interpolated(scores[0], tiles, tile, place) for place in range(PATCHES)]
        norms = [math.sqrt(sum(value**2 for value in values)) for values in (own, above)]
        kept.append(highest([a / norms[0] + b / norms[1] for a, b in zip(own, above, strict=True)], count))
    return kept, quotas


def interpolated(scores, tiles, tile, place):
    """The thumbnail's scores at the middle of a tile's patch, linear between the middles of its own patches."""
    indices = [GRID * part + index for part, index in zip(divmod(tile, tiles), divmod(place, GRID), strict=True)]
    corners = []
    for index in indices:
        at = min(max((index + 0.5) / tiles - 0.5, 0.0), GRID - 1.0)
        low = int(at)
        corners.append([(low, 1 - (at - low)), (min(low + 1, GRID - 1), at - low)])
    return sum(scores[r * GRID + c] * wr * wc for r, wr in corners[0] for c, wc in corners[1])


def slow(tower, picture, name, keep, layer, tiles):
    """One picture through a budget -> z [E], the places that are kept, and the tiles' quotas."""
    early, late, logits, tokens = [], [], [], []
    for view in views_of(picture, tiles):
        x = tower.embed(view[None])[0]
        for i, block in enumerate(tower.transformer.resblocks[: layer + 1]):
            attention = class_row(block, x).tolist()
            early += [attention] if i == 0 else []
            query, key, _ = projections(block, x)
            products = (query[:, 0] * key.transpose(0, 1)).sum(-1) / query.shape[-1] ** 0.5  # [N,H]
            x = block.feed_forward(x + slow_attention(block, x)[0])
        late.append(attention)
        logits.append(products.mean(1)[1:].tolist())
        tokens.append(x)
    if name == "hired":
        kept, quotas = hired(early, late, keep, tiles)
    elif name == "globalcom2":
        kept, quotas = globalcom2(logits, keep, tiles)
    else:
        kept, quotas = [highest(scores, math.floor(PATCHES * keep + 0.5)) for scores in late], [1] * tiles**2
    x = torch.stack([tokens[0][0]] + [tokens[v][1 + place] for v, places in enumerate(kept) for place in places])
    sizes = [1.0] * (1 + len(kept[0])) + [1 / tiles**2] * sum(map(len, kept[1:]))
    for block in tower.transformer.resblocks[layer + 1 :]:
        x = block.feed_forward(x + slow_attention(block, x, sizes)[0])
    return tower.pool(x[None])[0], [PATCHES * v + place for v, places in enumerate(kept) for place in places], quotas


@each
@pytest.mark.parametrize(("layer", "tiles", "keep"), [(0, 2, 0.3), (1, 2, 0.5), (1, 3, 0.4), (2, 2, 0.9)])
@torch.no_grad()
def test_a_budget_keeps_what_the_released_formulas_say(tower, name, layer, tiles, keep):
    model, images = tiled(tower, name, keep, layer, tiles), pictures(tiles)
    z, (_, context) = model(images), model.run(images)
    shares = []
    for row, picture in enumerate(images):
        expected, kept, quotas = slow(tower, picture, name, keep, layer, tiles)
        assert context.positions[row].tolist() == kept
        torch.testing.assert_close(z[row], expected)
        shares.append(tuple(quotas))
    assert (len(set(shares)) > 1) == (name != "class-attention")  # the pictures tell budgets apart


@pytest.mark.parametrize("keep", [0.3, 0.6])
@torch.no_grad()
def test_a_tile_keeps_its_released_number_or_one_token_more_or_less(tower, keep):
    """Released, GlobalCom²'s tiles keep int(K·r_i), in all fewer than their budget by up to one a tile."""
    images = pictures(2)
    context = tiled(tower, "globalcom2", keep, 1, 2).run(images)[1]
    for row, picture in enumerate(images):
        released = [int(quota) for quota in slow(tower, picture, "globalcom2", keep, 1, 2)[2]]
        counts = (context.positions[row] // PATCHES).bincount(minlength=5).tolist()
        assert counts[0] == int(PATCHES * keep) and sum(counts[1:]) == int(4 * PATCHES * keep)
        assert all(abs(count - number) <= 1 for count, number in zip(counts[1:], released, strict=True))


def test_a_patch_across_an_edge_falls_to_both_tiles():
    """ViT-B/16's 14 patches a side in 3 tiles: each shows 4 2/3 of them, the first all of four and most of the next."""
    row = areas(14, 3)[:3].unflatten(1, (14, 14)).sum(1) / 14 / 3  # of the upper three tiles, columns of patches
    assert areas(14, 3).sum(1).tolist() == [14 * 14] * 9 and areas(14, 3).sum(0).tolist() == [9] * 14**2
    torch.testing.assert_close(row[0, :6], torch.tensor([1, 1, 1, 1, 2 / 3, 0]))
    torch.testing.assert_close(row[1, 4:10], torch.tensor([1 / 3, 1, 1, 1, 1, 1 / 3]))
    assert areas(4, 2)[0].nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_what_exceeds_a_tile_goes_to_the_others():
    """Quotas 10 : 2 : 1 : 0 of 6 tokens in tiles of 4: the first is full, and the rest is shared as 2 : 1 : 0."""
    scores = torch.arange(16.0).view(1, 4, 4)
    kept = apportioned(scores, torch.tensor([[10.0, 2.0, 1.0, 0.0]]), 6)
    assert kept.tolist() == [[0, 1, 2, 3, 7, 11]]
    assert apportioned(scores, torch.tensor([[10.0, 2.0, 1.0, 0.0]]), 14)[0, -2:].tolist() == [14, 15]


@each
@pytest.mark.parametrize(("layer", "tiles"), [(0, 2), (1, 3)])
@torch.no_grad()
def test_its_multiply_adds_have_a_closed_form(tower, name, layer, tiles):
    """V views through the embedding and the first blocks, one sequence through the others, and the budget's own."""
    width, views, keep = TOWER["width"], 1 + tiles**2, 0.4
    places = named(name).reducers(setting_for(tower, keep, layer, tiles))
    kept = places[layer, "after"].left(PATCHES)
    total = views * (3 * 8 * 8 * width * PATCHES + 5 * width * (PATCHES + 1))
    for block in range(LAYERS):
        tokens, sequences = (PATCHES + 1, views) if block <= layer else (kept + 1, 1)
        total += sequences * ((10 * width + 12 * width**2) * tokens + 2 * width * tokens**2)
    total += sum(reducer.macs(Call(PATCHES, 1, width, TOWER["heads"], ran=True)) for reducer in places.values())
    total += 5 * width * (kept + 1) + width * TOWER["embed_dim"]
    assert round(1e9 * count_macs(TiledTower(tower, SIZE * tiles, places), pictures(tiles, 1)).gmacs) == total


@each
@torch.no_grad()
def test_a_pictures_answer_does_not_depend_on_its_batch(tower, name):
    model, images = tiled(tower, name, 0.4, 1, 2), pictures(2)
    together = model(images)
    for row in range(3):
        torch.testing.assert_close(model(images[row : row + 1])[0], together[row])


@each
@torch.no_grad()
def test_keeping_everything_is_the_tower_on_all_tiles(tower, name):
    images = pictures(2)
    whole = TiledTower(tower, 2 * SIZE)
    assert whole.run(images)[0].shape[1] == 1 + 5 * PATCHES
    torch.testing.assert_close(tiled(tower, name, 1.0, LAYERS // 4, 2)(images), whole(images))


@each
def test_it_is_exported_for_any_batch_and_gives_gradients(tower, name):
    model = tiled(tower, name, 0.4, 1, 2)
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch")}
        exported = torch.export.export(model, (pictures(2),), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(exported(pictures(2, 5)), model(pictures(2, 5)))
    images = pictures(2, 1).requires_grad_()
    model(images).square().sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).any()


@each
@torch.no_grad()
def test_towers_of_open_clip_take_budgets_alike(name):
    """The adapted tower and ours, by the same weights."""
    original = open_clip.transformer.VisionTransformer(SIZE, 8, 64, 3, 2, 4.0, output_dim=16).double().eval()
    ours = small_tower()
    ours.load_state_dict(original.state_dict())
    images = pictures(2)
    torch.testing.assert_close(tiled(adapt(original), name, 0.4, 1, 2)(images), tiled(ours, name, 0.4, 1, 2)(images))


def test_what_cannot_work_in_tiles_is_refused(tower):
    with pytest.raises(ValueError, match="pictures of 40 px cannot be cut into tiles of the tower's 32 px; use 64 or"):
        TiledTower(tower, 40)
    with pytest.raises(ValueError, match=r"pictures of \(32, 32\) pixels given to tiles of 64; resize them"):
        TiledTower(tower, 64)(pictures(1))
    with pytest.raises(
        ValueError, match="1 pictures of 2×2 tiles came out as 5 sequences; give a reducer that joins 5 v"
    ):
        TiledTower(tower, 64, {1: DivPrune(0.5)})(pictures(2, 1))
    with pytest.raises(
        ValueError, match="1 pictures of 3×3 tiles came out as 2 sequences; give a reducer that joins 10"
    ):
        TiledTower(tower, 96, schedule(named("hired"), tower, 0.5, [1], 2))(pictures(3, 1))
    with pytest.raises(ValueError, match="divprune has no budget over the tiles of a picture; take one of class-att"):
        schedule(named("divprune"), tower, 0.5, [1], 2)
    with pytest.raises(ValueError, match=r"places \[0, 1\]: the tiles of a picture are joined at one block"):
        schedule(named("hired"), tower, 0.5, [0, 1], 2)
    with pytest.raises(ValueError, match=r"keep 1\.5 is not in"):
        schedule(named("hired"), tower, 1.5, [1], 2)
