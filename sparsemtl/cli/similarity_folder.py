"""The folder of a similarity analysis: what was computed is kept, and never mixed.

settings.json      what the records depend on; another analysis is refused
records/           one file per seed, per-layer numbers of every pair
gains.json         settings of the measured gains
gains/             one file per training
NAME.md .json .tsv the report and its numbers; NAME_layers.tsv, NAME_iou.tsv, NAME_*.png, and
                   NAME_gains.tsv, which --gains takes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemtl.cli.run_folder import read_json
from sparsemtl.similarity import SeedRecord
from sparsemtl.training.checkpoint import write_json

WHAT = "a similarity analysis"


@dataclass(frozen=True)
class SimilarityFolder:
    """Paths and stored results of one analysis."""

    root: Path

    def open(self, settings: dict[str, Any]) -> None:
        """Start the analysis here, or continue it.

        raises: ValueError if the folder holds anything else; nothing is changed then
        """
        path = self.root / "settings.json"
        if path.exists():
            self._check_same(path, settings)
            return
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ValueError(
                f"Expected --out to be a new or empty folder or {WHAT}, got {self.root}"
            )
        write_json(path, settings)

    def open_gains(self, settings: dict[str, Any]) -> None:
        """The same for the measured gains inside it."""
        path = self.root / "gains.json"
        if path.exists():
            self._check_same(path, settings)
        else:
            write_json(path, settings)

    def record(self, seed: int) -> SeedRecord | None:
        """What was computed for a seed, if it was."""
        path = self.root / "records" / f"seed_{seed}.json"
        return SeedRecord.from_json(read_json(path, WHAT)) if path.exists() else None

    def add_record(self, record: SeedRecord) -> None:
        write_json(self.root / "records" / f"seed_{record.seed}.json", record.to_json())

    def cell(self, tasks: tuple[str, ...], seed: int) -> dict[str, Any] | None:
        """Metrics of one co-training, if it is done."""
        path = self._cell(tasks, seed)
        return read_json(path, WHAT) if path.exists() else None

    def add_cell(self, tasks: tuple[str, ...], seed: int, result: dict[str, Any]) -> None:
        write_json(self._cell(tasks, seed), result)

    def _cell(self, tasks: tuple[str, ...], seed: int) -> Path:
        return self.root / "gains" / f"{'+'.join(tasks)}_seed_{seed}.json"

    def _check_same(self, path: Path, settings: dict[str, Any]) -> None:
        found = read_json(path, WHAT)
        asked = json.loads(json.dumps(settings))
        name = _difference(found, asked)
        if name is not None:
            raise ValueError(
                f"Expected {self.root} to hold an analysis of the same settings, got one with "
                f"another {name}; it was left as it is. Choose another --out"
            )


def _difference(found: Any, asked: Any, name: str = "") -> str | None:
    """The first field that differs, as a dotted name, with both values."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in [*asked, *(k for k in found if k not in asked)]:
            inner = f"{name}.{key}" if name else key
            if key not in found or key not in asked:
                return inner
            different = _difference(found[key], asked[key], inner)
            if different is not None:
                return different
        return None
    return None if found == asked else f"{name} ({found!r}, not {asked!r})"
