"""Costs of several levels by closed formulas, the embedded block on tiny models, and what the table says."""

import json

import pytest
import torch

from benchmarks.waveclip import highres as waveclip_highres
from benchmarks.waveclip.highres import SIZES, measured, price, render
from benchmarks.waveclip.observed import observe
from common.clip import CLIP
from common.testing import TINY_CAPTIONS, tiny_architecture
from waveclip import WaveTower
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


def block(large):
    """An embedded block of two students on noise."""
    small = CLIP.tiny().eval()
    pairs = [(small, WaveTower.from_image_tower(small.image_tower).eval())]
    pairs.append((large, WaveTower.from_image_tower(large.image_tower, levels=2).eval()))
    students = []
    for teacher, student in pairs:
        size = teacher.image_tower.image_size
        batch = {"image": torch.randn(30, 3, size, size), "label": torch.arange(30) % 6}
        students.append(measured(teacher, student, observe(teacher, student, [batch], list(TINY_CAPTIONS))))
    gained = {"teacher": (0.1, 0.05, 0.15), "student": (0.08, 0.03, 0.13)}
    return {
        "split": "test",
        "pictures": 30,
        "models": students,
        "twice_the_pixels": gained,
        "behind": (-0.02, -0.03, -0.01),
    }


def test_the_embedded_block_has_every_exit_and_both_frontiers(large):
    found = block(large)
    one, two = found["models"]
    assert [row["tokens"] for row in one["rows"]] == [17, 5, 18]
    assert [row["tokens"] for row in two["rows"]] == [65, 5, 18, 67]
    for model in found["models"]:
        first, last = model["frontier"][0], model["frontier"][-1]
        assert first["gmacs"] == pytest.approx(model["rows"][1]["gmacs"])
        assert last["gmacs"] == pytest.approx(model["rows"][-1]["gmacs"])
        assert first["accuracy"] == pytest.approx(model["rows"][1]["accuracy"])


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
    for command in waveclip_highres.COMMANDS:
        assert f"not run; `{waveclip_highres.COMMANDS[0]}`" in rendered["md"] and command in rendered["md"]
    assert len(rendered["figures"]["waveclip-highres"].axes) == 1
    rendered = render(json.loads(json.dumps(result | {"embedded": block(large)})))
    assert "| 64 px, 2 levels | all leave after step 1 | 18 |" in rendered["md"]
    assert "teacher's accuracy by +10.0 [+5.0, +15.0] points" in rendered["md"] and "not run" not in rendered["md"]
    assert len(rendered["figures"]["waveclip-highres"].axes) == 2
    for table in rendered["md"].split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1


def test_without_weights_of_96_px_their_block_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(waveclip_highres, "STUDENT_96", tmp_path / "none.safetensors")
    monkeypatch.setattr(waveclip_highres, "embedded", lambda smoke: pytest.fail("it ran"))
    monkeypatch.setattr(waveclip_highres, "SIZES", ())
    result = waveclip_highres.run(smoke=True)
    assert result["embedded"] is None and result["paper_scale"] == []
