"""The machine line that stands beside every number."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from sparsemtl.ops.availability import native_module, why_not_native

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """Processor, threads, instruction set, versions, GPU and git revision, ready for JSON."""
    line: dict[str, object] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native_module().isa() if why_not_native() is None else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": revision(),
    }
    if torch.cuda.is_available():
        line["gpu"] = torch.cuda.get_device_name()
        line["cuda"] = torch.version.cuda
    return line


def cpu_model() -> str:
    """Name of the processor as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def revision() -> str:
    """Git revision of the working tree, with a plus where files differ from it."""
    git = ["git", "-C", str(RESULTS.parent.parent)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() + ("+" if changed.returncode else "") or "unknown"


def text(line: dict[str, object]) -> str:
    """Write the line for people."""
    return " · ".join(f"{key} {value}" for key, value in line.items())
