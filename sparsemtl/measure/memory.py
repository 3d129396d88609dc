"""Memory of this process: resident now, at its peak, and on the GPU. All in bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"  # proc(5): resets the resident high-water mark


@dataclass
class MemoryPeak:
    """What `track_peak` fills in when its block ends.

    resident: peak resident set, bytes; None where the system does not tell
    cuda:     peak bytes allocated by torch on the current CUDA device; None without one
    since_start: True if the peak could not be reset and may be older than the block
    """

    resident: int | None = None
    cuda: int | None = None
    since_start: bool = True


def rss_bytes() -> int | None:
    """Resident set of this process now; None where the system does not tell."""
    return _status("VmRSS")


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process since its start or the last reset."""
    peak = _status("VmHWM")
    return _peak_from_rusage() if peak is None else peak


@contextmanager
def track_peak() -> Iterator[MemoryPeak]:
    """Measure the peaks of the enclosed block; read the yielded object after it."""
    peak = MemoryPeak(since_start=not _reset_peak())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield peak
    finally:
        peak.resident = peak_rss_bytes()
        if torch.cuda.is_available():
            peak.cuda = torch.cuda.max_memory_allocated()


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024  # the kernel writes kB
    return None


def _peak_from_rusage() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_CLEAR_PEAK)
    except OSError:
        return False
    return True
