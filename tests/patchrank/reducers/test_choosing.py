"""Reducers that choose among tokens, each against its formula in loops over one picture's tokens."""

import copy
import pickle

import pytest
import torch

from common.reducer_registry import named, schedule, setting_for
from common.reduction import ReducedTower
from patchrank.reducers import ATS, CentreCrop, DivPrune, HalfResolution, KMedoids, ZOOPrune
from patchrank.reducers.ats import sampled
from patchrank.reducers.farthest import cosines, squared_distances
from patchrank.reducers.gtp import neighbour_graph
from patchrank.reducers.kmedoids import k_medoids
from tests.patchrank.reducers.slow import (
    PATCHES,
    at_middle,
    class_row,
    cosine,
    images,
    plain,
    projections,
    slow_attention,
    small_tower,
    tokens,
)


@pytest.fixture(scope="module")
def tower():
    return small_tower()


@pytest.mark.parametrize("compare", [cosines, squared_distances])
def test_tokens_are_compared_precisely_under_autocast(compare):
    """Near-equal tokens: their distances would tie in half precision."""
    near = 1 + 0.01 * torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    expected = compare(near)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compare(near), expected, atol=0, rtol=0)


@pytest.mark.parametrize(("keep", "count"), [(0.2, 3), (0.6, 10), (0.53, 8)])
def test_divprune_takes_the_farthest_token_again_and_again(keep, count):
    x = tokens()
    _, context = DivPrune(keep)(x, plain(x))
    for picture, kept in zip(x[:, 1:], context.positions.tolist(), strict=True):
        distance = [[1 - cosine(a, b) for b in picture] for a in picture]
        nearest = [min(distance[i][j] for j in range(PATCHES) if j != i) for i in range(PATCHES)]
        chosen = [nearest.index(max(nearest))]
        while len(chosen) < count:
            near = [-1 if i in chosen else min(distance[i][j] for j in chosen) for i in range(PATCHES)]
            chosen.append(near.index(max(near)))
        assert kept == sorted(chosen)


def test_divprune_takes_no_token_twice_where_all_are_equal():
    x = torch.ones(1, 1 + PATCHES, 6)
    _, context = DivPrune(0.5)(x, plain(x))
    assert len(set(context.positions[0].tolist())) == 8


@torch.no_grad()
def test_divprune_may_compare_keys(tower):
    _, _, keys, context = at_middle(tower, DivPrune(0.5, of="keys"))
    for picture, kept in zip(keys.mean(1), context.positions.tolist(), strict=True):
        again = DivPrune(0.5)(picture[None], plain(picture[None]))[1]
        assert again.positions[0].tolist() == kept


def slow_medoids(picture, count):
    """Medoids and clusters of tokens [K,F], until nothing changes."""
    places = range(len(picture))
    distance = [[float((a - b).norm()) for b in picture] for a in picture]
    norms = [float(token.norm()) for token in picture]
    medoids = [norms.index(max(norms))]
    while len(medoids) < count:
        near = [-1 if i in medoids else min(distance[i][j] for j in medoids) for i in places]
        medoids.append(near.index(max(near)))
    while True:
        cluster = [medoids.index(i) if i in medoids else min((distance[i][m], k) for k, m in enumerate(medoids))[1]
                   for i in places]  # fmt: skip
        members = [[i for i in places if cluster[i] == k] for k in range(count)]
        better = [min((sum(distance[i][j] for j in group), i) for i in group)[1] for group in members]
        if better == medoids:
            return sorted(medoids), [sorted(medoids).index(medoids[k]) for k in cluster]
        medoids = better


def test_k_medoids_reach_the_fixed_point():
    x = tokens(4)[:, 1:]
    medoids, cluster = k_medoids(x, 6, rounds=20)
    for row, picture in enumerate(x):
        assert (medoids[row].tolist(), cluster[row].tolist()) == slow_medoids(picture, 6)


def test_k_medoids_keep_the_medoids_or_the_means_of_their_clusters():
    x = tokens(1)
    medoids, cluster = slow_medoids(x[0, 1:], 6)
    kept, context = KMedoids(6 / 16, rounds=20)(x, plain(x))
    torch.testing.assert_close(kept, x[:, [0] + [1 + place for place in medoids]])
    means, context = KMedoids(6 / 16, "means", rounds=20)(x, plain(x))
    groups = [[i for i in range(PATCHES) if cluster[i] == k] for k in range(6)]
    torch.testing.assert_close(means[0, 1:], torch.stack([x[0, 1:][group].mean(0) for group in groups]))
    assert context.sizes[0].tolist() == [len(group) for group in groups]
    torch.testing.assert_close(context.bias[0, 0, 0, 1:], context.sizes[0].double().log())


@torch.no_grad()
def test_ats_takes_the_token_whose_cumulated_significance_is_nearest(tower):
    x, _, _, context = at_middle(tower, ATS(0.6), count=3)
    block = tower.transformer.resblocks[1]
    repeats = 0
    for row in range(3):
        values = projections(block, x[row])[2][:, 1:].transpose(0, 1).flatten(1)
        raw = [float(a) * float(v.norm()) for a, v in zip(class_row(block, x[row]), values, strict=True)]
        order = sorted(range(PATCHES), key=lambda place: raw[place])
        sums = [sum(raw[place] for place in order[: k + 1]) for k in range(PATCHES)]
        sums = [(value - sums[0]) / (sums[-1] - sums[0]) for value in sums]
        start = min(value for value in sums if value > 0)
        points = [start + (1 - start) * k / 9 for k in range(10)]
        places = [order[min(range(PATCHES), key=lambda k, point=point: abs(sums[k] - point))] for point in points]
        fresh = [place if place not in places[:k] else -1 for k, place in enumerate(places)]
        assert context.positions[row].tolist() == fresh
        hidden = [place == -1 for place in fresh]
        assert (context.bias[row, 0, 0, 1:] == -torch.inf).tolist() == hidden
        assert (context.sizes[row] == 0).tolist() == hidden
        repeats += sum(hidden)
    assert repeats  # or the case is not there


def slow_gtp(tower, picture, keep, layers):
    """One picture through a tower with GTP in the middle of some blocks -> z [E], and the places that are left."""
    places, x = list(range(PATCHES)), tower.embed(picture[None])[0]
    near = {(i, j) for i in places for j in places if i != j and abs(i // 4 - j // 4) <= 1 and abs(i % 4 - j % 4) <= 1}
    degree = [sum((i, j) in near for j in places) for i in places]
    for layer, block in enumerate(tower.transformer.resblocks):
        added, weights, _ = slow_attention(block, x)
        x = x + added
        if layer in layers:
            score = [
                max(float(head[i, i]) for head in weights) * max(float(head[:, i].sum()) for head in weights)
                for i in range(1, len(x))
            ]
            order = sorted(range(len(places)), key=lambda i: -score[i])
            kept, gone = order[: round(keep * len(places))], order[round(keep * len(places)) :]
            patches = [x[1 + i].clone() for i in kept]
            for token, i in zip(patches, kept, strict=True):
                for j in gone:
                    if (places[i], places[j]) in near:
                        token += 0.1 * x[1 + j] / (degree[places[i]] * degree[places[j]]) ** 0.5
            x, places = torch.stack([x[0], *patches]), [places[i] for i in kept]
        x = block.feed_forward(x)
    return tower.pool(x[None])[0], places


@pytest.mark.parametrize("layers", [[1], [0, 2]])
@torch.no_grad()
def test_gtp_passes_pruned_tokens_to_their_neighbours(tower, layers):
    """At the second of two places to those neighbours that are still there; the graph is that of the whole grid."""
    reduced = ReducedTower(tower, schedule(named("gtp"), tower, 0.6, layers))
    z, positions = reduced(images()), reduced.run(images())[1].positions
    for row, picture in enumerate(images()):
        expected, places = slow_gtp(tower, picture, 0.6, layers)
        assert positions[row].tolist() == places and len(places) == {1: 10, 2: 6}[len(layers)]
        torch.testing.assert_close(z[row], expected, atol=1e-6, rtol=1e-5)


def test_the_graph_of_neighbours_is_symmetric_and_has_no_loops():
    graph = neighbour_graph(4)
    assert torch.equal(graph, graph.T) and graph.diagonal().eq(0).all() and (graph[5] > 0).sum() == 8


def slow_zoo(prune, readout, picture, count):
    """Places of tokens [K,F] by sensitivity and distance, in ascending order."""
    released, sensitivity = prune.form == "released", []
    for token in picture:
        step, changes = 0.01 if released else 0.01 * float(token.norm()), []
        for direction in prune.directions[:, : len(token)].to(token):
            unit = direction / direction.norm()
            changes.append(float((readout(token + step * unit) - readout(token - step * unit)).norm()) / (2 * step))
        sensitivity.append(sum(changes) / len(changes))
    low = min(sensitivity) if released else 0.0
    weight = [(value - low) / (max(sensitivity) - low) for value in sensitivity]
    compared = [readout(token) if released else token for token in picture]
    chosen = [weight.index(max(weight))]
    while len(chosen) < count:
        near = [
            -1 if i in chosen else weight[i] * min(1 - cosine(compared[i], compared[j]) for j in chosen)
            for i in range(len(picture))
        ]
        chosen.append(near.index(max(near)))
    return sorted(chosen)


@pytest.mark.parametrize(("form", "directions", "count"), [("ours", 3, 11), ("released", None, 10)])
@torch.no_grad()
def test_zoo_prune_weighs_distance_by_sensitivity(form, directions, count):
    """10.7 of 16 patches: ours is rounded, the released form rounds down."""
    torch.manual_seed(0)
    x, norm, projection = tokens(2), torch.nn.LayerNorm(6).double(), torch.randn(6, 4, dtype=torch.float64)

    def readout(patches):
        return norm(patches) @ projection

    prune = ZOOPrune(0.67, readout, form, directions)
    assert len(prune.directions) == (directions or 64)
    _, context = prune(x, plain(x))
    for picture, kept in zip(x[:, 1:], context.positions.tolist(), strict=True):
        assert kept == slow_zoo(prune, readout, picture, count)


@torch.no_grad()
def test_the_released_zoo_prune_has_a_name_of_its_own_and_works_on_equal_tokens(tower):
    x = torch.ones(1, 1 + PATCHES, 64, dtype=torch.float64)
    for name, form in {"zoo-prune": "ours", "zoo-prune-released": "released"}.items():
        prune = named(name).reducers(setting_for(tower, 0.67, 1))[1]
        assert prune.form == form
        assert len(set(prune(x, plain(x))[1].positions[0].tolist())) == prune.left(PATCHES)


def test_zoo_prune_refuses_forms_and_directions_that_are_none():
    with pytest.raises(ValueError, match="form 'few' is none of ours, released"):
        ZOOPrune(0.5, torch.nn.Identity(), "few")
    with pytest.raises(ValueError, match="directions 0 is below 1; leave it out"):
        ZOOPrune(0.5, torch.nn.Identity(), directions=0)


def test_the_centre_of_a_grid_of_four():
    x = tokens(1)
    _, context = CentreCrop(0.25, grid=4)(x, plain(x))
    assert sorted(context.positions[0].tolist()) == [5, 6, 9, 10]
    _, context = CentreCrop(0.75, grid=4, norm="l2")(x, plain(x))
    assert set(range(16)) - set(context.positions[0].tolist()) == {0, 3, 12, 15}


@torch.no_grad()
def test_the_centre_is_that_of_the_whole_grid_at_the_second_of_two_places_too(tower):
    reduced = ReducedTower(tower, schedule(named("centre-crop"), tower, 0.5, [0, 1]))
    assert sorted(reduced.run(images())[1].positions[0].tolist()) == [5, 6, 9, 10]


def test_half_the_resolution_averages_two_by_two():
    x = tokens(1)
    halved, context = HalfResolution(4)(x, plain(x))
    torch.testing.assert_close(halved[0, 1], x[0, [1, 2, 5, 6]].mean(0))
    torch.testing.assert_close(halved[0, 4], x[0, [11, 12, 15, 16]].mean(0))
    assert context.sizes.tolist() == [[4.0] * 4] and halved.shape[1] == 5
    with pytest.raises(ValueError, match="15 tokens are not the 16 patches of the grid"):
        HalfResolution(4)(x[:, :-1], plain(x[:, :-1]))
    with pytest.raises(ValueError, match="a grid of 5 patches a side has no halves"):
        HalfResolution(5)


def test_one_point_is_the_most_significant_token():
    significance = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05]])
    places, repeat = sampled(significance, 1)
    assert places.tolist() == [[1]] and not repeat.any()


@torch.no_grad()
def test_a_copy_of_a_tower_reads_its_own_projection():
    """As an average of weights does, or a model that is moved to another device."""
    tower = small_tower()
    reduced = ReducedTower(tower, named("zoo-prune").reducers(setting_for(tower, 0.5, 1)))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(reduced)))
    torch.testing.assert_close(copied(images()), reduced(images()))
    copied.tower.proj.zero_()
    copied.tower.proj[:, 0] = 1.0
    again = ReducedTower(copied.tower, named("zoo-prune").reducers(setting_for(copied.tower, 0.5, 1)))
    torch.testing.assert_close(copied.run(images())[1].positions, again.run(images())[1].positions)
