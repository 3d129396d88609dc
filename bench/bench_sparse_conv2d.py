"""sparse_conv2d against the fastest dense convolution that torch offers, forward and backward.

    python -m bench.bench_sparse_conv2d --sparsity 0.9 --threads 2      a table, with a verdict
    pytest bench/bench_sparse_conv2d.py                                 pytest-benchmark

Cases are layers of DeepLab-ResNet34 at 321x321, batch 1. Dense paths: torch NCHW, channels_last,
blocked oneDNN (`to_mkldnn`) and, with --compiled, torch.compile with freezing; the row names the
fastest, by median. Candidates take turns within one run. Each call is preceded by three untimed
ones of the same candidate, so that all are measured with warm caches: what the candidate before has
driven out comes back over two or three calls. A row is printed only if what it times agrees with
float64; `roof` is the share that multiply-adds on live weights, padding included, have
in what the cores reach in registers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import RESULTS, machine, text
from sparsemtl.ops import pack_pattern, sparse_conv2d
from sparsemtl.ops.availability import native_module
from sparsemtl.ops.pattern import STRUCTURES, Pattern

Call = Callable[[], object]

CASES = {  # C, K, kernel, dilation, map
    "1x1-1024": (1024, 1024, 1, 1, 41),
    "3x3-512-d2": (512, 512, 3, 2, 41),
    "3x3-512-1024-d6": (512, 1024, 3, 6, 41),
    "3x3-512-1024-d12": (512, 1024, 3, 12, 41),
    "3x3-512-1024-d18": (512, 1024, 3, 18, 41),
    "3x3-512-1024-d24": (512, 1024, 3, 24, 41),
    "3x3-64-81": (64, 64, 3, 1, 81),
    "3x3-128-41": (128, 128, 3, 1, 41),
}
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
PASSES = ("forward", "training")
SETTLE = 3  # untimed calls before each timed one
GHZ = 4.27  # of the machine of the committed results, from 273 GF/s of multiply-adds per core
_FLOPS_PER_CYCLE = {"avx512": 64, "avx2": 32, "generic": 8}

# Speed-ups to reach: case prefix -> pass and structure -> one for each of SPARSITIES
MUST = {
    ("1x1-1024", "forward", "element"): (2.2, 4, 7, 20),
    ("3x3-512", "forward", "element"): (1.9, 3.5, 6, 15),
    ("3x3-64", "forward", "element"): (1.8, 3, 5.5, 12),
    ("3x3-128", "forward", "element"): (1.8, 3, 5.5, 12),
    ("", "training", "element"): (1.8, 3, 5, 10),
    ("", "forward", "vector(8)"): (3, 6, 10, 25),
}


def make(case: str, sparsity: float, structure: str) -> tuple[Tensor, Tensor, Tensor, dict]:
    """x, weight, gradient of the output and the convolution's options; seeded."""
    channels, rows, kernel, dilation, size = CASES[case]
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, size, size, generator=rng)
    shape, vector = (rows, channels, kernel, kernel), STRUCTURES[structure]
    live = torch.rand(rows // vector, *shape[1:], generator=rng) >= sparsity
    scale = math.sqrt(channels * kernel * kernel * max(1 - sparsity, 1e-3))
    weight = torch.randn(shape, generator=rng) / scale * live.repeat_interleave(vector, 0)
    grad = torch.randn(1, rows, size, size, generator=rng)
    return x, weight, grad, {"padding": dilation * (kernel // 2), "dilation": dilation}


def step(convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, grad: Tensor) -> Call:
    """Forward and both gradients; leaves that share no memory with other candidates."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    w = w.clone(memory_format=torch.preserve_format).requires_grad_()

    def run() -> None:
        convolve(x, w).backward(grad)
        x.grad = w.grad = None

    return run


def dense_calls(x: Tensor, w: Tensor, grad: Tensor, options: dict, compiled: bool, kind: str):
    """Name -> call of each dense path that exists for this pass."""

    def convolve(a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(a, b, **options)

    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, w, grad)]
    if kind == "training":
        calls: dict[str, Call] = {
            "nchw": step(convolve, x, w, grad),
            "channels_last": step(convolve, *last),
        }
        if compiled:
            calls["compiled"] = step(torch.compile(convolve), *last)
        return calls
    padding, dilation = [options["padding"]] * 2, [options["dilation"]] * 2
    blocked_x = x.to_mkldnn()
    blocked_w = torch._C._nn.mkldnn_reorder_conv2d_weight(
        w.to_mkldnn(), padding=padding, stride=1, dilation=dilation, groups=1,
        input_size=list(x.shape),
    )  # fmt: skip
    calls = {
        "nchw": lambda: convolve(x, w),
        "channels_last": lambda: convolve(last[0], last[1]),
        "mkldnn": lambda: torch.mkldnn_convolution(
            blocked_x, blocked_w, None, padding, [1, 1], dilation, 1
        ),
    }
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True
        layer = torch.nn.Conv2d(*w.shape[1::-1], w.shape[2], bias=False, **options).eval()
        layer.weight.data.copy_(w)
        frozen = torch.compile(layer)
        calls["compiled"] = lambda: frozen(x)
    return calls


def relative_error(
    x: Tensor, w: Tensor, grad: Tensor, options: dict, pattern: Pattern, kind: str
) -> float:
    """Largest error against float64, relative to the largest entry; of gradients too if timed."""
    if kind == "forward":
        expected = F.conv2d(x.double(), w.double(), **options)
        error = (sparse_conv2d(x, w, pattern=pattern, **options) - expected).abs().max()
        return (error / expected.abs().max()).item()
    wide = [t.double().requires_grad_() for t in (x, w)]
    expected = F.conv2d(*wide, **options)
    wanted = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    wanted[2] = wanted[2] * pattern.mask()
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    y = sparse_conv2d(*leaves, pattern=pattern, **options)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    errors = [(f - e).abs().max() / e.abs().max() for f, e in zip(found, wanted, strict=True)]
    return max(error.item() for error in errors)


def time_warm(calls: dict[str, Call], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each call; in turn, each behind untimed calls of its own."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(times[next(iter(calls))]) < rounds:
        if time.perf_counter() - begin > budget and len(times[next(iter(calls))]) >= 3:
            break
        for name, call in calls.items():
            for _ in range(SETTLE):
                call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def measure(
    case: str,
    kind: str,
    structure: str,
    sparsity: float,
    rounds: int,
    budget: float,
    compiled: bool,
) -> dict[str, object]:
    """One row; raises AssertionError where the result is wrong."""
    x, w, grad, options = make(case, sparsity, structure)
    pattern = pack_pattern(w, structure=structure)
    error = relative_error(x, w, grad, options, pattern, kind)
    assert error < 1e-5, f"{case} {kind} {structure} {sparsity}: relative error {error:.1e}"
    calls = dense_calls(x, w, grad, options, compiled, kind)
    dense = list(calls)

    def convolve(a: Tensor, b: Tensor) -> Tensor:
        return sparse_conv2d(a, b, pattern=pattern, **options)

    calls["sparse"] = step(convolve, x, w, grad) if kind == "training" else lambda: convolve(x, w)
    with torch.set_grad_enabled(kind == "training"):
        times = time_warm(calls, rounds, budget)
    medians = {name: statistics.median(t) for name, t in times.items()}
    fastest = min(dense, key=medians.__getitem__)
    low, _, high = statistics.quantiles(times["sparse"], n=4, method="inclusive")
    passes = 3 if kind == "training" else 1
    flops = 2 * pattern.nonzeros * grad[0, 0].numel() * passes
    best = {name: min(t) for name, t in times.items()}
    return {
        "case": case,
        "pass": kind,
        "structure": structure,
        "sparsity": sparsity,
        "dense_path": fastest,
        "dense_ms": round(1e3 * medians[fastest], 4),
        "sparse_ms": round(1e3 * medians["sparse"], 4),
        "speedup": round(medians[fastest] / medians["sparse"], 3),
        "speedup_of_best": round(min(best[name] for name in dense) / best["sparse"], 3),
        "spread": round((high - low) / medians["sparse"], 3),
        "rel_err": float(f"{error:.2g}"),
        "fraction_of_roof": round(flops / best["sparse"] / peak_flops(), 3),
        "rounds": len(times["sparse"]),
    }


def peak_flops() -> float:
    """Flops a second of multiply-adds in registers, over all threads."""
    return GHZ * 1e9 * _FLOPS_PER_CYCLE[native_module().isa()] * torch.get_num_threads()


def must_of(row: dict[str, object]) -> float | None:
    if row["sparsity"] not in SPARSITIES:
        return None
    for (prefix, kind, structure), goals in MUST.items():
        same = (kind, structure) == (row["pass"], row["structure"])
        if same and str(row["case"]).startswith(prefix):
            return goals[SPARSITIES.index(float(str(row["sparsity"])))]
    return None


def steady_memory() -> None:
    """Keep freed memory mapped, for every candidate alike: otherwise each call pays page faults
    for its output, as many for a dense as for a sparse one, and hides what is measured."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


@pytest.mark.parametrize("call", ["nchw", "channels_last", "sparse"])
@pytest.mark.parametrize("case", CASES)
def bench_sparse_conv2d(benchmark, case: str, call: str) -> None:
    x, w, grad, options = make(case, 0.9, "element")
    pattern = pack_pattern(w)
    assert relative_error(x, w, grad, options, pattern, "forward") < 1e-5
    calls = dense_calls(x, w, grad, options, False, "forward")
    calls["sparse"] = lambda: sparse_conv2d(x, w, pattern=pattern, **options)
    benchmark.extra_info.update(machine())
    with torch.no_grad():
        benchmark.pedantic(calls[call], rounds=10, warmup_rounds=2)


def save(path: Path, line: dict[str, object], rows: list[dict[str, object]], add: bool) -> None:
    """Write the rows with the machine's line; or add them to, or put them in place of, a file's."""
    path.parent.mkdir(exist_ok=True)
    rows = [{**row, "threads": line["threads"], "isa": line["isa"]} for row in rows]
    if add and path.exists():
        names = ("case", "pass", "structure", "sparsity", "threads", "isa")
        new = {tuple(row[name] for name in names) for row in rows}
        kept = json.loads(path.read_text())["rows"]
        rows = [r for r in kept if tuple(r.get(name) for name in names) not in new] + rows
    path.write_text(json.dumps({"machine": line, "rows": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--structure", choices=STRUCTURES, default="element")
    parser.add_argument("--kind", choices=PASSES, action="append", metavar="PASS")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=_FLOPS_PER_CYCLE)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of a row")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--add", action="store_true", help="keep the other rows of --out")
    parser.add_argument("--out", default=str(RESULTS / "sparse_conv2d.json"))
    args = parser.parse_args()
    steady_memory()
    torch.set_num_threads(args.threads)
    if args.isa:
        native_module().force_isa(args.isa)
    line = machine()
    print(text(line))
    kinds = args.kind or (PASSES if args.structure == "element" else PASSES[:1])
    rows, met = [], True
    print(f"{'case':<18}{'pass':<10}{'sparse':>7} {'dense path':<14}{'dense ms':>9}{'ms':>9}"
          f"{'speedup':>9}{'best':>7}{'spread':>8}{'roof':>6}{'must':>6}")  # fmt: skip
    for kind in kinds:
        for case in args.case or CASES:
            for sparsity in args.sparsity or SPARSITIES:
                row = measure(
                    case, kind, args.structure, sparsity, args.rounds, args.budget, args.compiled
                )
                must = must_of(row)
                met &= must is None or row["speedup"] >= must
                rows.append(row)
                print(
                    f"{case:<18}{kind:<10}{sparsity:>7.0%} {row['dense_path']:<14}"
                    f"{row['dense_ms']:>9.2f}{row['sparse_ms']:>9.3f}{row['speedup']:>8.2f}x"
                    f"{row['speedup_of_best']:>6.1f}x{row['spread']:>8.1%}"
                    f"{row['fraction_of_roof']:>6.0%}{must if must else '':>6}",
                    flush=True,
                )
    save(Path(args.out), line, rows, args.add)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
