"""What the op benches share as programs: interleaved rounds, a table, a verdict, a JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import RESULTS, machine, text
from sparsemtl.timing import Timing, interleave

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Goal:
    """What `native` must reach in one case: times eager's speed, at most times a copy's time."""

    case: str
    times_eager: float
    times_copy: float


def parser(doc: str, cases: Sequence[str], stem: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every op bench."""
    options = argparse.ArgumentParser(description=doc.splitlines()[0])
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--case", choices=cases, action="append")
    options.add_argument("--out", default=str(RESULTS / f"{stem}.json"))
    return options


def compare(
    args: argparse.Namespace,
    cases: Sequence[str],
    weights: Callable[[str], int],
    candidates: Callable[[str], Calls],
    goal: Goal,
    device: str = "cpu",
) -> int:
    """Time the candidates of each case, which `candidates` has gated, and write the file.

    returns: 0 if the goal is met or its case was not run, else 1
    """
    torch.set_num_threads(args.threads)
    line = machine()
    print(text(line))
    found: dict[str, object] = {}
    met = True
    for case in args.case or cases:
        times = interleave(candidates(case), args.rounds, device=device)
        found[case] = report(case, times, weights(case))
        if case == goal.case and "native" in times:
            met = verdict(times, goal)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": line, "device": device, "cases": found}, indent=1))
    return 0 if met else 1


def report(case: str, times: dict[str, Timing], weights: int) -> dict[str, object]:
    """Print the rows of one case; return them for the file."""
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


def verdict(times: dict[str, Timing], goal: Goal) -> bool:
    """Print whether the goal is met."""
    eager = times["eager"].median / times["native"].median
    copy = times["native"].median / times["copy"].median
    met = eager >= goal.times_eager and copy <= goal.times_copy
    print(
        f"native: {eager:.1f}x eager (must {goal.times_eager:g}), {copy:.2f}x a copy of the same "
        f"bytes (must {goal.times_copy:g}): {'met' if met else 'MISSED'}"
    )
    return met
