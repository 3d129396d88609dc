"""DiSparse-dynamic: RigL's drop and grow, where each task votes for what the backbone grows.

Source: Sun et al., DiSparse, CVPR 2022. Per layer the smallest weights are dropped down to the
layer's density less a cosine rate; then each task grows its largest |gradients|, up to the density:
the backbone takes the union over tasks (so it holds more than its density until the next drop),
each head its own task's. The last update drops to the exact densities and grows nothing, which the
released code, ending in an undefined function, never reaches.

`variant="released"`: gradients at the dense point, dormant values included; a regrown weight has
its old value; optimizer moments are carried over. The default reads the paper as RigL does: masked
point, start at 0, no moments.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskConfig, forget_moments, masks_of
from sparsemtl.methods.rigl import check_topology
from sparsemtl.methods.scores import check_backbone, owners, scoring, task_gradients
from sparsemtl.methods.topology import (
    Budget,
    TopologyMethod,
    cosine_rate,
    drop,
    grow,
    kept_in_drop,
    short_of,
)

VARIANTS = ("paper", "released")


@dataclass(frozen=True)
class DiSparseDynamicConfig(MaskConfig):
    """Densities per layer and the schedule of updates."""

    allocation: str = "erk"  # erk or uniform
    power: float = 0.9  # of ERK
    update_every: int | None = None  # steps; None: a 200th of the schedule, at least 10
    update_until: float = 0.75  # share of the schedule
    drop_rate: float = 0.5  # at the first update; falls to 0 as a cosine
    parts: int = 2  # of the batch; |gradient| is summed over them (8 on Taskonomy as coded)
    variant: str = "paper"  # or released

    def __post_init__(self) -> None:
        super().__post_init__()
        check_topology(self)
        self.check_share("drop_rate")
        self.check_count("parts")
        self.check_choice("variant", VARIANTS)


class DiSparseDynamic(TopologyMethod):
    """Drop by |w|, grow by each task's |∂L_t/∂w|."""

    name = "disparse-dynamic"

    def prepare(self, model: nn.Module, steps: int, batches: Any = ()) -> None:
        super().prepare(model, steps, batches)
        self.keep_dormant = self.config.variant == "released"

    def on_step(self, state: StepState) -> None:
        if state.step == self.end:
            self._replace(state, [m for g in self._dropped(rate=0.0) for m in g])
        elif state.step < self.end and state.step % self.every == 0:
            rate = cosine_rate(state.step, self.end, self.config.drop_rate)
            survivors = [m for g in self._dropped(rate) for m in g]
            self._replace(state, self._grown(state, survivors))

    def _dropped(self, rate: float) -> list[list[Tensor]]:
        old, budgets = masks_of(self.sparsity), iter(self.budgets)
        return [
            [
                drop(w, mask, _left(next(budgets), rate), self.structure)
                for w, mask in zip(group, masks, strict=True)
            ]
            for group, masks in zip(self.weights, old, strict=True)
        ]

    def _grown(self, state: StepState, survivors: Sequence[Tensor]) -> list[Tensor]:
        """Survivors and what the tasks ask for, up to each layer's density for each task.

        Where too few positions have a gradient, the largest of what was to be dropped stays.
        """
        names = self.sparsity.group_names
        flat = [w for group in self.weights for w in group]
        starts = [0]
        for group in self.weights:
            starts.append(starts[-1] + len(group))
        grown = [mask.clone() for mask in survivors]
        scores = self._task_scores(state, flat)
        for task, places in owners(names, list(scores)).items():
            own = [i for place in places for i in range(starts[place], starts[place + 1])]
            for i, gradient in zip(own, scores[task], strict=True):
                quota = short_of(self.budgets[i], survivors[i], self.structure)
                grown[i] |= grow(gradient, survivors[i], quota, self.structure)
        old = [mask for group in masks_of(self.sparsity) for mask in group]
        for i, weight in enumerate(flat):
            short = short_of(self.budgets[i], grown[i], self.structure)
            grown[i] |= drop(weight, old[i] & ~grown[i], short, self.structure)
        return grown

    def _task_scores(self, state: StepState, flat: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Task → Σ over the batch's parts of |∂L_t/∂w|, of the weights that the task sees."""
        names = self.sparsity.group_names
        scores: dict[str, list[Tensor]] = {}
        self.sparsity.open = True
        with scoring(state.model, flat, "own", state.seed):
            for part in parts_of(state.batch, self.config.parts):
                losses = state.forward(part)
                seen = owners(names, list(losses))
                weights = {t: [w for i in seen[t] for w in self.weights[i]] for t in seen}
                for task, found in task_gradients(state, losses, weights):
                    sizes = [g.abs() for g in found]
                    old = scores.get(task)
                    scores[task] = (
                        sizes if old is None else [a + b for a, b in zip(old, sizes, strict=True)]
                    )
        self.sparsity.open = False
        nested = {
            task: self._nested(values, owners(names, list(scores))[task])
            for task, values in scores.items()
        }
        if state.step <= self.every:  # later a batch without valid pixels is no mistake
            check_backbone(self.name, nested, names, 1)
        return scores

    def _nested(self, values: Sequence[Tensor], places: Sequence[int]) -> list[list[Tensor]]:
        rest = iter(values)
        return [[next(rest) for _ in self.weights[place]] for place in places]

    def _replace(self, state: StepState, masks: Sequence[Tensor]) -> None:
        old = [m for group in masks_of(self.sparsity) for m in group]
        self.sparsity.fix_masks(self.layers(list(masks)), keep_dormant=self.keep_dormant)
        if self.keep_dormant:
            return
        flat = [w for group in self.weights for w in group]
        for w, was, now in zip(flat, old, masks, strict=True):
            forget_moments(state.optimizer, w, ~(was & now))


def _left(budget: Budget, rate: float) -> Budget:
    """What a drop leaves of a layer's budget."""
    return {size: kept_in_drop(count, rate) for size, count in budget.items()}


def parts_of(batch: Any, count: int) -> list[Any]:
    """A batch cut into at most `count` parts of one or more samples.

    batch: named tuple, tuple, list or dict of tensors [B, ...], nested, or a tensor
    """
    size = _size(batch)
    count = min(count, size)
    cuts = [round(i * size / count) for i in range(count + 1)]
    return [_cut(batch, a, b) for a, b in itertools.pairwise(cuts)]


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return len(value)
    values = list(value.values()) if isinstance(value, Mapping) else list(value)
    return _size(values[0])


def _cut(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop]
    if isinstance(value, Mapping):
        return {k: _cut(v, start, stop) for k, v in value.items()}
    parts = [_cut(v, start, stop) for v in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
