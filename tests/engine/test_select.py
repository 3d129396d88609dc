"""Choosing kernels: what is measured, what is remembered, and what a choice makes of a graph."""

from __future__ import annotations

import json

import pytest
import torch

from sparsemtl.engine import choices, select, time_layer
from sparsemtl.engine.deferred import density
from sparsemtl.engine.executors.dense import DenseExecutor
from sparsemtl.engine.executors.forms import Form
from sparsemtl.engine.executors.native import NativeExecutor
from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.engine.pack import pack_weight, structures_of
from sparsemtl.engine.select import executor_of
from sparsemtl.engine.selection import LayerChoice, Selection, parse_form
from sparsemtl.ops.availability import why_not_native
from tests.engine.native_graphs import Maker, assert_near

WIDER = ("vector(4)", "vector(8)", "vector(16)")

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(time_layer, "ROUNDS", 2)


def small(sparsity: float = 0.9) -> tuple[Maker, str]:
    maker = Maker(1)
    x = maker.input(2, 3, 20, 18)
    h = maker.conv(x, 16, 3, padding=(1, 1), sparsity=sparsity, activation="relu")
    inner = maker.conv(h, 16, 3, padding=(2, 2), dilation=(2, 2), sparsity=sparsity)
    h = maker.conv(inner, 16, 1, residual=h, sparsity=sparsity, activation="relu6")
    a = maker.conv(h, 8, 3, padding=(6, 6), dilation=(6, 6), sparsity=0.95)
    b = maker.conv(h, 8, 3, padding=(6, 6), dilation=(6, 6), sparsity=0.95)
    y = maker.node("add", a, b)
    flat = maker.node("mean", y, dims=(2, 3), keepdim=False)
    weights = {"weight": maker.weight(4, 8), "bias": maker.tensor(4)}
    return maker, maker.node("linear", flat, weights=weights, activation="")


@pytest.mark.parametrize("mode", select.SELECT)
def test_every_mode_gives_torchs_outputs(mode):
    maker, y = small()
    graph = maker.graph(y)
    selection = select.select(graph, mode)
    example = maker.example()
    got = executor_of(graph, selection)(*example)
    for task, expected in TorchExecutor(graph)(*example).items():
        assert_near(got[task], expected)
        assert got[task].is_contiguous()


def test_what_is_measured_is_remembered_by_shape_and_density(monkeypatch):
    maker, y = small()
    graph = maker.graph(y)
    first = select.select(graph)
    assert all(c.candidates and c.choice in c.candidates for c in first.layers.values())
    names = {"conv2d_0", "conv2d_1", "conv2d_2", "conv2d_3", "linear_7"}
    assert set(first.layers) == names | ({"conv2d_4"} if first.apart else set())
    on_disk = json.loads(choices.engine_file().read_text())
    # The two branches are timed merged and each alone, under one entry if they are alike.
    assert sum(len(layers) for layers in on_disk.values()) in (len(names) + 1, len(names) + 2)

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(select, "time_layer", refuse)
    again = select.select(graph)
    assert {n: c.choice for n, c in again.layers.items()} == {
        n: c.choice for n, c in first.layers.items()
    }


def test_a_damaged_file_is_measured_anew():
    choices.engine_file().write_text("{ not json")
    maker, y = small()
    assert select.select(maker.graph(y)).layers


def test_convolutions_stay_apart_where_that_is_faster(monkeypatch):
    maker, y = small()
    graph = maker.graph(y)
    for merged_seconds, apart in ((1.0, ("conv2d_3", "conv2d_4")), (1e-9, ())):

        def times(node, alone, structures, merged_seconds=merged_seconds):
            seconds = merged_seconds if len(node.outputs) > 1 else 1e-6
            return {"element/table/4": seconds, "dense": 2.0}

        monkeypatch.setattr(select, "known_times", lambda key: None)
        monkeypatch.setattr(select, "remember_times", lambda key, found: found)
        monkeypatch.setattr(select, "time_layer", times)
        selection = select.select(graph)
        assert selection.apart == apart
        assert ("conv2d_4" in selection.layers) == bool(apart)
        executor, example = executor_of(graph, selection), maker.example()
        assert len(executor.graph.nodes) == len(graph.nodes) - (not apart)
        assert_near(executor(*example)["t0"], TorchExecutor(graph)(*example)["t0"])


def test_a_selection_survives_a_file():
    maker, y = small()
    graph = maker.graph(y)
    selection = select.select(graph, "sparse")
    again = Selection.from_state(json.loads(json.dumps(selection.state())))
    assert again == selection
    assert isinstance(executor_of(graph, again), NativeExecutor)
    assert isinstance(executor_of(graph, Selection({}, "dense")), DenseExecutor)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"whole": "native"},
        {"whole": "fast", "apart": [], "layers": {}},
        {"whole": "native", "apart": [], "layers": {"a": ["a", 0.5, {}, "element/table/99", ""]}},
        {"whole": "native", "apart": [], "layers": {"a": ["a", 0.5, {}, "blocks/table/4", ""]}},
        {"whole": "native", "apart": [], "layers": {"a": ["a", "x", {}, "dense", ""]}},
        {"whole": "native", "apart": [], "layers": {"a": [1]}},
        {"whole": "native", "apart": [], "layers": 3},
        {"whole": "native", "apart": 3, "layers": {}},
    ],
)
def test_a_state_that_nobody_wrote_is_refused(state):
    with pytest.raises(ValueError, match="Selection: Expected"):
        Selection.from_state(state)


@pytest.mark.parametrize("structure", ["element", "vector(4)", "vector(8)", "vector(16)"])
@pytest.mark.parametrize("mode", ["table", "linear", "direct"])
def test_each_form_gives_the_same(structure, mode):
    maker = Maker(2)
    x = maker.input(2, 24, 13, 15)
    h = maker.conv(x, 20, 3, padding=(3, 3), dilation=(3, 3), sparsity=0.8)
    y = maker.conv(h, 24, 1, residual=x, activation="relu")
    graph = maker.graph(y)
    layers = {
        node.name: LayerChoice(node.name, 0.2, {}, f"{structure}/{mode}/{width}", "")
        for node, width in zip(graph.nodes, (3, 6), strict=True)
    }
    example = maker.example()
    got = executor_of(graph, Selection(layers))(*example)["t0"]
    assert_near(got, TorchExecutor(graph)(*example)["t0"])


def test_one_dense_layer_between_sparse_ones():
    maker, y = small()
    graph = maker.graph(y)
    selection = select.select(graph, "sparse")
    for name in ("conv2d_1", "conv2d_3", "linear_7"):
        old = selection.layers[name]
        selection.layers[name] = LayerChoice(name, old.density, {}, "dense", "")
    executor = executor_of(graph, selection)
    example = maker.example()
    assert_near(executor(*example)["t0"], TorchExecutor(graph)(*example)["t0"])
    assert [native for native, _ in executor.segments] == [True, False, True, False, True, False]
    assert sum(t.what == "torch" for t in executor.profile(*example)) == 3


def test_an_unknown_mode_is_named():
    maker, y = small()
    with pytest.raises(ValueError, match="'fastest'"):
        select.select(maker.graph(y), "fastest")


def test_forms_have_names():
    assert parse_form("vector(8)/direct/3") == ("vector(8)", "direct", 3)
    assert parse_form("dense") is None


def test_structures_are_found_from_zeros():
    weight = torch.zeros(16, 8, 3, 3)
    weight[8:, ::3] = 1.0  # whole vectors of eight channels
    weight[0, 0, 0, 0] = 1.0
    found = structures_of(weight)
    assert found["vector(8)"] == pytest.approx((8 * 3 * 9 + 8) / (8 * 3 * 9 + 1))
    assert set(structures_of(torch.eye(32))) == {"element"}
    assert set(structures_of(torch.zeros(32, 4))) == {"element"}
    odd = torch.ones(2 * 21, 3, 1, 1)  # groups of 21 channels: the last vector has fewer
    assert structures_of(odd, 2) == dict.fromkeys(("element", *WIDER), 1.0)
    odd[20] = 0.0
    odd[5] = 0.0
    found = structures_of(odd, 2)
    assert found["vector(4)"] == pytest.approx(41 / 40)  # channel 20 stands alone
    assert found["vector(16)"] == pytest.approx(42 / 40)
    assert density(torch.zeros(0, 3)) == 0.0
    assert density(weight) == pytest.approx(217 / 1152)


def test_rows_are_shared_out_where_pixels_are_few():
    weight = torch.randn(64, 32, 3, 3)
    form = Form(pack_weight(weight), "table", 4, False)
    assert form.parts(1, 64 * 64) == 1
    assert form.parts(1, 1) == 8  # 64 nonzeros per column, of which each part needs eight
    lists = form.weight.lists(parts=4)
    assert lists.sizes[0] == 4
    assert lists.arrays[0][:, 4].tolist() == [0, 0, 0, 0]
    assert lists.arrays[0][:, 2].tolist() == [0, 16, 32, 48]
    assert lists.sizes[2] == weight.numel()


def test_without_measuring_the_zeros_decide_the_structure():
    maker = Maker(3)
    x = maker.input(1, 8, 9, 9)
    layers = {}
    for structure, rows in (("vector(16)", 0), ("vector(8)", 4), ("element", 32)):
        y = maker.conv(x, 32, 3, padding=(1, 1), sparsity=0.0)
        weight = maker.nodes[-1].weights["weight"]
        if rows > 0:
            live = torch.rand(rows, *weight.shape[1:], generator=maker.random) > 0.8
            weight *= live.repeat_interleave(32 // rows, 0)
        layers[maker.nodes[-1].name] = structure
        x = y
    graph = maker.graph(x)
    selection = select.select(graph, "sparse")
    assert {n: c.choice.split("/")[0] for n, c in selection.layers.items()} == layers
    example = maker.example()
    got = executor_of(graph, selection)(*example)["t0"]
    assert_near(got, TorchExecutor(graph)(*example)["t0"])
