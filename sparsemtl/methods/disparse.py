"""DiSparse: each task scores the shared weights by itself; what any task wants stays.

A task's ranking runs over what it sees, the backbone and its own head. A weight survives if some
task ranks it within that task's best `keep` share: the backbone's mask is the union over tasks,
each head has its own task's. Source: Sun et al., DiSparse, CVPR 2022. Its keep ratios are tuned by
hand so that the union meets the target; here the ratio is solved, so that the whole network meets
it exactly, for any tasks and any network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskConfig, MaskMethod, step_of
from sparsemtl.methods.scores import (
    INITS,
    Scores,
    check_backbone,
    owners,
    scoring,
    task_saliency,
)
from sparsemtl.sparsity.structure import ELEMENT, Structure, parse_structure

PRETRAINED_SCORES = ("magnitude", "taylor")


@dataclass(frozen=True)
class DiSparseStaticConfig(MaskConfig):
    """Before training: what the scores are computed on."""

    batches: int = 50  # mini-batches of the run's size
    init: str = "xavier"  # weights while scoring: xavier (as coded), own
    keep_ratio: float | None = None  # None: solved for the target; else used as it is

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("batches")
        self.check_choice("init", INITS)
        check_keep_ratio(self)


@dataclass(frozen=True)
class DiSparsePTConfig(MaskConfig):
    """After (dense) training: which scores, and when."""

    scores: str = "magnitude"  # |w| (as coded for NYUv2, Cityscapes); taylor: Σ|g|·w² (Taskonomy)
    batches: int = 50  # for taylor
    prune_at: float = 0.5  # share of the schedule that is trained dense; 0: prune at the start
    keep_ratio: float | None = None  # None: solved for the target; else used as it is

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("batches")
        self.check_choice("scores", PRETRAINED_SCORES)
        self.check_share("prune_at")
        check_keep_ratio(self)


def check_keep_ratio(config: Any) -> None:
    """raises ValueError unless `keep_ratio` is None, or in (0, 1] and on single weights."""
    ratio = config.keep_ratio
    if ratio is not None and parse_structure(config.structure) != ELEMENT:
        raise ValueError(
            f"{type(config).__name__}: Expected structure element with a keep_ratio, got "
            f"{config.structure!r}: a union over tasks has no whole groups; leave keep_ratio out"
        )
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise ValueError(
            f"{type(config).__name__}: Expected keep_ratio in (0, 1] or None, got {ratio}"
        )


def entry_ratios(
    scores: Mapping[str, Scores],
    components: Sequence[str],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    structure: Structure = ELEMENT,
) -> list[list[Tensor]]:
    """The smallest keep ratio at which each weight is in the union: min over tasks of rank / N_t.

    scores:     task → per component that it sees, per layer, ≥ 0
    components: names of all; shapes: of all their weights
    returns:    per component, per layer, float64 in (0, 1]; ranks by falling score, ties by index
    """
    seen = owners(components, list(scores))
    least: list[list[Tensor]] = [[] for _ in components]
    for task, parts in scores.items():
        grouped = [
            [structure.expand(structure.scores(layer), layer.shape) for layer in part]
            for part in parts
        ]
        flat = torch.cat([layer.reshape(-1) for part in grouped for layer in part])
        order = torch.argsort(flat, descending=True, stable=True)
        ratio = torch.empty(flat.numel(), dtype=torch.float64, device=flat.device)
        places = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
        ratio[order] = places / flat.numel()
        rest = iter(ratio.split([layer.numel() for part in grouped for layer in part]))
        for place in seen[task]:
            own = [next(rest).reshape(shape) for shape in shapes[place]]
            least[place] = (
                [torch.minimum(a, b) for a, b in zip(least[place], own, strict=True)]
                if least[place]
                else own
            )
    for place, name in enumerate(components):
        if not least[place]:
            raise ValueError(
                f"disparse: Expected each component to be seen by a task of {list(scores)}, "
                f"got {name!r}"
            )
    return least


def union_masks(ratios: list[list[Tensor]], keep_ratio: float) -> list[list[Tensor]]:
    """Masks of a given keep ratio: True where some task ranks the weight that high."""
    return [[layer <= keep_ratio for layer in group] for group in ratios]


class _DiSparse(MaskMethod):
    """What the one-time variants share: from scores per task to masks."""

    keep_ratio: float | None = None  # that was used, solved or given

    def prune_by_tasks(self, scores: Mapping[str, Scores]) -> None:
        shapes = [[tuple(w.shape) for w in group] for group in self.weights]
        ratios = entry_ratios(scores, self.sparsity.group_names, shapes, self.structure)
        if self.config.keep_ratio is not None:
            self.keep_ratio = self.config.keep_ratio
            self.sparsity.fix_masks(union_masks(ratios, self.config.keep_ratio))
            return
        self.prune([[1.0 / layer for layer in group] for group in ratios])
        assert self.sparsity.masks is not None
        kept = zip(ratios, self.sparsity.masks, strict=True)
        self.keep_ratio = max(
            float(ratio[mask].max()) if bool(mask.any()) else 0.0
            for group, masks in kept
            for ratio, mask in zip(group, masks, strict=True)
        )

    def describe(self, model: Any) -> dict[str, Any]:
        return {**super().describe(model), "keep_ratio": self.keep_ratio}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "keep_ratio": self.keep_ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.keep_ratio = state["keep_ratio"]


class DiSparseStatic(_DiSparse):
    """Per-task saliency before the first step."""

    name = "disparse-static"

    def on_start(self, state: StepState) -> None:
        config, names = self.config, self.sparsity.group_names
        flat = [w for group in self.weights for w in group]
        with scoring(state.model, flat, config.init, state.seed):
            scores = task_saliency(state, self.weights, names, config.batches)
        check_backbone(self.name, scores, names, config.batches)
        self.prune_by_tasks(scores)


class DiSparsePT(_DiSparse):
    """Per-task scores of trained weights."""

    name = "disparse-pt"

    def on_start(self, state: StepState) -> None:
        if self.config.prune_at == 0.0:
            self._prune(state)

    def on_step(self, state: StepState) -> None:
        if not self.sparsity.frozen and state.step >= step_of(self.config.prune_at, self.steps):
            self._prune(state)

    def _prune(self, state: StepState) -> None:
        names, config = self.sparsity.group_names, self.config
        if config.scores == "magnitude":
            tasks = [name.removeprefix("head:") for name in names if name.startswith("head:")]
            sizes, seen = self.magnitudes(), owners(names, tasks or ["all"])
            self.prune_by_tasks({task: [sizes[i] for i in part] for task, part in seen.items()})
            return
        flat = [w for group in self.weights for w in group]
        with scoring(state.model, flat, "own", state.seed):
            scores = task_saliency(state, self.weights, names, config.batches)
        check_backbone(self.name, scores, names, config.batches)
        sizes, seen = self.magnitudes(), owners(names, list(scores))
        # Σ|w·g| · |w| = Σ|g| · w²: the square multiplied once, as coded.
        self.prune_by_tasks(
            {
                task: [
                    [a * b for a, b in zip(part, sizes[i], strict=True)]
                    for part, i in zip(parts, seen[task], strict=True)
                ]
                for task, parts in scores.items()
            }
        )
