"""The machine line: no number is worth reading without it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsemtl.ops.availability import native_module, why_not_native

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("torch", "triton", "numpy", "torchmetrics", "torchjd", "safetensors")


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that a result was made with.

    returns: plain values, ready for JSON; None for what the system does not tell
    """
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "ram_bytes": _ram_bytes(),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "sparsemtl": _own_version(),
        "git": _git_revision(),
        "native": _native(),
    }


def machine_line(env: dict[str, Any] | None = None) -> str:
    """Return `environment()` as one line for tables and plots."""
    env = environment() if env is None else env
    ram = "" if env["ram_bytes"] is None else f", {env['ram_bytes'] / 2**30:.0f} GiB"
    gpus = "".join(f", {gpu['name']}" for gpu in env["gpus"])
    git = "" if env["git"] is None else f" ({env['git']})"
    return (
        f"{env['cpu'] or 'unknown CPU'}, {env['cores']} cores, {env['threads']} threads{ram}{gpus}"
        f" · Python {env['python']}, torch {env['torch']} · sparsemtl {env['sparsemtl']}{git}"
    )


def _cpu_model() -> str | None:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine() or None


def _usable_cores() -> int:
    """Logical cores that this process may use, which a container makes fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not POSIX, or not known there
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _own_version() -> str | None:
    import sparsemtl

    return getattr(sparsemtl, "__version__", None) or _version("sparsemtl")


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
        }
        for gpu in found
    ]


def _native() -> str:
    """ISA that the native kernels run with, or why there are none."""
    reason = why_not_native()
    return str(native_module().isa()) if reason is None else reason


def _git_revision() -> str | None:
    """Short hash of the checkout that the package lies in, `+` if it has changes."""
    package = Path(__file__).resolve().parents[1]
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != package.parent:
        return None  # installed somewhere below another project's checkout
    revision = _git(package, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}+" if changed else revision


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
