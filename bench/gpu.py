"""GPU correctness and benches where there is a GPU: `make gpu`, in under nine minutes.

    python -m bench.gpu [--plan] [--limit SECONDS] [--only NAME ...] [--out FOLDER]

First every op against torch on the device, then tests/ops where pytest and hypothesis are
installed, then the CUDA kernels under compute-sanitizer where it is. Then the sections of
bench/gpu_sections.py, each in a process of its own, which checks what it times once more. gpu.json,
gpu.md and gpu.png are written anew after each, so that whatever ends a run leaves what it had. What
fails leaves the end of its output in gpu.json and the run fails, but the other parts are run; what
cannot run says why.

Exit status: 0 passed, 1 failed, 2 and one line where there is no GPU. --plan lists the cases with
their floors, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.gpu_plan import plan
from bench.gpu_report import write
from bench.gpu_sections import SECTIONS
from bench.machine import RESULTS, machine, text

LIMIT = 525  # seconds of the whole run, under nine minutes
# Seconds that a part may take at most; what one leaves, the next ones have.
LIMITS = {
    "build": 70, "gate": 60, "tests": 75, "memcheck": 30, "racecheck": 30,
    "roofs": 20, "G1": 30, "G2": 70, "G3": 90, "G6": 120, "G4": 50, "G5": 60, "engine": 240,
}  # fmt: skip


class Run:
    """One run: what it found so far, and the time it has left."""

    def __init__(self, limit: float, out: Path) -> None:
        self.begin, self.limit, self.out = time.perf_counter(), limit, out
        self.result: dict[str, object] = {"machine": machine(), "parts": {}, "rows": {}}

    @property
    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.begin)

    def call(self, name: str, command: list[str], **variables: str) -> tuple[str, str]:
        """Run a part in a child: its state, "passed", "failed" or "stopped", and its output."""
        seconds = min(LIMITS[name], self.left)
        if seconds < 5:
            return self.note(name, "skipped", f"no time left of {self.limit:.0f} s"), ""
        environment = {**os.environ, "TRITON_INTERPRET": "0", **variables}
        try:
            done = subprocess.run(
                command, env=environment, timeout=seconds, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            shown = output.decode(errors="replace") if isinstance(output, bytes) else output
            return self.note(name, "stopped", f"after {seconds:.0f} s", shown), shown
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        state = "passed" if done.returncode == 0 else "failed"
        return self.note(name, state, last, done.stdout), done.stdout

    def note(self, name: str, state: str, reason: str, output: str = "") -> str:
        spent = time.perf_counter() - self.begin
        parts = self.result["parts"]
        assert isinstance(parts, dict)
        parts[name] = {"state": state, "reason": reason[:300], "at": round(spent, 1)}
        if state in ("failed", "stopped"):
            parts[name]["output"] = output[-6000:]
        print(f"gpu: {name} {state} at {spent:.0f} s: {reason[:160]}", flush=True)
        self.save()
        return state

    def save(self) -> None:
        write(self.result, self.out)


def build(run: Run) -> None:
    """Build the native module where it is missing and can be built."""
    if importlib.util.find_spec("sparsemtl._C") is not None:
        return
    if importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None:
        run.note("build", "skipped", "sparsemtl._C is not built, and pybind11 or g++ is missing")
        return
    run.call("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"])


def gate(run: Run) -> bool:
    """Whether every op agrees with torch on this device."""
    agreed, output = run.call("gate", [sys.executable, "-m", "bench.gpu_gate"])
    if agreed != "passed":
        print(output[-4000:])
    missing = [m for m in ("pytest", "hypothesis") if importlib.util.find_spec(m) is None]
    if missing:
        run.note("tests", "skipped", f"not installed: {', '.join(missing)}")
        return agreed == "passed"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "bench", "tests/ops"]
    state, output = run.call("tests", tests, SPARSEMTL_TEST_DEVICE="cuda")
    if state == "failed":
        print(output[-4000:])
    return agreed == "passed" and state != "failed"


def sanitize(run: Run) -> bool:
    """Memory and race checks of the CUDA C++ kernels, on short cases."""
    from sparsemtl.ops.availability import why_not_cuda

    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(tool, os.X_OK):
        run.note("memcheck", "skipped", "compute-sanitizer was not found")
        return True
    if why_not_cuda() is not None:
        run.note("memcheck", "skipped", str(why_not_cuda()))
        return True
    clean = True
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable]
        command += ["-m", "bench.gpu_gate", "--cuda-only"]
        # Each tensor an allocation of its own, past whose end the tool sees.
        state, output = run.call(check, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if state == "failed" and "Device not supported" in output:
            run.note(check, "skipped", "compute-sanitizer does not support this device")
        elif state == "failed":
            print(output[-4000:])
            clean = False
    return clean


def sections(run: Run, names: list[str]) -> bool:
    passed = True
    rows = run.result["rows"]
    assert isinstance(rows, dict)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "rows.json")
            command = [sys.executable, "-m", "bench.gpu_sections", name, "--out", str(out)]
            state, output = run.call(name, command)
            if out.exists():  # also of a section that was stopped
                rows[name] = json.loads(out.read_text())["rows"]
            run.save()
            if state == "failed":
                passed = False
                print(output[-2000:])
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="list the cases and their floors")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the whole run")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.plan:
        print("floors of an H200, assumed 4.3 TB/s and 790 TFLOP/s in bfloat16; not measured")
        for name, floor in plan():
            print(f"{name:<52} {floor:9.3f} ms")
        return 0
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here, nothing was run")
        return 2
    run = Run(args.limit, args.out)
    print(text(machine()), flush=True)
    build(run)
    passed = gate(run)
    passed = sanitize(run) and passed
    passed = sections(run, args.only) and passed
    run.result["passed"] = passed
    run.result["seconds"] = round(time.perf_counter() - run.begin, 1)
    run.save()
    print(f"gpu: {'passed' if passed else 'FAILED'}, wrote {args.out / 'gpu.json'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
