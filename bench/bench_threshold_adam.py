"""threshold_adam against torch.optim.Adam followed by an eager soft threshold, and against a copy.

    python -m bench.bench_threshold_adam            the interleaved comparison, with a verdict
    pytest bench/bench_threshold_adam.py            pytest-benchmark, for comparing revisions

Eager is what a user writes: Adam(foreach=True) on weights and θ, then S = sign(W) relu(|W| − σ(θ))
without autograd; it makes neither the bits nor the counts that the op makes. Fused is torch's
fused Adam and our own soft threshold. Copy moves as many bytes as the op must: W, g, m and v
read, W, m, v and S written, a bit for each weight; its memory is there beforehand, as the op's is.
The two rows of a whole step add the soft threshold's gradients of W and θ: under autograd through
the eager formula, and through the values that the op has left ready.

Eager runs hundreds of short parallel regions, each of which waits for the slower thread: on a
machine that others load it suffers most, and its ratio says little. Compare on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.machine import RESULTS, machine, text
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops import (
    THRESHOLD_ADAM,
    AdamRule,
    ThresholdStats,
    ready_values,
    soft_threshold_component,
    soft_threshold_reference,
    threshold_adam,
    use_backend,
)
from sparsemtl.ops.threshold_adam import threshold_adam_bytes
from sparsemtl.timing import Timing, interleave

CASES = ("deeplab-resnet34", "deeplab-resnet34/bf16", "backbone", "stage-1")
OPTIONS = {"lr": 1e-3, "betas": (0.5, 0.999), "weight_decay": 1e-4}
THETA = -4.6  # α = 0.01: of weights of the spread below, about two thirds are dead
MUST_EAGER, MUST_COPY = 8.0, 1.4  # goals over the whole network with two threads


def component_shapes(case: str) -> list[list[tuple[int, ...]]]:
    """Shapes of the weights of each component; the whole network has 90.7 M of them."""
    if case == "stage-1":
        return [[(64, 64, 3, 3)] * 6]
    with torch.device("meta"):
        heads = {"segmentation": 40, "normals": 3, "depth": 1}
        model = build_model(ModelConfig("deeplab-resnet34"), heads)
    shapes = [[tuple(w.shape) for w in c.weights] for c in model.components().values()]
    return shapes[:1] if case == "backbone" else shapes


class Problem:
    """Weights, gradients and Adam's state of every candidate, seeded."""

    def __init__(self, case: str) -> None:
        rng = torch.Generator().manual_seed(0)
        draw = lambda s: torch.randn(s, generator=rng)  # noqa: E731
        shapes = component_shapes(case)
        self.dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
        self.owners = [g for g, component in enumerate(shapes) for _ in component]
        flat = [shape for component in shapes for shape in component]
        self.theta = torch.full((len(shapes),), THETA)
        self.weights = [draw(s).mul_(0.01) for s in flat]
        self.grads = [draw(s).mul_(1e-3) for s in flat]
        self.means = [torch.zeros_like(w) for w in self.weights]
        self.squares = [torch.full_like(w, 1e-6) for w in self.weights]
        self.rules = [AdamRule(**OPTIONS, step=100)] * len(flat)
        self.out: ThresholdStats | None = None

    def op(self) -> ThresholdStats:
        """θ first, then everything else in one pass; the values' memory is used again."""
        state = (self.weights, self.grads, self.means, self.squares, self.rules)
        alpha = torch.sigmoid(self.theta)
        self.out = threshold_adam(
            *state, alpha, self.owners, dtype=self.dtype, bitmask=True, out=self.out
        )
        return self.out

    def parameters(self) -> tuple[list[Tensor], Tensor]:
        """Weights and θ of an optimizer of torch, sharing the gradients."""
        weights = [w.clone().requires_grad_() for w in self.weights]
        theta = self.theta.clone().requires_grad_()
        for weight, grad in zip(weights, self.grads, strict=True):
            weight.grad = grad
        theta.grad = torch.ones_like(theta)
        return weights, theta


def eager_step(problem: Problem) -> Callable[[], object]:
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


def fused_step(problem: Problem) -> Callable[[], object]:
    weights, theta = problem.parameters()
    adam = torch.optim.Adam([*weights, theta], fused=True, **OPTIONS)

    @torch.no_grad()
    def step() -> list[Tensor]:
        adam.step()
        alphas, values = torch.sigmoid(theta), []
        for g in range(len(alphas)):
            own = [w for w, owner in zip(weights, problem.owners, strict=True) if owner == g]
            found = soft_threshold_component(own, alphas[g])
            values += [value.to(problem.dtype) for value in found]
        return values

    return step


def eager_training(problem: Problem) -> Callable[[], object]:
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


def ready_training(problem: Problem) -> Callable[[], object]:
    """Backward through ready values, θ's Adam, and the op, which leaves the next values ready."""
    weights, theta = problem.parameters()
    adam = torch.optim.Adam([theta], foreach=True, **OPTIONS)
    moments = [[t.clone() for t in state] for state in (problem.means, problem.squares)]
    out: ThresholdStats | None = None

    def run_op() -> ThresholdStats:
        state = (weights, [w.grad for w in weights], *moments, problem.rules)
        alpha = torch.sigmoid(theta.detach())
        return threshold_adam(*state, alpha, problem.owners, bitmask=True, out=out)

    out = run_op()

    def step() -> None:
        for leaf in (*weights, theta):
            leaf.grad = None
        alphas, values = torch.sigmoid(theta), []
        for g in range(len(alphas)):
            places = [i for i, owner in enumerate(problem.owners) if owner == g]
            known = [out.values[i] for i in places]
            values += ready_values([weights[i] for i in places], alphas[g], known)
        torch.autograd.backward(values, problem.grads)
        adam.step()
        run_op()

    return step


def copy_of(problem: Problem) -> Callable[[], object]:
    size = threshold_adam_bytes(problem.weights, problem.dtype) // 2  # read once, written once
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def on_backend(name: str, problem: Problem) -> Callable[[], object]:
    def step() -> None:
        with use_backend(name):
            problem.op()

    return step


def candidates(case: str) -> dict[str, Callable[[], object]]:
    problem = Problem(case)
    calls = {
        "copy": copy_of(problem),
        "eager": eager_step(problem),
        "fused": fused_step(problem),
    }
    if THRESHOLD_ADAM.explain(problem.weights)["native"] is None:
        calls["native"] = on_backend("native", problem)
        if problem.dtype is torch.float32:
            calls["eager step"] = eager_training(problem)
            calls["native step"] = ready_training(problem)
    return calls


def check(case: str) -> None:
    """The gate: one step is torch's Adam and the reference in float64, or no number is given."""
    problem = Problem(case)
    before = [[t.clone() for t in state] for state in (problem.weights, problem.means)]
    out = problem.op()
    lr = OPTIONS["lr"]
    for i, (weight, square) in enumerate(zip(problem.weights, problem.squares, strict=True)):
        wide = before[0][i].double().requires_grad_()
        wide.grad = problem.grads[i].double()
        adam = torch.optim.Adam([wide], **OPTIONS)
        adam.state[wide] = {
            "step": torch.tensor(99.0),
            "exp_avg": before[1][i].double(),
            "exp_avg_sq": torch.full_like(wide, 1e-6),
        }
        adam.step()
        close = torch.testing.assert_close
        close(weight.double(), wide.detach(), rtol=2e-7, atol=1e-6 * lr)
        close(square.double(), adam.state[wide]["exp_avg_sq"], rtol=1e-6, atol=0.0)
        alpha = torch.sigmoid(problem.theta)[problem.owners[i]]
        expected = soft_threshold_reference(weight.double(), alpha.double())
        rtol = 4e-3 if problem.dtype is torch.bfloat16 else 2e-7
        close(out.values[i].double(), expected, rtol=rtol, atol=0.0)
        assert out.nonzeros[i] == (weight.abs() > alpha).sum()


@pytest.fixture(scope="module", params=CASES)
def gated(request: pytest.FixtureRequest) -> dict[str, Callable[[], object]]:
    check(request.param)
    return candidates(request.param)


@pytest.mark.parametrize("call", ["copy", "eager", "fused", "native", "eager step", "native step"])
def bench_threshold_adam(benchmark, gated: dict[str, Callable[[], object]], call: str) -> None:
    if call not in gated:
        pytest.skip(f"{call} cannot run here")
    benchmark.extra_info.update(machine())
    benchmark.pedantic(gated[call], rounds=5, warmup_rounds=1)


def report(case: str, times: dict[str, Timing], weights: int) -> dict[str, object]:
    rows = {
        name: {
            "median_ms": round(1e3 * t.median, 4),
            "best_ms": round(1e3 * t.best, 4),
            "spread": round(t.spread, 3),
            "times_eager": round(times["eager"].median / t.median, 2),
            "times_copy": round(t.median / times["copy"].median, 3),
        }
        for name, t in times.items()
    }
    print(f"\n{case}: {weights:,} weights, {times['copy'].rounds} interleaved rounds")
    print(f"{'':<12}{'median ms':>10}{'best ms':>10}{'spread':>8}{'x eager':>9}{'/ copy':>8}")
    for name, row in rows.items():
        print(
            f"{name:<12}{row['median_ms']:>10.3f}{row['best_ms']:>10.3f}{row['spread']:>8.1%}"
            f"{row['times_eager']:>9.1f}{row['times_copy']:>8.2f}"
        )
    return {"weights": weights, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--out", default=str(RESULTS / "threshold_adam.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    line = machine()
    print(text(line))
    found: dict[str, object] = {"machine": line, "cases": {}}
    met = True
    for case in args.case or CASES:
        check(case)
        calls = candidates(case)
        times = interleave(calls, args.rounds)
        count = sum(torch.Size(s).numel() for part in component_shapes(case) for s in part)
        found["cases"][case] = report(case, times, count)  # type: ignore[index]
        if case == CASES[0] and "native" in times:
            eager = times["eager"].median / times["native"].median
            copy = times["native"].median / times["copy"].median
            met = eager >= MUST_EAGER and copy <= MUST_COPY
            whole = times["eager step"].median / times["native step"].median
            print(
                f"native: {eager:.1f}x eager (must {MUST_EAGER:g}), "
                f"{copy:.2f}x a copy of the same bytes (must {MUST_COPY:g}): "
                f"{'met' if met else 'MISSED'}; with the threshold's backward {whole:.1f}x"
            )
    RESULTS.mkdir(exist_ok=True)
    with open(args.out, "w") as file:
        json.dump(found, file, indent=1)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
