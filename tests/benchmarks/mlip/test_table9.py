"""Table 9: the plain row is CLIP's own count, and what is rendered says what was counted."""

import pytest

from benchmarks.mlip import table9 as mlip_table9
from benchmarks.mlip.table9 import parts_of, render, row
from benchmarks.printed import paper_numbers


def values(paper_gmacs, gmacs):
    return {"gmacs_paper": paper_gmacs, "gmacs": gmacs, "gmacs_fft": 0.0}


def test_the_papers_ratios_follow_from_its_numbers():
    for printed in paper_numbers("mlip")["table9"]:
        assert printed["accuracy"] / printed["gflops"] == pytest.approx(printed["ratio"], abs=0.008)


def test_rows_of_vit_b_32():
    clip, mlip = (row("ViT-B-32", method) for method in ("CLIP", "MLIP"))
    assert round(clip["tower"]["gmacs_paper"], 2) == 4.37 and round(clip["tower"]["gmacs"], 2) == 4.41
    assert (round(clip["text"]["gmacs_paper"], 2), round(clip["text"]["gmacs"], 2)) == (2.91, 2.98)
    assert clip["guide"] is None and clip["patches"] == [49] and clip["tower"]["gmacs_fft"] == 0
    assert clip["training"]["gmacs"] == pytest.approx(clip["tower"]["gmacs"] + clip["text"]["gmacs"])
    # In training all of MLIP's tokens are projected, with both heads.
    assert mlip["training_heads"] == pytest.approx((49 + 23) * 768 * 512 / 1e9 + 49 * 5 * 768 / 1e9)
    assert mlip["patches"] == [49, 34, 23]
    assert 0.09 < mlip["guide"]["gmacs_paper"] < mlip["guide"]["gmacs"] < 0.1
    parts = parts_of(mlip, "gmacs")
    assert parts["image"] + parts["guide"] == pytest.approx(mlip["tower"]["gmacs"])
    assert parts["image"] < clip["tower"]["gmacs"]


def test_rendering_states_the_difference_and_why():
    rows = [
        {
            "method": method,
            "architecture": "ViT-B-16",
            "patches": [196, 98, 49] if guide else [196],
            "tower": tower,
            "guide": guide,
            "text": values(2.91, 2.98),
            "training_heads": 0.1,
            "training": {"gmacs_paper": 19.9, "gmacs": 20.7},
        }
        for method, tower, guide in [
            ("CLIP", values(16.87, 17.58), None),
            ("MLIP", values(13.0, 13.4), values(0.09, 0.1)),
        ]
    ]
    text = render({"rows": rows, "paper": paper_numbers("mlip")["table9"]})["md"]
    assert "| CLIP ViT-B-16 | 196 | 16.87 | – | 2.91 | 19.78 | 19.78 (ours +0.0 %) | 19.90 | – |" in text
    costs = "12.91 | 0.09 | 2.91 | 15.91 | 19.54 (ours -18.6 %) | 19.90 | 22.9 %"
    assert f"| MLIP ViT-B-16 | 196 → 98 → 49 | {costs} |" in text
    assert "leaves 16.63" in text and "The other 3.63" in text and "not run" in text


def test_a_smoke_run_counts_the_papers_rows_alone(monkeypatch):
    monkeypatch.setattr(mlip_table9, "row", lambda name, method: {"architecture": name, "method": method})
    assert [counted["architecture"] for counted in mlip_table9.run(smoke=True)["rows"]] == ["ViT-B-16"] * 4
    assert len(mlip_table9.run()["rows"]) == 12


def test_slip_and_declip_cost_more_in_training_alone():
    clip, slip, declip = (row("ViT-B-32", method) for method in ("CLIP", "SLIP", "DeCLIP"))
    assert clip["tower"] == slip["tower"] == declip["tower"] and clip["text"] == slip["text"] == declip["text"]
    image, text = clip["tower"]["gmacs"], clip["text"]["gmacs"]
    head = 2 * (768 * 4096 + 4096**2 + 4096 * 256) / 1e9
    assert slip["training"]["gmacs"] == pytest.approx(3 * image + text + head)
    simsiam = 2 * (512 * 1024 + 2 * 1024**2 + 2 * 1024 * 512) / 1e9
    masked = 0.15 * 77 * 512 * 49408 / 1e9
    assert declip["training"]["gmacs"] == pytest.approx(2 * image + 2 * text + simsiam + masked)
