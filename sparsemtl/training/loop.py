"""The training loop. Closed: everything but a step's own work is a callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from sparsemtl.errors import DivergedError
from sparsemtl.training.state import Stopwatch, TrainState

Callback = Callable[[TrainState], None]


def train(state: TrainState, callbacks: Sequence[Callback] = ()) -> None:
    """Run the steps that are left; after each, every callback in order.

    raises: DivergedError as soon as a loss or the gradient norm is NaN or inf. No step is taken.
    """
    state.model.train()
    watch = Stopwatch()
    for batch in state.batches():
        losses = state.forward(batch)
        state.losses = {task: value.item() for task, value in losses.items()}
        stop_unless_finite(state, state.losses)
        state.factors = state.weighting(state.losses)
        total = torch.stack(
            [losses[t] * (state.factors[t] * state.loss_weight(t)) for t in losses]
        ).sum()
        state.total = total.item()
        state.optimizer.zero_grad(set_to_none=True)
        total.backward()
        state.method.on_backward(state)
        clip_gradients(state)
        state.optimizer.step()
        state.schedule.step()
        state.step += 1
        state.method.on_step(state)
        state.seconds += watch.lap()
        for callback in callbacks:
            callback(state)
        watch.lap()  # callbacks are not training
        if state.stop_requested:
            return


def clip_gradients(state: TrainState) -> None:
    """Clip the global norm, where the configuration asks for it."""
    limit = state.config.optim.clip_norm
    if limit is None:
        return
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    state.gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
    stop_unless_finite(state, {"gradient norm": state.gradient_norm})


def stop_unless_finite(state: TrainState, values: dict[str, float]) -> None:
    """raises DivergedError naming what is not finite, the step and the last good checkpoint."""
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not bad:
        return
    what = ", ".join(
        f"{name} is {value}" if name == "gradient norm" else f"the loss of task {name!r} is {value}"
        for name, value in bad.items()
    )
    good = state.last_checkpoint
    raise DivergedError(
        f"training stopped at step {state.step + 1}: {what}. "
        + (f"Last good checkpoint: {good}." if good else "No checkpoint was written before.")
        + " Try a lower lr, clip_norm, or check the data (`sparsemtl data check`)."
    )
