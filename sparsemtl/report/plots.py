"""Figures of a run. Each function takes plain data and returns a Figure; no global plot state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_LABELS = 8  # a longer legend would hide the curves
SPARSITY_BIN = 5.0  # %, over which the median of step times is taken
ACTIVE_ALPHA = 1e-7  # below it no threshold prunes anything yet
COLOURS = ("#3b6fb6", "#d9822b", "#3a9a6b", "#b5446e", "#7a5fb0", "#7d7d7d")
STYLE: dict[str, Any] = {"fontsize": 10, "loc": "left"}


@dataclass(frozen=True)
class PictureRow:
    """One line of the picture grid: named RGB pictures [H, W, 3], uint8."""

    pictures: Mapping[str, np.ndarray]


def training_curves(
    rows: Sequence[Mapping[str, Any]],
    requested: float = 0.0,
    baseline_rows: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Losses, task factors, sparsity and thresholds over the steps.

    rows: the lines of metrics.jsonl; baseline_rows: the dense twin's, drawn dotted.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _losses(axes[0, 0], rows, baseline_rows)
    _factors(axes[0, 1], rows)
    _sparsity(axes[1, 0], rows, requested)
    _alphas(axes[1, 1], rows)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if 0 < len(axis.get_legend_handles_labels()[0]) <= MOST_LABELS:
            axis.legend(fontsize=8, frameon=False)
    return figure


def step_time(
    rows: Sequence[Mapping[str, Any]], dense_rows: Sequence[Mapping[str, Any]], machine: str
) -> Figure:
    """Time of a training step against the sparsity at that time.

    rows: the lines of times.jsonl   dense_rows: the dense twin's, of which the median is drawn
    """
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axis = figure.subplots()
    sparsity = 100 * np.array([row["sparsity"] for row in rows])
    times = 1000 * np.array([row["seconds"] for row in rows])
    axis.plot(sparsity, times, ".", ms=4, color=_colour(0), alpha=0.4, label="as measured")
    bins = np.round(sparsity / SPARSITY_BIN)
    middles = [
        (float(np.median(sparsity[bins == b])), float(np.median(times[bins == b])))
        for b in sorted(set(bins))
    ]
    axis.plot(*zip(*middles, strict=True), "o-", color=_colour(0), label="median")
    tallest = max(height for _, height in middles)
    if dense_rows:
        dense = 1000 * float(np.median([row["seconds"] for row in dense_rows]))
        axis.axhline(dense, color="k", lw=0.9, ls="--", label="dense twin, median")
        tallest = max(tallest, dense)
    # Steps in which layers are measured stand out by far, and would flatten the rest.
    top = 1.25 * tallest
    axis.set_ylim(0, top)
    above = int((times > top).sum())
    if above:
        said = f"{above} of {len(times)} steps lie above, up to {times.max():.4g} ms"
        axis.set_title(said, fontsize=8, loc="right")
    axis.set_xlabel("sparsity, %")
    axis.set_ylabel("training step, ms")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(machine, fontsize=8, x=0.01, ha="left")
    return figure


def allocation(summary: Mapping[str, Any]) -> Figure:
    """How the zeros are spread: over the components, and over the layers in network order."""
    sparsity = summary["sparsity"]
    names = list(sparsity["components"])
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    values = [100 * sparsity["components"][n] for n in names]
    left.barh(names[::-1], values[::-1], color=[_colour(i) for i in range(len(names))][::-1])
    for place, value in enumerate(values[::-1]):
        left.text(min(value, 96) - 1, place, f"{value:.2f}", va="center", ha="right", color="w")
    left.axvline(100 * sparsity["overall"], color="k", lw=1, ls="--")
    left.set_title(f"sparsity by component, overall {100 * sparsity['overall']:.2f} %", **STYLE)
    left.set_xlim(0, 100)
    left.set_xlabel("% zeros")
    layers = sparsity["layers"]
    owners = [_owner(layer, names) for layer in layers]
    right.bar(
        range(len(layers)), [100 * v for v in layers.values()], color=[_colour(o) for o in owners]
    )
    right.set_title("by layer, in network order", **STYLE)
    right.set_xlabel("layer")
    right.set_ylim(0, 100)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def picture_grid(rows: Sequence[PictureRow]) -> Figure:
    """Pictures in a grid; the column titles are the first row's names."""
    columns = list(rows[0].pictures)
    height, width = next(iter(rows[0].pictures.values())).shape[:2]
    cell = 1.9
    figure = Figure(
        figsize=(cell * len(columns), cell * height / width * len(rows) + 0.4),
        layout="constrained",
    )
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, name in zip(line, columns, strict=True):
            axis.imshow(row.pictures[name], interpolation="nearest")
            axis.set_axis_off()
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=8)
    return figure


@dataclass(frozen=True)
class DeltaPoint:
    """One row of a comparison.   sparsity: None for a method without a budget"""

    method: str
    sparsity: float | None
    delta: float
    std: float | None


def delta_against_sparsity(points: Sequence[DeltaPoint], reference: str) -> Figure:
    """Δ of each method over the requested sparsity; error bars are one std over seeds.

    With a single budget there is nothing to draw it against: a row per method then.
    """
    pruned = [p for p in points if p.sparsity is not None and np.isfinite(p.delta)]
    budgets = {p.sparsity for p in pruned}
    rows = len(pruned) if len(budgets) == 1 else 0
    figure = Figure(figsize=(8, max(5.0, 0.9 + 0.27 * rows)), layout="constrained")
    axis = figure.subplots()
    label = f"Δ_T against {reference}, %"
    if rows:
        _delta_rows(axis, pruned)
        axis.set_xlabel(f"{label}, at {100 * (pruned[0].sparsity or 0.0):g} % sparsity")
    else:
        _delta_curves(axis, pruned)
        axis.set_xlabel("sparsity, %")
        axis.set_ylabel(label)
    for i, point in enumerate(p for p in points if p.sparsity is None):
        line = axis.axvline if rows else axis.axhline
        line(point.delta, color="k", lw=0.9, ls=("--", ":", "-.")[i % 3], label=point.method)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if points:
        axis.legend(fontsize=7, frameon=False, ncols=1 if rows else 2)
    return figure


def _delta_rows(axis: Axes, points: Sequence[DeltaPoint]) -> None:
    """One row per method, the best on top."""
    ordered = sorted(points, key=lambda p: p.delta)
    spread = [p.std or 0.0 for p in ordered]
    places = range(len(ordered))
    axis.errorbar([p.delta for p in ordered], places, xerr=spread, fmt="o", capsize=3, lw=1.3)
    axis.set_yticks(places, [p.method for p in ordered], fontsize=8)


def _delta_curves(axis: Axes, points: Sequence[DeltaPoint]) -> None:
    """A curve per method over its budgets."""
    for i, method in enumerate(dict.fromkeys(p.method for p in points)):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.sparsity or 0.0)
        axis.errorbar(
            [100 * (p.sparsity or 0.0) for p in own],
            [p.delta for p in own],
            yerr=[p.std or 0.0 for p in own],
            marker="osD^v"[i // len(COLOURS) % 5],
            color=_colour(i),
            label=method,
            capsize=3,
            lw=1.3,
        )


def _losses(
    axis: Axes, rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]
) -> None:
    axis.set_title("training loss per task (smoothed); dotted: dense", **STYLE)
    for style, lines in (("-", rows), (":", baseline)):
        steps, losses = _series(lines, "loss")
        for i, (task, values) in enumerate(losses.items()):
            label = task if style == "-" else None
            axis.plot(steps, _smooth(values), style, color=_colour(i), label=label, lw=1.3)
    axis.set_yscale("log")


def _factors(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("task weighting β (smoothed)", **STYLE)
    steps, factors = _series(rows, "factor")
    for i, (task, values) in enumerate(factors.items()):
        axis.plot(steps, _smooth(values), color=_colour(i), label=task, lw=1.3)


def _sparsity(axis: Axes, rows: Sequence[Mapping[str, Any]], requested: float) -> None:
    axis.set_title("sparsity per component, %", **STYLE)
    counted = [r for r in rows if "sparsity" in r]
    steps = [r["step"] for r in counted]
    if not counted:
        axis.text(0.5, 0.5, "dense", ha="center", va="center", transform=axis.transAxes)
        return
    for i, name in enumerate(counted[0]["sparsity"]["components"]):
        values = [100 * r["sparsity"]["components"][name] for r in counted]
        axis.plot(steps, values, color=_colour(i), label=name, lw=1.5)
    overall = [100 * r["sparsity"]["overall"] for r in counted]
    axis.plot(steps, overall, color="k", lw=1.5, label="overall")
    axis.axhline(100 * requested, color="k", lw=0.8, ls="--")
    axis.set_ylim(0, 101)


def _alphas(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("threshold α per component, until the mask is fixed", **STYLE)
    open_rows = [
        r
        for r in rows
        if "alpha" in r and not r.get("frozen") and max(r["alpha"].values()) > ACTIVE_ALPHA
    ]
    if not open_rows:
        axis.text(0.5, 0.5, "no thresholds", ha="center", va="center", transform=axis.transAxes)
        return
    for i, name in enumerate(open_rows[0]["alpha"]):
        values = [r["alpha"][name] for r in open_rows]
        axis.plot([r["step"] for r in open_rows], values, color=_colour(i), label=name, lw=1.5)
    axis.set_yscale("log")


def _series(
    rows: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[int], dict[str, list[float]]]:
    found = [r for r in rows if key in r]
    names = list(found[0][key]) if found else []
    return [r["step"] for r in found], {n: [r[key][n] for r in found] for n in names}


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Exponential average with a memory of a fiftieth of the run."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 50)
    mean, smoothed = values[0] if values else 0.0, []
    for value in values:
        mean = keep * mean + (1.0 - keep) * value
        smoothed.append(mean)
    return np.array(smoothed)


def _owner(layer: str, components: Sequence[str]) -> int:
    """Index of the component that a layer's name belongs to."""
    for i, name in enumerate(components):
        if layer.startswith(name.replace("head:", "heads.") + "."):
            return i
    return len(components)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
