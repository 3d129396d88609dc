"""Figures of benches: rows in, Figure out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsemtl.report.plots import COLOURS

Rows = Sequence[Mapping[str, Any]]
MARKERS = ("o", "s", "^", "D")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def speedups(rows: Rows, machine: str) -> Figure:
    """Speed-up over the fastest dense path: one panel per case, or bars at one sparsity.

    rows: of a bench, with case, pass, sparsity, speedup, structure
    """
    sparsities = sorted({row["sparsity"] for row in rows})
    if len(sparsities) == 1:
        return _bars(rows, sparsities[0], machine)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(len(cases), 3 if len(cases) <= 9 else 6)
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.3 * lines + 1.0), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, [row for row in rows if row["case"] == case], case)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_visible(False)
    _scale(axes[0, 0], [row["speedup"] for row in rows], axes[0, 0].yaxis)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("sparsity, %", fontsize=10)
    figure.supylabel("speed-up over the fastest dense path", fontsize=10)
    figure.suptitle(_title(rows, machine), fontsize=9, x=0.01, ha="left")
    return figure


def step_times(rows: Rows, machine: str) -> Figure:
    """Time of a training step against the overall sparsity; splits by component are marked apart.

    rows: of `bench step`, with mask, split, sparsity, dense_ms, sparse_ms, medians_ms
    """
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axis = figure.subplots()
    for m, mask in enumerate(dict.fromkeys(row["mask"] for row in rows)):
        own = sorted((r for r in rows if r["mask"] == mask), key=lambda r: r["sparsity"])
        label = "sparse kernels" + ("" if mask == "fixed" else ", mask still open")
        series = [("sparse_ms", label, "-")]
        if m == 0:
            series += [("dense_ms", "dense, fastest", "--")]
        if m == 0 and "masked" in own[0]["medians_ms"]:
            own = [{**row, "masked_ms": row["medians_ms"]["masked"]} for row in own]
            series += [("masked_ms", "zeros in dense kernels", ":")]
        for i, (key, name, style) in enumerate(series):
            even = [r for r in own if len(set(r["split"].values())) == 1]
            colour = COLOURS[(3 * m + i) % 6]
            axis.plot(
                [100 * r["sparsity"] for r in even],
                [r[key] for r in even],
                *(style,),
                marker=MARKERS[i],
                color=colour,
                label=name,
            )
            for row in (r for r in own if r not in even):
                axis.plot(100 * row["sparsity"], row[key], "*", ms=12, color=colour)
                if key == "sparse_ms":
                    text = f" {row['case'].split()[-1]}: {row['speedup']:.2f}×"
                    axis.annotate(text, (100 * row["sparsity"], row[key]), fontsize=8, va="top")
    axis.set_ylim(0)
    axis.set_xlabel("sparsity over all components, %")
    axis.set_ylabel("training step, ms")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{rows[0]['case'].split()[0]} · {machine}", fontsize=8, x=0.01, ha="left")
    return figure


def model_times(rows: Rows, machine: str) -> Figure:
    """Images a second of every candidate, one panel per batch size.

    rows: of `bench model`, with candidate, batch, images_per_second, median_ms
    """
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure = Figure(figsize=(1 + 4.2 * len(batches), 3.6), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        own = [r for r in rows if r["batch"] == batch and r["median_ms"] is not None]
        names = [row["candidate"] for row in own]
        values = [row["images_per_second"] for row in own]
        colours = [COLOURS[1] if name == "engine" else COLOURS[0] for name in names]
        axis.barh(names, values, color=colours)
        for place, row in enumerate(own):
            text = f" {row['median_ms']:.4g} ms"
            axis.text(row["images_per_second"], place, text, va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set_title(f"batch {batch}", fontsize=10, loc="left")
        axis.set_xlabel("images per second")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['case']} · {machine}", fontsize=8, x=0.01, ha="left")
    return figure


def _panel(axis: Axes, rows: Rows, case: str) -> None:
    for i, kind in enumerate(dict.fromkeys(row["pass"] for row in rows)):
        own = sorted((r for r in rows if r["pass"] == kind), key=lambda r: r["sparsity"])
        x, y = [100 * r["sparsity"] for r in own], [r["speedup"] for r in own]
        axis.plot(x, y, marker=MARKERS[i % 4], ms=4, lw=1.5, color=COLOURS[i % 6], label=kind)
    axis.axhline(1.0, color="k", lw=0.8, ls="--")
    axis.set_title(case, fontsize=8, loc="left")
    axis.set_yscale("log")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _bars(rows: Rows, sparsity: float, machine: str) -> Figure:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    kinds = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(9, 0.24 * len(cases) * max(1, len(kinds)) + 1.6), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        own = {row["case"]: row for row in rows if row["pass"] == kind}
        places = [i + (k - (len(kinds) - 1) / 2) * height for i, c in enumerate(cases) if c in own]
        values = [own[c]["speedup"] for c in cases if c in own]
        axis.barh(places, values, 0.9 * height, color=COLOURS[k % 6], label=kind)
        for place, value in zip(places, values, strict=True):
            axis.text(value * 1.03, place, f"{value:.2f}", va="center", fontsize=7)
    axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1.0, color="k", lw=0.8, ls="--")
    axis.set_xscale("log")
    _scale(axis, [row["speedup"] for row in rows], axis.xaxis)
    axis.margins(y=0.01)
    axis.set_xlabel(f"speed-up over the fastest dense path at {100 * sparsity:g} % sparsity")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(rows, machine), fontsize=8, x=0.01, ha="left")
    return figure


def _scale(axis: Axes, values: Sequence[float], ruler: Any) -> None:
    """Plain numbers at a logarithmic axis, from a little below to a little above the values."""
    low, high = 0.8 * min([*values, 1.0]), 1.35 * max([*values, 1.0])
    (axis.set_xlim if ruler is axis.xaxis else axis.set_ylim)(low, high)
    ticks = [t for t in TICKS if low <= t <= high]
    ruler.set_ticks(ticks, [f"{t:g}×" for t in ticks])
    ruler.set_ticks([], minor=True)


def _title(rows: Rows, machine: str) -> str:
    structures = sorted({row["structure"] for row in rows})
    return f"{', '.join(structures)} sparsity · {machine}"
