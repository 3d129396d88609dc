"""Compile every Triton kernel ahead of time for sm_80 and sm_90, without a GPU.

    python -m bench.aot [--out bench/results/aot.json]

Needs a process without TRITON_INTERPRET. A stand-in driver names the target, so that
`kernel.warmup` specialises as a launch would; the registers, shared memory and spills of the
machine code are read by cuobjdump from the triton package. A spill is a failure.
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
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.machine import RESULTS, machine

TARGETS = (80, 90)


class TargetDriver:
    """What Triton asks of a driver before a launch: a target, a device and a stream."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def cases() -> Iterator[tuple[str, object, list[object], dict[str, object]]]:
    """Name, kernel, argument types or values, options: one for each way a kernel is launched."""
    from sparsemtl.kernels import soft_threshold as st
    from sparsemtl.kernels import threshold_adam as ta
    from sparsemtl.ops.soft_threshold_backends import TRITON_BLOCK

    tables: list[object] = [torch.int64] * 4  # addresses, sizes, owners, starts
    for dtype, triton_type in st.TYPES.items():
        options = {"DTYPE": triton_type, "BP": TRITON_BLOCK, "num_warps": 4}
        name = f"soft_threshold_fwd/{str(dtype)[6:]}"
        arguments = [*tables, torch.float32, torch.int64, 12]
        for kind, count, mask in (("plain", 0, 0), ("count", 1, 0), ("mask", 1, 1)):
            flags = {"COUNT": bool(count), "MASK": bool(mask)}
            yield f"{name}/{kind}", st.soft_threshold_fwd_kernel, arguments, {**options, **flags}
        arguments = [*tables, torch.float32, torch.float32, 12]
        name = f"soft_threshold_bwd/{str(dtype)[6:]}"
        yield name, st.soft_threshold_bwd_kernel, arguments, options
        arguments = [*tables, torch.float32, torch.int64, torch.float32, torch.int64, 12]
        for kind, flags in (("adam", (0, 0)), ("threshold", (1, 0)), ("mask", (1, 1))):
            chosen = {**options, "THRESHOLD": bool(flags[0]), "MASK": bool(flags[1])}
            name = f"threshold_adam/{str(dtype)[6:]}/{kind}"
            yield name, ta.threshold_adam_kernel, arguments, chosen


def compile_one(kernel, arguments: list[object], options: dict[str, object]) -> bytes:
    """Return the machine code of a kernel for the active driver's target."""
    from triton import MockTensor

    given = [MockTensor(a) if isinstance(a, torch.dtype) else a for a in arguments]
    return kernel.warmup(*given, grid=(1,), **options).asm["cubin"]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of shared and local memory, local being spills."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|SHARED|LOCAL|STACK):(\d+)", output))
    return {key.lower(): int(found[key]) for key in ("REG", "SHARED", "LOCAL", "STACK")}


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
    for capability in TARGETS:
        driver.set_active(TargetDriver(capability))
        for name, kernel, arguments, options in cases():
            rows[f"sm_{capability}/{name}"] = resources(compile_one(kernel, arguments, options))
    spilled = [name for name, row in rows.items() if row["local"] or row["stack"]]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w") as file:
        json.dump({"machine": machine(), "kernels": rows}, file, indent=1)
    most = max(row["reg"] for row in rows.values())
    print(f"aot: {len(rows)} kernels compiled, at most {most} registers, {len(spilled)} spill")
    for name in spilled:
        print(f"aot: {name} spills: {rows[name]}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
