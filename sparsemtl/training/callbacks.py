"""What happens around the steps: logs, checkpoints, evaluation, signals."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from sparsemtl.errors import CheckpointError, DivergedError
from sparsemtl.sparsity.sparsify import Sparsity
from sparsemtl.sparsity.stats import count_dead, overall_sparsity
from sparsemtl.training import distributed
from sparsemtl.training.checkpoint import atomic_write, save_checkpoint
from sparsemtl.training.evaluate import evaluate
from sparsemtl.training.loop import Callback
from sparsemtl.training.state import TrainState


def every(steps: int, callback: Callback) -> Callback:
    """Call `callback` after each `steps` steps and after the last one."""

    def call(state: TrainState) -> None:
        if state.step % steps == 0 or state.finished:
            callback(state)

    return call


class MetricsLog:
    """`metrics.jsonl`: one line per step, the record of a run.

    Fields: step, loss (per task), factor (per task), total, lr, grad_norm; every `count_every`
    steps sparsity (overall and per component) and the method's own numbers; "evaluation" lines
    from `Evaluator`.
    """

    def __init__(self, path: Path, count_every: int) -> None:
        self.path, self.count_every = path, count_every
        self._file: TextIO | None = None

    def __call__(self, state: TrainState) -> None:
        row: dict[str, Any] = {
            "step": state.step,
            "loss": state.losses,
            "factor": state.factors,
            "total": state.total,
            "lr": state.optimizer.param_groups[0]["lr"],
        }
        if state.gradient_norm is not None:
            row["grad_norm"] = state.gradient_norm
        if state.step % self.count_every == 0 or state.finished:
            state.pruning = pruning_row(state)
            row |= state.pruning
        self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line.   raises: CheckpointError if the disk refuses it."""
        if not distributed.is_main():
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (kept open)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error}") from error

    def cut_after(self, step: int) -> None:
        """Forget what a resumed run will write again, a torn last line included."""
        if not (distributed.is_main() and self.path.exists()):
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if row["step"] > step:
                break
            kept.append(line + "\n")
        atomic_write(self.path, lambda file: file.write("".join(kept).encode()))

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what a full disk refused, `write` has reported
                file.close()


def pruning_row(state: TrainState) -> dict[str, Any]:
    """Sparsity now, per component and overall, and what the method says of itself."""
    sparsity = getattr(state.model, "sparsity", None)
    if not isinstance(sparsity, Sparsity):
        return state.method.describe(state.model)
    counts = count_dead(sparsity)
    return {
        "sparsity": {
            "overall": overall_sparsity(counts),
            "components": {name: dead / total for name, (dead, total) in counts.items()},
        },
        **state.method.describe(state.model),
    }


class Checkpointer:
    """Saves everything a bit-exact continuation needs; refuses to save NaN or inf."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def __call__(self, state: TrainState) -> None:
        if state.last_checkpoint is not None and state.last_checkpoint.stem.endswith(
            f"_{state.step:08d}"
        ):
            return
        good = state.last_checkpoint
        for name, parameter in state.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DivergedError(
                    f"training stopped at step {state.step}: parameter {name!r} has NaN or inf, "
                    f"so no checkpoint was written. Last good checkpoint: {good or 'none'}."
                )
        try:
            state.last_checkpoint = save_checkpoint(
                self.folder, state.step, state.resume_state(), self.keep
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"step {state.step}: {error}. Last good checkpoint: {good or 'none'}. "
                "Free some space, then resume."
            ) from error


class Evaluator:
    """Measures the tasks' metrics while training and appends them to the log."""

    def __init__(self, dataset: Any, log: MetricsLog, batch_size: int) -> None:
        self.dataset, self.log, self.batch_size = dataset, log, batch_size
        self.latest: dict[str, dict[str, float]] = {}

    def __call__(self, state: TrainState) -> None:
        self.latest = evaluate(state.model, state.tasks, self.dataset, batch_size=self.batch_size)
        self.log.write({"step": state.step, "evaluation": self.latest})


class StopOnSignal:
    """Ctrl-C or SIGTERM: the step under way ends, then the loop stops. A second one interrupts."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __call__(self, state: TrainState) -> None:
        if distributed.any_rank(self.received is not None):  # all stop after the same step
            self.received = self.received or "another process"
            state.stop_requested = True
