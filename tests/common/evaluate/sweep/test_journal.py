"""The file of measured points."""

from common.evaluate.points import Point
from common.evaluate.sweep.journal import Journal


def test_a_name_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path):
    file, identity = tmp_path / "points.jsonl", {"model": "one\u2028two\x85three"}
    Journal(file, identity).add("test", Point("tome", 0.5, (1,)), {"top1": 0.25})
    assert Journal(file, identity).of("test")[Point("tome", 0.5, (1,))]["top1"] == 0.25
