"""Reducers inside a level, beside the cache: one picture at a time with the plain softmax, and closed counts."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.waveclip.costs import WavePath
from common.adaptive import paths_of
from common.flops import count_macs
from common.stages import run_chain
from common.tower import ImageTower
from mlip.merging import Merging
from patchrank.reducers import ATS, ClassAttention, EViT, RandomKeep, ToMe
from waveclip import MarginGate, ProgressiveClassifier, WaveTower
from waveclip.reduced import ReducedWaveTower

WIDTH, HEADS, LAYERS = 64, 2, 3


def tower(levels=1, dtype=torch.float64):
    """A tower for 32 px, patch 8, one level: 4 + 1 coarse tokens, 12 + 1 fine ones; and three pictures."""
    torch.manual_seed(0)
    image_tower = ImageTower(32, 8, WIDTH, LAYERS, HEADS, embed_dim=16).to(dtype)
    with torch.no_grad():
        for parameter in image_tower.parameters():  # biases too: those of keys matter beside ready keys
            parameter.add_(0.05 * torch.randn_like(parameter))
    return WaveTower.from_image_tower(image_tower, levels).eval(), torch.randn(3, 3, 32, 32, dtype=dtype)


def attend(block, x, past, sizes):
    """One picture's tokens x [N,D] after attention to past (key, value) and each other; its weights, keys, values."""
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    query, *current = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in qkv.chunk(3, -1))
    key, value = (torch.cat(pair, dim=1) for pair in zip(past, current, strict=True))
    logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    logits[:, :, past[0].shape[1] :] += torch.tensor([1.0, *sizes]).to(x).log()
    weights = logits.softmax(-1)
    return x + block.attn.out_proj((weights @ value).transpose(0, 1).flatten(1)), weights, current


def slow(wave, picture, step, before=None, middle=None):
    """Embeddings of one picture, its tokens of one step reduced before block 1 or in the middle of every block.

    before: weights [H,N,M+N] of the block -> places kept.  middle: x [N,D], current keys, sizes -> x, sizes.
    """
    empty = torch.zeros(HEADS, 0, WIDTH // HEADS, dtype=picture.dtype)
    past, levels = [(empty, empty)] * LAYERS, []
    for number, band in enumerate(wave.tokenizer.decompose(picture[None])):
        x = wave.ln_pre(wave.tokenizer.embed(band, number))[0]
        sizes = [1.0] * (len(x) - 1)
        for layer, block in enumerate(wave.transformer.resblocks):
            if before and (number, layer) == (step, 1):
                kept = before(attend(block, x, past[layer], sizes)[1])
                x, sizes = x[[0] + [1 + place for place in kept]], [1.0] * len(kept)
            x, _, current = attend(block, x, past[layer], sizes)
            past[layer] = tuple(torch.cat(pair, dim=1) for pair in zip(past[layer], current, strict=True))
            if middle and number == step:
                x, sizes = middle(x, current[0], sizes)
            x = block.feed_forward(x)
        levels.append(wave.ln_post(x[0]) @ wave.proj)
    return levels


def most_attended(weights):
    """The half (rounded up) of the patches to which the class token attends most, among all that it sees."""
    patches = weights.shape[1] - 1
    seen = weights[:, 0, -patches:].mean(0).tolist()
    return sorted(range(patches), key=lambda place: -seen[place])[: (patches + 1) // 2]


def merge_two(x, keys, sizes):
    """The two best edges from odd to even patches, by the cosine of their mean keys; means weighted by sizes."""
    if len(sizes) == 1:
        return x, sizes
    keys = keys.mean(0)[1:]
    patches, evens, odds = x[1:], range(0, len(sizes), 2), range(1, len(sizes), 2)
    edges = []
    for a in odds:
        closeness = [float(F.cosine_similarity(keys[a], keys[b], dim=0)) for b in evens]
        edges.append((max(closeness), a, evens[closeness.index(max(closeness))]))
    going = {a: b for _, a, b in sorted(edges, reverse=True)[:2]}
    staying = [a for a in odds if a not in going]
    groups = [[a] for a in staying] + [[b, *(a for a in going if going[a] == b)] for b in evens]
    tokens = [sum(sizes[i] * patches[i] for i in group) / sum(sizes[i] for i in group) for group in groups]
    return torch.stack([x[0], *tokens]), [sum(sizes[i] for i in group) for group in groups]


@pytest.mark.parametrize(("levels", "step"), [(1, 0), (1, 1), (2, 1), (2, 2)])
@torch.no_grad()
def test_pruning_in_a_level_equals_one_picture_at_a_time(levels, step):
    wave, images = tower(levels)
    reduced = ReducedWaveTower(wave, {step: {1: ClassAttention(0.5)}})
    actual = reduced(images)
    for row, picture in enumerate(images):
        for z, expected in zip(actual, slow(wave, picture, step, before=most_attended), strict=True):
            torch.testing.assert_close(z[row], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("step", [0, 1])
@torch.no_grad()
def test_merging_in_a_level_equals_one_picture_at_a_time(step):
    """Sizes count in their own level alone: the level after sees a merged token as one."""
    wave, images = tower()
    merging = {(layer, "middle"): ToMe(2) for layer in range(LAYERS)}
    actual = ReducedWaveTower(wave, {step: merging})(images)
    for row, picture in enumerate(images):
        for z, expected in zip(actual, slow(wave, picture, step, middle=merge_two), strict=True):
            torch.testing.assert_close(z[row], expected, atol=1e-10, rtol=0)


EVERYTHING_STAYS = {
    "nothing": {},
    "class attention": {1: ClassAttention(1.0)},
    "random": {1: RandomKeep(1.0)},
    "EViT": {(1, "middle"): EViT(1.0)},
    "ToMe": {(layer, "middle"): ToMe(0) for layer in range(LAYERS)},
    "MLIP's merging": {(1, "middle"): Merging(1.0)},
}


@pytest.mark.parametrize("name", EVERYTHING_STAYS)
@torch.no_grad()
def test_when_every_token_stays_it_is_the_tower(name):
    wave, images = tower(levels=2, dtype=torch.float32)
    places = EVERYTHING_STAYS[name]
    reduced = ReducedWaveTower(wave, dict.fromkeys(range(3), places))
    for z, expected in zip(reduced(images), wave(images), strict=True):
        torch.testing.assert_close(z, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(reduced.encode_image(images), wave.encode_image(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [0, 1])
def test_multiply_adds_by_the_closed_formula(step):
    """Pruned before block 1: what the blocks save, and the class row that chooses."""
    wave, images = tower(dtype=torch.float32)
    tokens = [5, 13]
    count = {0: 2, 1: 6}[step]  # half of the patches
    assert [wave.tokens_in(number) for number in range(2)] == tokens

    def blocks(entering):
        """entering: for each block, the tokens of both levels."""
        total = 0
        for coarse, fine in entering:
            for new, seen in ((coarse, coarse), (fine, coarse + fine)):
                total += new * (12 * WIDTH**2 + 2 * 5 * WIDTH) + 2 * new * seen * WIDTH
        return total

    left = [count + 1 if number == step else whole for number, whole in enumerate(tokens)]
    patches, cached = tokens[step], 0 if step == 0 else tokens[0]
    choosing = 5 * patches * WIDTH + patches * WIDTH * HEADS + 2 * WIDTH**2 + cached * WIDTH
    expected = blocks([tokens, left, left]) + choosing - blocks([tokens] * LAYERS)
    reduced = ReducedWaveTower(wave, {step: {1: ClassAttention(0.5)}})
    counts = [count_macs(WavePath(model, 1), images[:1]) for model in (reduced, wave)]
    assert round(1e9 * counts[0].gmacs) - round(1e9 * counts[1].gmacs) == expected


@torch.no_grad()
def test_its_stages_give_every_levels_embedding():
    wave, images = tower()
    reduced = ReducedWaveTower(wave, {0: {1: ClassAttention(0.5)}})
    results = run_chain([stage.module for stage in reduced.stages()], images)
    for (z, *_), expected in zip(results, reduced(images), strict=True):
        torch.testing.assert_close(z, F.normalize(expected, dim=-1))


@torch.no_grad()
def test_early_exit_over_reduced_levels_answers_as_all_levels_would():
    wave, images = tower()
    reduced = ReducedWaveTower(wave, {1: {1: ClassAttention(0.5)}})
    classes = F.normalize(torch.randn(6, 16, dtype=torch.float64), dim=-1)
    everything = ProgressiveClassifier(reduced, classes, 20.0, MarginGate(2.0))
    coarse, fine = (everything.probabilities(z) for z in reduced(images))
    threshold = float(MarginGate(0.0).confidence(coarse).sort().values[:2].mean())
    made = ProgressiveClassifier(reduced, classes, 20.0, MarginGate(threshold))(images)
    assert made.exit_step.sum() == 1 and made.tokens.tolist() == [5 + 13 * step for step in made.exit_step.tolist()]
    expected = torch.where(made.exit_step[:, None] == 1, fine, coarse)
    torch.testing.assert_close(made.scores, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_each_of_its_levels_is_a_path_of_its_own():
    wave, images = tower(dtype=torch.float32)
    paths = paths_of(ReducedWaveTower(wave, {1: {1: ClassAttention(0.5)}}))
    whole, (coarse, fine) = paths_of(wave).costs(32), paths.costs(32)
    assert coarse == whole[0] and coarse < fine < whole[1]
    classes, scale = F.normalize(torch.randn(6, 16), dim=-1), torch.tensor(20.0)
    (coarse, fine), (confidence,) = paths.probabilities_of_all_paths(images, classes, scale)
    threshold = float(confidence.sort().values[:2].mean())
    scores, path = paths.runner(threshold, classes, scale)(images)
    assert path.tolist() == (confidence < threshold).long().tolist() and path.sum() == 1
    torch.testing.assert_close(scores, torch.where(path[:, None] == 1, fine, coarse))


@torch.no_grad()
def test_the_state_of_the_plain_tower_can_be_refined_with_reducers():
    wave, images = tower()
    reduced = ReducedWaveTower(wave, {1: {1: RandomKeep(0.5)}})
    _, state = wave.begin(images)
    torch.testing.assert_close(reduced.refine(state)[0], reduced(images)[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("reducers", "message"),
    [
        ({2: {}}, "this tower has steps 0 to 1"),
        ({1: {3: ToMe(1)}}, r"a reducer at 3: places are i, \(i, 'middle'\) and \(i, 'after'\)"),
    ],
)
def test_a_step_or_place_that_is_not_there_is_refused(reducers, message):
    with pytest.raises(ValueError, match=message):
        ReducedWaveTower(tower()[0], reducers)


def test_tokens_that_a_mask_hides_would_be_seen_by_a_later_level():
    wave, _ = tower(2)
    ReducedWaveTower(wave, {2: {1: ATS(0.5)}})
    with pytest.raises(ValueError, match="ATS at step 1 masks tokens, to which later steps would attend"):
        ReducedWaveTower(wave, {1: {1: ATS(0.5)}})
