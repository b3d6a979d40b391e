"""The file of measured points."""

import pytest

from common.evaluate.points import Point
from common.evaluate.sweep.journal import Journal


def test_a_name_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path):
    file, identity = tmp_path / "points.jsonl", {"model": "one\u2028two\x85three"}
    Journal(file, identity).add("test", Point("tome", 0.5, (1,)), {"top1": 0.25})
    assert Journal(file, identity).of("test")[Point("tome", 0.5, (1,))]["top1"] == 0.25


def test_a_sweep_that_measured_nothing_refuses_no_other(tmp_path):
    """Nor does the header that an interruption left alone."""
    file = tmp_path / "points.jsonl"
    Journal(file, {"limit": 1})
    file.write_text('{"sweep": {"limit": 2}}\n')
    Journal(file, {"limit": 3}).add("test", Point(), {"top1": 0.25})
    assert Journal(file, {"limit": 3}).of("test")[Point()]["top1"] == 0.25
    with pytest.raises(ValueError, match="holds another sweep: limit was 3, is 4"):
        Journal(file, {"limit": 4})
