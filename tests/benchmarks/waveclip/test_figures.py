"""Table 1 and Figures 1, 3 and 4: closed formulas, and that what is rendered says what was run."""

import numpy as np
import pytest
import torch

from benchmarks.printed import paper_numbers
from benchmarks.waveclip import fig1, fig3, fig4, table1
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.costs import WavePath, cost
from common.clip import CLIP
from common.timing import seconds
from waveclip import WaveTower


def test_naive_overhead_by_the_closed_formula():
    """The tiny tower: width 64, 2 blocks, 32 px, patch 8: 4 + 1 coarse tokens, 12 + 1 of detail."""
    width, layers, coarse = 64, 2, 5
    wave = WaveTower.from_image_tower(CLIP.tiny().image_tower).eval()
    naive, cached = (cost(model, 32).macs for model in (fig3.Naive(wave), WavePath(wave, 1)))
    linear = layers * coarse * 12 * width**2
    attention = layers * 2 * coarse**2 * width  # coarse queries meet coarse keys once more
    assert naive.gmacs - naive.gmacs_paper - (cached.gmacs - cached.gmacs_paper) == pytest.approx(attention / 1e9)
    extra = 1e9 * (naive.gmacs_paper - cached.gmacs_paper)
    # Beside the blocks: norms at 5 a value, the coarse patches, the wavelet's own filters, one more read-out.
    assert 1.0 < extra / linear < 1.6


def test_naive_and_cached_agree():
    wave = WaveTower.from_image_tower(CLIP.tiny().image_tower).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        naive, cached = fig3.Naive(wave)(images), WavePath(wave, 1)(images)
    torch.testing.assert_close(naive[-1], cached[-1], atol=1e-5, rtol=1e-5)


def test_comparison_states_both_sides():
    result = fig3.cached_and_naive(WaveTower.from_image_tower(CLIP.tiny().image_tower).eval(), 32, 2, 1)
    assert result["overhead"] == pytest.approx(result["naive_gmacs"] - result["cached_gmacs"])
    assert result["overhead"] > 0 and result["cached_seconds"] > 0 and result["batch"] == 2


def test_timing_alternates_and_wants_a_round():
    order = []
    durations = seconds({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert order == ["a", "b"] * 3  # one round warms up
    assert set(durations) == {"a", "b"}
    with pytest.raises(ValueError, match="rounds 0"):
        seconds({}, 0)


def test_figure_3_renders_beside_the_paper():
    model = {
        "batch": 8, "cached_gmacs": 17.0, "naive_gmacs": 21.0, "cached_seconds": 1.0, "naive_seconds": 1.25
    }  # fmt: skip
    printed = paper_numbers("waveclip")["figure3"]["overhead"]
    points = [
        {"method": f"point {i}", "refined": 0.2, "overhead": 0.9, "overhead_paper": 0.8, "printed": value}
        for i, value in enumerate(printed)
    ]
    run = {"dtype": "float32", "device": "CPU", "threads": 2}
    rendered = fig3.render({"conditions": run, "models": {"a, b": model}, "points": points})
    assert "| 20.0 % |" in rendered["md"]
    assert all(f"+{value:.2f}" in rendered["md"] for value in printed)
    assert set(rendered["figures"]) == {"waveclip-fig3"}


def test_table_1_says_what_two_levels_need():
    rows = [
        {
            "levels": 1,
            "image_size": 224,
            "tokens": [50, 198],
            "gmacs_paper": [4.3, 17.0],
            "gmacs": [4.4, 17.5],
        }
    ]
    need = {"192": 3.0, "224": 3.5, "256": 4.0}
    text = table1.render({"rows": rows, "patches_needed": need, "paper_full": 197})["md"]
    assert "| 1 | 224 px | 1 | 198 | 17.00 | 17.50 |" in text
    assert "3.5 patches" in text and "256 px (4)" in text
    vision = {"image_size": 224, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64}
    with pytest.raises(ValueError, match="192 or 256"):
        WaveTower.from_image_tower(CLIP({**CLIP.tiny().architecture, "vision_cfg": vision}).image_tower, levels=2)


def student(margin, maximum, coarse, fine):
    return Answers(np.stack([coarse, fine]), margin[None], maximum[None])


def by_thousandths():
    """The coarse level is right in the upper half of the pictures, the fine one in the upper three quarters.

    The margin refines from below and the maximum from above, so that the margin comes to the second quarter first.
    """
    place = np.arange(1000) / 1000
    return student(place, 1 - place, place >= 0.5, place >= 0.25)


def test_gates_are_compared_at_equal_shares():
    rows = {row["what"]: row for row in fig4.compare_gates(2 * [by_thousandths()], 20)["rows"]}
    leads = [rows[f"accuracy, {100 * share:.1f} % refined"]["lead"][0] for share in fig4.SHARES]
    assert leads == pytest.approx([0, 0.264 - 0.25, 0.25 - (0.558 - 0.5), 0.25 - (0.743 - 0.5)], abs=1e-6)
    auroc, over_all = rows["AUROC: the coarse level is right"], rows["accuracy, mean over all refined shares"]
    assert (auroc["margin"][0], auroc["maximum"][0], auroc["lead"][0]) == pytest.approx((1, 0, 1), abs=1e-6)
    # Flat, then a rise by a quarter over a quarter of the pictures, then flat.
    assert over_all["margin"][0] == pytest.approx(0.25 * 0.5 + 0.25 * 0.625 + 0.5 * 0.75, abs=0.001)
    assert over_all["maximum"][0] == pytest.approx(0.5 * 0.5 + 0.25 * 0.625 + 0.25 * 0.75, abs=0.001)


def test_curves_and_histograms_are_of_all_seeds():
    result = fig4.compare_gates(2 * [by_thousandths()], 20)
    curve = result["gates"]["margin"]["curve"]
    assert (curve["accuracy"][0], curve["accuracy"][-1]) == pytest.approx((0.5, 0.75))
    assert result["lead"]["lead"][10] == pytest.approx(0.25, abs=1e-6), "where half of the pictures are refined"
    assert sum(result["gates"]["maximum"]["histograms"]["right"]) == 2 * 500
    assert sum(result["gates"]["maximum"]["histograms"]["wrong"]) == 2 * 500


def test_figures_1_and_4_render():
    gates = fig4.compare_gates(2 * [by_thousandths()], 20)
    rendered = fig4.render({"conditions": {"seeds": 2}, "pictures": 1000} | gates)
    assert "| AUROC: the coarse level is right | 100.00 | 0.00 | +100.00 [" in rendered["md"]
    assert "1,000 test pictures" in rendered["md"] and set(rendered["figures"]) == {"waveclip-fig4"}
    point = {"gmacs": 0.03, "accuracy": 0.8, "low": 0.7, "high": 0.9}
    result = {
        "conditions": {"seeds": 3, "reads_of_test": 7},
        "pictures": 50,
        "teacher": point,
        "half": point,
        "frontier": [point | {"refined": i / 10, "gmacs": 0.01 + i / 400} for i in range(11)],
        "paper": paper_numbers("waveclip")["table2"],
    }
    rendered = fig1.render(result)
    assert "| 0 % | 0.0100 | 80.0 [70.0, 90.0] | 33 % |" in rendered["md"]
    assert "50 test pictures" in rendered["md"] and "whatever models: 7." in rendered["md"]
    assert set(rendered["figures"]) == {"waveclip-fig1"}
