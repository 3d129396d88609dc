"""Writes what a similarity analysis found: Markdown, JSON, tab-separated tables and heat maps."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparsemtl.cli.similarity_findings import (
    LABELS,
    Findings,
    group_text,
    pair_table,
    pair_values,
    signed,
)
from sparsemtl.cli.similarity_markdown import markdown
from sparsemtl.cli.similarity_tables import as_json, layer_rows, pair_rows, profile_rows, tsv
from sparsemtl.similarity import pairs_of
from sparsemtl.similarity.gains import pair_gains, write_gains
from sparsemtl.training.checkpoint import atomic_write, write_json

log = logging.getLogger(__name__)


def write_report(findings: Findings, root: Path, name: str) -> list[Path]:
    """Write every file of the report; returns their paths. Pictures need matplotlib."""
    pictures = _draw(findings, root, name)
    texts = {
        f"{name}.md": "\n".join(markdown(findings, [path.name for path in pictures])) + "\n",
        f"{name}.tsv": tsv(pair_rows(findings)),
        f"{name}_layers.tsv": tsv(layer_rows(findings)),
        f"{name}_iou.tsv": tsv(profile_rows(findings)),
    }
    if findings.gains is not None:
        texts[f"{name}_gains.tsv"] = write_gains(findings.tasks, findings.mean_gains())
    for file, text in texts.items():
        atomic_write(root / file, lambda out, text=text: out.write(text.encode()))  # type: ignore[misc]
    write_json(root / f"{name}.json", as_json(findings))
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
    header, *rows = pair_table(findings)
    for i, cell in enumerate(header):
        table.add_column(cell, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if findings.gains is not None:
        for metric, value in findings.correlations().items():
            console.print(
                f"{LABELS[metric]}: Spearman {signed(value['spearman'])}, Kendall "
                f"{signed(value['kendall'])} with the co-training gains",
                highlight=False,
            )
    for budget, by, grouping in findings.groupings():
        console.print(
            f"{budget} network{'s' * (budget != 1)} by {LABELS.get(by, by)}: "
            f"{group_text(findings.tasks, grouping)}",
            highlight=False,
        )


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
            {m: pair_values(matrix) for m, matrix in matrices.items()},
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
