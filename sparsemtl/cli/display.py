"""The live view of a training run: a panel on a terminal, plain lines without one."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsemtl.cli.runner import Display, DisplayFactory
from sparsemtl.training.state import TrainState

REFRESH = 0.5  # seconds between two tables
PLAIN = 10.0  # seconds between two plain lines


def live_display(quiet: bool, console: Console | None = None) -> DisplayFactory:
    """The display that fits where the output goes."""
    console = console or Console(stderr=False)

    def build(title: str, state: TrainState) -> Display:
        if quiet:
            return Display()
        if console.is_terminal:
            return LivePanel(title, state, console)
        return PlainLines(title, console)

    return build


class PlainLines(Display):
    """A line every few seconds, and one at the end."""

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = title, console
        self.last = float("-inf")
        self.begin: tuple[float, int] | None = None

    def __call__(self, state: TrainState) -> None:
        now = time.monotonic()
        if self.begin is None:
            self.begin = (now, state.step)
        if now - self.last < PLAIN and not state.finished:
            return
        self.last = now
        losses = "  ".join(f"{t} {v:.4f}×{state.factors[t]:.2f}" for t, v in state.losses.items())
        parts = [f"{self.title}  step {state.step}/{state.total_steps}", losses, _dead(state)]
        remaining = _remaining(self.begin, now, state)
        if remaining is not None:
            parts.append(f"ETA {_clock(remaining)}")
        self.say("  |  ".join(p for p in parts if p))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class LivePanel(Display):
    """Losses and their factors, sparsity and α per component, a bar with the time left."""

    def __init__(self, title: str, state: TrainState, console: Console) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.task = self.bar.add_task(title, total=state.total_steps, completed=state.step)
        self.live = Live(self.bar, console=console, refresh_per_second=4)
        self.last = float("-inf")

    def __enter__(self) -> LivePanel:
        self.live.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self.live.__exit__(None, None, None)

    def __call__(self, state: TrainState) -> None:
        self.bar.update(self.task, completed=state.step)
        now = time.monotonic()
        if now - self.last >= REFRESH or state.finished:
            self.last = now
            self.live.update(Group(_losses(state), _components(state), self.bar))

    def say(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False)


def _losses(state: TrainState) -> Table:
    table = Table(box=None, padding=(0, 2))
    for heading in ("task", "loss", "factor"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, loss in state.losses.items():
        table.add_row(task, f"{loss:.4f}", f"{state.factors[task]:.3f}")
    return table


def _components(state: TrainState) -> Table | str:
    row = state.pruning
    if "sparsity" not in row:
        return ""
    table = Table(box=None, padding=(0, 2))
    table.add_column("component")
    table.add_column("sparsity %", justify="right")
    for name, value in row["sparsity"]["components"].items():
        table.add_row(name, f"{100 * value:.2f}")
    frozen = " (fixed)" if row.get("frozen") else ""
    table.add_row("overall" + frozen, f"{100 * row['sparsity']['overall']:.2f}")
    return table


def _dead(state: TrainState) -> str:
    row = state.pruning
    if "sparsity" not in row:
        return ""
    parts = [f"{n} {100 * v:.1f}" for n, v in row["sparsity"]["components"].items()]
    return f"sparsity {100 * row['sparsity']['overall']:.2f}% ({', '.join(parts)})"


def _remaining(begin: tuple[float, int], now: float, state: TrainState) -> float | None:
    done = state.step - begin[1]
    if done < 1:
        return None
    return (now - begin[0]) / done * (state.total_steps - state.step)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
