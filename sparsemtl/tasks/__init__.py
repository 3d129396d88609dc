"""Tasks: loss, metrics, direction of better, constant predictor and colours of one output."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sparsemtl.errors import unknown_choice
from sparsemtl.tasks.base import Task, TaskMetrics
from sparsemtl.tasks.classification import Classification
from sparsemtl.tasks.constant import ConstantPredictor
from sparsemtl.tasks.delta import Delta, delta
from sparsemtl.tasks.depth import Depth
from sparsemtl.tasks.keypoints_edges import Edges, Keypoints
from sparsemtl.tasks.normals import Normals
from sparsemtl.tasks.segmentation import Segmentation

__all__ = [
    "RELEASED",
    "TASKS",
    "Classification",
    "ConstantPredictor",
    "Delta",
    "Depth",
    "Edges",
    "Keypoints",
    "Normals",
    "Segmentation",
    "Task",
    "TaskMetrics",
    "delta",
    "make_task",
]

TASKS: dict[str, type[Task]] = {  # kind → class
    "segmentation": Segmentation,
    "normals": Normals,
    "depth": Depth,
    "keypoints": Keypoints,
    "edges": Edges,
    "classification": Classification,
}

RELEASED: dict[str, dict[str, Any]] = {  # kind → options that measure as the released codes do
    "segmentation": {"resolution": "released", "miou_convention": "released", "pooling": "batches"},
    "normals": {
        "resolution": "released"
    },  # the space is a property of the data, given by its TargetSpec
    "depth": {"resolution": "released", "delta_rule": "released", "pooling": "batches"},
    "keypoints": {"resolution": "released", "pooling": "batches"},
    "edges": {"resolution": "released", "pooling": "batches"},
}


def make_task(name: str, kind: str, channels: int, **options: Any) -> Task:
    """Make the task of one output.

    name:     the output's name, used in errors and reports
    kind:     one of TASKS
    channels: of the prediction: classes for segmentation and classification, 3 for normals, else 1
    options:  fields of the kind's class, such as `miou_convention` or `resolution`
    raises:   ValueError for an unknown kind or value, TypeError for an unknown option
    """
    if kind not in TASKS:
        raise ValueError(f"make_task: {unknown_choice('kind', kind, TASKS)}")
    known = [f.name for f in fields(TASKS[kind]) if f.name not in ("name", "channels")]
    for option in options:
        if option not in known:
            raise TypeError(f"make_task: {unknown_choice(f'option of {kind}', option, known)}")
    return TASKS[kind](name, channels, **options)
