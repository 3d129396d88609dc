"""The roofs of this machine: multiply-adds in registers, and copying memory.

Measured before anything else, so that a share of the roof is a share of what these cores did in
this very run, not of what a data sheet says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.ops.dispatch import BackendUnavailable

_COPY_BYTES = 256 << 20  # read, and as many written: beyond every cache
_SECONDS = 0.05  # of one try
_TRIES = 5


@dataclass(frozen=True)
class Roof:
    """What the threads of this process reach together.

    flops:      multiply-adds of float32 vectors in registers, two operations each, per second
    copy_bytes: bytes read and written per second by a large copy, both counted
    """

    flops: float
    copy_bytes: float

    def to_json(self) -> dict[str, float]:
        return {key: float(f"{value:.4g}") for key, value in asdict(self).items()}

    def text(self) -> str:
        return (
            f"roof: {self.flops / 1e9:.0f} GFLOP/s in registers, "
            f"{self.copy_bytes / 1e9:.1f} GB/s copying"
        )


def measure_roof() -> Roof:
    """Measure both, in about a second, with torch's present number of threads.

    raises: BackendUnavailable without the native module, whose instruction set it measures
    """
    reason = why_not_native()
    if reason is not None:
        raise BackendUnavailable(f"roof: Expected the native module, got none: {reason}")
    run, threads = native_module().run_roof, torch.get_num_threads()
    rounds = 10_000
    while _best(partial(run, rounds, threads), 1) < _SECONDS:
        rounds *= 2
    flops = threads * native_module().roof_flops(rounds) / _best(partial(run, rounds, threads))
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    return Roof(flops, 2 * _COPY_BYTES / _best(lambda: target.copy_(source)))


def _best(call: Callable[[], object], tries: int = _TRIES) -> float:
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
