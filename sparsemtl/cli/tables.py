"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparsemtl.cli.run_folder import RunFolder

PLAIN_WIDTH = 120  # columns of a table in a file or a pipe

Metrics = Mapping[str, Mapping[str, float | None]]


def print_summary(summary: Mapping[str, Any], folder: RunFolder) -> None:
    """Metrics, Δ, sparsity, parameters and FLOPs of a finished run."""
    console = _console()
    rows: dict[str, Metrics] = {"constant predictor": summary["constant_metrics"]}
    if "baseline_metrics" in summary:
        rows["dense"] = summary["baseline_metrics"]
    sparsity = summary["sparsity"]
    name = summary["method"]
    if sparsity["requested"] > 0.0:
        name += f" {100 * sparsity['requested']:g}%"
    rows[name] = summary["metrics"]
    for task in summary["metrics"]:
        console.print(_task_table(task, rows, {name: summary["delta"]["tasks"].get(task)}))
    console.print(_delta_line(summary["delta"]), highlight=False)
    console.print(component_table(summary))
    work = summary["flops"]["total"]
    dense, sparse = (2e-9 * work[key] for key in ("dense_mac", "sparse_mac"))
    console.print(
        f"{summary['parameters']:,} parameters; one image costs {dense:.3f} GFLOP dense, "
        f"{sparse:.3f} GFLOP counting nonzero weights only",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s; everything is in {folder.root}",
        highlight=False,
        soft_wrap=True,
    )


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _task_table(
    task: str, rows: Mapping[str, Metrics], deltas: Mapping[str, float | None]
) -> Table:
    table = Table(title=task, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("model")
    for metric in next(iter(rows.values()))[task]:
        table.add_column(metric, justify="right")
    table.add_column("Δ %", justify="right")
    for name, metrics in rows.items():
        change = deltas.get(name)
        cells = [_number(value) for value in metrics[task].values()]
        table.add_row(name, *cells, "" if change is None else f"{change:+.2f}")
    return table


def component_table(summary: Mapping[str, Any]) -> Table:
    """Sparsity, weights and work per component; work counts multiply-adds (1 MAC = 2 FLOP)."""
    sparsity, work = summary["sparsity"], summary["flops"]
    height, width = work["input"][-2:]
    table = Table(
        box=SIMPLE_HEAD,
        title_justify="left",
        title=f"components (work at {height}×{width}, 1 MAC = 2 FLOP)",
    )
    table.add_column("component")
    for heading in ("sparsity %", "weights", "nonzero", "dense MMAC", "sparse MMAC"):
        table.add_column(heading, justify="right")
    for name, value in sparsity["components"].items():
        total, zeros = sparsity["component_weights"][name], sparsity["component_zeros"][name]
        part = work["components"][name]
        table.add_row(name, f"{100 * value:.2f}", f"{total:,}", f"{total - zeros:,}", *_mega(part))
    table.add_row(
        "overall",
        f"{100 * sparsity['overall']:.2f}",
        f"{sparsity['weights']:,}",
        f"{sparsity['weights'] - sparsity['zeros']:,}",
        *_mega(work["total"]),
        style="bold",
    )
    return table


def _mega(work: Mapping[str, int]) -> list[str]:
    return [f"{work[key] / 1e6:,.1f}" for key in ("dense_mac", "sparse_mac")]


def _delta_line(delta: Mapping[str, Any]) -> str:
    if delta["overall"] is None:
        return f"Δ: none ({delta['reason']})"
    form = "mean over metrics, Eq. 7" if delta["form"] == "mean" else "sum over metrics"
    return f"Δ overall {delta['overall']:+.2f} % against {delta['reference']} ({form})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def print_evaluation(result: Mapping[str, Any]) -> None:
    """One table per task, Δ, and the overall sparsity."""
    console = _console()
    deltas = result["delta"]["tasks"]
    for task in result["metrics"]:
        console.print(
            _task_table(
                task, {result["split"]: result["metrics"]}, {result["split"]: deltas.get(task)}
            )
        )
    console.print(_delta_line(result["delta"]), highlight=False)
    console.print(f"sparsity {100 * result['sparsity']['overall']:.2f} %", highlight=False)
