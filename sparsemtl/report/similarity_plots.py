"""Figures of a similarity analysis. Each function takes plain data and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LABELS = {"epi": "EPI-Sim", "iou": "IoU", "css": "CSS", "mcss": "MCSS"}
MOST_NUMBERS = 8  # tasks; in a larger matrix the numbers would not be readable


def task_heatmaps(tasks: Sequence[str], matrices: Mapping[str, np.ndarray]) -> Figure:
    """One T × T heat map per metric.   matrices: metric → [T, T]"""
    columns = min(2, len(matrices))
    rows = -(-len(matrices) // columns)
    cell = max(3.4, 0.75 * len(tasks) + 1.2)
    figure = Figure(figsize=(cell * columns + 0.6, cell * 0.86 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(matrices) :]:
        axis.set_axis_off()
    for axis, (metric, matrix) in zip(axes.flat, matrices.items(), strict=False):
        others = matrix[~np.eye(len(tasks), dtype=bool)]
        image = _matrix(axis, tasks, matrix, float(others.min()), float(others.max()), "{:.3f}")
        axis.set_title(LABELS[metric], fontsize=10, loc="left")
        figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def layer_heatmaps(
    pairs: Sequence[str], layers: Sequence[str], scores: Mapping[str, np.ndarray]
) -> Figure:
    """Pairs × layers, one band per metric.   scores: metric → [P, L], in network order"""
    height = 0.22 * len(pairs) + 0.75
    width = max(7.0, 0.2 * len(layers) + 3.5)
    figure = Figure(figsize=(width, height * len(scores) + 1.3), layout="constrained")
    axes = figure.subplots(len(scores), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (metric, values) in zip(axes, scores.items(), strict=True):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        axis.set_yticks(range(len(pairs)), pairs, fontsize=6)
        axis.set_title(f"{LABELS[metric]} per layer", fontsize=9, loc="left")
        figure.colorbar(image, ax=axis)
    axes[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=5)
    return figure


def gain_figure(
    tasks: Sequence[str],
    gains: np.ndarray,
    pairs: Sequence[str],
    similarity: Mapping[str, Sequence[float]],
    pair_gain: Sequence[float],
    correlations: Mapping[str, Mapping[str, Any]],
) -> Figure:
    """Measured gains [T, T], and the pairs' gains against each metric's similarity."""
    figure = Figure(figsize=(4.2 + 3.0 * len(similarity), 3.9), layout="constrained")
    axes = figure.subplots(
        1, 1 + len(similarity), width_ratios=(1.5, *([1.0] * len(similarity))), squeeze=False
    )[0]
    limit = float(np.nanmax(np.abs(gains)))
    image = _matrix(axes[0], tasks, gains, -limit, limit, "{:+.1f}", cmap="RdBu")
    axes[0].set_title("gain of row from column, %", fontsize=9, loc="left")
    figure.colorbar(image, ax=axes[0], shrink=0.8)
    for axis, (metric, values) in zip(axes[1:], similarity.items(), strict=True):
        axis.axhline(0.0, color="0.7", lw=0.8)
        axis.scatter(values, pair_gain, s=16, color="#3b6fb6")
        for x, y, pair in zip(values, pair_gain, pairs, strict=True):
            axis.annotate(pair, (x, y), fontsize=4.5, xytext=(2, 2), textcoords="offset points")
        rho = correlations[metric]["spearman"]
        note = "constant" if rho is None else f"Spearman {rho:+.2f}"
        axis.set_title(f"{LABELS[metric]}: {note}", fontsize=9, loc="left")
        axis.set_xlabel("similarity", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylabel("co-training gain of the pair, %", fontsize=8)
    return figure


def _matrix(
    axis: Axes,
    tasks: Sequence[str],
    matrix: np.ndarray,
    low: float,
    high: float,
    form: str,
    cmap: str = "viridis",
) -> Any:
    """A square heat map; the diagonal, which says nothing, is left white."""
    shown = np.where(np.eye(len(tasks), dtype=bool), np.nan, matrix)
    image = axis.imshow(shown, cmap=cmap, vmin=low, vmax=high if high > low else low + 1e-9)
    axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    if len(tasks) <= MOST_NUMBERS:
        for i, j in np.argwhere(np.isfinite(shown)):
            red, green, blue, _ = image.cmap(image.norm(shown[i, j]))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axis.text(
                j,
                i,
                form.format(shown[i, j]),
                ha="center",
                va="center",
                fontsize=7,
                color="w" if dark else "k",
            )
    return image
