"""One timer for layers, engine, measurements and benches: candidates interleaved in one run.

Candidates that are timed one after the other meet another clock and another load; taking turns,
they meet the same. The median is reported with its spread, and what runs on a GPU is waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in seconds.

    median: the middle one   low, high: quartiles   best: the shortest   rounds: how many
    """

    median: float
    low: float
    high: float
    best: float
    rounds: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median if self.median > 0 else 0.0


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    budget: float | None = None,
    settle: int = 0,
    least: int = 1,
) -> dict[str, Timing]:
    """Time the calls in turn, round after round.

    calls:   name -> what to time, without arguments; its result is dropped inside the time
    rounds:  timed rounds of each   warmup: rounds before them, not counted
    device:  where the work runs; a CUDA device is waited for before and after each call
    budget:  seconds after which no further round is begun, once each call was timed `least` times
    settle:  untimed calls of a candidate before each timed one, so that it meets the caches as its
             own repetition leaves them and not as the candidate before it does
    returns: name -> Timing, in the order of calls
    raises:  ValueError if there is no call or no round
    """
    if not calls:
        raise ValueError("interleave: Expected at least one call, got none")
    if rounds < 1 or warmup < 0:
        raise ValueError(
            f"interleave: Expected rounds ≥ 1 and warmup ≥ 0, got {rounds} and {warmup}"
        )
    if settle < 0 or least < 1:
        raise ValueError(f"interleave: Expected settle ≥ 0 and least ≥ 1, got {settle} and {least}")
    wait = _waiter(torch.device(device))
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(warmup + rounds):
        spent = time.perf_counter() - begin
        if turn >= warmup + least and budget is not None and spent > budget:
            break
        for name, call in calls.items():
            for _ in range(settle):
                call()
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: _summarise(seconds) for name, seconds in times.items()}


def _waiter(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _summarise(seconds: list[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, min(seconds), len(seconds))
