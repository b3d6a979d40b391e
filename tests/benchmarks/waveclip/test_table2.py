"""The paper-scale block: its numbers, its words, and that nothing is filled in without a run."""

import json

import pytest

from benchmarks.waveclip import table2
from benchmarks.waveclip.table2 import paper_scale, paper_scale_markdown, render, run


@pytest.fixture(scope="module")
def block():
    return paper_scale()


COSTS = {  # without and with attention's two products
    "TinyCLIP (ViT-8M/16)": (1.59, 1.79),
    "TinyCLIP (ViT-39M/16)": (7.53, 8.00),
    "Open CLIP (ViT-B/32)": (4.37, 4.41),
    "MobileCLIP-S2 (Conv)": (5.99, 6.00),
    "CLIP ViT-B/16": (16.87, 17.58),
    "MobileCLIP-B (RegNetY-B)": (17.01, 17.73),
}


def test_costs_of_the_architectures(block):
    rows = {row["method"]: row for row in block["rows"]}
    for method, costs in COSTS.items():
        assert (round(rows[method]["gmacs_paper"], 2), round(rows[method]["gmacs"], 2)) == costs, method


def test_costs_beside_the_papers(block):
    rows = {row["method"].split(" (")[0]: row for row in block["rows"]}
    assert len(block["rows"]) == 11  # Table 2 and the point in the prose
    assert rows["CLIP ViT-B/16"]["gmacs_paper"] == pytest.approx(16.867794432, abs=1e-9)
    assert rows["CLIP ViT-B/16"]["gmacs"] == pytest.approx(17.58312192, abs=1e-9)
    for name in ("TinyCLIP", "Open CLIP", "CLIP ViT-B/16", "MobileCLIP-B", "MobileCLIP2"):
        assert abs(rows[name]["difference_paper"]) < 0.5
    assert rows["MobileCLIP-S2"]["gmacs_paper"] == pytest.approx(5.99, abs=0.005)
    assert rows["MobileCLIP-S2"]["difference_paper"] == pytest.approx(100 * (5.99 / 7.11 - 1), abs=0.1)
    assert "7.82" in rows["MobileCLIP-S2"]["note"]


def test_waveclip_rows_follow_the_closed_formula(block):
    """One tower of width D = 768: 50 coarse tokens, then 148 that attend to 198."""
    width, rows = 768, [row for row in block["rows"] if row["refined"] is not None]
    linear = 12 * width * width + 2 * 5 * width
    patches = {50: 49 * width * width, 148: 147 * width * width}

    def level(new: int, seen: int) -> tuple[float, float]:
        paper = 12 * new * linear + patches[new] + 2 * 5 * new * width + width * 512
        return paper / 1e9, (paper + 12 * 2 * new * seen * width) / 1e9

    (coarse_paper, coarse), (fine_paper, fine) = level(50, 50), level(148, 198)
    for row in rows:
        p = row["refined"]
        assert row["tokens"] == pytest.approx(50 + 148 * p)
        # The colour and wavelet filters are the tokenizer's own few multiply-adds.
        assert row["gmacs_paper"] == pytest.approx(coarse_paper + p * fine_paper, rel=5e-3)
        assert row["gmacs"] == pytest.approx(coarse + p * fine, rel=5e-3)
    assert [row["refined"] for row in rows] == [0.148, 0.264, 0.743, 0.558]


def test_savings(block):
    savings = block["savings"]
    assert savings["stated_like_for_like"] == pytest.approx(100 * (1 - 14.03 / 17.58312192))
    assert savings["gmacs"] == pytest.approx(20, abs=1.5)


def test_table_says_what_was_not_run(block):
    text = paper_scale_markdown(block)
    assert text.count("| not run |") == 11
    assert "IMAGENET=DIR WEIGHTS=DIR make reproduce-table2" in text
    filled = json.loads(json.dumps(block))
    for row in filled["rows"]:
        row["accuracy"] = {"top1": 66.31, "interval": [65.9, 66.72], "images": 50000}
    text = paper_scale_markdown(filled)
    assert "66.3 [65.9, 66.7], 50,000 images" in text
    assert "not run" not in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}


def test_run_is_json_and_wants_both_folders(block, monkeypatch):
    monkeypatch.setattr(table2, "paper_scale", lambda imagenet, weights: block)
    monkeypatch.setattr(table2, "measure", lambda shares, smoke: {"shares": shares})
    monkeypatch.setattr(table2, "markdown", lambda measured: "the embedded block\n")
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.delenv("WEIGHTS", raising=False)
    result = json.loads(json.dumps(run(smoke=True)))
    assert {
        "scale",
        "seeds",
        "revision",
        "clean",
        "torch",
        "device",
        "threads",
        "dtype",
        "batch",
        "date",
    } <= set(result["conditions"])
    assert result["embedded"]["shares"] == {"low": 0.148, "mid": 0.264, "high": 0.743}
    assert render(result)["md"].endswith("the embedded block\n")
    assert render(result)["figures"] == {}
    monkeypatch.setenv("IMAGENET", "somewhere")
    with pytest.raises(ValueError, match="set both or neither"):
        run()
