"""`sparsemtl bench model`: rows, files and one-line errors."""

from __future__ import annotations

import json

import pytest

from sparsemtl.cli import bench_model, main
from sparsemtl.models import config as models
from sparsemtl.ops.availability import why_not_native

native = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")


@pytest.fixture
def small(monkeypatch):
    make = lambda _, tasks: models.build_model(  # noqa: E731
        models.ModelConfig("deeplab-resnet18", width=0.1), tasks
    )
    monkeypatch.setattr("sparsemtl.measure.pruned.build_model", make)


@native
def test_rows_of_the_engine_and_its_peers(small, tmp_path, capsys):
    out = tmp_path / "model.json"
    arguments = [
        *("--tasks", "depth:1", "--prune", "0.9", "--input", "1,3,33,41", "--batch", "1", "2"),
        *("--against", "torch,torch-bf16,openvino", "--rounds", "3", "--json", str(out)),
    ]
    assert main(["bench", "model", *arguments]) == 0
    found = json.loads(out.read_text())
    assert [(r["batch"], r["candidate"]) for r in found["rows"]] == [
        (batch, name) for batch in (1, 2) for name in ("engine", "torch", "torch-bf16", "openvino")
    ]
    engine, torch_ = found["rows"][:2]
    assert engine["against"] == "torch"
    assert engine["rel_err"] < 1e-4
    assert engine["file_mb"] < torch_["file_mb"] / 3
    assert engine["peak_mb"] > 0
    assert engine["load_s"] > 0
    assert 0 < engine["theoretical_gmac"] < engine["dense_gmac"]
    assert 0 < engine["executed_gmac"] <= engine["dense_gmac"]
    assert found["convention"].startswith("multiply-adds (1 MAC = 2 FLOP)")
    assert "× as fast as the fastest float32 peer, torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "1,3,321"], "Expected --input like 1,3,321,321"),
        (["--input", "1,3,0,321"], "Expected --input like 1,3,321,321"),
        (["--against", "torch,tensorrt"], "a runtime of --against"),
        (["--prune", "1.5"], "Expected --prune in [0, 1)"),
        (["--tasks", "depth"], "Expected --tasks like"),
        (["--model", "resnet"], "Expected --model to be one of"),
        (["--batch", "0"], "Expected --batch and --rounds >= 1, got 0"),
        (["--seconds", "0"], "Expected --seconds > 0, got 0"),
        (["/dev/null/engine"], "Expected a run folder or an engine folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    def measured(*_args, **_kwargs):
        raise AssertionError("measured before the arguments were checked")

    monkeypatch.setattr(bench_model.BenchModel, "_rows", measured)
    assert main(["bench", "model", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[0]
