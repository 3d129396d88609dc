"""soft_threshold, forward and backward, against eager torch and a copy of the same bytes.

    python -m bench.bench_soft_threshold            the interleaved comparison, with a verdict
    pytest bench/bench_soft_threshold.py            pytest-benchmark, for comparing revisions

Eager is what a user writes: S = sign(W) · relu(|W| − σ(θ)) under autograd, with gradients of W
and θ. Copy moves as many bytes as the fused passes must: W read twice; g read; S, grad_W written.
Every call allocates its outputs, as training does; the copy has its memory beforehand.
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
from sparsemtl.ops import (
    SOFT_THRESHOLD,
    soft_threshold_component,
    soft_threshold_reference,
    use_backend,
)
from sparsemtl.ops.soft_threshold import soft_threshold_bytes
from sparsemtl.timing import Timing, interleave

CASES = {  # shapes of a component's weights
    "20M": [(20_000_000,)],
    "head": [(1024, 512, 3, 3), (1024, 1024, 1, 1), (40, 1024, 1, 1)] * 4,  # ASPP, four branches
    "stage-1": [(64, 64, 3, 3)] * 6,
}
MUST_EAGER, MUST_COPY = 12.0, 1.5  # goals at 20 M weights and two threads


def make(case: str, device: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Weights, θ and gradients of S, seeded; θ = 0, so α = 0.5 and a good third is dead."""
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rng).to(device).requires_grad_() for s in CASES[case]]
    grads = [torch.randn(s, generator=rng).to(device) for s in CASES[case]]
    return weights, torch.zeros((), device=device, requires_grad=True), grads


def eager_torch(weights: list[Tensor], alpha: Tensor) -> list[Tensor]:
    return [torch.sign(w) * torch.relu(torch.abs(w) - alpha) for w in weights]


def training_step(forward: Callable, weights: list[Tensor], theta: Tensor, grads: list[Tensor]):
    """A call that runs forward and backward and frees the gradients, as an optimizer does."""

    def step() -> None:
        torch.autograd.backward(forward(weights, torch.sigmoid(theta)), grads)
        for leaf in (*weights, theta):
            leaf.grad = None

    return step


def on_backend(name: str) -> Callable:
    def forward(weights: list[Tensor], alpha: Tensor) -> tuple[Tensor, ...]:
        with use_backend(name):
            return soft_threshold_component(weights, alpha)

    return forward


def copy_of(weights: list[Tensor]) -> Callable[[], object]:
    size = soft_threshold_bytes(weights) // 2  # read once and written once
    source = torch.ones(size, dtype=torch.uint8, device=weights[0].device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def candidates(case: str, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    weights, theta, grads = make(case, device)
    calls: dict[str, Callable[[], object]] = {
        "copy": copy_of(weights),
        "eager": training_step(eager_torch, weights, theta, grads),
    }
    if compiled:
        fused = torch.compile(eager_torch)
        calls["compiled"] = training_step(fused, weights, theta, grads)
    for name in SOFT_THRESHOLD.explain(weights, theta).usable:
        calls[name] = training_step(on_backend(name), weights, theta, grads)
    return calls


def check(case: str, device: str) -> None:
    """The gate: every usable backend agrees with the float64 reference, or no number is given."""
    weights, theta, grads = make(case, device)
    wide = [w.detach().double().requires_grad_() for w in weights]
    a = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    expected = [soft_threshold_reference(w, a) for w in wide]
    wanted = torch.autograd.grad(expected, [*wide, a], [g.double() for g in grads])
    size = sum(g.abs().sum().item() for g in grads)
    for name in SOFT_THRESHOLD.explain(weights, theta).usable:
        alpha = torch.tensor(0.5, device=device, requires_grad=True)
        values = on_backend(name)(weights, alpha)
        found = torch.autograd.grad(values, [*weights, alpha], grads)
        for f, e in zip(values, expected, strict=True):
            torch.testing.assert_close(f.double(), e, rtol=2e-7, atol=0.0)
        for f, e in zip(found[:-1], wanted[:-1], strict=True):
            torch.testing.assert_close(f.double(), e, rtol=0.0, atol=0.0)
        torch.testing.assert_close(found[-1].double(), wanted[-1], rtol=2e-7, atol=1e-7 * size)


@pytest.fixture(scope="module", params=CASES)
def gated(request: pytest.FixtureRequest) -> dict[str, Callable[[], object]]:
    check(request.param, "cpu")
    return candidates(request.param, "cpu", compiled=False)


@pytest.mark.parametrize("call", ["copy", "eager", *SOFT_THRESHOLD.names])
def bench_soft_threshold(benchmark, gated: dict[str, Callable[[], object]], call: str) -> None:
    if call not in gated:
        pytest.skip(f"{call} cannot run here")
    benchmark.extra_info.update(machine())
    benchmark.pedantic(gated[call], rounds=10, warmup_rounds=2)


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
    print(f"{'':<10}{'median ms':>10}{'best ms':>10}{'spread':>8}{'x eager':>9}{'/ copy':>8}")
    for name, row in rows.items():
        print(
            f"{name:<10}{row['median_ms']:>10.3f}{row['best_ms']:>10.3f}{row['spread']:>8.1%}"
            f"{row['times_eager']:>9.1f}{row['times_copy']:>8.2f}"
        )
    return {"weights": weights, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--out", default=str(RESULTS / "soft_threshold.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    line = machine()
    print(text(line))
    found: dict[str, object] = {"machine": line, "device": args.device, "cases": {}}
    met = True
    for case in args.case or CASES:
        check(case, args.device)
        calls = candidates(case, args.device, args.compiled)
        times = interleave(calls, args.rounds, device=args.device)
        count = sum(torch.Size(shape).numel() for shape in CASES[case])
        found["cases"][case] = report(case, times, count)  # type: ignore[index]
        if case == "20M" and "native" in times:
            eager = times["eager"].median / times["native"].median
            copy = times["native"].median / times["copy"].median
            met = eager >= MUST_EAGER and copy <= MUST_COPY
            print(
                f"native: {eager:.1f}x eager (must {MUST_EAGER:g}), "
                f"{copy:.2f}x a copy of the same bytes (must {MUST_COPY:g}): "
                f"{'met' if met else 'MISSED'}"
            )
    RESULTS.mkdir(exist_ok=True)
    with open(args.out, "w") as file:
        json.dump(found, file, indent=1)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
