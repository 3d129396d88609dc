"""Saved engines: small, exact, written whole, and read with suspicion."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemtl.engine import codec
from sparsemtl.engine.engine import Engine, compile
from sparsemtl.engine.file import PLAN, WEIGHTS
from sparsemtl.errors import EngineFileError
from sparsemtl.models.config import ModelConfig, build_model
from tests.engine.fuzz_folder import fuzz, make_folder
from tests.engine.networks import Standardised, TwoHeads
from tests.engine.support import assert_close_tasks, expected_of, randomise


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "engine")
    return tmp_path / "engine"


@given(
    st.integers(0, 4000),
    st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 0.9, 1.0]),
    st.integers(0, 99),
)
def test_every_coding_gives_back_the_bits(count, density, seed):
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal(count).astype(np.float32))
    weight[torch.from_numpy(rng.random(count) >= density)] = 0
    coding, parts = codec.encode(weight)
    sizes = {name: (part.dtype, part.numel()) for name, part in parts.items()}
    codec.check(coding, (count,), sizes)
    assert codec.decode(coding, (count,), parts).equal(weight)
    coded = sum(part.numel() * part.element_size() for part in parts.values())
    assert coded <= 4 * count


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 510, 511, 1000])
def test_long_gaps_are_exact(gap):
    weight = torch.zeros(3 * gap + 700)
    weight[[gap, 2 * gap + 1, 3 * gap + 2]] = torch.tensor([1.0, -2.0, 3.0])
    parts = {
        "values": torch.tensor([1.0, -2.0, 3.0]),
        "index": codec._to_gaps(np.flatnonzero(weight.numpy()), weight.numel()),
    }
    assert codec.decode("gaps", tuple(weight.shape), parts).equal(weight)


def test_a_file_cannot_make_much_memory_of_little():
    parts = {"values": (torch.float32, 0), "index": (torch.uint8, 0)}
    with pytest.raises(ValueError, match="Expected gaps parts"):
        codec.check("gaps", (1 << 20, 1 << 10), parts)
    with pytest.raises(ValueError, match="Expected bitmask parts"):
        codec.check("bitmask", (1 << 20,), {**parts, "index": (torch.uint8, 17)})


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.95])
def test_what_is_loaded_computes_the_same_bits(tmp_path, sparsity):
    model = build_model(ModelConfig("mobilenetv2", width=0.1), {"seg": 3, "depth": 1})
    randomise(model, sparsity, dead=0.1)
    engine = compile(model, (1, 3, 33, 47), executor="torch")
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine", executor="torch")
    for shape in ((1, 3, 33, 47), (2, 3, 40, 64)):
        x = torch.randn(shape)
        assert_close_tasks(loaded(x), engine(x), 0.0)
        assert_close_tasks(loaded(x), expected_of(model, x))


def test_bfloat16_halves_the_values(tmp_path):
    model = randomise(build_model(ModelConfig(width=0.2), {"seg": 3}), 0.9)
    engine = compile(model, (1, 3, 33, 33), executor="torch")
    x = torch.randn(1, 3, 33, 33)
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        engine.save(tmp_path / dtype, dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / WEIGHTS).stat().st_size
        loaded = Engine.load(tmp_path / dtype, executor="torch")
        assert_close_tasks(loaded(x), expected_of(model, x), 1e-4 if dtype == "float32" else 0.05)
    nonzeros = sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 4)
    assert sizes["float32"] < 5.6 * nonzeros
    assert sizes["bfloat16"] < 3.6 * nonzeros
    with pytest.raises(ValueError, match="Expected dtype to be one of"):
        engine.save(tmp_path / "other", dtype="int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_keeps_it(tmp_path, dtype):
    model = randomise(TwoHeads(), 0.5).to(dtype)
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    engine = compile(model, x, executor="torch")
    engine.save(tmp_path / "engine")
    assert_close_tasks(Engine.load(tmp_path / "engine")(x), engine(x), 0.0)


def test_guards_survive_the_file(tmp_path):
    model = Standardised()
    compile(model, (2, 3, 6, 6), executor="torch").save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine", executor="torch")
    assert_close_tasks(loaded(x := torch.randn(3, 3, 8, 5)), expected_of(model, x))
    with pytest.raises(ValueError, match="d0_0 != 1"):
        loaded(torch.randn(1, 3, 6, 6))


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch, folder):
    before = (folder / PLAN).read_bytes()
    engine = compile(TwoHeads(), (1, 3, 8, 8), executor="torch")
    with pytest.raises(ValueError, match="new or empty folder"):
        engine.save(folder)
    monkeypatch.setattr("sparsemtl.engine.file._flush", _fail)
    with pytest.raises(OSError, match="disk full"):
        engine.save(folder, overwrite=True)
    assert (folder / PLAN).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    monkeypatch.undo()
    engine.save(folder, overwrite=True)
    assert Engine.load(folder, executor="torch").input_shapes == [(1, 3, 8, 8)]
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder"):
        engine.save(other, overwrite=True)


def _fail(path) -> None:
    raise OSError("disk full")


def _edit(folder, change) -> None:
    whole = json.loads((folder / PLAN).read_bytes())
    change(whole)
    whole["crc32"] = zlib.crc32(json.dumps(whole["plan"], sort_keys=True).encode())
    (folder / PLAN).write_text(json.dumps(whole))


def _node(whole, op):
    return next(node for node in whole["plan"]["nodes"] if node["op"] == op)


EDITS = {
    "version": (lambda w: w.update(version=7), "Expected version 1 of sparsemtl-engine, got '7'"),
    "format": (lambda w: w.update(format="other"), "Expected format"),
    "size-huge": (lambda w: w["plan"]["tensors"][0].update(shape=[1 << 40]), "to be an integer in"),
    "size-large": (lambda w: w["plan"]["tensors"][0].update(shape=[1 << 30]), "parts of a weight"),
    "size-negative": (lambda w: w["plan"]["tensors"][0].update(shape=[-1]), "to be an integer in"),
    "shape-other": (lambda w: w["plan"]["values"][0].__setitem__(1, [2, 4, 16, 20]), "Expected"),
    "value-named-twice": (
        lambda w: w["plan"]["values"].append(w["plan"]["values"][0]),
        "got one twice",
    ),
    "weight-out-of-range": (
        lambda w: _node(w, "conv2d")["weights"].update(weight=99),
        "the number of a weight",
    ),
    "padding-huge": (
        lambda w: _node(w, "conv2d")["attrs"].update(padding=[1 << 20, 1 << 20]),
        "to write",
    ),
    "operator-of-another-library": (
        lambda w: _node(w, "torch")["attrs"].update(target="os::system"),
        "operators that a file may name",
    ),
    "operator-that-reads-files": (
        lambda w: _node(w, "torch")["attrs"].update(target="aten::from_file.default"),
        "operators that a file may name",
    ),
    "operator-that-writes": (
        lambda w: _node(w, "torch")["attrs"].update(target="aten::relu_.default"),
        "operators that a file may name",
    ),
    "order": (lambda w: w["plan"]["nodes"].reverse(), "written before"),
    "guard-that-runs": (
        lambda w: w["plan"]["freedom"].update(guards=["__import__('os')"]),
        "formula",
    ),
    "bias-like-its-kernel": (
        lambda w: _node(w, "conv2d")["weights"].update(
            bias=_node(w, "conv2d")["weights"]["weight"]
        ),
        "that agree",
    ),
    "nesting": (lambda w: _node(w, "conv2d")["attrs"].update(stride=_deep(50)), "attribute"),
}


def _deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(("change", "words"), EDITS.values(), ids=EDITS.keys())
def test_a_changed_field_is_named(folder, change, words):
    _edit(folder, change)
    with pytest.raises(EngineFileError, match=words):
        Engine.load(folder, executor="torch")


def test_what_torch_refuses_only_when_it_computes_is_a_value_error(folder):
    def no_bias_axis(whole):
        node = next(
            n for n in whole["plan"]["nodes"] if "conv_transpose2d" in str(n["attrs"].get("target"))
        )
        whole["plan"]["tensors"][node["weights"]["constant1"]]["shape"] = []

    _edit(folder, no_bias_axis)
    with pytest.raises(ValueError, match="conv_transpose2d"):
        Engine.load(folder, executor="torch")(torch.zeros(2, 3, 16, 20))


def test_other_damage_is_refused(folder, tmp_path):
    with pytest.raises(EngineFileError, match="Expected a folder with"):
        Engine.load(tmp_path / "nowhere", executor="torch")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(EngineFileError, match="checksum of weights"):
        Engine.load(folder, executor="torch")
    (folder / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(EngineFileError, match="bytes, got"):
        Engine.load(folder, executor="torch")
    text = (folder / PLAN).read_text()
    (folder / PLAN).write_text(text.replace("relu", "silu"))
    with pytest.raises(EngineFileError, match="checksum of plan"):
        Engine.load(folder, executor="torch")
    (folder / PLAN).write_text("[" * 100_000)
    with pytest.raises(EngineFileError):
        Engine.load(folder, executor="torch")


@pytest.mark.parametrize("executor", ["torch", "auto"])
def test_mutated_folders_are_refused_or_run(executor):
    outcomes = fuzz(120, seed=1, executor=executor)
    assert sum(outcomes.values()) == 120
    assert outcomes["refused at load"] > 60
    assert outcomes["runs"] + outcomes["runs, and right"] > 5, "what changes nothing must still run"
