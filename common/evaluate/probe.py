"""Linear probe: multinomial logistic regression with an L2 penalty, on features computed once (CLIP, section A.3).

Shapes: M samples, E features, C classes.

``strength`` is scikit-learn's C: the fit minimises ``sum(cross entropy) + |W|²/(2 C)``, with an unpenalised bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_GRADIENT = 1e-6


@dataclass(frozen=True)
class Probe:
    """A fitted classifier: weight [C,E], bias [C], and classes, long [C], the label of each row.

    gradient: the largest component of the mean loss's gradient where the solver stopped.
    iterations: the solver's number of iterations.
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor
    gradient: float
    iterations: int

    def logits(self, features: Tensor) -> Tensor:
        """features [M,E] -> logits [M,C] of the labels in ``classes``."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def scores(self, features: Tensor, num_classes: int) -> Tensor:
        """features [M,E] -> logits of all labels [M, num_classes], -inf for labels absent from training."""
        logits = self.logits(features)
        return logits.new_full((len(features), num_classes), -torch.inf).index_copy(1, self.classes, logits)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Top-1 accuracy (fraction) on features [M,E] with labels [M]."""
        guesses = [self.classes[self.logits(part).argmax(-1)] for part in features.split(4096)]
        return (torch.cat(guesses) == labels).double().mean().item()


def fit(
    features: Tensor,
    labels: Tensor,
    strength: float,
    start: Probe | None = None,
    max_iterations: int = 1000,
    part: int = 65536,
) -> Probe:
    """Logistic regression of labels long [M] on features [M,E], by full-batch L-BFGS in fp64.

    strength: C > 0; a larger C is a weaker penalty.
    start: where the solver starts: a probe of the same classes, fitted at a nearby strength; None: zeros.
    part: number of samples whose logits are in memory at a time.
    ValueError: a strength that is not positive, or fewer than two classes.
    """
    if not strength > 0:
        raise ValueError(f"strength {strength} must be positive")
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"{len(labels)} samples of {len(classes)} class; a probe tells two classes apart at least")
    # MPS has no fp64.
    dtype = torch.float32 if features.device.type == "mps" else torch.float64
    # Centring only improves conditioning: the bias absorbs the shift.
    centre = features.mean(0, dtype=dtype)
    weight = torch.zeros(len(classes), features.shape[1], dtype=dtype, device=features.device)
    bias = torch.zeros(len(classes), dtype=dtype, device=features.device)
    if start is not None:
        weight += start.weight
        bias += start.bias + start.weight @ centre
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iterations,
        tolerance_grad=_GRADIENT,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        total = weight.square().sum() / (2 * strength * len(labels))  # the penalty; all terms are divided by M
        total.backward()
        for x, y in zip(features.split(part), targets.split(part), strict=True):
            share = F.cross_entropy(F.linear(x.to(dtype) - centre, weight, bias), y, reduction="sum") / len(labels)
            share.backward()
            total = total.detach() + share.detach()
        return total

    optimizer.step(loss)
    loss()  # leaves the gradient at the solution
    gradient = max(parameter.grad.abs().max().item() for parameter in parameters)
    iterations = optimizer.state[weight]["n_iter"]
    weight, bias = weight.detach(), bias.detach()
    return Probe(weight, bias - weight @ centre, classes, gradient, iterations)


def choose_strength(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """CLIP's search for the strength: (the best strength, {strength: score} of all that were tried).

    It tries seven powers of ten from 1e-6 to 1e6, then halves the step and tries both neighbours of the best, down to
    eight steps per decade: at most 15 fits instead of 97. Among equal scores, the stronger penalty wins.
    """
    tried = {float(exponent): score(10.0**exponent) for exponent in range(-6, 7, 2)}
    step = 2.0
    best = _best(tried)
    while step > 1 / 8:
        step /= 2
        for exponent in (best - step, best + step):
            if -6 <= exponent <= 6 and exponent not in tried:
                tried[exponent] = score(10.0**exponent)
        best = _best(tried)
    return 10.0**best, {10.0**exponent: tried[exponent] for exponent in sorted(tried)}


def _best(tried: dict[float, float]) -> float:
    return max(tried, key=lambda exponent: (tried[exponent], -exponent))


def fit_best(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    with_val: bool = True,
    max_iterations: int = 1000,
) -> tuple[Probe, float, dict[float, float]]:
    """The probe at the strength that is best on ``val``: (probe, strength, {strength: accuracy on val}).

    train, val: (features [M,E], labels long [M]).
    with_val: refit at that strength on train and val together, as CLIP does; False (few shots): fit on train alone.
    """
    probes: dict[float, Probe] = {}

    def score(strength: float) -> float:
        nearest = min(probes, key=lambda other: abs(math.log(other / strength)), default=None)
        probes[strength] = fit(*train, strength, probes.get(nearest), max_iterations)
        return probes[strength].accuracy(*val)

    strength, tried = choose_strength(score)
    if not with_val:
        return probes[strength], strength, tried
    both = tuple(map(torch.cat, zip(train, val, strict=True)))
    return fit(*both, strength, max_iterations=max_iterations), strength, tried
