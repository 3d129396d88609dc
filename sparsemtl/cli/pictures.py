"""Draws a finished run's pictures into its plots/ folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsemtl.cli.run_folder import RunFolder, build_split, build_tasks, load_model
from sparsemtl.config import RunConfig
from sparsemtl.data.base import collate
from sparsemtl.measure.environment import machine_line
from sparsemtl.training.checkpoint import atomic_write

log = logging.getLogger(__name__)

SAMPLES = 4  # rows of the picture grid


def draw(folder: RunFolder, config: RunConfig, summary: Mapping[str, Any]) -> None:
    """Write the pictures; says so if matplotlib is missing."""
    try:
        from sparsemtl.report import plots
    except ImportError:
        log.warning("no pictures: matplotlib is missing (pip install 'sparsemtl[report]')")
        return
    requested = summary["sparsity"]["requested"]
    figures = {
        "curves.png": plots.training_curves(
            read_lines(folder.log), requested, read_lines(folder.baseline.log)
        ),
        "allocation.png": plots.allocation(summary),
        "predictions.png": plots.picture_grid(
            [plots.PictureRow(row) for row in prediction_rows(folder, config)]
        ),
    }
    times = read_lines(folder.times)
    if len({row["sparsity"] for row in times}) > 1:
        note = machine_line()
        figures["step_time.png"] = plots.step_time(times, read_lines(folder.baseline.times), note)
    for name, figure in figures.items():
        atomic_write(
            folder.plots / name,
            lambda file, figure=figure: figure.savefig(file, format="png", dpi=120),  # type: ignore[misc]
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prediction_rows(folder: RunFolder, config: RunConfig) -> list[dict[str, np.ndarray]]:
    """Per test sample: the image, then target and predictions of each task, all uint8 RGB."""
    dataset = build_split(config, "test")
    tasks = build_tasks(config, dataset)
    models: dict[str, nn.Module] = {"predicted": load_model(folder)}
    if folder.baseline.weights.exists():
        models = {"dense": load_model(folder.baseline), "pruned": models["predicted"]}
    places = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).round().astype(int)
    rows = []
    for place in places:
        sample = dataset.sample(int(place))
        image = dataset.rgb(sample.image).permute(1, 2, 0).clamp(0, 1)
        row = {"image": (255 * image).round().to(torch.uint8).numpy()}
        with torch.no_grad():
            outputs = {name: model(collate([sample]).image) for name, model in models.items()}
        for task_name, task in tasks.items():
            target, valid = sample.targets[task_name], sample.valid[task_name]
            limits = None
            if target.is_floating_point() and task.kind != "normals" and bool(valid.any()):
                seen = target[:, valid]
                limits = (float(seen.min()), float(seen.max()))
            row[f"{task_name}\ntarget"] = task.to_picture(target, valid, limits)
            for name, output in outputs.items():
                predicted = nn.functional.interpolate(
                    output[task_name].float(), size=image.shape[:2], mode="nearest-exact"
                )[0]
                row[f"{task_name}\n{name}"] = task.to_picture(predicted, None, limits)
        rows.append(row)
    return rows
