"""Two CSV files of answers: what is counted as a difference."""

import pytest

from benchmarks.together.runtime import compared

OURS = [
    {"picture": "a", "label": "cat", "level": "0", "probability": "0.9"},
    {"picture": "b", "label": "dog", "level": "1", "probability": "0.5"},
]


def test_labels_levels_and_probabilities_are_compared_picture_by_picture():
    theirs = [OURS[0] | {"probability": "0.89"}, OURS[1] | {"label": "cat", "level": "0"}]
    found = compared(OURS, theirs)
    assert found.pop("probability") == pytest.approx(0.01)
    assert found == {"pictures": 2, "stopped early": 1, "other labels": 1, "other levels": 1}


def test_answers_to_other_pictures_are_not_compared():
    with pytest.raises(ValueError, match="2 and 1 answers are not of the same pictures in the same order"):
        compared(OURS, OURS[:1])
