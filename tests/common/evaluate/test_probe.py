"""The linear probe against scipy's minimiser, its search against the whole grid, and few-shot draws."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from common.evaluate.probe import choose_strength, fit, fit_best


def blobs(samples=120, noise=1.0, classes=3, seed=0):
    """Points in the plane around one corner a class, far from the origin; labels 2, 5, 8, ..."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(samples) % classes
    corners = torch.randn(classes, 2, generator=torch.Generator().manual_seed(1)) * 3 + 10
    return corners[kinds] + noise * torch.randn(samples, 2, generator=generator), 2 + 3 * kinds


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_minimises_what_scikit_learn_minimises(strength):
    features, labels = blobs()
    x, y = features.double().numpy(), ((labels - 2) // 3).numpy()

    def loss(flat):
        weight, bias = flat[:6].reshape(3, 2), flat[6:]
        logits = x @ weight.T + bias
        return (logsumexp(logits, 1) - logits[np.arange(len(y)), y]).sum() + (weight**2).sum() / (2 * strength)

    reference = minimize(loss, np.zeros(9), method="BFGS", options={"gtol": 1e-7, "maxiter": 3000})
    probe = fit(features, labels, strength)
    result = loss(torch.cat([probe.weight.flatten(), probe.bias]).numpy())
    assert result == pytest.approx(reference.fun, rel=1e-6)
    np.testing.assert_allclose(probe.weight.numpy().ravel(), reference.x[:6], atol=2e-3)
    assert probe.gradient < 1e-5 and probe.classes.tolist() == [2, 5, 8]
    in_parts = fit(features, labels, strength, part=7)
    torch.testing.assert_close(in_parts.weight, probe.weight, atol=1e-4, rtol=1e-4)
    assert fit(features, labels, strength, start=probe).iterations <= 2


def test_separable_features_are_separated():
    train, val, test = (blobs(noise=0.1, seed=seed) for seed in range(3))
    probe, strength, tried = fit_best(train, val)
    assert probe.accuracy(*test) == 1.0 and tried[strength] == 1.0
    scores = probe.scores(test[0], 10)
    assert torch.equal(scores.argmax(-1), test[1])
    assert scores[:, [0, 1, 3, 4, 6, 7, 9]].eq(-torch.inf).all()
    alone, same_strength, _ = fit_best(train, val, with_val=False)
    assert same_strength == strength
    assert not torch.equal(alone.weight, probe.weight), "the final fit takes the validation samples too"


@pytest.mark.parametrize("peak", [-6.0, -3.3, 0.125, 2.9, 6.0])
def test_search_finds_the_peak_of_the_grid(peak):
    asked = []

    def score(strength):
        asked.append(strength)
        return -abs(np.log10(strength) - peak)

    best, tried = choose_strength(score)
    grid = 10.0 ** np.arange(-6, 6.001, 1 / 8)
    assert best == pytest.approx(max(grid, key=lambda strength: -abs(np.log10(strength) - peak)))
    assert len(asked) == len(set(asked)) == len(tried) <= 15
    assert list(tried) == sorted(tried)


def test_of_equal_scores_the_stronger_penalty_wins():
    assert choose_strength(lambda strength: 0.5)[0] == pytest.approx(1e-6)


def test_refusals():
    features, labels = blobs(9)
    with pytest.raises(ValueError, match="strength 0 must be positive"):
        fit(features, labels, 0)
    with pytest.raises(ValueError, match="9 samples of 1 class"):
        fit(features, torch.zeros(9, dtype=torch.long), 1.0)
