"""Gates on probabilities that are written out."""

import math

import pytest
import torch

from waveclip import MarginGate, MaxProbabilityGate, margin_threshold

# Exact in binary: margins 0.25, 0 and 0.75, largest 0.5, 0.5 and 0.875.
PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.125, 0.0, 0.875]])


def test_the_margin_is_the_largest_less_the_second():
    assert MarginGate(0.25).confidence(PROBABILITIES).tolist() == [0.25, 0.0, 0.75]


def test_the_confidence_of_the_other_gate_is_the_largest():
    assert MaxProbabilityGate(0.5).confidence(PROBABILITIES).tolist() == [0.5, 0.5, 0.875]


def test_a_tie_with_the_threshold_stops():
    assert MarginGate(0.25)(PROBABILITIES).tolist() == [True, False, True]
    assert MaxProbabilityGate(0.5)(PROBABILITIES).tolist() == [True, True, True]


def test_just_above_the_tie_goes_on():
    assert MarginGate(0.25 + 1e-6)(PROBABILITIES).tolist() == [False, False, True]
    assert MaxProbabilityGate(0.5 + 1e-6)(PROBABILITIES).tolist() == [False, False, True]


@pytest.mark.parametrize("gate", [MarginGate, MaxProbabilityGate])
def test_zero_always_stops_and_more_than_one_never(gate):
    assert gate(0.0)(PROBABILITIES).all()
    assert not gate(1.01)(PROBABILITIES).any()


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_a_threshold_that_is_negative_or_no_number_is_refused(threshold):
    with pytest.raises(ValueError, match=f"margin threshold {threshold} must be 0 or more"):
        MarginGate(threshold)
    with pytest.raises(ValueError, match=f"probability threshold {threshold} must be 0 or more"):
        MaxProbabilityGate(threshold)


def test_a_margin_of_one_class_is_refused():
    with pytest.raises(ValueError, match="a margin needs two classes at least; use MaxProbabilityGate"):
        MarginGate(0.5)(torch.ones(2, 1))


def test_the_relative_threshold_is_divided_by_the_classes():
    assert margin_threshold(20.0, 1000) == 0.02
    with pytest.raises(ValueError, match="num_classes 0 must be positive"):
        margin_threshold(20.0, 0)
