"""The numbers of a similarity analysis: tab-separated tables and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsemtl import config as configs
from sparsemtl.cli.similarity_findings import Findings, command_line, pair_values
from sparsemtl.similarity import INDEXINGS, METRICS, WEIGHTS, pairs_of, similarity_matrix


def pair_rows(findings: Findings) -> Iterator[list[Any]]:
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
                    pairs_of(findings.tasks), pair_values(mean), pair_values(std), strict=True
                ):
                    yield [weights, indexing, metric, a, b, f"{m:.6g}", f"{s:.6g}"]


def layer_rows(findings: Findings) -> Iterator[list[Any]]:
    """Per-layer scores, mean over seeds."""
    yield ["metric", "sparsity", "task_a", "task_b", "index", "layer", "score"]
    layers = findings.records[0].layers
    for metric in METRICS:
        mean = np.mean([r.scores[metric] for r in findings.records], axis=0)  # [S, P, L]
        for s, sparsity in enumerate(findings.settings.sparsities):
            for p, (a, b) in enumerate(pairs_of(findings.tasks)):
                for i, layer in enumerate(layers):
                    yield [metric, f"{sparsity:g}", a, b, i, layer, f"{mean[s, p, i]:.6g}"]


def profile_rows(findings: Findings) -> Iterator[list[Any]]:
    """DiSparse's layer-wise analysis, mean over seeds."""
    pairs = [f"{a}/{b}" for a, b in pairs_of(findings.tasks)]
    yield ["index", "layer", "all", *pairs]
    joint = np.mean([r.joint_iou for r in findings.records], axis=0)
    profile = np.mean([r.iou_profile for r in findings.records], axis=0)
    for i, layer in enumerate(findings.records[0].layers):
        yield [i, layer, f"{joint[i]:.6g}", *(f"{v:.6g}" for v in profile[:, i])]


def as_json(findings: Findings) -> dict[str, Any]:
    matrices = {m: findings.matrix(m) for m in findings.options.metrics}
    value: dict[str, Any] = {
        "format": 1,
        "command": command_line(),
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


def tsv(rows: Iterator[list[Any]]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)
