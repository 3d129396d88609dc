"""A run as one HTML page that stands alone: styles and pictures are inside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

PICTURES = {  # files of a run's plots/, in the order of the page
    "predictions.png": "Predictions",
    "allocation.png": "Allocation",
    "curves.png": "Training",
    "step_time.png": "Step time against sparsity",
}


@dataclass(frozen=True)
class PageTable:
    """What the page shows as one table; `total`: the last row is a sum."""

    rows: Sequence[Sequence[str]]
    heads: Sequence[str] = ()
    title: str = ""
    total: bool = False


@dataclass(frozen=True)
class Inference:
    """What the compiled model gains, measured on the machine of the report."""

    note: str
    table: PageTable


def run_page(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    plots: Path,
    command: str,
    inference: Inference | None = None,
) -> str:
    """Render a finished run.

    summary, config: summary.json and config.json of its folder
    plots:           folder of its pictures; those that are absent are left out
    command:         the line that repeats the run
    raises:          ImportError with the line that installs jinja2
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError("reports need jinja2: pip install 'sparsemtl[report]'") from error
    source = resources.files("sparsemtl.report").joinpath("run.html.j2").read_text("utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    method = summary["method"]
    return template.render(
        title=f"{summary['model']}, {method}",
        lead=f"{summary['preset'] or 'own configuration'} · seed {summary['seed']} · "
        f"{summary['steps']} steps in {summary['seconds']:.0f} s",
        cards=_cards(summary),
        delta=_delta(summary["delta"]),
        quality=_quality(summary),
        components=_components(summary),
        inference=inference,
        pictures=_pictures(plots),
        command=command,
        machine=_machine(summary["environment"]),
        config=json.dumps(config, indent=2),
    )


def inference_of(measured: Mapping[str, Any]) -> Inference:
    """The table of what `sparsemtl bench model --json` wrote."""
    heads = ["runs on", "median ms", "spread", "images/s", "peak MB", "load s", "file MB"]
    body = []
    for row in measured["rows"]:
        values = [_number(row[k]) for k in ("images_per_second", "peak_mb", "load_s", "file_mb")]
        spread = "-" if row["spread"] is None else f"{row['spread']:.1%}"
        body.append([row["candidate"], _number(row["median_ms"]), spread, *values])
    engine = next(row for row in measured["rows"] if row["candidate"] == "engine")
    gain = "" if engine["speedup"] is None else f" {engine['speedup']:.2f}× {engine['against']}."
    note = f"Batch {engine['batch']}, candidates in turns, outputs compared first.{gain} "
    return Inference(note + measured["machine"], PageTable(body, heads))


def _cards(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    sparsity, work = summary["sparsity"], summary["flops"]["total"]
    cards = [
        ("zeros", f"{100 * sparsity['overall']:.2f} %"),
        ("parameters", f"{summary['parameters']:,}"),
        ("weights left", f"{sparsity['weights'] - sparsity['zeros']:,}"),
        (
            "work of nonzero weights",
            f"{work['sparse_mac'] / max(work['dense_mac'], 1):.1%} of dense",
        ),
    ]
    overall = summary["delta"]["overall"]
    return [("Δ against dense", f"{overall:+.2f} %"), *cards] if overall is not None else cards


def _delta(delta: Mapping[str, Any]) -> str:
    if delta["overall"] is None:
        return f"Δ: none ({delta['reason']})"
    form = "mean over metrics, Eq. 7" if delta["form"] == "mean" else "sum over metrics"
    return f"Δ {delta['overall']:+.2f} % against {delta['reference']} ({form}); above 0 is better."


def _quality(summary: Mapping[str, Any]) -> list[PageTable]:
    rows = {"constant predictor": summary["constant_metrics"]}
    if "baseline_metrics" in summary:
        rows["dense"] = summary["baseline_metrics"]
    rows[summary["method"]] = summary["metrics"]
    tables = []
    for task, metrics in summary["metrics"].items():
        body = []
        for name, values in rows.items():
            change = summary["delta"]["tasks"].get(task) if name == summary["method"] else None
            cells = [_number(values[task][metric]) for metric in metrics]
            body.append([name, *cells, "" if change is None else f"{change:+.2f}"])
        tables.append(PageTable(body, ["model", *metrics, "Δ %"], task))
    return tables


def _components(summary: Mapping[str, Any]) -> PageTable:
    sparsity, work = summary["sparsity"], summary["flops"]
    rows = []
    for name, value in sparsity["components"].items():
        total, zeros = sparsity["component_weights"][name], sparsity["component_zeros"][name]
        rows.append(_component(name, value, total, zeros, work["components"][name]))
    whole = (sparsity["overall"], sparsity["weights"], sparsity["zeros"], work["total"])
    rows.append(_component("overall", *whole))
    heads = ["component", "zeros %", "weights", "nonzero", "dense MMAC", "sparse MMAC"]
    height, width = work["input"][-2:]
    return PageTable(rows, heads, f"Work at {height}×{width}; 1 MAC = 2 FLOP", total=True)


def _component(
    name: str, sparsity: float, total: int, zeros: int, work: Mapping[str, int]
) -> list[str]:
    mega = [f"{work[key] / 1e6:,.1f}" for key in ("dense_mac", "sparse_mac")]
    return [name, f"{100 * sparsity:.2f}", f"{total:,}", f"{total - zeros:,}", *mega]


def _pictures(plots: Path) -> list[dict[str, str]]:
    found = [(plots / name, title) for name, title in PICTURES.items()]
    return [
        {"title": title, "data": base64.b64encode(path.read_bytes()).decode("ascii")}
        for path, title in found
        if path.is_file()
    ]


def _machine(environment: Mapping[str, Any]) -> PageTable:
    rows = []
    for name, value in environment.items():
        if value in (None, [], ""):
            continue
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB"
        rows.append([name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)])
    return PageTable(rows, (), "Machine and versions")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
