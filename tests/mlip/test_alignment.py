"""Token losses against brute force: all permutations, the paper's padded square, and loops over tokens."""

import math
from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from common.clip import CLIP
from mlip import alignment
from mlip.alignment import assign_tokens, caption_mask, late_interaction, one_to_many, one_to_one

SIZES = [(1, 1), (1, 4), (4, 1), (3, 3), (5, 2), (2, 5), (4, 6)]  # image tokens, real text tokens


def pairs(sizes=SIZES, dim=7):
    """Tokens [B,K,E] and [B,T,E] in float64 for pairs of one K, and the mask of the texts' real tokens.

    Texts begin with a token that takes no part, like start-of-text, and end in padding.
    """
    generator = torch.Generator().manual_seed(0)
    count, lengths = sizes[0][0], [length for _, length in sizes]
    image = torch.randn(len(sizes), count, dim, generator=generator, dtype=torch.float64)
    text = torch.randn(len(sizes), max(lengths) + 3, dim, generator=generator, dtype=torch.float64)
    place = torch.arange(text.shape[1])
    return image, text, (place > 0) & (place <= torch.tensor(lengths)[:, None])


def cosines(image, text, mask):
    """For each pair the matrix of its real tokens' cosines, texts down, as nested lists."""
    return [
        [[float(F.cosine_similarity(b, a, dim=0)) for a in tokens] for b in words[real]]
        for tokens, words, real in zip(image, text, mask, strict=True)
    ]


def best_assignment(table):
    """The greatest sum of entries, no two in a row or column, over all ways to choose them."""
    rows, columns = len(table), len(table[0])
    if rows > columns:
        table, rows, columns = list(zip(*table, strict=True)), columns, rows
    return max(sum(table[row][column] for row, column in enumerate(way)) for way in permutations(range(columns), rows))


def grouped():
    """SIZES by their number of image tokens, which all pairs of a batch share."""
    return [[size for size in SIZES if size[0] == count] for count in sorted({count for count, _ in SIZES})]


def test_alignment_reads_words_and_end_of_text():
    clip = CLIP.tiny()
    ids = clip.tokenizer(["cat", "a red cat on the dog"])
    mask = caption_mask(ids)
    assert mask.sum(1).tolist() == [2, 7]
    assert not mask[:, 0].any() and mask[0].tolist() == [False, True, True] + [False] * 13
    assert ids[0, 2] == ids.max()  # the last one is end-of-text
    assert (ids[1] == 0).any() and mask[1][: ids[1].argmax()][1:].all()  # a word's id may be 0, as padding is


@pytest.mark.parametrize("sizes", grouped(), ids=str)
def test_one_to_many_is_the_mean_of_best_cosines_both_ways(sizes):
    image, text, mask = pairs(sizes)
    terms = []
    for table in cosines(image, text, mask):
        of_text = sum(max(row) for row in table) / len(table)
        of_image = sum(max(column) for column in zip(*table, strict=True)) / len(table[0])
        terms.append(-(of_text + of_image) / 2)
    assert math.isclose(one_to_many(image, text, mask), sum(terms) / len(terms), rel_tol=1e-9)


@pytest.mark.parametrize("sizes", grouped(), ids=str)
def test_one_to_one_is_the_best_of_all_permutations(sizes):
    image, text, mask = pairs(sizes)
    terms = [-best_assignment(table) / min(len(table), len(table[0])) for table in cosines(image, text, mask)]
    assert math.isclose(one_to_one(image, text, mask), sum(terms) / len(terms), rel_tol=1e-9)


@pytest.mark.parametrize("sizes", grouped(), ids=str)
def test_one_to_one_equals_the_papers_zero_padded_square(sizes):
    image, text, mask = pairs(sizes)
    terms = []
    for table in cosines(image, text, mask):
        side = max(len(table), len(table[0]))
        square = torch.zeros(side, side, dtype=torch.float64)
        square[: len(table), : len(table[0])] = torch.tensor(table, dtype=torch.float64)
        rows, columns = linear_sum_assignment(square.numpy(), maximize=True)
        terms.append(-float(square[rows, columns].sum()) / min(len(table), len(table[0])))
    assert math.isclose(one_to_one(image, text, mask), sum(terms) / len(terms), rel_tol=1e-9)


def test_tokens_that_fit_perfectly_cost_least():
    eye = torch.eye(4)[None].repeat(2, 1, 1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    shuffled = eye[:, torch.tensor([2, 0, 3, 1])]
    for loss in (one_to_many, one_to_one):
        assert math.isclose(loss(eye, 3 * shuffled, mask), -1, rel_tol=1e-6)
    # Two words for one image token: each may have it under one-to-many, one of them alone under one-to-one.
    doubled = eye[:, [0, 0, 1, 2]]
    assert one_to_many(eye, doubled, mask) == pytest.approx(-(1 + 3 / 4) / 2)
    assert one_to_one(eye, doubled, mask) == pytest.approx(-3 / 4)


def test_the_gradient_of_one_to_one_flows_through_the_matches_alone():
    image, text, mask = pairs([(4, 6), (4, 1)])
    image.requires_grad_()
    one_to_one(image, text, mask).backward()
    # The second caption is one token: only the image token that it matched has a gradient.
    words, table = text[1][mask[1]], cosines(image.detach()[1:], text[1:], mask[1:])[0]
    (matched,) = image.grad[1].abs().sum(-1).nonzero().flatten().tolist()
    assert matched == table[0].index(max(table[0]))
    alone = image.detach()[1, matched].clone().requires_grad_()
    (-F.cosine_similarity(alone, words[0], dim=0) / 2).backward()
    torch.testing.assert_close(image.grad[1, matched], alone.grad)
    assert image.grad[0].abs().sum(-1).min() > 0  # six words for four image tokens: all of those are matched


def test_a_text_longer_than_the_picture_leaves_words_over():
    cosines = torch.tensor([[0.1, 0.9], [0.8, 0.7], [0.6, 0.5], [0.3, 0.2]])
    assert assign_tokens(cosines, [3, 1]).tolist() == [1, 0, -1, 0]


def test_threads_find_the_same(monkeypatch):
    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (40,)).tolist()
    table = torch.rand(sum(lengths), 6)
    expected = assign_tokens(table, lengths)
    monkeypatch.setattr(alignment, "POOL_CELLS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(assign_tokens(table, lengths), expected)


@pytest.mark.parametrize("pool", [0, 10**9])
def test_similarities_that_are_not_finite_name_the_sample(monkeypatch, pool):
    monkeypatch.setattr(alignment, "POOL_CELLS", pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    image, text, mask = pairs([(4, 3)] * 5)
    image[3, 2] = torch.nan
    with pytest.raises(ValueError, match="sample 3 of the batch are not finite"):
        one_to_one(image, text, mask)


def test_no_rank_raises_alone(monkeypatch):
    """The others would wait for it. A loss that is not finite stops all of them, see common/finite.py."""
    for name in ("is_initialized", "get_world_size"):
        monkeypatch.setattr(alignment.distributed, name, lambda: 2)
    image, text, mask = pairs([(4, 3)] * 2)
    image[1, 2] = torch.nan
    assert one_to_one(image.requires_grad_(), text, mask).isnan()


@pytest.mark.parametrize("loss", [one_to_many, late_interaction])
def test_a_token_that_is_not_finite_is_seen_in_the_loss(loss):
    image, text, mask = pairs([(4, 3)] * 2)
    image[1, 2] = torch.nan
    options = [torch.tensor(5.0)] if loss is late_interaction else []
    assert loss(image, text, mask, *options).isnan()


@pytest.mark.parametrize("loss", [one_to_many, one_to_one])
def test_half_precision_and_autocast_are_summed_in_fp32(loss):
    image, text, mask = pairs([(5, 2)])
    exact = loss(image, text, mask)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", torch.bfloat16):
            result = loss(image.to(dtype), text.to(dtype), mask)
        assert result.dtype == torch.float32 and math.isclose(result, exact, abs_tol=0.01)


def best(table, keys=None):
    """The mean over the columns of each one's largest entry, among the rows ``keys``."""
    rows = table if keys is None else [table[row] for row in keys]
    return sum(map(max, zip(*rows, strict=True))) / len(table[0])


def largest(sums, keys):
    """The places of the ``keys`` largest sums; None: of all."""
    return sorted(range(len(sums)), key=lambda place: -sums[place])[:keys]


def filip(image, text, mask, scale, same, smoothing, keys=None):
    """FILIP's loss by loops: every picture against every caption, both ways."""
    tables = [[cosines(a[None], b[None], m[None])[0] for b, m in zip(text, mask, strict=True)] for a in image]
    paired = [tables[place][place] for place in range(len(image))]  # captions down, pictures across
    words = [largest([sum(row) for row in table], keys) for table in paired]
    patches = [largest([sum(column) for column in zip(*table, strict=True)], keys) for table in paired]
    terms = []
    for anchor in range(len(image)):
        of_image = [best(table, words[other]) for other, table in enumerate(tables[anchor])]
        turned = [list(zip(*row[anchor], strict=True)) for row in tables]
        of_text = [best(table, patches[other]) for other, table in enumerate(turned)]
        for logits in (of_image, of_text):
            mass = [math.exp(scale * logit) for logit in logits]
            positive = sum(m for m, other in zip(mass, same, strict=True) if other == same[anchor])
            spread = sum(math.log(m / sum(mass)) for m in mass) / len(mass)
            terms.append(-(1 - smoothing) * math.log(positive / sum(mass)) - smoothing * spread)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("keys", [None, 1, 2, 9])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("same", [[0, 1, 2], [4, 1, 4]])
def test_late_interaction_compares_all_pairs(monkeypatch, smoothing, same, keys):
    image, text, mask = pairs([(4, 3), (4, 6), (4, 1)])
    expected = filip(image, text, mask, 5.0, same, smoothing, keys)
    gradients = []
    for cells in (2**26, 1):  # all at once, and one row at a time
        monkeypatch.setattr(alignment, "CHUNK_CELLS", cells)
        leaf = image.clone().requires_grad_()
        options = {"same": torch.tensor(same), "label_smoothing": smoothing, "keys": keys}
        result = late_interaction(leaf, text, mask, torch.tensor(5.0, dtype=torch.float64), **options)
        assert math.isclose(result, expected, rel_tol=1e-9)
        result.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
