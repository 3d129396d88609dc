"""threshold_adam, Adam and the next S(W) in one pass, against torch's Adam and the threshold.

    python -m bench.bench_threshold_adam            the interleaved comparison, with a verdict
    pytest bench/bench_threshold_adam.py            pytest-benchmark, for comparing revisions

What is timed, and the gate before it, is sparsemtl/measure/bench_adam.py.
"""

from __future__ import annotations

import sys

import pytest
import torch

from bench.driver import Calls, Goal, compare, parser
from bench.machine import machine
from sparsemtl.measure.bench_adam import (
    CASES,
    AdamProblem,
    adam_candidates,
    check_adam,
    component_shapes,
)

SPARSITY = 2 / 3
GOAL = Goal("deeplab-resnet34", times_eager=8.0, times_copy=1.4)  # with two threads


def make(case: str) -> AdamProblem:
    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    return AdamProblem(component_shapes(case), SPARSITY, dtype)


def gated_candidates(case: str) -> Calls:
    check_adam(lambda: make(case))
    return adam_candidates(make(case))


@pytest.fixture(scope="module", params=CASES)
def gated(request: pytest.FixtureRequest) -> Calls:
    return gated_candidates(request.param)


@pytest.mark.parametrize("call", ["copy", "eager", "fused", "native", "eager step", "native step"])
def bench_threshold_adam(benchmark, gated: Calls, call: str) -> None:
    if call not in gated:
        pytest.skip(f"{call} cannot run here")
    benchmark.extra_info.update(machine())
    benchmark.pedantic(gated[call], rounds=5, warmup_rounds=1)


def main() -> int:
    args = parser(__doc__, CASES, "threshold_adam", rounds=7).parse_args()
    return compare(
        args,
        CASES,
        lambda case: sum(torch.Size(s).numel() for part in component_shapes(case) for s in part),
        gated_candidates,
        GOAL,
    )


if __name__ == "__main__":
    sys.exit(main())
