"""Timing for the GPU benches: candidates in turn, with events, several calls to a sample."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def times(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: float = 3.0,
    warm: int = 1,
) -> dict[str, dict[str, float]]:
    """Milliseconds of each call: median and quartiles of interleaved samples, within a budget.

    A call that raises in its `warm` first runs is left out, with the reason in its place under
    "error".
    """
    found: dict[str, dict[str, float]] = {}
    alive: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        try:
            for _ in range(warm):
                call()
            alive[name] = call
        except (RuntimeError, ValueError, TypeError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}  # type: ignore[dict-item]
    samples: dict[str, list[float]] = {name: [] for name in alive}
    repeats = {
        name: max(1, min(20, int(2.0 / max(_sample(call, 1, device), 1e-3))))
        for name, call in alive.items()
    }  # about 2 ms to a sample
    begin = time.perf_counter()
    while len(next(iter(samples.values()), [])) < 30:
        for name, call in alive.items():
            samples[name].append(_sample(call, repeats[name], device))
        if time.perf_counter() - begin > budget and len(next(iter(samples.values()))) >= 5:
            break
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found[name] = {
            "ms": statistics.median(values), "low": low, "high": high, "samples": len(values),
        }  # fmt: skip
    return found


def _sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Milliseconds of one call, the mean of a few in a row."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - begin) / repeats
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeats


def best(row: Mapping[str, Mapping[str, float]], prefix: str) -> float | None:
    """The least median of the candidates whose names begin so; None if none ran."""
    found = [t["ms"] for name, t in row.items() if name.startswith(prefix) and "ms" in t]
    return min(found) if found else None


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
