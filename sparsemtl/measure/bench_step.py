"""A whole training step, dense and sparse: forward, losses, backward, optimizer.

dense     the dense method with torch's fused Adam; the fastest of three layouts counts
masked    a sparsified model without sparse kernels, which computes with zeros; on request
sparse    the same model with them, each layer and pass as measured faster

Each is a run as `sparsemtl train` makes it, on one batch. The mask is either fixed, as after the
ramp, or open: then S(W, α) with thresholds at the same sparsity, and every weight keeps learning.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from sparsemtl.data.base import MultitaskSample
from sparsemtl.measure.pruned import build, magnitude_masks
from sparsemtl.measure.rows import Call, WrongResult, digits
from sparsemtl.methods.base import Method
from sparsemtl.models.dropout import Dropout
from sparsemtl.sparsity import choice
from sparsemtl.sparsity.sparsify import Sparsity, sparsify
from sparsemtl.tasks import make_task
from sparsemtl.timing import interleave
from sparsemtl.training.loop import train_step
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState

MASKS = ("fixed", "open")
# name → are the weights, is the image in channels_last
DENSE = {
    "dense channels_last": (True, True),
    "dense nchw": (False, False),
    "dense nchw weights": (False, True),
}
LOSS_TOLERANCE = 1e-5  # relative
GRAD_TOLERANCE, GRAD_NOISE = 1e-3, 5.0  # relative; or so many times what NUDGE changes
NUDGE = 1e-7  # of each pixel: about float32's rounding
STEPS = 1_000_000  # of the schedule: none of it ends within a bench


@dataclass(frozen=True)
class StepSetup:
    """What is trained: a model of the registry, its tasks, the image size and the batch."""

    model: str
    tasks: Mapping[str, int]
    image: tuple[int, int]
    batch: int = 1


class FixedSplit(Method):
    """Every component at its sparsity: by magnitude masks, or by thresholds that leave as much."""

    name = "fixed-split"

    def __init__(self, split: Mapping[str, float], open_mask: bool) -> None:
        self.split, self.open_mask = split, open_mask

    def prepare(self, model: nn.Module, steps: int, batches: Iterable[Any] = ()) -> None:
        masks = magnitude_masks(model, self.split, across_layers=self.open_mask)
        sparsify(model)
        sparsity = sparsity_of(model)
        if not self.open_mask:
            sparsity.freeze(masks, torch.zeros(len(masks)))
            return
        levels = [
            max([w.detach()[~m].abs().max().item() for w, m in pairs if not bool(m.all())] or [0.0])
            for pairs in (
                list(zip(sparsity.weights(g), group, strict=True)) for g, group in enumerate(masks)
            )
        ]
        with torch.no_grad():
            sparsity.theta.copy_(torch.logit(torch.tensor(levels).clamp(1e-9, 0.5)))


def sparsity_of(model: nn.Module) -> Sparsity:
    assert isinstance(model.sparsity, Sparsity)
    return model.sparsity


def make_state(
    setup: StepSetup,
    split: Mapping[str, float] | None,
    open_mask: bool = False,
    sparse_kernels: bool = False,
    channels_last: bool = True,
    dropout: bool = True,
) -> TrainState:
    """A run at its first step; dense without a split."""
    gc.collect()  # models and their slots name each other: gigabytes that nobody else frees in time
    model: nn.Module = build(setup.model, setup.tasks)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not dropout:
        for module in model.modules():
            if isinstance(module, Dropout):
                module.p = 0.0
    tasks = {name: make_task(name, name, channels) for name, channels in setup.tasks.items()}
    method = Method() if split is None else FixedSplit(split, open_mask)
    config = TrainConfig(
        steps=STEPS,
        batch_size=setup.batch,
        optim=OptimConfig(optimizer="adam" if split is None else "threshold-adam"),
        runtime=RuntimeConfig(sparse_kernels=sparse_kernels),
    )
    state = TrainState.create(model, tasks, (make_batch(setup),), method, config)
    state.model.train()
    return state


def make_batch(setup: StepSetup) -> MultitaskSample:
    """A seeded random image with targets of every task."""
    rng = torch.Generator().manual_seed(0)
    size = (setup.batch, *setup.image)
    targets: dict[str, torch.Tensor] = {}
    for name, channels in setup.tasks.items():
        if name == "segmentation":
            targets[name] = torch.randint(0, channels, size, generator=rng)
        elif name == "normals":
            vectors = torch.randn(setup.batch, 3, *setup.image, generator=rng)
            targets[name] = normalize(vectors, dim=1)
        else:
            targets[name] = 0.5 + torch.rand(setup.batch, channels, *setup.image, generator=rng)
    valid = {name: torch.ones(size, dtype=torch.bool) for name in setup.tasks}
    image = torch.randn(setup.batch, 3, *setup.image, generator=rng)
    image = image.contiguous(memory_format=torch.channels_last)
    return MultitaskSample(image, targets, valid, torch.arange(setup.batch))


def check_step(setup: StepSetup, split: Mapping[str, float], open_mask: bool) -> float:
    """The gate: losses and gradients of a sparse step are those of the masked dense one.

    returns: the largest relative error of a loss   raises: WrongResult
    """
    batch = make_batch(setup)
    runs = {
        "wanted": _gradients(make_state(setup, split, open_mask, dropout=False), batch),
        "again": _gradients(make_state(setup, split, open_mask, dropout=False), _nudged(batch)),
        "found": _gradients(make_state(setup, split, open_mask, True, dropout=False), batch),
    }
    expected, losses = runs["wanted"][0], runs["found"][0]
    worst = max(abs(losses[t] - e) / max(abs(e), 1e-12) for t, e in expected.items())
    if not worst <= LOSS_TOLERANCE:
        raise WrongResult(
            f"bench step: Expected losses within {LOSS_TOLERANCE:g} of the masked dense step's, "
            f"got a relative error of {worst:.1e}"
        )
    # A ReLU flips where its input is 0 but for rounding, and forty layers carry that on: what
    # rounding the image does to some gradient of the dense step, another order of sums may do too.
    off, noise = (_differences(runs["wanted"][1], runs[name][1]) for name in ("found", "again"))
    limit = max(GRAD_TOLERANCE, GRAD_NOISE * max(noise.values()))
    name = max(off, key=lambda n: off[n])
    if not off[name] <= limit:
        raise WrongResult(
            f"bench step: Expected the gradient of {name} within {limit:.1e} of the "
            f"masked dense step's, got a relative error of {off[name]:.1e}"
        )
    return worst


def _differences(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Relative error of each gradient; NaN counts as infinite."""
    errors = {}
    for name, grad in wanted.items():
        off = (found[name] - grad).norm().item() / max(grad.norm().item(), 1e-12)
        errors[name] = off if off == off else float("inf")
    return errors


def _nudged(batch: MultitaskSample) -> MultitaskSample:
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(batch.image.shape, generator=rng)
    return batch._replace(image=batch.image * (1.0 + NUDGE * noise))


def _gradients(
    state: TrainState, batch: MultitaskSample
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    losses = state.forward(batch)
    torch.stack(list(losses.values())).sum().backward()
    grads = {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, grads


@contextmanager
def fresh_choices() -> Iterator[None]:
    """Choices measured in this run and kept nowhere else."""
    before = os.environ.get("SPARSEMTL_CACHE"), choice.CHOICES.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSEMTL_CACHE"] = folder
        choice.CHOICES.forget()
        try:
            yield
        finally:
            choice.CHOICES.forget()
            choice.CHOICES.load_state_dict(before[1])
            if before[0] is None:
                del os.environ["SPARSEMTL_CACHE"]
            else:
                os.environ["SPARSEMTL_CACHE"] = before[0]


def step_call(state: TrainState, batch: MultitaskSample) -> Call:
    return lambda: train_step(state, batch)


def measure_step(
    setup: StepSetup,
    splits: Mapping[str, Mapping[str, float]],
    masks: Iterable[str],
    rounds: int = 5,
    warmup: int = 1,
    with_masked: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row per split and kind of mask; dense and sparse steps take turns.

    splits:      name → component → fraction of zeros
    with_masked: time a sparsified model without sparse kernels, too
    """
    batch = make_batch(setup)
    plain = batch._replace(image=batch.image.contiguous())
    dense = {
        name: step_call(make_state(setup, None, channels_last=weights), batch if image else plain)
        for name, (weights, image) in DENSE.items()
    }
    first = interleave(dense, 2, warmup)
    fastest = min(DENSE, key=lambda n: first[n].best)
    dense = {fastest: dense[fastest]}  # the others' weights and moments are gigabytes
    labels = ("masked", "sparse") if with_masked else ("sparse",)
    for kind in masks:
        for name, split in splits.items():
            with fresh_choices():
                error = check_step(setup, split, kind == "open")
                choice.CHOICES.forget()
                states = {
                    label: make_state(setup, split, kind == "open", label == "sparse")
                    for label in labels
                }
                whole = _overall(states["sparse"])  # open masks move from the first step on
                calls = {
                    fastest: dense[fastest],
                    # In its own layout, which is what a run reads from disk: no channels_last.
                    **{n: step_call(state, plain) for n, state in states.items()},
                }
                times = interleave(calls, rounds, warmup)
                picked = choice.CHOICES.state_dict()
            ours = times["sparse"]
            yield {
                "case": f"{setup.model} {name}",
                "pass": "training step",
                "structure": "element",
                "sparsity": whole,
                "dense_path": fastest,
                "dense_ms": digits(1e3 * times[fastest].median),
                "sparse_ms": digits(1e3 * ours.median),
                "speedup": digits(times[fastest].median / ours.median),
                "spread": round(ours.spread, 3),
                "rel_err": float(f"{error:.2g}"),
                "fraction_of_roof": None,  # a step is many ops: each has its own
                "mask": kind,
                "split": dict(split),
                "speedup_of_best": digits(times[fastest].best / ours.best),
                "dense_spread": round(times[fastest].spread, 3),
                "medians_ms": {n: digits(1e3 * t.median) for n, t in {**first, **times}.items()},
                "sparse_passes": [sum(p) for p in zip(*picked.values(), strict=True)] or [0, 0, 0],
                "layer_shapes": len(picked),
                "rounds": ours.rounds,
            }
            del states, calls, times, ours  # before the next row makes its own


def _overall(state: TrainState) -> float:
    sparsity = sparsity_of(state.model)
    groups = range(len(sparsity.groups))
    dead = sum(sparsity.dead_count(g, i) for g in groups for i in range(len(sparsity.weights(g))))
    return round(dead / sum(w.numel() for g in groups for w in sparsity.weights(g)), 4)
