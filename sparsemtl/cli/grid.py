"""Runs the cells of a comparison, several at a time, each in a process and a folder of its own.

A cell's folder is an ordinary run folder: an interrupted one is resumed to the same bits, a
finished one is left alone, a failed one keeps what it said in `error.txt` and is tried again by the
next call. One that fails does not stop the others.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sparsemtl import config as configs
from sparsemtl.cli.run_folder import RunFolder
from sparsemtl.config import RunConfig
from sparsemtl.measure.compare import Cell

POLL = 0.2  # seconds
GRACE = 60.0  # seconds that a stopped cell gets to save

Say = Callable[[str], None]


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    begin: float


def folder_of(root: Path, cell: Cell) -> RunFolder:
    return RunFolder(root / "cells" / cell.name)


@contextmanager
def claimed(root: Path) -> Iterator[None]:
    """raises ValueError while another process runs cells here: two would write one folder."""
    with open(root / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Expected {root} to be free, got a comparison at work there"
            ) from error
        yield


def check_cells(root: Path, configured: Mapping[Cell, RunConfig]) -> None:
    """raises ValueError if a cell's folder holds a run of another configuration."""
    for cell, config in configured.items():
        folder = folder_of(root, cell)
        if folder.config.exists() and folder.load_config() != config:
            raise ValueError(
                f"Expected {folder.root} to hold the run that this comparison asks for, got one "
                "of other settings; choose another --out, nothing was changed"
            )


def run_cells(
    root: Path, configured: Mapping[Cell, RunConfig], jobs: int, say: Say
) -> dict[Cell, str]:
    """Train what is not finished.   returns: failed cell → what it said, its last line

    raises: KeyboardInterrupt after Ctrl-C, when every running cell has saved
    """
    waiting = [c for c in configured if not folder_of(root, c).summary.exists()]
    total, failed, running = len(configured), dict[Cell, str](), list[_Running]()
    done = total - len(waiting)
    if done:
        say(f"{done} of {total} runs are finished already")
    with _stops_children(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running.append(_start(folder_of(root, cell), cell, configured[cell]))
            time.sleep(POLL)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                one.log.close()
                done += 1
                seconds = time.monotonic() - one.begin
                said = _outcome(root, one)
                if said is not None:
                    failed[one.cell] = said
                    say(f"[{done}/{total}] {one.cell.name} FAILED: {said}")
                else:
                    say(f"[{done}/{total}] {one.cell.name} ({seconds:.0f} s)")
    return failed


def _start(folder: RunFolder, cell: Cell, config: RunConfig) -> _Running:
    if not folder.config.exists():
        folder.create(config)
    log = open(folder.root / "error.txt", "wb")  # noqa: SIM115 (closed when the cell ends)
    threads = str(config.train.runtime.threads)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sparsemtl", "train", "--resume", str(folder.root)),
            *("--quiet", "--no-plots"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        start_new_session=True,  # Ctrl-C reaches the cells through us, once
    )
    return _Running(cell, process, log, time.monotonic())


def _outcome(root: Path, one: _Running) -> str | None:
    """None for a finished cell, whose error.txt is removed; else the reason that it gave."""
    folder = folder_of(root, one.cell)
    text = (folder.root / "error.txt").read_text(errors="replace").strip()
    if one.process.returncode == 0 and folder.summary.exists():
        (folder.root / "error.txt").unlink()
        return None
    lines = [line for line in text.splitlines() if line.startswith("error: ")] or [
        *text.splitlines()[-1:]
    ]
    reason = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return f"{reason} (exit code {one.process.returncode})"


@contextmanager
def _stops_children(running: list[_Running]) -> Iterator[None]:
    """However we end, no cell is left behind: each is asked to save, then waited for."""
    old = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
        for one in running:
            one.process.terminate()
        for one in running:
            try:
                one.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            one.log.close()


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def parse_method(text: str, config: RunConfig, sparsity: float | None) -> RunConfig:
    """`config` with the method that `text` names.

    text:   NAME or NAME+OPTION=VALUE+…; an option is a field of the method's config, `weighting`,
            or any field of the run with its section, for example train.optim.lr
    raises: ValueError naming the method or the option
    """
    import json

    name, *options = text.split("+")
    config = configs.with_method(config, name)
    changes: dict[str, Any] = {}
    for option in options:
        field, equals, value = option.partition("=")
        if not equals or not field:
            raise ValueError(f"compare: Expected NAME+OPTION=VALUE, got {text!r}")
        path = {"weighting": "train.weighting.name"}.get(field, field)
        try:
            parsed: Any = json.loads(value)
        except json.JSONDecodeError:
            parsed = value  # a word
        changes[path if "." in path else f"method.{path}"] = parsed
    if sparsity is not None:
        changes["method.sparsity"] = sparsity
    return configs.with_changes(config, changes)
