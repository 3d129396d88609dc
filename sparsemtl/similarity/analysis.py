"""Task similarity over seeds and sparsities.

T tasks, P = T(T-1)/2 pairs in the order of `pairs_of`, S sparsities, L backbone layers. A seed
gives one record of per-layer numbers; every weighting and average is computed from records alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsemtl.errors import unknown_choice
from sparsemtl.similarity import metrics
from sparsemtl.similarity.layer_weights import Array, average, layer_weights
from sparsemtl.similarity.masks import KEEP_RULES, cut_masks, keep_ratio
from sparsemtl.similarity.saliency import INITS, Saliency, saliency
from sparsemtl.training.batches import training_batches

Fresh = Callable[[str, int], nn.Module]  # (task, seed) → a new network with that task's head


@dataclass(frozen=True)
class SimilarityConfig:
    """How tasks are scored; everything that the records depend on besides data and network."""

    seeds: tuple[int, ...] = (0, 1, 2, 3)  # of the weights and the order of the data
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)  # of backbone and own head together
    batches: int = 5  # 50 for Meta-Sparse's tables and DiSparse's analysis
    batch_size: int = 8
    keep: str = "exact"  # or DiSparse's table of keep ratios, "disparse-nyuv2"
    init: str = "xavier"  # weights for scoring; "own": as the network draws them
    empty: str = "equal"  # what a layer counts in which no task keeps a weight
    iou_keep: float = 0.078  # keep ratio of DiSparse's layer-wise analysis

    def __post_init__(self) -> None:
        for name in ("seeds", "sparsities"):  # JSON knows lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))
            values = getattr(self, name)
            if not values:
                raise ValueError(f"SimilarityConfig: Expected at least one of {name}, got none")
            if len(set(values)) != len(values):
                raise ValueError(
                    f"SimilarityConfig: Expected {name} without repetition, got {list(values)}"
                )
        for name in ("batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"SimilarityConfig: Expected {name} >= 1, got {getattr(self, name)}"
                )
        for name, choices in (("keep", KEEP_RULES), ("init", INITS), ("empty", metrics.EMPTY)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"SimilarityConfig: {unknown_choice(name, getattr(self, name), choices)}"
                )
        if not 0.0 < self.iou_keep <= 1.0:
            raise ValueError(f"SimilarityConfig: Expected iou_keep in (0, 1], got {self.iou_keep}")
        if min(self.seeds) < 0:
            raise ValueError(f"SimilarityConfig: Expected seeds >= 0, got {list(self.seeds)}")
        for sparsity in self.sparsities:
            keep_ratio(sparsity, self.keep)


@dataclass(frozen=True)
class SeedRecord:
    """What one seed says.

    numel:           [L] weights per layer
    scores:          metric → [S, P, L]
    kept:            [S, T, L] weights that each task keeps
    filter_sparsity: [S, T, L] of output filter number l of layer l, NaN where there is none
    iou_profile:     [P, L] IoU at `iou_keep`; joint_iou [L]: intersection over union of all tasks
    """

    seed: int
    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    numel: Array
    scores: dict[str, Array]
    kept: Array
    filter_sparsity: Array
    iou_profile: Array
    joint_iou: Array

    def to_json(self) -> dict[str, Any]:
        """Plain lists; NaN becomes null."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SeedRecord:
        """raises: ValueError if a part is missing or is no array of numbers."""
        try:
            parts = {f.name: value[f.name] for f in fields(cls)}
            arrays = ("numel", "kept", "filter_sparsity", "iou_profile", "joint_iou")
            parts |= {name: np.asarray(parts[name], dtype=np.float64) for name in arrays}
            parts["scores"] = {
                m: np.asarray(parts["scores"][m], dtype=np.float64) for m in metrics.METRICS
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"SeedRecord: Expected a complete record, got {error!r}") from error
        parts |= {"tasks": tuple(parts["tasks"]), "layers": tuple(parts["layers"])}
        return cls(**parts)


def pairs_of(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs in the order in which every array holds them."""
    return list(itertools.combinations(tasks, 2))


def check_tasks(tasks: Sequence[str]) -> None:
    """raises: ValueError for fewer than two tasks, or a repeated one."""
    if len(tasks) < 2:
        raise ValueError(
            f"similarity: Expected at least two tasks to compare, got {list(tasks) or 'none'}"
        )
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"similarity: Expected each task once, got {list(tasks)}")


def score_seed(
    fresh: Fresh, tasks: Mapping[str, Any], dataset: Any, config: SimilarityConfig, seed: int
) -> SeedRecord:
    """Score every task on networks of one seed and compare them layer by layer.

    fresh:   builds a network with a backbone and the head of one task; the same seed must give
             every task the same backbone, which `build_model` under `torch.manual_seed` does
    tasks:   name → Task, at least two
    dataset: MultitaskDataset with these targets; its training order of `seed` is used
    raises:  ValueError for one task, or for networks whose backbones differ
    """
    check_tasks(list(tasks))
    keeps = [keep_ratio(s, config.keep) for s in config.sparsities]
    found = []
    for name, task in tasks.items():
        batches = training_batches(dataset, config.batch_size, seed, 0, config.batches)
        ratios = tuple(dict.fromkeys((*keeps, config.iou_keep)))
        found.append(
            saliency(
                fresh(name, seed), task, batches, ratios, seed=seed, init=config.init, in_place=True
            )
        )
    return _compare(found, keeps, config, seed)


def similarity_matrix(
    records: Sequence[SeedRecord],
    metric: str,
    weights: str = "equal",
    indexing: str = "layer",
    aggregate: str = "mean",
) -> tuple[Array, Array]:
    """The mean over sparsities and seeds, and the standard deviation over seeds.

    returns: two [T, T] arrays, symmetric, 1 and 0 on the diagonal
    raises:  ValueError for an unknown metric or weighting
    """
    if metric not in metrics.METRICS:
        raise ValueError(f"similarity_matrix: {unknown_choice('metric', metric, metrics.METRICS)}")
    tasks = records[0].tasks
    places = list(itertools.combinations(range(len(tasks)), 2))
    values = np.array(
        [_pair_values(r, metric, weights, indexing, aggregate, places) for r in records]
    )  # [seeds, P]
    spread = values.std(axis=0, ddof=1) if len(records) > 1 else np.zeros(len(places))
    mean, std = np.eye(len(tasks)), np.zeros((len(tasks), len(tasks)))
    for (a, b), value, deviation in zip(places, values.mean(axis=0), spread, strict=True):
        mean[a, b] = mean[b, a] = value
        std[a, b] = std[b, a] = deviation
    return mean, std


def _pair_values(
    record: SeedRecord,
    metric: str,
    weights: str,
    indexing: str,
    aggregate: str,
    places: Sequence[tuple[int, int]],
) -> list[float]:
    """The pairs' averages over layers, then over sparsities."""
    scores = record.scores[metric]
    sparsity = 1.0 - record.kept / record.numel
    result = []
    for p, pair in enumerate(places):
        per_sparsity = [
            average(
                scores[s, p],
                layer_weights(
                    weights, sparsity[s, pair, :], record.filter_sparsity[s, pair, :], indexing
                ),
                aggregate,
                epi=metric == "epi",
            )
            for s in range(len(scores))
        ]
        result.append(float(np.mean(per_sparsity)))
    return result


def _compare(
    found: Sequence[Saliency], keeps: Sequence[float], config: SimilarityConfig, seed: int
) -> SeedRecord:
    layers = list(found[0].scores)
    for other in found[1:]:
        if list(other.scores) != layers:
            raise ValueError(
                f"similarity: Expected every task's network to have the backbone of "
                f"{found[0].task!r}, got another for {other.task!r}"
            )
    tasks, pairs = len(found), list(itertools.combinations(range(len(found)), 2))
    shape = (len(keeps), len(pairs), len(layers))
    scores = {name: np.zeros(shape) for name in metrics.METRICS}
    kept = np.zeros((len(keeps), tasks, len(layers)))
    filters = np.full_like(kept, np.nan)
    profile, joint = np.zeros((len(pairs), len(layers))), np.zeros(len(layers))
    rows, columns = (list(side) for side in zip(*pairs, strict=True))
    layers_of = [list(s.scores.values()) for s in found]
    ratios = list(dict.fromkeys((*keeps, config.iou_keep)))
    streams = {
        keep: [cut_masks(v, s.cuts[keep]) for v, s in zip(layers_of, found, strict=True)]
        for keep in ratios
    }
    for number, layer in enumerate(layers):
        values = [s.scores[layer] for s in found]
        whole = metrics.css(values)
        for keep in ratios:
            masks = [next(stream) for stream in streams[keep]]
            size = torch.tensor([int(mask.sum()) for mask in masks])
            if keep == config.iou_keep:
                profile[:, number] = metrics.iou(masks)[rows, columns].numpy()
                joint[number] = metrics.joint_iou(masks)
            for k in (k for k, other in enumerate(keeps) if other == keep):
                kept[k, :, number] = size.numpy()
                if number < len(masks[0]):
                    filters[k, :, number] = [1.0 - float(m[number].double().mean()) for m in masks]
                squares = {
                    "epi": metrics.epi(size),
                    "iou": metrics.iou(masks, config.empty),
                    "css": whole,
                    "mcss": metrics.mcss(values, masks, config.empty),
                }
                for name, square in squares.items():
                    scores[name][k, :, number] = square[rows, columns].numpy()
    numel = np.array([v.numel() for v in found[0].scores.values()], dtype=np.float64)
    names = tuple(s.task for s in found)
    return SeedRecord(seed, names, tuple(layers), numel, scores, kept, filters, profile, joint)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value != value else value
