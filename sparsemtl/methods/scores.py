"""Saliency scores from gradients: what the loss would change if a weight's mask closed.

At mask = 1, ∂L/∂mask = w · ∂L/∂w for every weight. Scores are computed on the network as it is or
re-initialised for scoring only, in training mode (batch statistics, dropout on), and averaged over
the processes of a run; running statistics are put back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsemtl.methods.base import StepState
from sparsemtl.models.component import BACKBONE

INITS = ("xavier", "own")
Scores = list[list[Tensor]]  # per component, per layer


def owners(components: Sequence[str], tasks: Sequence[str]) -> dict[str, list[int]]:
    """Task → indices of the components its loss sees: what is shared, and its own head.

    `head:<task>` belongs to that task, every other component to all tasks.
    """
    heads = {f"head:{task}": task for task in tasks}
    return {
        task: [i for i, name in enumerate(components) if heads.get(name, task) == task]
        for task in tasks
    }


@contextlib.contextmanager
def scoring(model: nn.Module, weights: Sequence[Tensor], init: str, seed: int) -> Iterator[None]:
    """Training mode and, with init="xavier", xavier-normal weights; all is put back after."""
    training = model.training
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    saved = [w.detach().clone() for w in weights] if init == "xavier" else []
    if init == "xavier":
        reinitialise(weights, seed)
    model.train()
    try:
        yield
    finally:
        model.train(training)
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)
            for weight, old in zip(weights if saved else (), saved, strict=True):
                weight.copy_(old)


def reinitialise(weights: Sequence[Tensor], seed: int) -> None:
    """Xavier-normal, in place: N(0, 2 / (fan_in + fan_out)); a function of shapes and seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            taps = math.prod(weight.shape[2:])
            deviation = math.sqrt(2.0 / ((weight.shape[0] + weight.shape[1]) * taps))
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


def gradients(loss: Tensor, weights: Sequence[Tensor], *, keep_graph: bool = False) -> list[Tensor]:
    """∂loss/∂w of each weight; 0 where the loss does not reach it."""
    found: Sequence[Tensor | None] = torch.autograd.grad(
        loss, weights, retain_graph=keep_graph, allow_unused=True
    )
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def task_gradients(
    state: StepState, losses: Mapping[str, Tensor], weights: Mapping[str, Sequence[Tensor]]
) -> Iterator[tuple[str, list[Tensor]]]:
    """(task, ∂L_t/∂w of that task's weights), averaged over the processes."""
    last = list(losses)[-1]
    for task, loss in losses.items():
        found = gradients(loss, weights[task], keep_graph=task != last)
        state.average(found)
        yield task, found


def task_saliency(
    state: StepState,
    weights: Sequence[Sequence[nn.Parameter]],
    components: Sequence[str],
    batches: int,
) -> dict[str, Scores]:
    """Σ over batches of |w · ∂L_t/∂w|, per task over the components that it sees.

    returns: task → per seen component, per layer, float32; one copy per task is held
    raises:  ValueError for a task without gradient in the backbone
    source:  DiSparse, as coded: unweighted single-task losses
    """
    scores: dict[str, list[Tensor]] = {}
    seen: dict[str, list[int]] = {}
    for batch in state.scoring_batches(batches):
        losses = state.forward(batch)
        seen = owners(components, list(losses))
        flat = {t: [w for i in seen[t] for w in weights[i]] for t in seen}
        for task, found in task_gradients(state, losses, flat):
            products = [(g * w.detach()).abs() for g, w in zip(found, flat[task], strict=True)]
            old = scores.get(task)
            scores[task] = (
                products if old is None else [a.add_(b) for a, b in zip(old, products, strict=True)]
            )
    return {task: _nested(values, weights, seen[task]) for task, values in scores.items()}


def _nested(
    values: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], seen: Sequence[int]
) -> Scores:
    rest = iter(values)
    return [[next(rest).float() for _ in weights[i]] for i in seen]


def check_backbone(
    who: str, scores: Mapping[str, Scores], components: Sequence[str], batches: int
) -> None:
    """raises ValueError for a task whose scores in what is shared are all 0."""
    tasks = list(scores)
    if BACKBONE not in components:
        return
    for task, seen in owners(components, tasks).items():
        place = seen.index(list(components).index(BACKBONE))
        if not any(bool((layer > 0).any()) for layer in scores[task][place]):
            raise ValueError(
                f"{who}: Expected task {task!r} to have a gradient in the backbone, got none in "
                f"{batches} batches: its head is detached, or it has no valid pixel"
            )
