"""Multitask networks and their components."""

from sparsemtl.models.component import (
    Component,
    ComponentMap,
    find_components,
    merge_components,
)
from sparsemtl.models.config import MODELS, ModelConfig, build_model
from sparsemtl.models.heads import ASPPHead
from sparsemtl.models.joint import HiddenLayer, JointClassifier, keep_units
from sparsemtl.models.mtl import MultitaskModel

__all__ = [
    "MODELS",
    "ASPPHead",
    "Component",
    "ComponentMap",
    "HiddenLayer",
    "JointClassifier",
    "ModelConfig",
    "MultitaskModel",
    "build_model",
    "find_components",
    "keep_units",
    "merge_components",
]
