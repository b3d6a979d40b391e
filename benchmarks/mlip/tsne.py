"""Exact t-SNE (van der Maaten and Hinton, JMLR 9, 2008), for the few hundred points of a figure.

Shapes: M points, D dimensions.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import entropy

EXAGGERATION, EXAGGERATED = 12.0, 250
"""Factor on the joint probabilities at the beginning, and for how many steps."""


def tsne(points: np.ndarray, perplexity: float = 30.0, steps: int = 1000) -> np.ndarray:
    """Points [M,D] -> a map [M,2] on which neighbours stay neighbours.

    It begins with the first two principal components, so that nothing is random, and follows the gradient of the
    divergence with momentum (0.5, then 0.8) and the rate M/12, at least 50.
    ValueError: a perplexity that M points cannot have.
    """
    joint = joint_probabilities(points, perplexity)
    centred = points - points.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    y = left[:, :2] * singular[:2]
    y *= 1e-4 / y[:, 0].std()
    rate, velocity = max(len(points) / EXAGGERATION, 50.0), np.zeros_like(y)
    for step in range(steps):
        early = step < EXAGGERATED
        velocity = (0.5 if early else 0.8) * velocity - rate * gradient(y, joint * (EXAGGERATION if early else 1.0))
        y = y + velocity
    return y - y.mean(0)


def joint_probabilities(points: np.ndarray, perplexity: float) -> np.ndarray:
    """P [M,M], symmetric, of sum 1: the Gaussian neighbourhoods of all points, each of that perplexity, averaged."""
    count = len(points)
    if not 1 < perplexity < count - 1:
        raise ValueError(f"perplexity {perplexity} of {count} points; use one between 1 and {count - 1}")
    distances = _squared_distances(points)
    conditional = np.zeros((count, count))
    for i, row in enumerate(distances):
        others = np.delete(row, i)
        conditional[i, np.arange(count) != i] = neighbourhood(others, perplexity)
    return (conditional + conditional.T) / (2 * count)


def neighbourhood(distances: np.ndarray, perplexity: float) -> np.ndarray:
    """Probabilities of neighbours at squared ``distances``, Gaussian, as narrow as the perplexity asks for."""
    scaled = (distances - distances.min()) / max(distances.mean(), 1e-12)  # so that widths are of order 1

    def probabilities(log_precision: float) -> np.ndarray:
        logits = -np.exp(log_precision) * scaled
        return np.exp(logits - logsumexp(logits))

    return probabilities(brentq(lambda width: entropy(probabilities(width)) - np.log(perplexity), -10, 20))


def gradient(y: np.ndarray, joint: np.ndarray) -> np.ndarray:
    """Of KL(P || Q) by the map y [M,2], Q being Student's with one degree of freedom -> [M,2]."""
    kernel = 1 / (1 + _squared_distances(y))
    np.fill_diagonal(kernel, 0)
    force = (joint - kernel / kernel.sum()) * kernel
    return 4 * (force.sum(1)[:, None] * y - force @ y)


def _squared_distances(points: np.ndarray) -> np.ndarray:
    norms = (points**2).sum(1)
    return np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0)
