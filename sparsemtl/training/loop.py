"""The training loop. Closed: everything but a step's own work is a callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemtl.errors import DivergedError
from sparsemtl.training import distributed
from sparsemtl.training.state import Stopwatch, TrainState

Callback = Callable[[TrainState], None]


def train(state: TrainState, callbacks: Sequence[Callback] = ()) -> None:
    """Run the steps that are left; after each, every callback in order.

    raises: DivergedError as soon as a loss or the gradient norm is NaN or inf. No step is taken.
    """
    state.model.train()
    if state.step == 0:
        state.method.on_start(state)
    watch = Stopwatch()
    for batch in state.batches():
        train_step(state, batch)
        state.seconds += watch.lap()
        for callback in callbacks:
            callback(state)
        watch.lap()  # callbacks are not training
        if state.stop_requested:
            return


def train_step(state: TrainState, batch: Any) -> None:
    """One step: losses, gradients, update, and what the method does around them."""
    state.batch = batch
    state.method.on_forward(state)
    losses = state.forward(batch, fast=True)
    state.losses = mean_losses(losses)
    stop_unless_finite(state, state.losses)
    state.optimizer.zero_grad(set_to_none=True)
    state.factors = state.weighting(state.losses)
    scales = {t: state.factors[t] * state.loss_weight(t) for t in losses}
    state.total = sum(state.losses[t] * scales[t] for t in losses)
    backward(state, {t: losses[t] * scales[t] for t in losses})
    state.method.on_backward(state)
    clip_gradients(state)
    state.optimizer.step()
    state.schedule.step()
    state.step += 1
    state.method.on_step(state)


def mean_losses(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """The tasks' losses as numbers, averaged over the processes."""
    values = torch.stack([value.detach().double() for value in losses.values()])
    distributed.average([values])
    return dict(zip(losses, values.tolist(), strict=True))


def backward(state: TrainState, losses: Mapping[str, Tensor]) -> None:
    """Fill the gradients from the weighted losses, then average them over the processes.

    Running statistics are averaged along: every process holds the same model after every step.
    """
    # Of the model, not of the optimizer: AdapMTL moves its thresholds itself.
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    if state.balance is None:
        torch.stack(list(losses.values())).sum().backward()
    else:
        state.balance.backward(losses, parameters, state.step)
    if distributed.size() > 1:
        distributed.average([p.grad for p in parameters if p.grad is not None])
        distributed.average([b for b in state.model.buffers() if b.is_floating_point()])


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
