"""Recoverable Compression against its formula, in loops over one picture's tokens, and its answer to other classes."""

from dataclasses import replace
from statistics import fmean, pstdev

import pytest
import torch

from common.reducer_registry import named, setting_for
from common.reduction import ReducedTower
from patchrank.reducers import RecoverableCompression
from patchrank.reducers.base import readout_of
from tests.patchrank.reducers.slow import (
    PATCHES,
    TOWER,
    cosine,
    images,
    plain,
    slow_density_peaks,
    small_tower,
    tokens,
)

NORM = torch.nn.LayerNorm(6).double()
PROJECTION = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def texts(count=3, width=4, seed=6):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def readout(x):
    return NORM(x) @ PROJECTION


def slow_choice(picture, classes, threshold, count):
    """Places of the ``count`` patches of [1+K,D] that stay, in the order of the choice, and how many stand out."""
    class_token, *patches = readout(picture)
    seen = [float(class_token @ p) for p in patches]
    limit = fmean(seen) + threshold * pstdev(seen)
    outliers = sorted((j for j in range(len(seen)) if seen[j] > limit), key=lambda j: -seen[j])
    said = [max(cosine(p, text) for text in classes) for p in patches]
    recovered = sorted((j for j in range(len(seen)) if j not in outliers), key=lambda j: -said[j])
    return [*outliers, *recovered][:count], len(outliers)


@pytest.mark.parametrize("threshold", [-0.5, 1.0, 9.0])
@torch.no_grad()
def test_outliers_stay_texts_recover_and_the_rest_merges(threshold):
    """Of 16 patches 10 are left: 8 stay and 8 merge into 2. The first threshold fills most places, the last none."""
    x, sizes = tokens(3), torch.arange(1.0, 17.0).expand(3, -1)
    reducer = RecoverableCompression(0.6, readout, texts(), threshold, merged=0.2)
    result, context = reducer(x, replace(plain(x), sizes=sizes))
    numbers = set()
    for row, picture in enumerate(x):
        chosen, outliers = slow_choice(picture, texts(), threshold, 8)
        numbers.add(min(outliers, 8))
        kept = sorted(chosen)
        others = [j for j in range(PATCHES) if j not in kept]
        assert context.positions[row].tolist() == [*kept, -1, -1]
        torch.testing.assert_close(result[row, 1:9], picture[1:][kept])
        groups = [[others[i] for i in group] for group in slow_density_peaks(readout(picture[1:])[others], 2)]
        means = [sum((j + 1) * picture[1 + j] for j in group) / sum(j + 1 for j in group) for group in groups]
        torch.testing.assert_close(result[row, 9:], torch.stack(means))
        assert context.sizes[row].tolist() == [*(j + 1 for j in kept), *(sum(j + 1 for j in g) for g in groups)]
    assert numbers <= {0} if threshold == 9 else max(numbers) > 0


@torch.no_grad()
def test_the_highest_outliers_stay_where_there_are_too_many():
    x = tokens(1)
    chosen, outliers = slow_choice(x[0], texts(), -1.0, 4)
    assert outliers > 4
    positions = RecoverableCompression(5 / 16, readout, texts(), -1.0)(x, plain(x))[1].positions
    assert positions[0].tolist() == [*sorted(chosen), -1]


def test_deviations_are_those_of_the_patches_themselves():
    """v is 3, 0, 0, 0, so the first patch lies 1.73 deviations above the mean; as of a sample it would be 1.5."""
    reducer = RecoverableCompression(0.5, readout, torch.tensor([[0.0, 1.0]]), threshold=1.6)
    patches = torch.tensor([[[3.0, -1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    assert reducer.ranked(torch.tensor([[1.0, 0.0]]), patches)[0].tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_other_classes_give_a_picture_another_embedding():
    """The texts' lengths say nothing, and a class that is listed twice says nothing new."""
    tower = small_tower()

    def embedding(classes):
        setting = setting_for(tower, 0.5, 1, texts=classes)
        return ReducedTower(tower, named("recoverable-compression").reducers(setting))(images())

    classes = texts(3, TOWER["embed_dim"])
    z = embedding(classes)
    lengths = torch.tensor([[9.0], [0.1], [1.0]])
    torch.testing.assert_close(embedding((lengths * classes).flip(0)), z)
    torch.testing.assert_close(embedding(classes[[0, 1, 2, 2]]), z)
    assert (embedding(texts(3, TOWER["embed_dim"], seed=7)) - z).abs().amax(1).min() > 1e-4


@torch.no_grad()
def test_similarities_are_precise_under_autocast():
    """The cosines of these patches with the text differ by about 1e-4, which bf16 does not tell apart."""
    x = 1 + 1e-3 * tokens(4).float()
    reducer = RecoverableCompression(0.6, lambda x: x, texts(1, 6).float(), threshold=9.0)
    expected = reducer(x, plain(x))[1].positions
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reducer(x, plain(x))[1].positions, expected)


@torch.no_grad()
def test_autocast_does_not_round_what_the_tower_reads_out():
    tower = small_tower().float()
    x = torch.randn(2, PATCHES, TOWER["width"], generator=torch.Generator().manual_seed(8))
    expected = tower.ln_post(x) @ tower.proj
    with torch.autocast("cpu", torch.bfloat16):
        read = readout_of(setting_for(tower, 0.5, 1), "recoverable-compression")(x)
    torch.testing.assert_close(read, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecoverableCompression(0.5, readout, texts()[0]), r"texts of shape \(4,\) are no embeddings \[C,E\]"),
        (lambda: RecoverableCompression(0.5, readout, texts()[:0]), r"texts of shape \(0, 4\) are no embeddings"),
        (lambda: RecoverableCompression(0.5, readout, texts(), merged=1.0), r"merged 1\.0 is not in \(0, 1\)"),
        (
            lambda: RecoverableCompression(0.5, readout, texts(3, 5))(tokens(), plain(tokens())),
            "texts of 5 numbers do not fit a tower whose embeddings have 4; give those of its own text tower",
        ),
    ],
)
def test_texts_and_constants_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
