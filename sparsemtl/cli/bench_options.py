"""What the bench verbs share: their options, checked before anything is measured, and the files."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from sparsemtl.measure.environment import environment, machine_line
from sparsemtl.measure.roof import Roof
from sparsemtl.training.checkpoint import write_json

FORMAT = 1


@dataclass(kw_only=True)
class BenchOptions:
    """Options of every bench."""

    threads: int | None = None
    """CPU threads; torch's own number by default."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write machine, roof and rows here."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the rows into this picture (PNG, SVG or PDF)."""

    def prepare(self) -> None:
        """Check what all benches share and set the threads.

        raises: ValueError, OSError, ImportError, each naming the flag
        """
        cores = _usable_cores()
        if self.threads is not None and not 1 <= self.threads <= cores:
            raise ValueError(
                f"Expected --threads in 1..{cores}, the cores that this process may use, "
                f"got {self.threads}"
            )
        for flag, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None:
                check_writable(flag, path)
        if self.plot is not None:
            check_plot(self.plot)
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def finish(
        self,
        bench: str,
        rows: Sequence[dict[str, Any]],
        roof: Roof | None,
        draw: Callable[[Sequence[dict[str, Any]], str], Any],
        **more: Any,
    ) -> None:
        """Write the JSON file and the picture, where they were asked for."""
        if self.json is not None:
            found = {
                "format": FORMAT,
                "bench": bench,
                "command": shlex.join(["sparsemtl", *sys.argv[1:]]),
                "machine": machine_line(),
                "environment": environment(),
                "roof": None if roof is None else roof.to_json(),
                **more,
                "rows": list(rows),
            }
            write_json(self.json, found)
            print(f"wrote {self.json}")
        if self.plot is not None:
            draw(rows, machine_line()).savefig(self.plot, dpi=130)
            print(f"wrote {self.plot}")


def check_sparsities(values: Sequence[float]) -> None:
    """raises ValueError unless there are some, each in [0, 1)."""
    if not values:
        raise ValueError("Expected --sparsity to name at least one fraction of zeros, got none")
    for value in values:
        if not 0.0 <= value < 1.0:
            raise ValueError(f"Expected --sparsity in [0, 1), a fraction of zeros, got {value:g}")


def pick(flag: str, wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that were asked for, or all; a part of a name picks every name that holds it.

    raises: ValueError naming the flag and what is close
    """
    every = list(names)
    picked: list[str] = []
    for word in wanted:
        found = [word] if word in every else [name for name in every if word in name]
        if not found:
            close = difflib.get_close_matches(word, every, n=3, cutoff=0.4)
            near = close or every[:6]
            raise ValueError(f"Expected {flag} to be (part of) a name such as {near}, got {word!r}")
        picked += [name for name in found if name not in picked]
    return picked or every


def check_positive(flag: str, value: int) -> None:
    """raises ValueError unless the value is at least 1."""
    if value < 1:
        raise ValueError(f"Expected {flag} >= 1, got {value}")


def check_writable(flag: str, path: Path) -> None:
    """raises ValueError or OSError unless a file can be written there; before any measurement."""
    if path.is_dir():
        raise ValueError(f"Expected {flag} to name a file, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(f"Expected {flag} to name a file in a folder that exists, got {path}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"Expected {flag} to name a writable file, got {path}: {reason}") from error


def check_plot(path: Path) -> None:
    """raises ImportError without matplotlib, ValueError for a suffix that it does not write."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib for --plot, got none: pip install 'sparsemtl[report]'"
        ) from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in kinds:
        raise ValueError(f"Expected --plot to end in .png, .svg or .pdf, got {path.name!r}")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
