"""ONNX: the same outputs in ONNX Runtime, and a helpful word where it is not installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sparsemtl.engine import onnx as exporter
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.sparsity.sparsify import sparsify
from tests.engine.support import randomise

MISSING = [m for m in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(m)]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")


@needs_onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["deeplab-resnet18", "mobilenetv2"])
def test_onnx_runtime_gives_the_models_outputs(tmp_path, name):
    model = randomise(build_model(ModelConfig(name, width=0.1), {"seg": 3, "depth": 1}), 0.8)
    sparsify(model, theta_init=-4.0)
    errors = exporter.export_onnx(model, (1, 3, 33, 47), tmp_path / "folder" / "model.onnx")
    assert list(errors) == ["seg", "depth"]
    assert max(errors.values()) < 1e-4
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.onnx"]


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_a_difference_is_an_error_and_writes_nothing(tmp_path, monkeypatch):
    model = randomise(build_model(ModelConfig("mobilenetv2", width=0.1), {"depth": 1}), 0.0)
    monkeypatch.setattr(exporter, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="in task 'depth'"):
        exporter.export_onnx(model, torch.zeros(1, 3, 33, 33), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not MISSING, reason="everything is installed")
def test_what_is_missing_is_named_with_the_line_that_installs_it(tmp_path):
    model = build_model(ModelConfig("mobilenetv2", width=0.1), {"depth": 1})
    with pytest.raises(ImportError, match=r"pip install 'sparsemtl\[export\]'"):
        exporter.export_onnx(model, (1, 3, 33, 33), tmp_path / "model.onnx")
