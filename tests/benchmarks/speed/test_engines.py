"""The towers on all installed engines at their smallest."""

import pytest

from benchmarks.speed import engines
from benchmarks.speed.towers import SMALLEST
from benchmarks.statistics import median_interval


@pytest.fixture(scope="module")
def result():
    return engines.measure(SMALLEST, "cpu", rounds=2)


def test_every_engine_gives_the_same_embeddings_at_both_batch_sizes(result):
    rows = {(row["engine"], row["batch"]): row for row in result["rows"] if row["dtype"] == "float32"}
    for engine in ("ONNX Runtime", "ours", "ours, optimised"):
        for batch in (1, 8):
            row = rows[engine, batch]
            assert row["difference"] < 1e-5 and len(row["rounds"]) == len(row["ratios"]) == 2
    assert rows["open_clip", 1]["ratios"] == [1, 1] and rows["WaveCLIP, level 0", 1]["difference"] is None
    assert rows["WaveCLIP, level 0, optimised", 8]["gmacs"] < rows["ours, optimised", 8]["gmacs"] / 2


def test_the_table_names_what_is_missing(result):
    left = [row for row in result["rows"] if row["engine"] not in ("OpenVINO", "ours, torch.compile")]
    text = "\n".join(engines.parts({"rows": left}))
    assert "| ours, optimised | float32 | 8 |" in text and "% (optimised, float32, batch 1)" in text
    assert "OpenVINO (`pip install -e '.[export,rivals]'`); ours, torch.compile (`make speed COMPILE=1`)." in text


def test_goals_are_judged_by_the_whole_interval_of_the_rounds():
    def row(engine, dtype, seconds, gmacs=16.0):
        return {"engine": engine, "dtype": dtype, "gmacs": gmacs, "rounds": [seconds] * 5}

    at_one = [
        row("ONNX Runtime", "float32", 1.0), row("open_clip", "float32", 1.0), row("ours, optimised", "float32", 0.9),
        row("WaveCLIP, level 0, optimised", "float32", 0.25, gmacs=4.0), row("open_clip", "bfloat16", 1.0),
        row("ours, optimised", "bfloat16", 0.8),
    ]  # fmt: skip
    text = engines.goals([each | {"batch": batch} for batch in (1, 8) for each in at_one])
    assert "| dense tower, × ONNX Runtime | float32 | 1 | 0.98 | 1.11 [1.11, 1.11] | reached |" in text
    assert "| dense tower, × open_clip | float32 | 8 | 1.15 | 1.11 [1.11, 1.11] | MISSED |" in text
    assert "| dense tower, × open_clip | bfloat16 | 1 | 1.15 | 1.25 [1.25, 1.25] | reached |" in text
    assert "OpenVINO" not in text, "it is not installed"
    assert "| coarse level, share of its counted saving | float32 | 8 | 0.92 | 0.90 [0.90, 0.90] | MISSED |" in text


def test_the_interval_of_a_median_is_that_of_its_resamples():
    assert median_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    low, high = median_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1 <= low < 3 < high <= 5
