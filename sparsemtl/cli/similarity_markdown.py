"""The report of a similarity analysis in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sparsemtl.cli.similarity_findings import (
    LABELS,
    Findings,
    command_line,
    group_text,
    pair_table,
    signed,
)
from sparsemtl.measure.environment import machine_line
from sparsemtl.similarity import pairs_of


def markdown(findings: Findings, pictures: Sequence[str]) -> Iterator[str]:
    s, o, config = findings.settings, findings.options, findings.config
    yield "# Task similarity\n"
    yield f"Machine: {machine_line(findings.environment)}.\n"
    yield f"Command, {findings.seconds:.0f} s: `{command_line()}`\n"
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
    yield from _markdown_table(pair_table(findings))
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
        [str(b), LABELS.get(by, by), group_text(findings.tasks, g), f"{g.value:.4g}"]
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
        numbers = [signed(value["spearman"]), signed(value["kendall"])]
        table.append([LABELS[metric], *numbers, order])
    yield from _markdown_table(table)


def _markdown_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    header, *body = rows
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in body:
        yield "| " + " | ".join(row) + " |"
    yield ""
