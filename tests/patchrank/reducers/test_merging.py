"""Reducers that merge tokens, each against its formula in loops over one picture's tokens, or scikit-learn."""

import math
from dataclasses import replace

import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from torch.nn import functional as F

from common.reducer_registry import Setting, named, setting_for
from common.reduction import ReducedTower, ReductionContext
from mlip.merging import equal_cost
from patchrank.reducers import (
    ATC,
    DPCKNN,
    MCTF,
    DiffRate,
    PiToMe,
    PruMerge,
    PruMergePlus,
    ToFu,
    TokenCondensation,
    VisionZip,
)
from patchrank.reducers.atc import agglomerate
from patchrank.reducers.diffrate import schedule
from patchrank.reducers.tca import rate_for
from tests.patchrank.reducers.slow import (
    PATCHES,
    at_middle,
    class_row,
    cosine,
    images,
    plain,
    slow_attention,
    slow_density_peaks,
    small_tower,
    tokens,
)


@pytest.fixture(scope="module")
def tower():
    return small_tower()


def ranked(scores):
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def mean(rows):
    return torch.stack(list(rows)).mean(0)


SIZES = torch.arange(1.0, 17.0).roll(5).expand(2, -1)


def sized(reducer):
    """The reducer behind one that gave tokens sizes."""
    return lambda x, context: reducer(x, replace(context, sizes=SIZES))


@pytest.mark.parametrize("linkage", ["average", "single", "complete"])
def test_agglomerative_clusters_are_those_of_scikit_learn(linkage):
    x = F.normalize(tokens(3)[:, 1:], dim=-1)
    distances = 1 - x @ x.transpose(1, 2)
    ours = agglomerate(distances, 6, linkage)
    for row in range(3):
        model = AgglomerativeClustering(6, metric="precomputed", linkage=linkage)
        theirs = model.fit_predict(distances[row].numpy()).tolist()
        assert len(set(zip(ours[row].tolist(), theirs, strict=True))) == 6  # the same up to names
        assert [ours[row].tolist().index(k) for k in range(6)] == sorted(ours[row].tolist().index(k) for k in range(6))


def test_pitome_merges_tokens_with_many_near_duplicates():
    x = tokens()
    result, context = PiToMe(5, margin=0.3)(x, plain(x))
    for row, picture in enumerate(x[:, 1:]):
        elu = [
            [c - 0.3 if c > 0.3 else math.exp(c - 0.3) - 1 for c in (cosine(a, b) for b in picture)] for a in picture
        ]
        order = ranked([sum(values) / PATCHES for values in elu])
        a, b, protected = order[:10:2], order[1:10:2], order[10:]
        into = [max(range(5), key=lambda k, i=i: cosine(picture[i], picture[b[k]])) for i in a]
        groups = [[i] for i in protected] + [[j, *(a[n] for n in range(5) if into[n] == k)] for k, j in enumerate(b)]
        torch.testing.assert_close(result[row, 1:], torch.stack([mean(picture[i] for i in group) for group in groups]))
        assert context.sizes[row].tolist() == [len(group) for group in groups] and context.bias is None


def tome_groups(keys, removed):
    """ToMe's groups of patches by mean keys [1+K,d], the receiving token first, and the tokens that go."""
    a, b = range(2, len(keys), 2), range(1, len(keys), 2)
    best = {i: max(b, key=lambda j, i=i: cosine(keys[i], keys[j])) for i in a}
    going = sorted(a, key=lambda i: -cosine(keys[i], keys[best[i]]))[:removed]
    staying = [i for i in a if i not in going] + list(b)
    return [[j, *(i for i in going if best[i] == j)] for j in staying], going


@torch.no_grad()
def test_tofu_prunes_or_keeps_the_largest_norm(tower):
    _, y, keys, merged = at_middle(tower, ToFu(5))
    _, _, _, pruned = at_middle(tower, ToFu(5, prune=True))
    for row in range(2):
        groups, going = tome_groups(keys[row].mean(0), 5)
        expected = []
        for group in groups:
            direction = mean(y[row, i] for i in group)
            expected.append(direction / direction.norm() * max(y[row, i].norm() for i in group))
        torch.testing.assert_close(merged.result[row, 1:], torch.stack(expected))
        assert pruned.positions[row].tolist() == [i - 1 for i in range(1, 17) if i not in going]


@torch.no_grad()
def test_mctf_merges_half_from_a_to_b_and_half_back(tower):
    x, y, _, outcome = at_middle(tower, MCTF(5))
    block = tower.transformer.resblocks[1]
    for row in range(2):
        received = slow_attention(block, x[row])[1].mean((0, 1)).tolist()
        scale = max(1 / value for value in received[1:])
        weight = {
            (i, j): (cosine(y[row, i], y[row, j]) + 1) / 2 * (1 / received[i] / received[j] / scale**2) ** (1 / 20)
            for i in range(2, 17, 2)
            for j in range(1, 17, 2)
        }
        a, b = list(range(2, 17, 2)), list(range(1, 17, 2))
        best = {i: max(b, key=lambda j, i=i: weight[i, j]) for i in a}
        going = sorted(a, key=lambda i: -weight[i, best[i]])[:2]
        stays = [i for i in a if i not in going]
        back = {j: max(stays, key=lambda i, j=j: weight[i, j]) for j in b}
        leaving = sorted(b, key=lambda j: -weight[back[j], j])[:3]
        members = {i: [i] for i in (*stays, *b)}
        for i in going:
            members[best[i]].append(i)
        for j in leaving:
            members[back[j]] += members.pop(j)
        means = {
            tuple(sorted(group)): sum(received[i] * y[row, i] for i in group) / sum(received[i] for i in group)
            for group in members.values()
        }
        order = [*stays, *sorted((j for j in b if j not in leaving), key=lambda j: -weight[back[j], j])]
        expected = torch.stack([means[tuple(sorted(members[i]))] for i in order])
        torch.testing.assert_close(outcome.result[row, 1:], expected)
        assert outcome.sizes[row].tolist() == [len(members[i]) for i in order]


@torch.no_grad()
def test_mctf_leaves_ten_tokens(tower):
    assert MCTF(8).left(16) == 9 and at_middle(tower, MCTF(8))[3].result.shape[1] == 10


@torch.no_grad()
def test_diffrate_prunes_and_merges_by_attention(tower):
    x, y, _, outcome = at_middle(tower, DiffRate(12, 8))
    block = tower.transformer.resblocks[1]
    for row in range(2):
        order = ranked(class_row(block, x[row]).tolist())[:12]
        head, tail = order[:8], order[8:]
        picture = y[row, 1:]
        into = [max(range(8), key=lambda k, j=j: cosine(picture[j], picture[head[k]])) for j in tail]
        for k, i in enumerate(head):
            members = [j for j, place in zip(tail, into, strict=True) if place == k]
            torch.testing.assert_close(outcome.result[row, 1 + k], mean(picture[j] for j in [i, *members]))
            size = 1 + sum(cosine(picture[j], picture[i]) for j in members)
            assert outcome.sizes[row, k].item() == pytest.approx(size, abs=1e-5)


@torch.no_grad()
def test_opposite_tokens_leave_diffrate_a_size_that_has_a_logarithm(tower):
    """Merged with 15 of its opposites, a token would have the size 1 - 15."""

    def behind(x, context):
        head = context.class_attention().argmax(1)
        signs = torch.full(context.positions.shape, -1.0).scatter(1, head[:, None], 1.0)
        return DiffRate(16, 1)(context.with_patches(x, signs[..., None] * x[:, 1:2]), context)

    outcome = at_middle(tower, behind)[3]
    assert outcome.sizes.tolist() == [[2.0**-14]] * 2
    torch.testing.assert_close(outcome.bias[:, 0, 0, 1:], outcome.sizes.double().log())


def test_the_released_schedule_of_diffrate_fits_other_towers():
    plan = schedule(Setting(0.6, 3, 196, 12, 14))
    assert (1, "middle") in plan and (0, "middle") not in plan
    assert [(r.pruned, r.merged) for r in plan.values()][:2] == [(196, 195), (195, 193)]  # 12.5 G, class token aside
    small = schedule(Setting(0.6, 1, 36, 4, 6))
    assert [reducer.merged for reducer in small.values()] == sorted((r.merged for r in small.values()), reverse=True)


@pytest.mark.parametrize("form", ["averaged", "released"])
@torch.no_grad()
def test_visionzip_keeps_the_attended_and_gathers_the_rest(tower, form):
    x, y, keys, outcome = at_middle(tower, VisionZip(0.5, contextual=0.25, form=form))
    block = tower.transformer.resblocks[1]
    for row in range(2):
        order = ranked(class_row(block, x[row]).tolist())
        dominant, others = sorted(order[:6]), sorted(order[6:])
        targets = [others[0], others[5]]  # every fifth of ten
        rest = [place for place in others if place not in targets]
        key, picture = keys[row].mean(0)[1:], y[row, 1:]
        into = [max(range(2), key=lambda k, j=j: cosine(key[j], key[targets[k]])) for j in rest]
        expected = [picture[place] for place in dominant]
        for k, target in enumerate(targets):
            members = [picture[j] for j, place in zip(rest, into, strict=True) if place == k]
            if form == "averaged":
                expected.append(mean([picture[target], *members]))
            else:
                expected.append(picture[target] + (mean(members) if members else 0))
        torch.testing.assert_close(outcome.result[row, 1:], torch.stack(expected))


@torch.no_grad()
def test_the_released_visionzip_has_a_name_of_its_own(tower):
    for name, form in {"visionzip": "averaged", "visionzip-released": "released"}.items():
        listed = ReducedTower(tower, named(name).reducers(setting_for(tower, 0.5, 1)))
        expected = ReducedTower(tower, {(1, "middle"): VisionZip(0.5, form=form)})
        torch.testing.assert_close(listed(images()), expected(images()))
    assert named("visionzip").title != named("visionzip-released").title


def most_attended(attention):
    """Eight of 16 places."""
    return sorted(ranked(attention)[:8])


def every_fourth_and_one(attention):
    """Five of 16 places: every fourth, and of the others the one with most attention."""
    return sorted([0, 4, 8, 12, next(place for place in ranked(attention) if place % 4)])


@pytest.mark.parametrize(
    ("reducer", "choice", "count"),
    [
        (PruMerge(8 / 16, neighbours=4), most_attended, 4),
        (PruMergePlus(5 / 16, neighbours=20), every_fourth_and_one, 15),
        (PruMerge(8 / 16), most_attended, 1),
    ],
)
@torch.no_grad()
def test_prumerge_adds_what_is_like_each_kept_token(tower, reducer, choice, count):
    x, y, keys, outcome = at_middle(tower, reducer)
    block = tower.transformer.resblocks[1]
    for row in range(2):
        whole = F.linear(block.ln_1(x[row]), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, _ = whole.chunk(3, -1)  # heads are not split
        attention = (query[0] @ key.T / 64**0.5).softmax(-1)[1:].tolist()
        kept = choice(attention)
        flat, picture = keys[row].transpose(0, 1).flatten(1)[1:], y[row, 1:]
        for place, i in enumerate(kept):
            near = sorted((j for j in range(16) if j != i), key=lambda j: -cosine(flat[i], flat[j]))[:count]
            expected = picture[i] + sum(attention[j] * picture[j] for j in near)
            torch.testing.assert_close(outcome.result[row, 1 + place], expected)
        extra = sum(attention[j] * picture[j] for j in range(16) if j not in kept)
        torch.testing.assert_close(outcome.result[row, -1], extra)
        sizes = [1.0] * len(kept) + [16.0 - len(kept)]
        assert outcome.positions[row].tolist() == [*kept, -1] and outcome.sizes[row].tolist() == sizes


@pytest.mark.parametrize(("patches", "near"), [(576, 32), (196, 11), (36, 2), (16, 1), (4, 1), (2, 1)])
def test_prumerge_takes_in_the_released_share_of_the_patches(patches, near):
    assert PruMerge(0.5).near(patches) == PruMergePlus(0.5).near(patches) == near
    assert PruMerge(0.5, neighbours=32).near(patches) == min(32, patches - 1)


def test_prumerge_needs_a_neighbour():
    with pytest.raises(ValueError, match="neighbours 0 is below 1; leave it out"):
        PruMerge(0.5, neighbours=0)


def test_prumerge_plus_keeps_what_the_released_code_keeps():
    """Of 60 patches 5 are outliers, a twelfth: every int(12/3)-th joins them. Outliers stand at none of those here."""
    attention = torch.rand(2, 60, generator=torch.Generator().manual_seed(0))
    attention[:, ::4] = 0
    context = ReductionContext(torch.arange(60).expand(2, -1))
    kept = PruMergePlus(20 / 60).chosen(attention, 20, context)
    for row in range(2):
        assert kept[row].tolist() == sorted({*ranked(attention[row].tolist())[:5], *range(0, 60, 4)})


@torch.no_grad()
def test_tca_keeps_merges_into_four_and_fuses(tower):
    """r = .2 of 16: T = 13, M = 4, so 5 stay, 8 merge and 3 fuse."""
    x, y, _, outcome = at_middle(tower, TokenCondensation(0.2))
    block = tower.transformer.resblocks[1]
    for row in range(2):
        attention = class_row(block, x[row]).tolist()
        order, picture = ranked(attention), y[row, 1:]
        middle, away = order[5:13], lambda i, j, picture=picture: float((picture[i] - picture[j]).norm())
        centres = [middle[0]]
        while len(centres) < 4:
            near = {i: min(away(i, c) for c in centres) for i in middle if i not in centres}
            centres.append(max(near, key=near.get))
        groups = {c: [c] for c in centres}
        for i in middle:
            if i not in centres:
                groups[min(centres, key=lambda c, i=i: away(i, c))].append(i)
        expected = [picture[i] for i in order[:5]]
        for centre, group in groups.items():
            weight = {i: 1.0 if i == centre else 1 / away(i, centre) for i in group}
            expected.append(sum(weight[i] * picture[i] for i in group) / sum(weight.values()))
        expected.append(sum(attention[i] * picture[i] for i in order[13:]))
        torch.testing.assert_close(outcome.result[row, 1:], torch.stack(expected))
        assert outcome.sizes[row].sum() == 16


def test_tca_has_the_released_numbers_of_tokens():
    """Class token included: 197, 143, 104, 77 at rate .1."""
    reducer, patches = TokenCondensation(0.1), 196
    counts = [patches := reducer.left(patches) for _ in range(3)]
    assert [1 + count for count in counts] == [143, 104, 77]
    assert abs(TokenCondensation(rate_for(0.6, 196)).left(196) - 118) <= 1
    with pytest.raises(ValueError, match=r"rate 0\.4 of 196 patches leaves -40 as they are"):
        TokenCondensation(0.4).left(196)


def test_density_peaks_are_those_of_the_formula():
    x = tokens(3)
    result, context = DPCKNN(6 / 16)(x, plain(x))
    for row, picture in enumerate(x[:, 1:]):
        groups = slow_density_peaks(picture, 6)
        torch.testing.assert_close(result[row, 1:], torch.stack([picture[group].mean(0) for group in groups]))
        assert context.sizes[row].tolist() == [len(group) for group in groups]


@torch.no_grad()
def test_atc_merges_by_mean_keys_and_sizes(tower):
    _, y, keys, outcome = at_middle(tower, sized(ATC(0.4)))
    unit = F.normalize(keys.mean(1)[:, 1:], dim=-1)
    group = agglomerate(1 - unit @ unit.transpose(1, 2), 6)
    for row in range(2):
        for k in range(6):
            members = (group[row] == k).nonzero().flatten()
            sizes = SIZES[row, members].double()
            torch.testing.assert_close(outcome.result[row, 1 + k], sizes @ y[row, 1 + members] / sizes.sum())
            assert outcome.sizes[row, k] == sizes.sum()
    torch.testing.assert_close(outcome.bias[:, 0, 0, 1:], outcome.sizes.double().log())


@pytest.mark.parametrize("taus", [(1, 20, 40), (4, 2, 0.5)])
@torch.no_grad()
def test_mctf_prefers_small_tokens_and_weighs_large_ones(tower, taus):
    """One merge, from B to A: the best edge by all three criteria, its mean by attention received times size."""
    x, y, _, outcome = at_middle(tower, sized(MCTF(1, *taus)))
    block = tower.transformer.resblocks[1]
    for row in range(2):
        received = slow_attention(block, x[row])[1].mean((0, 1))[1:].tolist()
        sizes, picture = SIZES[row].tolist(), y[row, 1:]
        edges = {
            (i, j): ((cosine(picture[i], picture[j]) + 1) / 2) ** (1 / taus[0])
            * (received[i] * received[j]) ** (-1 / taus[1]) * (sizes[i] * sizes[j]) ** (-1 / taus[2])
            for i in range(1, 16, 2) for j in range(0, 16, 2)
        }  # fmt: skip
        i, j = max(edges, key=edges.get)
        one, other = received[i] * sizes[i], received[j] * sizes[j]
        expected = (one * picture[i] + other * picture[j]) / (one + other)
        torch.testing.assert_close(outcome.result[row, 1 + i // 2], expected)
        assert outcome.sizes[row, i // 2] == sizes[i] + sizes[j] and outcome.bias is not None


@torch.no_grad()
def test_prumerge_counts_a_merged_tokens_size_once(tower):
    """Behind proportional attention: softmax of q·k/√D + log size over all tokens, heads taken as one."""
    bias = F.pad(SIZES.double().log(), (1, 0))[:, None, None]
    seen = {}

    def behind(x, context):
        seen["attention"] = PruMerge(0.5)
        seen["logits"] = replace(context, bias=None).class_logits().sum(1) * 2**-0.5
        return PruMerge(0.5)(x, replace(context, bias=bias, sizes=SIZES))

    _, y, _, outcome = at_middle(tower, behind)
    attention = (seen["logits"] + bias[:, 0, 0]).softmax(-1)[:, 1:]
    gone = [ranked(attention[row].tolist())[8:] for row in range(2)]
    expected = torch.stack([attention[row, gone[row]] @ y[row, 1:][gone[row]] for row in range(2)])
    torch.testing.assert_close(outcome.result[:, -1], expected)


def test_density_peaks_gather_their_neighbours():
    """Two tight clusters: their densest tokens are the centres, and each becomes its cluster's mean."""
    x = tokens(1)
    x[0, 1:10] = 0.01 * x[0, 1:10]
    x[0, 10:] = 5 + 0.02 * x[0, 10:]
    result, context = DPCKNN(2 / 16)(x, plain(x))
    assert context.sizes[0].tolist() == [9.0, 7.0]
    torch.testing.assert_close(result[0, 1:], torch.stack([x[0, 1:10].mean(0), x[0, 10:].mean(0)]))


@pytest.mark.parametrize(("keep", "blocks", "merges"), [(0.75, 11, [26, 26]), (0.5, 9, [52, 52]), (0.65, 3, [41, 41])])
def test_mlip_merges_as_many_in_two_blocks_as_pruning_drops(keep, blocks, merges):
    places = equal_cost(Setting(keep, 12 - blocks, 196, 12))
    assert [reducer.removed for reducer in places.values()] == merges and next(iter(places)) == (12 - blocks, "middle")
    lost = sum(removed * (blocks - i) for i, removed in enumerate(merges))
    assert abs(lost - blocks * 196 * (1 - keep)) < blocks


def test_mlip_merges_in_more_blocks_where_two_cannot():
    """Two merges of 67 would be more than half of what the second finds."""
    places = equal_cost(Setting(0.35, 3, 196, 12))
    assert [reducer.removed for reducer in places.values()] == [48, 48, 48]
