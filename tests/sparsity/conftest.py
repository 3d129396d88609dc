"""A small multitask network for the sparsity tests."""

from __future__ import annotations

import pytest
import torch

from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.models.mtl import MultitaskModel

HEADS = {"segmentation": 5, "normals": 3, "depth": 1}


def make_model(seed: int = 0, width: float = 0.125) -> MultitaskModel:
    torch.manual_seed(seed)
    return build_model(ModelConfig("deeplab-resnet18", width=width, dropout=0.0), HEADS)


@pytest.fixture
def model() -> MultitaskModel:
    return make_model()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 33, 41, generator=torch.Generator().manual_seed(1))
