"""sparse_conv2d against the fastest dense convolution that torch offers, forward and backward.

    python -m bench.bench_sparse_conv2d --sparsity 0.9 --threads 2      a table, with a verdict
    pytest bench/bench_sparse_conv2d.py                                 pytest-benchmark

Cases are the layers whose speed is promised, at 321x321, batch 1. What is timed, the dense paths
and the gate before them are sparsemtl/measure/bench_conv.py, which `sparsemtl bench conv` runs over
every layer. Here each timed call stands behind three untimed ones of the same candidate: what the
candidate before has driven out of the caches comes back over two or three calls.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from bench.machine import RESULTS, machine, text
from sparsemtl.measure.bench_conv import (
    PASSES,
    make_problem,
    measure_case,
    relative_error,
    sparse_call,
    steady_memory,
)
from sparsemtl.measure.conv_cases import all_cases
from sparsemtl.measure.dense_conv import Compiler, dense_calls
from sparsemtl.measure.roof import measure_roof
from sparsemtl.ops.availability import native_module
from sparsemtl.ops.pattern import STRUCTURES

CASES = {  # name here and in the committed rows: name among all cases
    "1x1-1024": "deeplab/1x1-1024-1024@41",
    "3x3-512-d2": "extra/3x3-512-512-d2@41",
    "3x3-512-1024-d6": "deeplab/3x3-512-1024-d6@41",
    "3x3-512-1024-d12": "deeplab/3x3-512-1024-d12@41",
    "3x3-512-1024-d18": "deeplab/3x3-512-1024-d18@41",
    "3x3-512-1024-d24": "deeplab/3x3-512-1024-d24@41",
    "3x3-64-81": "deeplab/3x3-64-64@81",
    "3x3-128-41": "deeplab/3x3-128-128@41",
}
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
SETTLE = 3  # untimed calls before each timed one

# Speed-ups to reach: case prefix, pass, structure -> one for each of SPARSITIES
MUST = {
    ("1x1-1024", "forward", "element"): (2.2, 4, 7, 20),
    ("3x3-512", "forward", "element"): (1.9, 3.5, 6, 15),
    ("3x3-64", "forward", "element"): (1.8, 3, 5.5, 12),
    ("3x3-128", "forward", "element"): (1.8, 3, 5.5, 12),
    ("", "training", "element"): (1.8, 3, 5, 10),
    ("", "forward", "vector(8)"): (3, 6, 10, 25),
}
KEY = ("case", "pass", "structure", "sparsity", "threads", "isa")  # of a committed row


def must_of(row: dict[str, object]) -> float | None:
    if row["sparsity"] not in SPARSITIES:
        return None
    for (prefix, kind, structure), goals in MUST.items():
        same = (kind, structure) == (row["pass"], row["structure"])
        if same and str(row["case"]).startswith(prefix):
            return goals[SPARSITIES.index(float(str(row["sparsity"])))]
    return None


@pytest.mark.parametrize("call", ["nchw", "channels_last", "sparse"])
@pytest.mark.parametrize("case", CASES)
def bench_sparse_conv2d(benchmark, case: str, call: str) -> None:
    problem = make_problem(all_cases()[CASES[case]], 0.9)
    assert relative_error(problem, training=False) < 1e-5
    calls = dense_calls(problem.case, problem.x, problem.weight, problem.grad, training=False)
    calls["sparse"] = sparse_call(problem, training=False)
    benchmark.extra_info.update(machine())
    with torch.no_grad():
        benchmark.pedantic(calls[call], rounds=10, warmup_rounds=2)


def save(path: Path, line: dict[str, object], rows: list[dict[str, object]], add: bool) -> None:
    """Write the rows with the machine's line; or add them to, or put them in place of, a file's."""
    path.parent.mkdir(exist_ok=True)
    if add and path.exists():
        new = {tuple(row[name] for name in KEY) for row in rows}
        kept = json.loads(path.read_text())["rows"]
        rows = [r for r in kept if tuple(r.get(name) for name in KEY) not in new] + rows
    path.write_text(json.dumps({"machine": line, "rows": rows}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--structure", choices=STRUCTURES, default="element")
    parser.add_argument("--kind", choices=PASSES, action="append", metavar="PASS")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=native_module().usable_isas())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of a row")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--add", action="store_true", help="keep the other rows of --out")
    parser.add_argument("--out", default=str(RESULTS / "sparse_conv2d.json"))
    return parser.parse_args()


def show(row: dict[str, object], must: float | None) -> None:
    print(
        f"{row['case']:<18}{row['pass']:<10}{row['sparsity']:>7.0%} {row['dense_path']:<14}"
        f"{row['dense_ms']:>9.2f}{row['sparse_ms']:>9.3f}{row['speedup']:>8.2f}x"
        f"{row['speedup_of_best']:>6.1f}x{row['spread']:>8.1%}"
        f"{row['fraction_of_roof']:>6.0%}{must if must else '':>6}",
        flush=True,
    )


def main() -> int:
    args = arguments()
    steady_memory()
    torch.set_num_threads(args.threads)
    if args.isa:
        native_module().force_isa(args.isa)
    line, roof = machine(), measure_roof()
    compiler = Compiler(float("inf")) if args.compiled else None
    print(text(line))
    print(roof.text())
    kinds = args.kind or (PASSES if args.structure == "element" else PASSES[:1])
    rows, met = [], True
    print(f"{'case':<18}{'pass':<10}{'sparse':>7} {'dense path':<14}{'dense ms':>9}{'ms':>9}"
          f"{'speedup':>9}{'best':>7}{'spread':>8}{'roof':>6}{'must':>6}")  # fmt: skip
    for case in args.case or CASES:
        for sparsity in args.sparsity or SPARSITIES:
            problem = make_problem(all_cases()[CASES[case]], sparsity, args.structure)
            for kind in kinds:
                row = measure_case(
                    problem, kind, args.structure, sparsity, roof, compiler,
                    rounds=args.rounds, seconds=args.budget, settle=SETTLE,
                )  # fmt: skip
                row |= {"case": case, "threads": args.threads, "isa": native_module().isa()}
                must = must_of(row)
                met &= must is None or row["speedup"] >= must
                rows.append(row)
                show(row, must)
    save(Path(args.out), line | {"roof": roof.to_json()}, rows, args.add)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
