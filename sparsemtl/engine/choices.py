"""Times of kernels on this machine, kept in a file between runs.

The file stands beside that of training, see `sparsity/choice.py`, and follows its rules: whoever
measured first decides, writers lock it, and it is replaced as a whole.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.sparsity.choice import cache_file, machine_key

log = logging.getLogger(__name__)

Times = dict[str, float]
_known: dict[str, Times] = {}  # of this process, so that an unwritable file costs one measurement


def engine_file() -> Path:
    """Where this machine's times are kept."""
    return cache_file().with_name("engine.json")


def machine() -> str:
    """What times depend on besides the layer: processor, threads, torch, instruction set."""
    isa = native_module().isa() if why_not_native() is None else "no native kernels"
    return f"{machine_key()}, {isa}"


def known_times(key: str, where: str | None = None) -> Times | None:
    """Times measured before for a layer.   where: by default this machine with as many threads"""
    where = where or machine()
    full = f"{engine_file()} {where} {key}"
    if full not in _known:
        found = _read(engine_file()).get(where, {}).get(key)
        if found is not None:
            _known[full] = found
    return _known.get(full)


def remember_times(key: str, times: Times, where: str | None = None) -> Times:
    """Enter times; returns those that count, which are another's if it was first."""
    path, here = engine_file(), where or machine()
    try:
        times = _merge(path, here, key, times)
    except OSError as error:
        log.warning("times are measured anew in each run: cannot write %s: %s", path, error)
    _known[f"{path} {here} {key}"] = times
    return times


def _read(path: Path) -> dict[str, dict[str, Times]]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(m): {str(k): {str(n): float(t) for n, t in v.items()} for k, v in c.items()}
            for m, c in value.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no file, or a damaged one: measured anew


def _merge(path: Path, machine: str, key: str, times: Times) -> Times:
    try:
        import fcntl
    except ImportError as error:  # no POSIX
        raise OSError("file locks are not to be had here") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        machines = _read(path)
        kept = machines.setdefault(machine, {}).setdefault(key, times)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(machines, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    return kept
