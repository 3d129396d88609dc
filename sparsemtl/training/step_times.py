"""How long a run's steps take, beside how sparse its model was by then."""

from __future__ import annotations

from sparsemtl.training.callbacks import MetricsLog
from sparsemtl.training.state import TrainState


class StepTimes:
    """`times.jsonl`: apart from metrics.jsonl, which the same seed writes the same each time.

    Fields of a line: step, steps (how many it stands for, that one last), seconds (of one of
    them, on average) and sparsity (a fraction of zeros, overall). A session's first step counts
    for nothing: it waits for the loader and for memory.

    every: as the metrics log's, which counts the zeros and must be called before
    """

    def __init__(self, log: MetricsLog, every: int) -> None:
        self.log, self.every = log, every
        self._begin: tuple[int, float] | None = None  # of the steps not yet written

    def __call__(self, state: TrainState) -> None:
        if self._begin is None:
            self._begin = state.step, state.seconds
            return
        if state.step % self.every != 0 and not state.finished:
            return
        steps, seconds = state.step - self._begin[0], state.seconds - self._begin[1]
        sparsity = state.pruning.get("sparsity", {"overall": 0.0})["overall"]
        row = {"step": state.step, "steps": steps, "seconds": seconds / steps, "sparsity": sparsity}
        self.log.write(row)
        self._begin = state.step, state.seconds
