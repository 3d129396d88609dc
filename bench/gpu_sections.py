"""The parts of `make gpu`, each run by itself: python -m bench.gpu_sections NAME --out FILE.

A section checks what it is about to time against torch, then times ours and the dense baselines in
turn, and writes after every row; a case that fails leaves its traceback and the next one is run. G1
to G6 are the goals of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu_common import Jobs, Row, Setting
from bench.gpu_convolutions import g2, g3, g4
from bench.gpu_elementwise import g1, roofs
from bench.gpu_engine import engine_jobs
from bench.gpu_models import g5, g6
from bench.machine import machine

SECTIONS: dict[str, Callable[[Setting], Jobs]] = {
    "roofs": roofs, "G1": g1, "G2": g2, "G3": g3, "G6": g6, "G4": g4, "G5": g5,
    "engine": lambda s: engine_jobs(s.device, s.small, 3 * s.budget),
}  # fmt: skip


FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def run(jobs: Jobs, out: Path, section: str) -> int:
    """Run the jobs one after the other and write what is known after each; how many failed."""
    rows: Row = {}
    failed = 0
    for name, job in jobs:
        try:
            rows[name] = job()
        except FAILURES as error:  # the other cases are worth having
            failed += 1
            text = "".join(traceback.format_exception(error))
            rows[name] = {"failed": {"error": str(error)[:300], "traceback": text[-4000:]}}
            print(text, file=sys.stderr)
        out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        print(f"{section}: {name}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the code out")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    setting = Setting(args.device, args.small)
    return 1 if run(SECTIONS[args.section](setting), args.out, args.section) else 0


if __name__ == "__main__":
    sys.exit(main())
