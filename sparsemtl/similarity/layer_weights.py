"""From per-layer scores to one number: the weights of the layers and how they are averaged.

L layers. Source: the Meta-Sparse poster names equal, linearly increasing and sparsity-based
weights; the other names and the formulas are the released code's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemtl.errors import unknown_choice

Array = npt.NDArray[np.float64]

WEIGHTS = ("equal", "linear", "linear-plus-one", "five-zeros", "sparsity", "min-sparsity")
INDEXINGS = ("layer", "filter")
AGGREGATES = ("mean", "unscaled")
SKIPPED = 5  # first layers that "five-zeros" leaves out


def layer_weights(
    name: str, sparsity: Array, filter_sparsity: Array | None = None, indexing: str = "layer"
) -> Array:
    """Weights of the layers for one pair of tasks, not normalised.

    name:            equal 1; linear: the layer's index from 0; linear-plus-one; five-zeros: the
                     index, 0 below 5; sparsity: s_a + s_b; min-sparsity: min(s_a, s_b); the last
                     two are equal where they are 0 in every layer
    sparsity:        [2, L], fraction of each layer that each task's mask drops
    filter_sparsity: [2, L], that of output filter number l of layer l; NaN where there is none
    indexing:        "layer": sparsity of the layer; "filter": as published, where the layer's mask
                     is indexed with the layer's number and so gives one of its filters
    returns:         [L]
    raises:          ValueError for other names, or if a layer has too few filters for "filter"
    """
    if name not in WEIGHTS:
        raise ValueError(f"layer_weights: {unknown_choice('name', name, WEIGHTS)}")
    if indexing not in INDEXINGS:
        raise ValueError(f"layer_weights: {unknown_choice('indexing', indexing, INDEXINGS)}")
    index = np.arange(sparsity.shape[1], dtype=np.float64)
    if name == "equal":
        return np.ones_like(index)
    if name == "linear":
        return index
    if name == "linear-plus-one":
        return index + 1.0
    if name == "five-zeros":
        return np.where(index < SKIPPED, 0.0, index)
    if indexing == "filter":
        sparsity = _of_filters(filter_sparsity)
    weights = sparsity.sum(axis=0) if name == "sparsity" else sparsity.min(axis=0)
    return weights if weights.any() else np.ones_like(index)  # nothing pruned: layers are alike


def average(scores: Array, weights: Array, aggregate: str = "mean", *, epi: bool = False) -> float:
    """One number from a pair's per-layer scores.

    aggregate: "mean": Σ w·s / Σ w, as the released code computes; it is the poster's (1/L) Σ w·s
               for weights of mean 1, a scale that the poster leaves open.
               "unscaled": (1/L) Σ w·s with the weights as they are (EPI-Sim: 1 - (1/L) Σ w·d)
    epi:       whether the scores are EPI-Sim's, which the poster subtracts from 1 at the end
    raises:    ValueError for another aggregate, or weights whose sum is not above 0
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"average: {unknown_choice('aggregate', aggregate, AGGREGATES)}")
    if aggregate == "unscaled":
        value = 1.0 - np.mean(weights * (1.0 - scores)) if epi else np.mean(weights * scores)
        return float(value)
    total = float(weights.sum())
    if not total > 0.0:
        raise ValueError(
            f"average: Expected layer weights with a sum above 0, got {total} over "
            f"{len(weights)} layers"
        )
    return float((weights * scores).sum() / total)


def _of_filters(filter_sparsity: Any) -> Array:
    if filter_sparsity is None or np.isnan(filter_sparsity).any():
        bad = [] if filter_sparsity is None else np.isnan(filter_sparsity).any(axis=0).nonzero()[0]
        where = f"layer {int(bad[0])} has fewer filters than that" if len(bad) else "none"
        raise ValueError(
            "layer_weights: Expected at least l + 1 output filters in layer l for "
            f"indexing='filter', got {where}"
        )
    return np.asarray(filter_sparsity, dtype=np.float64)
