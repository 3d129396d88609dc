"""soft_threshold, forward and backward, against eager torch and a copy of the same bytes.

    python -m bench.bench_soft_threshold            the interleaved comparison, with a verdict
    pytest bench/bench_soft_threshold.py            pytest-benchmark, for comparing revisions

What is timed, and the gate before it, is sparsemtl/measure/bench_threshold.py.
"""

from __future__ import annotations

import sys

import pytest
import torch

from bench.driver import Calls, Goal, compare, parser
from bench.machine import machine
from sparsemtl.measure.bench_threshold import (
    SHAPES,
    ThresholdProblem,
    check_threshold,
    threshold_candidates,
)
from sparsemtl.ops import SOFT_THRESHOLD

SPARSITY = 0.9
GOAL = Goal("20M", times_eager=12.0, times_copy=1.5)  # with two threads


def gated_candidates(case: str, device: str = "cpu", compiled: bool = False) -> Calls:
    problem = ThresholdProblem(SHAPES[case], SPARSITY, device)
    check_threshold(problem)
    return threshold_candidates(problem, compiled)


@pytest.fixture(scope="module", params=SHAPES)
def gated(request: pytest.FixtureRequest) -> Calls:
    return gated_candidates(request.param)


@pytest.mark.parametrize("call", ["copy", "eager", *SOFT_THRESHOLD.names])
def bench_soft_threshold(benchmark, gated: Calls, call: str) -> None:
    if call not in gated:
        pytest.skip(f"{call} cannot run here")
    benchmark.extra_info.update(machine())
    benchmark.pedantic(gated[call], rounds=10, warmup_rounds=2)


def main() -> int:
    options = parser(__doc__, list(SHAPES), "soft_threshold", rounds=15)
    options.add_argument("--device", default="cpu")
    options.add_argument("--compiled", action="store_true", help="time torch.compile too")
    args = options.parse_args()
    return compare(
        args,
        list(SHAPES),
        lambda case: sum(torch.Size(shape).numel() for shape in SHAPES[case]),
        lambda case: gated_candidates(case, args.device, args.compiled),
        GOAL,
        args.device,
    )


if __name__ == "__main__":
    sys.exit(main())
