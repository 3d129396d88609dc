"""A run's whole configuration: composed from the rooms' own configs, saved as `config.json`.

Only `cli` imports this file; a room sees its own config and no other. A preset is a function.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsemtl.data import DATASETS, DataConfig, NYUv2Config, ScenesConfig, VehicleXConfig
from sparsemtl.errors import unknown_choice
from sparsemtl.methods import (
    METHODS,
    AdapMTLConfig,
    DenseConfig,
    DistinctivenessConfig,
    MethodConfig,
    method_config_type,
    method_name,
)
from sparsemtl.models.config import ModelConfig
from sparsemtl.tasks.delta import FORMS as DELTA_FORMS
from sparsemtl.training.balance import BalanceConfig
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.state import TrainConfig
from sparsemtl.training.weighting import WeightingConfig

BASELINES = ("none", "dense")
FORMAT = 1


@dataclass(frozen=True)
class RunConfig:
    """data × model × method × training."""

    data: DataConfig
    model: ModelConfig
    method: MethodConfig = field(default_factory=AdapMTLConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tasks: tuple[str, ...] = ("segmentation", "normals", "depth")
    # options of sparsemtl.tasks per task, e.g. {"segmentation": {"miou_convention": "released"}}
    task_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    baseline: str = "none"  # "dense": also train the dense twin; else a run folder, for Δ
    delta_form: str = "mean"  # Eq. 7, or the published tables' "sum"
    start_from: str = ""  # a finished run whose model the weights are taken from
    preset: str = ""  # where it started from, for the record

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("RunConfig: Expected at least one task, got none")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"RunConfig: Expected each task once, got {list(self.tasks)}")
        unknown = [task for task in self.task_options if task not in self.tasks]
        if unknown:
            raise ValueError(
                f"RunConfig: Expected task_options for {list(self.tasks)}, got {unknown}"
            )
        if self.delta_form not in DELTA_FORMS:
            raise ValueError(unknown_choice("delta_form", self.delta_form, DELTA_FORMS))


def demo() -> RunConfig:
    """Procedural rooms and a narrow DeepLab-ResNet18: minutes on two cores."""
    return RunConfig(
        data=ScenesConfig(),
        model=ModelConfig("deeplab-resnet18", width=0.25, dropout=0.1),
        method=AdapMTLConfig(sparsity=0.9),
        train=TrainConfig(
            steps=400,
            batch_size=8,
            seed=0,
            loss_weights={"segmentation": 1.0, "normals": 4.0, "depth": 1.0},
            optim=OptimConfig(lr=2e-3, betas=(0.9, 0.999), schedule="cosine", weight_decay=1e-5),
        ),
        baseline="dense",
        preset="demo",
    )


def quick() -> RunConfig:
    """A comparison of all methods in minutes: small rooms, a narrow network, a short schedule."""
    return RunConfig(
        data=ScenesConfig(height=48, width=64, frames_train=320, frames_test=64),
        # Rates that fit a 6x8 map: at 6 to 24 most taps of a head would only ever meet padding.
        model=ModelConfig("deeplab-resnet18", width=0.125, dropout=0.1, rates=(1, 2, 3, 4)),
        method=AdapMTLConfig(sparsity=0.9),
        train=TrainConfig(
            steps=400,
            batch_size=8,
            loss_weights={"segmentation": 1.0, "normals": 4.0, "depth": 1.0},
            optim=OptimConfig(lr=2e-3, betas=(0.9, 0.999), schedule="cosine", weight_decay=1e-5),
        ),
        preset="quick",
    )


def nyuv2_adapmtl_resnet34() -> RunConfig:
    """AdapMTL's NYUv2 training (App. B, Table 6), 20 000 steps at 321×321."""
    return RunConfig(
        data=NYUv2Config(classes=40),  # as coded; the paper's text says 13 (docs/fidelity.md)
        model=ModelConfig("deeplab-resnet34"),
        method=AdapMTLConfig(sparsity=0.9),
        train=TrainConfig(
            steps=20_000,
            batch_size=16,
            loss_weights={"segmentation": 1.0, "normals": 20.0, "depth": 3.0},
            # All scale with the steps: decay every 4 000, weighting's window 400, warm-up 5 000.
            optim=OptimConfig(lr=1e-3, schedule="step", lr_factor=0.5),
        ),
        preset="nyuv2-adapmtl-resnet34",
    )


def nyuv2_adapmtl_mobilenetv2() -> RunConfig:
    """The same with the MobileNetV2 backbone."""
    return dataclasses.replace(
        nyuv2_adapmtl_resnet34(),
        model=ModelConfig("mobilenetv2"),
        preset="nyuv2-adapmtl-mobilenetv2",
    )


def scenes_distinctiveness() -> RunConfig:
    """The distinctiveness paper's training on the rooms' four classification tasks."""
    return _distinctiveness(
        ScenesConfig(),
        ("dominant_colour", "room_type", "object_count", "camera_pose"),
        ModelConfig("deeplab-resnet18", width=0.25, head="joint"),
        steps=320,  # 20 epochs of 512 rooms
        name="scenes-distinctiveness",
    )


def vehiclex_distinctiveness() -> RunConfig:
    """The same on Vehicle-X: 20 epochs of its 45 438 training pictures, from random weights."""
    return _distinctiveness(
        VehicleXConfig(),
        ("colour", "vehicle_type", "vehicle", "camera"),
        ModelConfig("deeplab-resnet34", head="joint"),
        steps=28_400,
        name="vehiclex-distinctiveness",
    )


def _distinctiveness(
    data: DataConfig, tasks: tuple[str, ...], model: ModelConfig, steps: int, name: str
) -> RunConfig:
    """128 units, θ = 30°, hardest 70 %, PCGrad, Adam 1e-3, L2 5e-3; no plateau schedule yet."""
    optim = OptimConfig(
        lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=5e-3,
        schedule="step",
        lr_factor=0.1,
        lr_every=2 * steps // 3,
    )
    train = TrainConfig(
        steps=steps, batch_size=32, mining=0.7, balance=BalanceConfig("pcgrad"), optim=optim
    )
    return RunConfig(
        data=data,
        model=model,
        method=DistinctivenessConfig(),
        train=train,
        tasks=tasks,
        preset=name,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "quick": quick,
    "nyuv2-adapmtl-resnet34": nyuv2_adapmtl_resnet34,
    "nyuv2-adapmtl-mobilenetv2": nyuv2_adapmtl_mobilenetv2,
    "scenes-distinctiveness": scenes_distinctiveness,
    "vehiclex-distinctiveness": vehiclex_distinctiveness,
}


def preset(name: str) -> RunConfig:
    """A preset by name.   raises: ValueError that lists the presets."""
    if name not in PRESETS:
        raise ValueError(unknown_choice("preset", name, PRESETS))
    return PRESETS[name]()


def with_method(config: RunConfig, name: str) -> RunConfig:
    """The same run with another method; a sparsity target is carried over where both have one."""
    kind = method_config_type(name)
    if isinstance(config.method, kind):
        return config
    target = getattr(config.method, "sparsity", None)
    fields = {f.name for f in dataclasses.fields(kind)}
    method = kind(sparsity=target) if target is not None and "sparsity" in fields else kind()
    return dataclasses.replace(config, method=method)


def dense_twin(config: RunConfig) -> RunConfig:
    """The dense run that Δ compares with: the same data, model, schedule and seed."""
    train = dataclasses.replace(config.train, weighting=WeightingConfig("fixed"))
    return dataclasses.replace(config, method=DenseConfig(), train=train, baseline="none")


def to_json(config: RunConfig) -> dict[str, Any]:
    """Plain values; `from_json` gives the config back."""
    names = {kind: name for name, kind in DATASETS.items()}
    return {
        "format": FORMAT,
        "data": {"name": names[type(config.data)], **_plain(config.data)},
        "method": {"name": method_name(config.method), **_plain(config.method)},
        **{
            f.name: _plain(getattr(config, f.name))
            for f in dataclasses.fields(config)
            if f.name not in ("data", "method")
        },
    }


def from_json(value: Mapping[str, Any]) -> RunConfig:
    """raises: ValueError naming the field that is unknown, missing or of the wrong kind."""
    value = dict(value)
    if value.pop("format", None) != FORMAT:
        raise ValueError(f"config: Expected format {FORMAT}, got another")
    sections = {}
    methods = {name: kind for name, (kind, _) in METHODS.items()}
    for section, kinds in (("data", DATASETS), ("method", methods)):
        if not isinstance(value.get(section), Mapping):
            raise ValueError(f"config: Expected a section {section!r}, got none")
        fields = dict(value.pop(section))
        name = fields.pop("name", None)
        if name not in kinds:
            raise ValueError(unknown_choice(section, name, kinds))
        sections[section] = rebuild(kinds[name], fields, section)
    return RunConfig(**sections, **_arguments(RunConfig, value, "config", skip=("data", "method")))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def rebuild(kind: type[Any], fields: Mapping[str, Any], where: str) -> Any:
    """A config dataclass from plain values.   raises: ValueError naming the field"""
    if not isinstance(fields, Mapping):
        raise ValueError(f"config: Expected {where} to be a section, got {fields!r}")
    return kind(**_arguments(kind, fields, where))


def _arguments(
    kind: type[Any], fields: Mapping[str, Any], where: str, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind) if f.name not in skip]
    for name in fields:
        if name not in known:
            raise ValueError(unknown_choice(f"a field of {where}", name, known))
    return {k: _revive(hints[k], v, f"{where}.{k}") for k, v in fields.items()}


def _revive(hint: Any, value: Any, where: str) -> Any:
    """`value`, as JSON holds it, as the type hint says.   raises: ValueError naming `where`"""
    options = [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = list(typing.get_args(hint))
    for option in options:
        origin, parts = typing.get_origin(option), typing.get_args(option)
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return rebuild(typing.cast("type[Any]", option), value, where)
        if origin is tuple and isinstance(value, (list, tuple)):
            kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
            if len(kinds) == len(value):
                items = zip(kinds, value, strict=True)
                return tuple(_revive(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(items))
        if origin is Mapping and isinstance(value, Mapping):
            return {k: _revive(parts[1], v, f"{where}.{k}") for k, v in value.items()}
        if origin is not None or not isinstance(option, type) or dataclasses.is_dataclass(option):
            continue
        whole_as_float = option is float and isinstance(value, int)
        if isinstance(value, bool) and option is not bool:
            continue
        if isinstance(value, option) or whole_as_float:
            return float(value) if whole_as_float else value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        expected = "a section"
    else:
        expected = getattr(hint, "__name__", None) or str(hint)
    raise ValueError(f"config: Expected {where} to be {expected}, got {value!r}")


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The same run with single fields changed.

    changes: dotted field → value, for example {"train.optim.lr": 1e-4}
    raises:  ValueError naming a field that there is not, or a value of the wrong kind
    """
    plain = to_json(config)
    for path, value in changes.items():
        *sections, last = path.split(".")
        place: Any = plain
        for section in sections:
            if isinstance(place, dict) and place.get(section) is None and section in place:
                place[section] = {}  # an optional section that was left out
            if section == "task_options" or (sections and sections[0] == "task_options"):
                place = place.setdefault(section, {})
                continue
            if not isinstance(place, dict) or section not in place:
                raise ValueError(unknown_choice("a section of the run", section, list(place)))
            place = place[section]
        if not isinstance(place, dict):
            raise ValueError(f"config: Expected {path} to name a field, got a value's field")
        place[last] = value
    return from_json(plain)
