"""Registers, shared memory and spills of the CUDA C++ kernels, for bench/aot.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc"
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a")


def find_nvcc() -> str | None:
    """The compiler that setup.py would take."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    found = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next((p for p in [*found, shutil.which("nvcc")] if p and os.access(p, os.X_OK)), None)


def cuda_rows(nvcc: str, cuobjdump: str) -> dict[str, dict[str, int]]:
    """Compile every csrc/cuda/*.cu and read what its machine code uses.

    raises: RuntimeError with the compiler's words where one does not compile
    """
    rows: dict[str, dict[str, int]] = {}
    flags = ["-std=c++17", "-O3", f"-I{SOURCES}", "-c"]
    for target in TARGETS:
        flags += ["-gencode", target]
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((SOURCES / "cuda").glob("*.cu")):
            made = str(Path(folder, source.stem + ".o"))
            command = [nvcc, *flags, str(source), "-o", made]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{source.name} does not compile: {done.stderr.strip()[-500:]}")
            command = [cuobjdump, "--dump-resource-usage", made]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows |= read(source.stem, demangled(done.stdout))
    return rows


def read(stem: str, text: str) -> dict[str, dict[str, int]]:
    """Rows from cuobjdump's words: a target, then each function with its resources."""
    rows: dict[str, dict[str, int]] = {}
    target = name = ""
    for line in text.splitlines():
        if found := re.match(r"\s*arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function (.*):$", line):
            kernel = re.search(r"(\w+_kernel(?:<.*?>)?)\(", found[1])
            name = kernel[1] if kernel else found[1]
        elif "REG:" in line and name:
            numbers = dict(re.findall(r"\b(REG|SHARED|LOCAL|STACK):(\d+)", line))
            row = {key.lower(): int(numbers[key]) for key in ("REG", "SHARED", "LOCAL", "STACK")}
            rows[f"{target}/cuda/{stem}/{name}"] = row
    return rows


def demangled(text: str) -> str:
    """Names as in the source, where c++filt is installed."""
    tool = shutil.which("c++filt")
    if tool is None:
        return text
    return subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout
