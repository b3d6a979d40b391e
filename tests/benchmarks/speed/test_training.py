"""The timing of MLIP's training at its smallest."""

import pytest
import torch

from benchmarks.speed import training as mlip_speed


def test_steps_and_matching_are_measured_side_by_side():
    found = mlip_speed.measure("cpu", rounds=1, smoke=True)
    assert set(found["matching"]) == {"49 x 20", "196 x 77"}
    for row in found["steps"]:
        assert row["ratio"] > 0 and len(row["mlip"]["rounds"]) == len(row["clip"]["rounds"]) == 2
        assert row["macs_ratio"] == pytest.approx(row["gmacs"]["clip"] / row["gmacs"]["mlip"])
        assert row["matching"]["tokens"] == [8, 15]  # of 16 patches half are kept; all words but start-of-text
    text = "\n\n".join(mlip_speed.parts(found))
    assert "| float32 | 2 |" in text and "256 pairs" in text and "196 x 77" in text


def test_the_matching_that_is_timed_is_one_to_one():
    partner = mlip_speed.matching(3, 6, 4, "cpu")()
    assert partner.shape == (12,)
    assert all(len(set(of.tolist())) == 4 for of in partner.split(4)) and (partner < 6).all()
    assert torch.equal(partner, mlip_speed.matching(3, 6, 4, "cpu")())
