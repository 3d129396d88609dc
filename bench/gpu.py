"""GPU correctness and benches where there is a GPU: `make gpu`, in under nine minutes.

Runs tests/ops on the device, where a CUDA backend that is skipped fails, then the op benches,
and writes one JSON with the machine line. Exit status 2 and one line where there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import torch

from bench.machine import RESULTS, machine, text

TEST_LIMIT, BENCH_LIMIT = 300, 180  # seconds, together under nine minutes


def run(command: list[str], limit: int, **variables: str) -> tuple[int, str]:
    """Exit status and output of a child; a child that takes too long counts as failed."""
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(
            command, env=environment, timeout=limit, stdout=subprocess.PIPE, text=True
        )
    except subprocess.TimeoutExpired:
        return 124, f"stopped after {limit} s"
    return done.returncode, done.stdout


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here, nothing was run")
        return 2
    begin, line = time.perf_counter(), machine()
    print(text(line), flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "tests/ops"]
    status, output = run(tests, TEST_LIMIT, SPARSEMTL_TEST_DEVICE="cuda", TRITON_INTERPRET="0")
    print(output)
    result: dict[str, object] = {"machine": line, "tests": output.strip().splitlines()[-1:]}
    if status == 0:  # no number on a red gate
        out = RESULTS / "soft_threshold_cuda.json"
        bench = [sys.executable, "-m", "bench.bench_soft_threshold", "--device", "cuda"]
        status, output = run([*bench, "--rounds", "50", "--out", str(out)], BENCH_LIMIT)
        print(output)
        if out.exists():
            result["soft_threshold"] = json.loads(out.read_text())["cases"]
            out.unlink()
    result["status"], result["seconds"] = status, round(time.perf_counter() - begin, 1)
    path = RESULTS / "gpu.json"
    path.write_text(json.dumps(result, indent=1))
    print(f"gpu: {'passed' if status == 0 else 'FAILED'}, wrote {path}")
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
