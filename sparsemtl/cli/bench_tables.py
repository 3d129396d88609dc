"""Rows of a bench as lines on the terminal, each as soon as it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsemtl.measure.environment import machine_line
from sparsemtl.measure.roof import Roof

# key of the row → (heading, width, format); text goes left, numbers right
COLUMNS: dict[str, tuple[str, int, str]] = {
    "case": ("case", 34, "s"),
    "pass": ("pass", 22, "s"),
    "sparsity": ("zeros", 7, ".1%"),
    "dense_path": ("dense path", 14, "s"),
    "dense_ms": ("dense ms", 10, ".4g"),
    "sparse_ms": ("sparse ms", 10, ".4g"),
    "speedup": ("speedup", 9, ".2f"),
    "spread": ("spread", 7, ".1%"),
    "rel_err": ("rel err", 9, ".1e"),
    "fraction_of_roof": ("of roof", 8, ".1%"),
}


class Lines:
    """A table whose heading stands above the first row."""

    def __init__(self, columns: Mapping[str, tuple[str, int, str]]) -> None:
        self.columns, self.begun = columns, False

    def show(self, row: Mapping[str, Any]) -> None:
        if not self.begun:
            self.begun = True
            print("".join(_cell(name, width, kind) for name, width, kind in self.columns.values()))
        cells = []
        for key, (_, width, kind) in self.columns.items():
            value = row[key]
            text = "-" if value is None else format(value, kind)
            cells.append(_cell(text, width, kind))
        print("".join(cells).rstrip(), flush=True)


def begin(roof: Roof | None) -> None:
    """The machine line, and the roof that was measured."""
    print(machine_line())
    if roof is not None:
        print(roof.text(), flush=True)


def _cell(text: str, width: int, kind: str) -> str:
    return f"{text:<{width}} " if kind == "s" else f"{text:>{width}} "
