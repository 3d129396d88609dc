"""soft_threshold, forward and backward, against eager torch and a copy of the same bytes.

Eager is what a user writes: S = sign(W) · relu(|W| − σ(θ)) under autograd, with gradients of W
and θ. Copy moves as many bytes as the fused passes must: W read twice; g read; S, grad_W written.
Every call allocates its outputs, as training does; the copy has its memory beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemtl.measure.rows import Call, Shapes, check_close, copy_call, row, worst_of
from sparsemtl.ops import (
    SOFT_THRESHOLD,
    soft_threshold_component,
    soft_threshold_reference,
    use_backend,
)
from sparsemtl.ops.soft_threshold import soft_threshold_bytes
from sparsemtl.timing import interleave

SHAPES: dict[str, Shapes] = {  # of a component's weights
    "20M": [(20_000_000,)],
    "head": [(1024, 512, 3, 3), (1024, 1024, 1, 1), (40, 1024, 1, 1)] * 4,  # ASPP, four branches
    "stage-1": [(64, 64, 3, 3)] * 6,
}
SPREAD = 0.1  # of the weights: α stays below 1 at every sparsity up to 1 − 1e-9
Forward = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]


class ThresholdProblem:
    """Weights, θ and gradients of S, seeded; `sparsity` of the weights are dead."""

    def __init__(self, shapes: Shapes, sparsity: float, device: str = "cpu") -> None:
        rng = torch.Generator().manual_seed(0)
        draw = lambda s: torch.randn(s, generator=rng).mul_(SPREAD).to(device)  # noqa: E731
        self.weights = [draw(s).requires_grad_() for s in shapes]
        self.grads = [draw(s) for s in shapes]
        alpha = SPREAD * math.sqrt(2.0) * torch.special.erfinv(torch.tensor(sparsity)).item()
        theta = torch.logit(torch.tensor(max(alpha, 1e-9), dtype=torch.float64)).float()
        self.theta = theta.to(device).requires_grad_()

    def step(self, forward: Forward) -> Call:
        """A call that runs forward and backward and frees the gradients, as an optimizer does."""

        def run() -> None:
            torch.autograd.backward(forward(self.weights, torch.sigmoid(self.theta)), self.grads)
            for leaf in (*self.weights, self.theta):
                leaf.grad = None

        return run


def eager_torch(weights: Sequence[Tensor], alpha: Tensor) -> list[Tensor]:
    """The op as plain torch, differentiated by autograd."""
    return [torch.sign(w) * torch.relu(torch.abs(w) - alpha) for w in weights]


def on_backend(name: str) -> Forward:
    """The op on one backend."""

    def forward(weights: Sequence[Tensor], alpha: Tensor) -> tuple[Tensor, ...]:
        with use_backend(name):
            return soft_threshold_component(weights, alpha)

    return forward


def threshold_candidates(problem: ThresholdProblem, compiled: bool = False) -> dict[str, Call]:
    """A copy of the same bytes, eager torch, and every backend that can run here."""
    calls: dict[str, Call] = {
        "copy": copy_call(soft_threshold_bytes(problem.weights), problem.weights[0].device),
        "eager": problem.step(eager_torch),
    }
    if compiled:
        calls["compiled"] = problem.step(torch.compile(eager_torch))
    for name in SOFT_THRESHOLD.explain(problem.weights, problem.theta).usable:
        calls[name] = problem.step(on_backend(name))
    return calls


def check_threshold(problem: ThresholdProblem) -> float:
    """The gate: every usable backend agrees with the float64 reference.

    returns: the largest relative error   raises: WrongResult
    """
    wide = [w.detach().double().requires_grad_() for w in problem.weights]
    alpha = torch.sigmoid(problem.theta.detach())
    a = alpha.double().requires_grad_()
    expected = [soft_threshold_reference(w, a) for w in wide]
    wanted = torch.autograd.grad(expected, [*wide, a], [g.double() for g in problem.grads])
    size = sum(g.abs().sum().item() for g in problem.grads)
    worst = 0.0
    for name in SOFT_THRESHOLD.explain(problem.weights, problem.theta).usable:
        leaf = alpha.clone().requires_grad_()
        values = on_backend(name)(problem.weights, leaf)
        found = torch.autograd.grad(values, [*problem.weights, leaf], problem.grads)
        for f, e in zip(values, expected, strict=True):
            worst = max(worst, check_close(f"soft_threshold on {name}", f, e, rtol=2e-7))
        for f, e in zip(found[:-1], wanted[:-1], strict=True):
            check_close(f"the gradient of W on {name}", f, e, rtol=0.0)
        who = f"the gradient of alpha on {name}"
        check_close(who, found[-1], wanted[-1], rtol=2e-7, atol=1e-7 * size)
        worst = max(worst, worst_of(found[-1], wanted[-1], size))
    return worst


def measure_threshold(
    cases: dict[str, Shapes], sparsities: Sequence[float], rounds: int = 15
) -> Iterator[dict[str, Any]]:
    """A row per case and sparsity: the best backend against eager torch; the gate comes first."""
    for case, shapes in cases.items():
        for sparsity in sparsities:
            problem = ThresholdProblem(shapes, sparsity)
            error = check_threshold(problem)
            times = interleave(threshold_candidates(problem), rounds, budget=20.0)
            best = SOFT_THRESHOLD.choose(problem.weights, problem.theta).name
            yield row(case, "forward + backward", sparsity, times, best, error)
