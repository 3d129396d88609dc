"""Compile every Triton and CUDA kernel ahead of time for sm_80 and sm_90, without a GPU.

    python -m bench.aot [--out bench/results/aot.json]

Needs a process without TRITON_INTERPRET. A stand-in driver names the target, so that
`kernel.warmup` specialises as a launch would; the registers, shared memory and spills of the
machine code are read by cuobjdump from the triton package. A spill of more than one address is a
failure, and so is more shared memory than the target has. bench/aot_cases.py holds the list.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.aot_cases import cases
from bench.aot_cuda import cuda_rows, find_nvcc
from bench.machine import RESULTS, machine

TARGETS = (80, 90)
SET_ASIDE = 8  # bytes: one address, where the ptxas of triton 3.6 stops at 48 or 80 registers
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that one program may have


class TargetDriver:
    """What Triton asks of a driver before a launch: a target, a device and a stream."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a kernel remembers what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_one(kernel, arguments: list[object], options: dict[str, object]) -> dict[str, int]:
    """Compile for the active driver's target; return what the machine code uses."""
    from triton import MockTensor

    given = [MockTensor(a) if isinstance(a, torch.dtype) else a for a in arguments]
    compiled = kernel.warmup(*given, grid=(1,), **options)
    found = resources(compiled.asm["cubin"])
    found["shared"] += compiled.metadata.shared  # what a launch asks for on top
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of static shared and local memory, local or stack being spills."""
    tool = cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|SHARED|LOCAL|STACK):(\d+)", output))
    return {key.lower(): int(found[key]) for key in ("REG", "SHARED", "LOCAL", "STACK")}


def cuobjdump() -> str:
    """The tool in the triton package."""
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(RESULTS / "aot.json"))
    args = parser.parse_args()
    if importlib.util.find_spec("triton") is None or platform.machine() != "x86_64":
        print("aot: triton is not installed here, nothing to compile")
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot: expected no TRITON_INTERPRET: the interpreter cannot compile", file=sys.stderr)
        return 2
    from triton.runtime.driver import driver

    rows: dict[str, dict[str, int]] = {}
    wrong: list[str] = []
    for capability in TARGETS:
        driver.set_active(TargetDriver(capability))
        for name, kernel, arguments, options in cases():
            row = rows[f"sm_{capability}/{name}"] = compile_one(kernel, arguments, options)
            if row["local"] + row["stack"] > SET_ASIDE:
                wrong.append(f"{name} spills on sm_{capability}: {row}")
            if row["shared"] > SHARED[capability]:
                wrong.append(f"{name} has too much shared memory for sm_{capability}: {row}")
    nvcc = find_nvcc()
    if nvcc is None:
        print("aot: nvcc was not found, so without the CUDA C++ kernels")
    else:
        for name, row in cuda_rows(nvcc, cuobjdump()).items():
            rows[name] = row
            if row["local"] + row["stack"] > SET_ASIDE:
                wrong.append(f"{name} spills: {row}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w") as file:
        json.dump({"machine": machine(), "kernels": rows}, file, indent=1)
    most = max(row["reg"] for row in rows.values())
    print(f"aot: {len(rows)} kernels compiled, at most {most} registers, {len(wrong)} refused")
    for line in wrong:
        print(f"aot: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
