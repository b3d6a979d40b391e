"""t-SNE against its definitions: perplexities, autograd's gradient of the divergence, and clusters that part."""

import numpy as np
import pytest
import torch

from benchmarks.mlip.tsne import gradient, joint_probabilities, neighbourhood, tsne


def points(count, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim))


@pytest.mark.parametrize("perplexity", [2.0, 10.0, 35.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_neighbourhood_is_gaussian_and_of_the_perplexity_asked_for(perplexity, scale):
    distances = scale * (points(40) ** 2).sum(1)
    found = neighbourhood(distances, perplexity)
    assert found.sum() == pytest.approx(1)
    assert np.exp(-(found * np.log(found + 1e-300)).sum()) == pytest.approx(perplexity, rel=1e-6)
    slopes = np.diff(np.log(found[:5])) / np.diff(distances[:5])  # a Gaussian's logarithm is linear in the square
    assert slopes == pytest.approx(slopes[0], rel=1e-6) and slopes[0] < 0


def test_joint_probabilities_are_symmetric_and_leave_out_the_point_itself():
    joint = joint_probabilities(points(30), 8.0)
    assert joint.sum() == pytest.approx(1) and (joint == joint.T).all() and (np.diag(joint) == 0).all()
    with pytest.raises(ValueError, match="perplexity 30 of 30 points; use one between 1 and 29"):
        joint_probabilities(points(30), 30)


def test_the_gradient_is_that_of_the_divergence():
    joint, y = torch.from_numpy(joint_probabilities(points(12), 4.0)), torch.from_numpy(points(12, 2, seed=1))
    y.requires_grad_()
    kernel = (1 / (1 + (y[:, None] - y).square().sum(-1))) * (1 - torch.eye(12))
    chosen = joint > 0
    (joint[chosen] * (joint[chosen] / (kernel / kernel.sum())[chosen]).log()).sum().backward()
    np.testing.assert_allclose(gradient(y.detach().numpy(), joint.numpy()), y.grad, rtol=1e-6, atol=1e-9)


def test_clusters_part_and_nothing_is_random():
    centres = 20 * np.eye(3, 5)
    data = np.concatenate([centre + points(20, seed=seed) for seed, centre in enumerate(centres)])
    found, label = tsne(data, perplexity=10), np.repeat(np.arange(3), 20)
    middles = np.stack([found[label == each].mean(0) for each in range(3)])
    nearest = ((found[:, None] - middles) ** 2).sum(-1).argmin(1)
    assert (nearest == label).all()
    np.testing.assert_array_equal(tsne(data, 10, steps=20), tsne(data, 10, steps=20))
