"""A run folder: what a training run reads, writes and leaves behind.

config.json      the whole configuration; a run can be repeated or resumed from it
metrics.jsonl    one line per step
times.jsonl      how long steps took, and how sparse the model was
checkpoints/     the last two, for --resume
model/           model.safetensors (dense with zeros, ordinary torch keys) and config.json
summary.json     results
plots/           pictures, where matplotlib is installed
engine/          the compiled model, in the demo
inference.json   what `sparsemtl bench model` measured of it, in the demo
baseline/        the dense twin's own run folder, where one was asked for
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from sparsemtl import config as configs
from sparsemtl.config import RunConfig
from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.errors import CheckpointError
from sparsemtl.methods.single_task import SingleTaskNetworks, split_by_task
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.models.joint import JointClassifier
from sparsemtl.tasks import Task, make_task
from sparsemtl.training.checkpoint import atomic_write, check_same_model, write_json


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def log(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def times(self) -> Path:
        return self.root / "times.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.root / "model" / "model.safetensors"

    @property
    def model_config(self) -> Path:
        return self.root / "model" / "config.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def engine(self) -> Path:
        return self.root / "engine"

    @property
    def inference(self) -> Path:
        return self.root / "inference.json"

    @property
    def baseline(self) -> RunFolder:
        return RunFolder(self.root / "baseline")

    def create(self, config: RunConfig) -> None:
        """Start a new run here.   raises: ValueError if the folder holds anything already."""
        self.check_free()
        write_json(self.config, configs.to_json(config))

    def check_free(self) -> None:
        """raises: ValueError if the folder holds anything already."""
        if self.root.exists() and (not self.root.is_dir() or self._holds_anything()):
            hint = f"; `--resume {self.root}` continues it" if self.config.exists() else ""
            raise ValueError(f"Expected --out to be a new or empty folder, got {self.root}{hint}")

    def _holds_anything(self) -> bool:
        """Whether anything but what a killed write left behind is here."""
        return any(
            not (p.name.startswith(".") and p.name.endswith(".tmp")) for p in self.root.iterdir()
        )

    def load_config(self) -> RunConfig:
        """raises: ValueError if this is no run folder or its config.json is damaged."""
        return configs.from_json(read_json(self.config, "a run folder"))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """raises: ValueError naming the file if it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"Expected {path.parent} to be {what} with {path.name}, got no such file"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}, got damaged text: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(value).__name__}")
    return value


def build_tasks(config: RunConfig, dataset: Any) -> dict[str, Task]:
    """The run's tasks, in its order, for what the data set offers."""
    tasks = {}
    for name in config.tasks:
        spec = dataset.spec.targets[name]
        options = dict(config.task_options.get(name, {}))
        if spec.kind == "normals":
            options["normals_space"] = spec.normals_space
        tasks[name] = make_task(name, spec.kind, spec.channels, **options)
    return tasks


def build_split(config: RunConfig, split: str, *, augmented: bool = False) -> Any:
    """One split of the run's data set, with the run's tasks.   augmented: for training"""
    data = config.data
    if not augmented:
        plain: dict[str, Any] = (
            {"flip": False} if isinstance(data, ScenesConfig) else {"augmentation": "none"}
        )
        data = dataclasses.replace(data, **plain)
    return build_dataset(data, split, list(config.tasks))


def save_model(
    folder: RunFolder, model: nn.Module, config: RunConfig, heads: dict[str, int]
) -> None:
    """Write the finished model: the same weights give the same bytes."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    data = save(tensors, metadata={"format": "pt"})
    atomic_write(folder.weights, lambda file: _write(file, data))
    plain = configs.to_json(config)
    if isinstance(model, JointClassifier):
        plain["model"]["hidden"] = model.hidden_layer().size  # a method may have shrunk it
    write_json(
        folder.model_config,
        {
            "format": 1,
            "model": plain["model"],
            "heads": heads,
            "data": plain["data"],
            "per_task": isinstance(model, SingleTaskNetworks),  # a whole network for each task
        },
    )


def load_model_config(folder: RunFolder) -> tuple[ModelConfig, dict[str, Any]]:
    """The finished model's own config, in which a method may have shrunk a layer; and its file.

    raises: CheckpointError if it describes no model
    """
    saved = read_json(folder.model_config, "a model folder")
    try:
        return configs.rebuild(ModelConfig, saved["model"], "model"), saved
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder.model_config} describes no model: {error!r}") from error


def load_model(folder: RunFolder) -> nn.Module:
    """The finished model of a run, in eval mode.

    raises: ValueError if the run has none yet; CheckpointError if the weights are not its model's
    """
    if not folder.weights.exists():
        raise ValueError(
            f"Expected a finished run in {folder.root} (model/model.safetensors), got none; "
            f"`sparsemtl train --resume {folder.root}` finishes it"
        )
    config, saved = load_model_config(folder)
    try:
        model: nn.Module = build_model(config, saved["heads"])
        if saved.get("per_task"):
            model = split_by_task(model, list(saved["heads"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder.model_config} describes no model: {error!r}") from error
    try:
        tensors: Mapping[str, torch.Tensor] = load_file(folder.weights)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder.weights} is not a readable model: {error}") from error
    check_same_model(folder.weights, model.state_dict(), tensors)
    model.load_state_dict(dict(tensors))
    # As it was trained: the same kernels run, so the same numbers come out.
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _write(file: Any, data: bytes) -> None:
    file.write(data)
