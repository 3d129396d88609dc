"""Writes what a similarity analysis found: Markdown, JSON, tab-separated tables and heat maps."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparsemtl import config as configs
from sparsemtl.config import RunConfig
from sparsemtl.measure.environment import machine_line
from sparsemtl.similarity import (
    INDEXINGS,
    METRICS,
    WEIGHTS,
    SeedRecord,
    SimilarityConfig,
    best_grouping,
    correlate,
    ordering_agreement,
    pairs_of,
    similarity_matrix,
)
from sparsemtl.similarity.gains import pair_gains
from sparsemtl.similarity.grouping import Grouping
from sparsemtl.training.checkpoint import atomic_write, write_json

log = logging.getLogger(__name__)

LABELS = {"epi": "EPI-Sim", "iou": "IoU", "css": "CSS", "mcss": "MCSS"}


@dataclass(frozen=True)
class Options:
    """What is shown of the records."""

    metrics: tuple[str, ...] = METRICS
    layer_weights: str = "equal"
    indexing: str = "layer"
    aggregate: str = "mean"
    grouping_budget: int | None = None


@dataclass(frozen=True)
class Findings:
    """Records and gains of one analysis, and everything the report says about them.

    gains: [seeds, T, T] directed, percent, or None
    """

    records: Sequence[SeedRecord]
    settings: SimilarityConfig
    options: Options
    gains: np.ndarray | None
    measured: bool
    gain_steps: int
    gain_seeds: tuple[int, ...]
    config: RunConfig
    seconds: float
    environment: dict[str, Any]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.records[0].tasks

    def matrix(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean over sparsities and seeds, deviation over seeds; [T, T] each."""
        o = self.options
        return similarity_matrix(self.records, metric, o.layer_weights, o.indexing, o.aggregate)

    def mean_gains(self) -> np.ndarray:
        """[T, T], over the seeds of the trainings."""
        assert self.gains is not None
        return np.asarray(self.gains.mean(axis=0))

    def correlations(self) -> dict[str, dict[str, Any]]:
        """Metric → how its order of the pairs agrees with that of the gains."""
        gains, found = self.mean_gains(), {}
        for metric in self.options.metrics:
            matrix = self.matrix(metric)[0]
            agree, total = ordering_agreement(matrix, gains)
            found[metric] = {
                **correlate(_upper(matrix), pair_gains(gains)),
                "ordering_agree": agree,
                "ordering_total": total,
            }
        return found

    def groupings(self) -> list[tuple[int, str, Grouping]]:
        """(budget, by what, grouping) for each metric and, where known, the gains."""
        budgets = [self.options.grouping_budget or 0]
        if self.options.grouping_budget is None:
            budgets = list(range(1, len(self.tasks)))
        found = []
        for budget in budgets:
            for metric in self.options.metrics:
                found.append((budget, metric, best_grouping(self.matrix(metric)[0], budget, 1.0)))
            if self.gains is not None:
                found.append((budget, "gains", best_grouping(self.mean_gains(), budget, 0.0)))
        return found


def write_report(findings: Findings, root: Path, name: str) -> list[Path]:
    """Write every file of the report; returns their paths. Pictures need matplotlib."""
    pictures = _draw(findings, root, name)
    texts = {
        f"{name}.md": "\n".join(_markdown(findings, [path.name for path in pictures])) + "\n",
        f"{name}.tsv": _tsv(_pair_rows(findings)),
        f"{name}_layers.tsv": _tsv(_layer_rows(findings)),
        f"{name}_iou.tsv": _tsv(_profile_rows(findings)),
    }
    for file, text in texts.items():
        atomic_write(root / file, lambda out, text=text: out.write(text.encode()))  # type: ignore[misc]
    write_json(root / f"{name}.json", _json(findings))
    return [*(root / file for file in texts), root / f"{name}.json", *pictures]


def print_findings(findings: Findings) -> None:
    """The pairs, and the groupings, on the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    o = findings.options
    table = Table(
        box=SIMPLE_HEAD,
        title_justify="left",
        title=f"similarity, layer weights {o.layer_weights} (mean ± std over "
        f"{len(findings.records)} seeds)",
    )
    header, *rows = _pair_table(findings)
    for i, cell in enumerate(header):
        table.add_column(cell, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if findings.gains is not None:
        for metric, value in findings.correlations().items():
            console.print(
                f"{LABELS[metric]}: Spearman {_signed(value['spearman'])}, Kendall "
                f"{_signed(value['kendall'])} with the co-training gains",
                highlight=False,
            )
    for budget, by, grouping in findings.groupings():
        console.print(
            f"{budget} network{'s' * (budget != 1)} by {LABELS.get(by, by)}: "
            f"{_group_text(findings.tasks, grouping)}",
            highlight=False,
        )


def _markdown(findings: Findings, pictures: Sequence[str]) -> Iterator[str]:
    s, o, config = findings.settings, findings.options, findings.config
    yield "# Task similarity\n"
    yield f"Machine: {machine_line(findings.environment)}.\n"
    yield f"Command, {findings.seconds:.0f} s: `{_command()}`\n"
    yield (
        f"{len(findings.tasks)} tasks on {type(config.data).__name__.removesuffix('Config')}, "
        f"{config.model.name} at width {config.model.width:g}; "
        f"{len(s.seeds)} seeds × {len(s.sparsities)} sparsities "
        f"({', '.join(f'{x:g}' for x in s.sparsities)}), {s.batches} batches of {s.batch_size}; "
        f"{len(findings.records[0].layers)} backbone layers, weights {o.layer_weights}"
        + (f" (indexing by {o.indexing})" if "sparsity" in o.layer_weights else "")
        + f", average {o.aggregate}.\n"
    )
    yield "## Pairs\n"
    yield "Mean ± standard deviation over seeds.\n"
    yield from _markdown_table(_pair_table(findings))
    for picture in pictures:
        yield f"![{Path(picture).stem}]({picture})\n"
    if findings.gains is not None:
        yield from _gains_part(findings)
    yield "## Groupings\n"
    yield (
        "The best partition under a budget of networks. By similarity, a task alone counts 1; by "
        "gains, 0.\n"
    )
    rows = [
        [str(b), LABELS.get(by, by), _group_text(findings.tasks, g), f"{g.value:.4g}"]
        for b, by, g in findings.groupings()
    ]
    yield from _markdown_table([["networks", "by", "groups", "value"], *rows])
    yield "## Layer-wise IoU of the masks\n"
    yield (
        f"DiSparse's analysis at keep ratio {s.iou_keep:g}, mean over seeds: all tasks' "
        f"intersection over their union.\n"
    )
    joint = np.mean([r.joint_iou for r in findings.records], axis=0)
    layers = findings.records[0].layers
    rows = [[layer, f"{v:.3f}"] for layer, v in zip(layers, joint, strict=True)]
    yield from _markdown_table([["layer", "IoU of all tasks"], *rows])


def _gains_part(findings: Findings) -> Iterator[str]:
    gains, tasks = findings.mean_gains(), findings.tasks
    yield "## Co-training gains\n"
    if findings.measured:
        yield (
            f"Measured: every task alone and every pair trained dense for {findings.gain_steps} "
            f"steps (seeds {', '.join(map(str, findings.gain_seeds))}), evaluated on the "
            "validation split. Gain of the row's task from sharing with the column's: mean "
            "relative change of its metrics, percent, positive is better.\n"
        )
    header = ["", *tasks]
    rows = [
        [task, *("" if i == j else f"{gains[i, j]:+.2f}" for j in range(len(tasks)))]
        for i, task in enumerate(tasks)
    ]
    yield from _markdown_table([header, *rows])
    assert findings.gains is not None
    if len(findings.gains) > 1:
        spread = np.nanmean(findings.gains.std(axis=0, ddof=1))
        yield (
            f"Over {len(findings.gains)} seeds a single entry's standard deviation is "
            f"{spread:.2f} on average.\n"
        )
    yield (
        f"Rank correlation of similarity with the pair's gain (mean of both directions), "
        f"{len(pairs_of(tasks))} pairs; order: of all cases sim(A, B) ≠ sim(A, C), how many have "
        "A gain more from the more similar task.\n"
    )
    table = [["metric", "Spearman", "Kendall τ-b", "order"]]
    for metric, value in findings.correlations().items():
        order = f"{value['ordering_agree']} of {value['ordering_total']}"
        numbers = [_signed(value["spearman"]), _signed(value["kendall"])]
        table.append([LABELS[metric], *numbers, order])
    yield from _markdown_table(table)


def _pair_table(findings: Findings) -> list[list[str]]:
    columns = {m: findings.matrix(m) for m in findings.options.metrics}
    header = ["pair", *(LABELS[m] for m in columns)]
    if findings.gains is not None:
        header.append("gain %")
    rows = [header]
    upper = {m: (_upper(mean), _upper(std)) for m, (mean, std) in columns.items()}
    gains = pair_gains(findings.mean_gains()) if findings.gains is not None else None
    for p, (a, b) in enumerate(pairs_of(findings.tasks)):
        row = [f"{a} / {b}", *(f"{mean[p]:.3f} ± {std[p]:.3f}" for mean, std in upper.values())]
        rows.append(row if gains is None else [*row, f"{gains[p]:+.2f}"])
    return rows


def _pair_rows(findings: Findings) -> Iterator[list[Any]]:
    """Every weighting and metric, as json2tab made of the released scores."""
    yield ["layer_weights", "indexing", "metric", "task_a", "task_b", "mean", "std"]
    narrow = any(np.isnan(r.filter_sparsity).any() for r in findings.records)
    for weights in WEIGHTS:
        for indexing in INDEXINGS if "sparsity" in weights else INDEXINGS[:1]:
            if indexing == "filter" and narrow:
                continue  # a layer has fewer filters than its number: not defined
            for metric in METRICS:
                mean, std = similarity_matrix(
                    findings.records, metric, weights, indexing, findings.options.aggregate
                )
                for (a, b), m, s in zip(
                    pairs_of(findings.tasks), _upper(mean), _upper(std), strict=True
                ):
                    yield [weights, indexing, metric, a, b, f"{m:.6g}", f"{s:.6g}"]


def _layer_rows(findings: Findings) -> Iterator[list[Any]]:
    """Per-layer scores, mean over seeds."""
    yield ["metric", "sparsity", "task_a", "task_b", "index", "layer", "score"]
    layers = findings.records[0].layers
    for metric in METRICS:
        mean = np.mean([r.scores[metric] for r in findings.records], axis=0)  # [S, P, L]
        for s, sparsity in enumerate(findings.settings.sparsities):
            for p, (a, b) in enumerate(pairs_of(findings.tasks)):
                for i, layer in enumerate(layers):
                    yield [metric, f"{sparsity:g}", a, b, i, layer, f"{mean[s, p, i]:.6g}"]


def _profile_rows(findings: Findings) -> Iterator[list[Any]]:
    """DiSparse's layer-wise analysis, mean over seeds."""
    pairs = [f"{a}/{b}" for a, b in pairs_of(findings.tasks)]
    yield ["index", "layer", "all", *pairs]
    joint = np.mean([r.joint_iou for r in findings.records], axis=0)
    profile = np.mean([r.iou_profile for r in findings.records], axis=0)
    for i, layer in enumerate(findings.records[0].layers):
        yield [i, layer, f"{joint[i]:.6g}", *(f"{v:.6g}" for v in profile[:, i])]


def _json(findings: Findings) -> dict[str, Any]:
    matrices = {m: findings.matrix(m) for m in findings.options.metrics}
    value: dict[str, Any] = {
        "format": 1,
        "command": _command(),
        "environment": findings.environment,
        "seconds": round(findings.seconds, 1),
        "tasks": list(findings.tasks),
        "settings": dataclasses.asdict(findings.settings),
        "options": dataclasses.asdict(findings.options),
        "data": configs.to_json(findings.config)["data"],
        "model": configs.to_json(findings.config)["model"],
        "similarity": {
            m: {"mean": mean.tolist(), "std": std.tolist()} for m, (mean, std) in matrices.items()
        },
        "groupings": [
            {
                "budget": budget,
                "by": by,
                "groups": [[findings.tasks[t] for t in group] for group in g.groups],
                "value": g.value,
                "exhaustive": g.exhaustive,
            }
            for budget, by, g in findings.groupings()
        ],
        "layers": list(findings.records[0].layers),
        "joint_iou": np.mean([r.joint_iou for r in findings.records], axis=0).tolist(),
    }
    if findings.gains is not None:
        value["gains"] = {
            "measured": findings.measured,
            "steps": findings.gain_steps if findings.measured else None,
            "seeds": list(findings.gain_seeds) if findings.measured else None,
            "per_seed": findings.gains.tolist(),
            "mean": findings.mean_gains().tolist(),
            "correlations": findings.correlations(),
        }
    return value


def _draw(findings: Findings, root: Path, name: str) -> list[Path]:
    try:
        from sparsemtl.report import similarity_plots as plots
    except ImportError:
        log.warning("no pictures: matplotlib is missing (pip install 'sparsemtl[report]')")
        return []
    tasks, pairs = findings.tasks, [f"{a}/{b}" for a, b in pairs_of(findings.tasks)]
    matrices = {m: findings.matrix(m)[0] for m in findings.options.metrics}
    layers = {
        m: np.mean([r.scores[m].mean(axis=0) for r in findings.records], axis=0)
        for m in findings.options.metrics
    }
    figures = {
        "tasks": plots.task_heatmaps(tasks, matrices),
        "layers": plots.layer_heatmaps(pairs, findings.records[0].layers, layers),
    }
    if findings.gains is not None:
        figures["gains"] = plots.gain_figure(
            tasks,
            findings.mean_gains(),
            pairs,
            {m: _upper(matrix) for m, matrix in matrices.items()},
            pair_gains(findings.mean_gains()),
            findings.correlations(),
        )
    written = []
    for part, figure in figures.items():
        path = root / f"{name}_{part}.png"
        atomic_write(
            path,
            lambda file, figure=figure: figure.savefig(file, format="png", dpi=130),  # type: ignore[misc]
        )
        written.append(path)
    return written


def _upper(matrix: np.ndarray) -> list[float]:
    """The pairs' values, in the order of `pairs_of`."""
    return [float(v) for v in matrix[np.triu_indices(len(matrix), 1)]]


def _group_text(tasks: Sequence[str], grouping: Grouping) -> str:
    return " · ".join("{" + ", ".join(tasks[t] for t in group) + "}" for group in grouping.groups)


def _markdown_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    header, *body = rows
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in body:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _tsv(rows: Iterator[list[Any]]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def _command() -> str:
    return shlex.join(["sparsemtl", *sys.argv[1:]])
