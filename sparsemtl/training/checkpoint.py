"""Checkpoints: written beside the old one and renamed, so the last good one always survives."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sparsemtl.errors import CheckpointError
from sparsemtl.training import distributed

FORMAT = 1
# What zipfile and torch.load raise on damaged files, beside pickle's own error.
UNREADABLE = (
    *(OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError),
    *(OverflowError, AssertionError, MemoryError, struct.error, zipfile.BadZipFile),
)
_NAME = re.compile(r"step_(\d{8})\.pt")


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is either the old one or complete, whatever happens meanwhile.

    Of several processes the first writes.
    raises: CheckpointError naming the file and the cause (a full disk, say); the old file stays.
    """
    if not distributed.is_main():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        raise CheckpointError(f"could not write {path}: {_reason(error, path)}") from error
    finally:
        with contextlib.suppress(OSError):  # gone after a rename; what remains is half a file
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented, keys in the order given; NaN and inf, which JSON lacks, become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `folder/step_XXXXXXXX.pt`, then delete all but the newest `keep`."""
    path = folder / f"step_{step:08d}.pt"
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    if distributed.is_main():
        for old in checkpoints(folder)[:-keep]:
            old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))


def load_checkpoint(path: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """Read one checkpoint without running pickled code.

    required: what it must hold
    raises:   CheckpointError if it is not a readable, undamaged checkpoint of this format
    """
    try:
        # torch.load checks no checksums: a flipped bit would resume in silence to other weights.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is not a readable checkpoint: {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"Expected a checkpoint at {path}, got no such file") from error
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: Expected checkpoint format {FORMAT}, got {found!r}")
    missing = [name for name in required if name not in state]
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of a run: it lacks {missing}")
    return state


def check_same_model(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """raises CheckpointError, naming the first difference, unless keys and shapes agree."""
    missing = [k for k in expected if k not in found]
    extra = [k for k in found if k not in expected]
    if missing or extra:
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {len(missing)} parameters missing "
            f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
        )
    for key, value in expected.items():
        if value.shape != found[key].shape:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: Expected {key} of shape "
                f"{tuple(value.shape)}, got {tuple(found[key].shape)}"
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: Exception, path: Path) -> str:
    try:
        stats = os.statvfs(path.parent)
        free = f" ({stats.f_bavail * stats.f_frsize / 2**20:.0f} MiB free there)"
    except OSError:
        free = ""
    # torch.save reports a short write as a RuntimeError about its own zip archive.
    cause = str(error) if isinstance(error, OSError) else "the write was cut short"
    return f"{cause}{free}"
