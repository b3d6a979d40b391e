"""Costs of several levels by closed formulas, and what the table says."""

import json

import pytest
import torch

from benchmarks.waveclip import highres as waveclip_highres
from benchmarks.waveclip.highres import SIZES, price, render
from common.clip import CLIP
from common.testing import tiny_architecture
from waveclip.tokenizer import check_size

WIDTH, LAYERS = 64, 2  # of the tiny tower, patch 8
STATED = {"batch": 4, "rounds": 3, "dtype": "float32", "device": "CPU", "threads": 2, "torch": "2"}


@pytest.fixture
def large(tmp_path):
    """The tiny CLIP for pictures of 64 px: a grid of 8, which halves three times."""
    torch.manual_seed(0)
    return CLIP.from_open_clip(tiny_architecture(tmp_path), image_size=64).eval()


@pytest.mark.parametrize(("levels", "new"), [(2, [5, 13, 49]), (3, [2, 4, 13, 49])])
def test_what_each_level_costs(large, levels, new):
    dense, *exits = price(large.image_tower, levels, batch=1, rounds=1)
    assert dense["tokens"] == 1 + 8 * 8
    seen = 0
    for row, tokens in zip(exits, new, strict=True):
        seen += tokens
        assert row["tokens"] == seen
        # Every new token meets itself and all before it, in two products; the rest is linear in the new tokens.
        products = LAYERS * 2 * tokens * seen * WIDTH
        assert row["level_gmacs"] - row["level_gmacs_paper"] == pytest.approx(products / 1e9)
        share = dense["gmacs_paper"] * tokens / dense["tokens"]
        if row is exits[0]:
            assert row["level_gmacs_paper"] > share  # it pays for the whole wavelet transform
        else:
            assert row["level_gmacs_paper"] == pytest.approx(share, rel=0.05)
        assert row["images_per_second"] > 0
    for key in ("gmacs", "gmacs_paper"):
        assert exits[-1][key] == pytest.approx(sum(row[f"level_{key}"] for row in exits))


def test_the_sizes_are_those_that_their_levels_divide():
    for size, levels in SIZES:
        check_size(size, 16, levels)
    with pytest.raises(ValueError, match="needs a multiple of 128"):
        check_size(448, 16, 3)


def test_what_is_rendered_says_what_was_run(large):
    rows = price(large.image_tower, 2, batch=1, rounds=1)
    result = {
        "conditions": STATED,
        "paper_scale": [{"image_size": 64, "levels": 2, "rows": rows}],
        "embedded": None,
    }
    rendered = render(json.loads(json.dumps(result)))
    assert "| 64 px, 2 levels | exit 2 | 67 |" in rendered["md"] and "(×1.00)" in rendered["md"]
    share = 100 * rows[1]["gmacs"] / rows[0]["gmacs"]
    assert f"dense tower: {share:.1f} % (64 px, 2 levels)." in rendered["md"]
    first, then = waveclip_highres.highres_embedded.COMMANDS
    assert f"96 px: not run; `{first}`, then `{then}`." in rendered["md"]
    assert len(rendered["figures"]["waveclip-highres"].axes) == 1
    for table in rendered["md"].split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1
