"""`sparsemtl compare`: methods × seeds × budgets → the paper's table."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsemtl import config as configs
from sparsemtl.cli.grid import check_cells, claimed, folder_of, parse_method, run_cells
from sparsemtl.cli.run_folder import build_split, build_tasks, read_json
from sparsemtl.cli.train import Folder, Number, Text, Train, Whole, Words, choice
from sparsemtl.config import RunConfig
from sparsemtl.data import DATASETS
from sparsemtl.errors import unknown_choice
from sparsemtl.measure.compare import (
    Cell,
    Directions,
    Row,
    check_grid,
    rows_of,
    verdict,
    why_no_delta,
)
from sparsemtl.measure.compare_tables import csv_text, latex, markdown, row_json
from sparsemtl.measure.environment import environment, machine_line
from sparsemtl.methods import METHODS, method_config_type
from sparsemtl.training.checkpoint import atomic_write, write_json

FORMAT = 1
REFERENCES = ("dense", "single-task")
DENSE = tuple(  # methods without a budget: one row each, whatever the sparsities
    name for name in METHODS if "sparsity" not in method_config_type(name).__dataclass_fields__
)
ALL = (  # of --methods all: every method, and what its paper leaves open
    *METHODS,
    # Global magnitudes compare layers of unlike scale; ERK gives these methods a fair budget.
    *("magnitude+allocation=erk", "imp+allocation=erk", "lth+allocation=erk"),
    # AdapMTL's ablations
    *("adapmtl+grouping=one", "adapmtl+grouping=two", "adapmtl+weighting=fixed"),
)
BY_OTHER_MEANS = ("distinctiveness",)  # prunes hidden units, to no budget of weights
Numbers = Annotated[tuple[float, ...], tyro.conf.arg(metavar="S", help_behavior_hint="")]
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N", help_behavior_hint="")]


@dataclass
class Compare:
    """Train each method at each sparsity and seed, and write one table of all.

    Every run is an ordinary run folder under OUT/cells. Stop and start as you like: finished runs
    are kept, an interrupted one goes on where it was, one that failed is tried again.
    """

    out: Folder = None
    """Folder of the comparison, new or of the same settings."""
    preset: str = "quick"
    """quick, or a preset of `sparsemtl train`."""
    methods: Words = ("all",)
    """Names, with options if any: adapmtl rigl magnitude+allocation=erk snip+structure=vector(8)
    adapmtl+weighting=fixed; all: every method, AdapMTL's ablations, and the magnitude methods
    with ERK too."""
    seeds: Seeds = (0,)
    sparsity: Numbers = (0.9,)
    """Budgets, fractions of zeros."""
    reference: str = "dense"
    """The method that Δ compares with, dense or single-task; it is run too."""
    delta_form: Text = None
    """mean (Eq. 7) or sum (as the published tables)."""
    data: Annotated[str | None, choice(DATASETS)] = None
    data_root: Folder = None
    data_option: Words = ()
    """More data options, name=value."""
    tasks: Words = ()
    model: Text = None
    width: Number = None
    steps: Whole = None
    batch_size: Whole = None
    set: Words = ()
    """Any other field of a run's config.json, for all methods."""
    jobs: int = 1
    """Runs at a time."""
    threads: int = 1
    """CPU threads of each run; another number gives other last bits."""
    tables: Annotated[Path | None, tyro.conf.arg(metavar="STEM", help_behavior_hint="")] = None
    """Write STEM.md, .csv, .tex, .json and .png; OUT/compare if not given."""

    def run(self) -> int:
        if self.out is None:
            raise ValueError("Expected --out DIR, got none")
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected --{name} >= 1, got {getattr(self, name)}")
        configured = self.cells()
        self._claim(self.out)
        with claimed(self.out):
            check_cells(self.out, configured)
            say = lambda text: print(text, flush=True)  # noqa: E731
            failed = run_cells(self.out, configured, self.jobs, say)
            self._write(configured, failed)
        return 1 if failed else 0

    def cells(self) -> dict[Cell, RunConfig]:
        """Every run of the comparison and its configuration; checks all before one is started."""
        check_grid(self.methods, self.sparsity, self.seeds)
        methods = list(self.methods)
        if "all" in methods:
            named = [m for m in methods if m != "all"]
            every = [m for m in ALL if m not in BY_OTHER_MEANS]
            methods = list(dict.fromkeys([*every, *named]))
        if self.reference not in REFERENCES:
            raise ValueError(unknown_choice("--reference", self.reference, REFERENCES))
        if self.reference not in methods:
            methods.insert(0, self.reference)
        base = self.base()
        configured = {}
        for method in methods:
            dense = method.partition("+")[0] in DENSE
            for sparsity in (None,) if dense else self.sparsity:
                for seed in self.seeds:
                    train = dataclasses.replace(base.train, seed=seed)
                    seeded = dataclasses.replace(base, train=train)
                    cell = Cell(method, sparsity, seed)
                    configured[cell] = parse_method(method, seeded, sparsity)
        names = [cell.name for cell in configured]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"compare: Expected methods that differ, got {twice} twice")
        return configured

    def base(self) -> RunConfig:
        """What all runs share."""
        shared: tuple[str, ...]
        shared = ("preset", "data", "data_root", "data_option", "tasks", "model", "width")
        shared += ("steps", "batch_size", "set", "threads", "delta_form")
        config = Train(**{name: getattr(self, name) for name in shared}).config()
        return dataclasses.replace(config, baseline="none")

    def _claim(self, out: Path) -> None:
        """raises ValueError if the folder holds anything but a comparison of these settings."""
        settings = {"format": FORMAT, "base": self._settings()}
        record = out / "settings.json"
        if record.exists():
            if read_json(record, "a comparison") != settings:
                raise ValueError(
                    f"Expected {out} to hold a comparison of the same settings, got one of others "
                    "(see its settings.json); choose another --out, nothing was changed"
                )
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"Expected --out to be a new or empty folder, got {out}")
        write_json(record, settings)

    def _settings(self) -> dict[str, Any]:
        plain = configs.to_json(self.base())
        return {k: v for k, v in plain.items() if k != "method"}

    def _write(self, configured: Mapping[Cell, RunConfig], failed: Mapping[Cell, str]) -> None:
        assert self.out is not None
        summaries = {
            cell: read_json(folder_of(self.out, cell).summary, "a finished run")
            for cell in configured
            if folder_of(self.out, cell).summary.exists()
        }
        if not summaries:
            raise ValueError("compare: Expected at least one finished run, got none; see above")
        base = self.base()
        tasks = build_tasks(base, build_split(base, "test"))
        directions: Directions = {name: task.higher_is_better for name, task in tasks.items()}
        form = base.delta_form
        rows = rows_of(list(configured), summaries, directions, self.reference, form)
        stem = self.tables or self.out / "compare"
        title = self._title(base, summaries)
        lines = verdict(rows, directions)
        if reason := why_no_delta(summaries, directions, self.reference, form):
            lines.insert(0, reason)
        lost = [f"{cell.name} failed: {reason}" for cell, reason in failed.items()]
        table = markdown(rows, directions)
        notes = "\n".join(f"- {line}" for line in [*lines, *lost])
        _text(stem, ".md", f"{title}\n{table}\n{notes}\n")
        _text(stem, ".csv", csv_text(rows, directions))
        _text(stem, ".tex", latex(rows, directions))
        write_json(
            _with(stem, ".json"),
            {
                "command": self._command(),
                "environment": environment(),
                "settings": self._settings(),
                "reference": self.reference,
                "delta_form": form,
                "rows": [row_json(row) for row in rows],
                "cells": {cell.name: _cell_json(cell, s) for cell, s in summaries.items()},
                "failed": {cell.name: reason for cell, reason in failed.items()},
                "verdict": lines,
            },
        )
        self._plot(stem, rows)
        print(f"\n{table}\n{notes}\n\n{_with(stem, '.md')} and .csv, .tex, .json")

    def _title(self, base: RunConfig, summaries: Mapping[Cell, Mapping[str, Any]]) -> str:
        train, env = base.train, next(iter(summaries.values()))["environment"]
        data = configs.to_json(base)["data"]
        size = f" {data['height']}x{data['width']}" if "height" in data else ""
        against = "single-task networks" if self.reference == "single-task" else "the dense model"
        return (
            f"# Methods compared\n\n"
            f"{data['name']}{size}, {base.model.name} at width {base.model.width:g}, "
            f"{train.steps} steps of {train.batch_size}, seeds {', '.join(map(str, self.seeds))}; "
            f"mean ± sample std over seeds; Δ against {against} ({base.delta_form} over a task's "
            f"metrics), its metrics averaged over its seeds.\n\n"
            f"    {self._command()}\n\n{machine_line(env)}\n"
        )

    def _command(self) -> str:
        """The command that makes this table again."""
        words = ["sparsemtl", "compare"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default and field.name not in ("preset", "seeds"):
                continue
            many = isinstance(value, tuple)
            words += [f"--{field.name.replace('_', '-')}"]
            words += [str(v) for v in value] if many else [str(value)]
        return shlex.join(words)

    def _plot(self, stem: Path, rows: Sequence[Row]) -> None:
        try:
            from sparsemtl.report import plots
        except ImportError:
            print(
                "no plot: matplotlib is missing (pip install 'sparsemtl[report]')", file=sys.stderr
            )
            return
        points = [
            plots.DeltaPoint(r.method, r.sparsity, r.overall_delta.mean, r.overall_delta.std)
            for r in rows
            if r.overall_delta is not None
        ]
        figure = plots.delta_against_sparsity(points, self.reference)
        atomic_write(_with(stem, ".png"), lambda file: figure.savefig(file, format="png", dpi=130))


def _cell_json(cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("metrics", "seconds", "steps")
    zeros = {k: summary["sparsity"][k] for k in ("requested", "overall", "components", "zeros")}
    return {**dataclasses.asdict(cell), **{k: summary[k] for k in keys}, "sparsity": zeros}


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _text(stem: Path, suffix: str, text: str) -> None:
    atomic_write(_with(stem, suffix), lambda file: file.write(text.encode()))
