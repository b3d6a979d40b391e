"""Turns that time themselves."""

from common.timing import Timed, rounds_ratio, take_turns


def test_turns_are_taken_in_order_and_the_first_round_does_not_count():
    order, seconds = [], {"slow": iter([9.0, 2.0, 4.0, 6.0]), "fast": iter([9.0, 1.0, 1.0, 2.0])}

    def turn(name):
        order.append(name)
        return Timed(next(seconds[name]), None)

    found = take_turns({name: lambda name=name: turn(name) for name in seconds}, rounds=3)
    assert order == ["slow", "fast"] * 4
    assert found["slow"] == {"seconds": 4.0, "rounds": [2.0, 4.0, 6.0], "peak_bytes": None}
    assert rounds_ratio(found["slow"], found["fast"]) == [2.0, 4.0, 3.0]
