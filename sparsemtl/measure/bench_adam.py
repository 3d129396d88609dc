"""threshold_adam against what it replaces: torch's Adam, then the threshold.

eager   torch.optim.Adam(foreach=True), then S = sign(W) · relu(|W| − α) tensor by tensor
fused   torch.optim.Adam(fused=True), then soft_threshold: our own op without the fusion
step    with the backward of the threshold before, which reads ready values in the op's case
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemtl.measure.conv_cases import HEADS
from sparsemtl.measure.rows import Call, Shapes, check_close, copy_call, row
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops import soft_threshold_component, use_backend
from sparsemtl.ops.soft_threshold import ThresholdStats, soft_threshold_reference
from sparsemtl.ops.threshold_adam import (
    THRESHOLD_ADAM,
    AdamRule,
    ready_values,
    threshold_adam,
    threshold_adam_bytes,
)
from sparsemtl.timing import interleave

CASES = ("deeplab-resnet34", "deeplab-resnet34/bf16", "backbone", "stage-1")
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.5, 0.999), "weight_decay": 1e-4}
SPREAD = 0.01  # of the weights
STEPS_BEFORE = 99  # the optimizers have run for a while


def component_shapes(case: str) -> list[Shapes]:
    """Shapes of the weights of each component; the whole network has 90.7 M of them."""
    if case == "stage-1":
        return [[(64, 64, 3, 3)] * 6]
    with torch.device("meta"):
        model = build_model(ModelConfig("deeplab-resnet34"), HEADS)
    shapes = [[tuple(w.shape) for w in c.weights] for c in model.components().values()]
    return list(shapes[:1] if case == "backbone" else shapes)


class AdamProblem:
    """Weights, gradients and Adam's state of every candidate, seeded; `sparsity` is dead."""

    def __init__(
        self, shapes: Sequence[Shapes], sparsity: float, dtype: torch.dtype = torch.float32
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        draw = lambda s: torch.randn(s, generator=rng)  # noqa: E731
        self.dtype = dtype
        self.owners = [g for g, component in enumerate(shapes) for _ in component]
        flat = [shape for component in shapes for shape in component]
        level = torch.special.erfinv(torch.tensor(sparsity, dtype=torch.float64)) * 2.0**0.5
        theta = torch.logit((SPREAD * level).clamp(1e-9, 0.5)).item()
        self.theta = torch.full((len(shapes),), theta)
        self.weights = [draw(s).mul_(SPREAD) for s in flat]
        self.grads = [draw(s).mul_(1e-3) for s in flat]
        self.means = [torch.zeros_like(w) for w in self.weights]
        self.squares = [torch.full_like(w, 1e-6) for w in self.weights]
        self.rules = [AdamRule(**OPTIONS, step=STEPS_BEFORE + 1)] * len(flat)
        self.out: ThresholdStats | None = None

    def op(self) -> ThresholdStats:
        """θ first, then everything else in one pass; the values' memory is used again."""
        state = (self.weights, self.grads, self.means, self.squares, self.rules)
        alpha = torch.sigmoid(self.theta)
        self.out = threshold_adam(
            *state, alpha, self.owners, dtype=self.dtype, bitmask=True, out=self.out
        )
        return self.out

    def on_backend(self, name: str) -> Call:
        def step() -> None:
            with use_backend(name):
                self.op()

        return step

    def parameters(self) -> tuple[list[Tensor], Tensor]:
        """Weights and θ of an optimizer of torch, sharing the gradients."""
        weights = [w.clone().requires_grad_() for w in self.weights]
        theta = self.theta.clone().requires_grad_()
        for weight, grad in zip(weights, self.grads, strict=True):
            weight.grad = grad
        theta.grad = torch.ones_like(theta)
        return weights, theta

    def places(self) -> list[list[int]]:
        """Of each component, where its weights stand."""
        groups = range(len(self.theta))
        return [[i for i, owner in enumerate(self.owners) if owner == g] for g in groups]


def eager_step(problem: AdamProblem) -> Call:
    weights, theta = problem.parameters()
    adam = torch.optim.Adam([*weights, theta], foreach=True, **OPTIONS)

    @torch.no_grad()
    def step() -> list[Tensor]:
        adam.step()
        alphas = torch.sigmoid(theta)
        pairs = zip(weights, problem.owners, strict=True)
        return [
            (torch.sign(w) * torch.relu(torch.abs(w) - alphas[g])).to(problem.dtype)
            for w, g in pairs
        ]

    return step


def fused_step(problem: AdamProblem) -> Call:
    weights, theta = problem.parameters()
    adam = torch.optim.Adam([*weights, theta], fused=True, **OPTIONS)

    @torch.no_grad()
    def step() -> list[Tensor]:
        adam.step()
        alphas, values = torch.sigmoid(theta), []
        for alpha, places in zip(alphas, problem.places(), strict=True):
            found = soft_threshold_component([weights[i] for i in places], alpha)
            values += [value.to(problem.dtype) for value in found]
        return values

    return step


def eager_training(problem: AdamProblem) -> Call:
    """Soft threshold under autograd, its backward, Adam."""
    weights, theta = problem.parameters()
    adam = torch.optim.Adam([*weights, theta], foreach=True, **OPTIONS)

    def step() -> None:
        adam.zero_grad()
        alphas, pairs = torch.sigmoid(theta), zip(weights, problem.owners, strict=True)
        values = [torch.sign(w) * torch.relu(torch.abs(w) - alphas[g]) for w, g in pairs]
        torch.autograd.backward(values, problem.grads)
        adam.step()

    return step


def ready_training(problem: AdamProblem) -> Call:
    """Backward through ready values, θ's Adam, and the op, which leaves the next values ready."""
    weights, theta = problem.parameters()
    adam = torch.optim.Adam([theta], foreach=True, **OPTIONS)
    means, squares = ([t.clone() for t in s] for s in (problem.means, problem.squares))
    out: ThresholdStats | None = None

    def run_op() -> ThresholdStats:
        grads = [w.grad for w in weights if w.grad is not None]  # all: backward has run
        alpha = torch.sigmoid(theta.detach())
        rules, owners = problem.rules, problem.owners
        return threshold_adam(
            weights, grads, means, squares, rules, alpha, owners, bitmask=True, out=out
        )

    out = run_op()
    written = out.values

    def step() -> None:
        for leaf in (*weights, theta):
            leaf.grad = None
        values: list[Tensor] = []
        for alpha, places in zip(torch.sigmoid(theta), problem.places(), strict=True):
            values += ready_values(
                [weights[i] for i in places], alpha, [written[i] for i in places]
            )
        torch.autograd.backward(values, problem.grads)
        adam.step()
        run_op()

    return step


def adam_candidates(problem: AdamProblem) -> dict[str, Call]:
    """A copy of the same bytes, eager and fused torch, the op, and whole steps of two of them."""
    calls: dict[str, Call] = {
        "copy": copy_call(threshold_adam_bytes(problem.weights, problem.dtype)),
        "eager": eager_step(problem),
        "fused": fused_step(problem),
    }
    if THRESHOLD_ADAM.explain(problem.weights)["native"] is None:
        calls["native"] = problem.on_backend("native")
        if problem.dtype is torch.float32:
            calls["eager step"] = eager_training(problem)
            calls["native step"] = ready_training(problem)
    return calls


def check_adam(make: Callable[[], AdamProblem]) -> float:
    """The gate: one step is torch's Adam and the reference in float64.

    returns: the largest relative error of S   raises: WrongResult
    """
    problem = make()
    before = [[t.clone() for t in state] for state in (problem.weights, problem.means)]
    out, lr, worst = problem.op(), OPTIONS["lr"], 0.0
    rtol = 4e-3 if problem.dtype is torch.bfloat16 else 2e-7
    for i, (weight, square) in enumerate(zip(problem.weights, problem.squares, strict=True)):
        wide = before[0][i].double().requires_grad_()
        wide.grad = problem.grads[i].double()
        adam = torch.optim.Adam([wide], **OPTIONS)
        adam.state[wide] = {
            "step": torch.tensor(float(STEPS_BEFORE)),
            "exp_avg": before[1][i].double(),
            "exp_avg_sq": torch.full_like(wide, 1e-6),
        }
        adam.step()
        check_close("the weights", weight, wide, rtol=2e-7, atol=1e-6 * lr)
        check_close("the squares", square, adam.state[wide]["exp_avg_sq"], rtol=1e-6)
        alpha = torch.sigmoid(problem.theta)[problem.owners[i]]
        expected = soft_threshold_reference(weight.double(), alpha.double())
        worst = max(worst, check_close("the values", out.values[i], expected, rtol))
        counted = (weight.abs() > alpha).sum().double().reshape(1)
        check_close("the counts", out.nonzeros[i].double().reshape(1), counted, rtol=0.0)
    return worst


def measure_adam(
    cases: Mapping[str, Sequence[Shapes]], sparsities: Sequence[float], rounds: int = 7
) -> Iterator[dict[str, Any]]:
    """Two rows per case and sparsity: the op, and with the threshold's backward before it."""
    for case, shapes in cases.items():
        dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
        for sparsity in sparsities:
            make = lambda s=shapes, z=sparsity, d=dtype: AdamProblem(s, z, d)  # noqa: E731
            error = check_adam(make)
            times = interleave(adam_candidates(make()), rounds, budget=40.0)
            ours = "native" if "native" in times else "fused"
            yield row(case, "optimizer", sparsity, times, ours, error)
            if "native step" in times:
                whole = ("eager step",)
                yield row(
                    case, "threshold + optimizer", sparsity, times, "native step", error, whole
                )
