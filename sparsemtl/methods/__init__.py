"""Pruning methods by name. To add one: a file with its config and class, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsemtl.errors import unknown_choice
from sparsemtl.methods.adapmtl import AdapMTL, AdapMTLConfig
from sparsemtl.methods.base import Method, OwnLoop, StepState
from sparsemtl.methods.dense import Dense, DenseConfig
from sparsemtl.methods.disparse import (
    DiSparsePT,
    DiSparsePTConfig,
    DiSparseStatic,
    DiSparseStaticConfig,
)
from sparsemtl.methods.disparse_dynamic import DiSparseDynamic, DiSparseDynamicConfig
from sparsemtl.methods.distinctiveness import Distinctiveness
from sparsemtl.methods.grasp import GraSP, GraSPConfig
from sparsemtl.methods.imp import IMP, IMPConfig
from sparsemtl.methods.lth import LTH, LTHConfig
from sparsemtl.methods.magnitude import Magnitude, MagnitudeConfig
from sparsemtl.methods.rigl import RigL, RigLConfig
from sparsemtl.methods.single_task import SingleTask, SingleTaskConfig
from sparsemtl.methods.snip import SNIP, SNIPConfig
from sparsemtl.methods.str_ import STR, STRConfig
from sparsemtl.methods.unit_merging import DistinctivenessConfig

METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "dense": (DenseConfig, Dense),
    "single-task": (SingleTaskConfig, SingleTask),
    "magnitude": (MagnitudeConfig, Magnitude),
    "imp": (IMPConfig, IMP),
    "lth": (LTHConfig, LTH),
    "snip": (SNIPConfig, SNIP),
    "grasp": (GraSPConfig, GraSP),
    "str": (STRConfig, STR),
    "disparse-static": (DiSparseStaticConfig, DiSparseStatic),
    "disparse-pt": (DiSparsePTConfig, DiSparsePT),
    "disparse-dynamic": (DiSparseDynamicConfig, DiSparseDynamic),
    "rigl": (RigLConfig, RigL),
    "adapmtl": (AdapMTLConfig, AdapMTL),
    "distinctiveness": (DistinctivenessConfig, Distinctiveness),
}

MethodConfig = (
    DenseConfig
    | SingleTaskConfig
    | MagnitudeConfig
    | IMPConfig
    | LTHConfig
    | SNIPConfig
    | GraSPConfig
    | STRConfig
    | DiSparseStaticConfig
    | DiSparsePTConfig
    | DiSparseDynamicConfig
    | RigLConfig
    | AdapMTLConfig
    | DistinctivenessConfig
)


def method_config_type(name: str) -> type[Any]:
    """The config dataclass of a method.   raises: ValueError that lists the methods."""
    if name not in METHODS:
        raise ValueError(unknown_choice("method", name, METHODS))
    return METHODS[name][0]


def build_method(config: MethodConfig, components: Mapping[str, Any] | None = None) -> Method:
    """The method a config belongs to.   components: map for a user's own network, or None."""
    for config_type, method_type in METHODS.values():
        if type(config) is config_type:
            method: Method = method_type(config, components)
            return method
    raise TypeError(f"build_method: Expected the config of one of {list(METHODS)}, got {config!r}")


def method_name(config: MethodConfig) -> str:
    """The registered name of a method's config."""
    return next(name for name, (kind, _) in METHODS.items() if type(config) is kind)


__all__ = [
    "METHODS",
    "AdapMTL",
    "AdapMTLConfig",
    "Dense",
    "DenseConfig",
    "DiSparseDynamicConfig",
    "DiSparsePTConfig",
    "DiSparseStaticConfig",
    "Distinctiveness",
    "DistinctivenessConfig",
    "GraSPConfig",
    "IMPConfig",
    "LTHConfig",
    "MagnitudeConfig",
    "Method",
    "MethodConfig",
    "OwnLoop",
    "RigLConfig",
    "SNIPConfig",
    "STRConfig",
    "SingleTaskConfig",
    "StepState",
    "build_method",
    "method_config_type",
    "method_name",
]
