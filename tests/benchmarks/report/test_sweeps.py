"""Reducers at equal multiply-adds, from the rows of sweeps."""

import pytest

from benchmarks.report.sweeps import at_equal_cost, interpolated


def row(share, lost):
    return {"of_whole": share, "reason": None} | {
        "difference": lost,
        "difference_low": lost - 0.01,
        "difference_high": lost + 0.01,
    }


def test_a_loss_lies_on_the_line_between_two_keep_rates():
    rows = [row(0.9, -0.01), row(0.5, -0.05), row(0.7, -0.03)]
    assert interpolated(rows, 0.6) == pytest.approx((-0.04, -0.05, -0.03))
    assert interpolated(rows, 0.7) == pytest.approx((-0.03, -0.04, -0.02))


@pytest.mark.parametrize("share", [0.4, 0.95])
def test_nothing_is_said_beyond_what_was_measured(share):
    failed = {"of_whole": None, "reason": "it needs a class token", "difference": None}
    assert interpolated([row(0.9, -0.01), row(0.5, -0.05), failed], share) is None


def test_the_committed_sweeps_fill_the_table_with_the_best_reducer_first():
    head, _, *lines = [line for line in at_equal_cost().splitlines() if line.startswith("|")]
    assert head.startswith("| reducer | scenes of shape, 75 % of GMACs | CIFAR-10, 75 % of GMACs |")
    at_75 = [[float(cell.split()[0]) for cell in line.split("|")[2:5] if cell.strip() != "–"] for line in lines]
    means = [sum(found) / len(found) for found in at_75 if found]
    assert means == pytest.approx(sorted(means, reverse=True), abs=0.11) and len(lines) > 20  # cells are rounded
