"""Weights that are decoded when they are wanted, and choices that a folder keeps."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch

from sparsemtl.engine import choices, codec, select
from sparsemtl.engine.deferred import cut, defer, density, from_coded, joined, live, values
from sparsemtl.engine.engine import Engine, compile
from sparsemtl.engine.file import PLAN
from sparsemtl.errors import EngineFileError
from sparsemtl.ops.availability import why_not_native
from tests.engine.native_graphs import Maker
from tests.engine.networks import TwoHeads
from tests.engine.support import assert_close_tasks, randomise

SHAPE = (1, 3, 16, 20)
native = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")


def sparse(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 5, 3, 3, generator=generator)
    return weight * (torch.rand(weight.shape, generator=generator) < 0.2)


def deferred(weight: torch.Tensor) -> torch.Tensor:
    coding, parts = codec.encode(weight)
    found = from_coded(coding, tuple(weight.shape), parts, weight.dtype)
    assert found.is_meta
    return found


def test_a_deferred_weight_has_its_shape_and_comes_by_its_values():
    weight = sparse(7, 0)
    late = deferred(weight)
    assert late.shape == weight.shape
    assert late.dtype == weight.dtype
    assert live(late) == int((weight != 0).sum())
    assert density(late) == density(weight)
    torch.testing.assert_close(values(late), weight, rtol=0, atol=0)
    torch.testing.assert_close(values(weight), weight, rtol=0, atol=0)


def test_cutting_and_joining_stay_deferred():
    a, b = sparse(4, 1), sparse(3, 2)
    place = (slice(None), slice(None), slice(1, 3), slice(0, 2))
    both = joined([deferred(a), b])
    assert both.is_meta
    assert live(both) == int((a != 0).sum() + (b != 0).sum())
    torch.testing.assert_close(values(both), torch.cat([a, b]), rtol=0, atol=0)
    torch.testing.assert_close(values(cut(both, place)), torch.cat([a, b])[place], rtol=0, atol=0)
    assert live(cut(both, place)) == int((torch.cat([a, b])[place] != 0).sum())
    assert not joined([a, b]).is_meta


def test_a_shared_weight_stays_shared_and_a_full_one_as_it_is():
    maker = Maker(0)
    x = maker.input(1, 8, 6, 6)
    maker.conv(maker.conv(x, 8, 3, sparsity=0.9), 8, 3, sparsity=0.0)
    graph = maker.graph(maker.nodes[-1].output)
    graph.nodes[1].weights = dict(graph.nodes[0].weights)
    found = defer(graph)
    assert found.nodes[0].weights["weight"] is found.nodes[1].weights["weight"]
    assert found.nodes[0].weights["weight"].is_meta
    assert not graph.nodes[0].weights["weight"].is_meta
    full = torch.ones(3, 4)
    graph.nodes[0].weights = {"weight": full}
    assert defer(graph).nodes[0].weights["weight"] is full


@pytest.mark.parametrize("coding", ["bitmask", "gaps"])
def test_places_are_checked_without_the_weight(coding):
    shape, places = (5, 7), np.array([0, 3, 20, 34])
    index = codec._to_bits(places, 35) if coding == "bitmask" else codec._to_gaps(places, 35)
    good = {"values": torch.ones(4), "index": index}
    codec.check_places(coding, shape, good)
    with pytest.raises(ValueError, match="places of a weight"):
        codec.check_places(coding, shape, {**good, "values": torch.ones(3)})
    worse = index.clone()
    worse[-1] = 0x80 if coding == "bitmask" else 250
    with pytest.raises(ValueError, match=r"beyond|below"):
        codec.check_places(coding, shape, {**good, "index": worse})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "_known", {})
    compile(randomise(TwoHeads(), 0.8), SHAPE, executor="native").save(tmp_path / "engine")
    return tmp_path / "engine"


def refuse(*_):
    raise AssertionError("timed again")


@native
def test_a_loaded_engine_times_nothing_again_on_the_same_machine(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(select, "time_layer", refuse)
    engine = Engine.load(folder)
    found = engine.explain()
    assert "of the engine's file" in found.chosen
    assert found.chosen in str(found)
    x = torch.randn(SHAPE)
    assert_close_tasks(engine(x), Engine.load(folder, executor="torch")(x))
    with pytest.raises(AssertionError, match="timed again"):
        engine.plan((2, *SHAPE[1:]))  # a size that the folder does not know


@native
def test_another_machine_times_for_itself_and_says_so(folder, monkeypatch):
    monkeypatch.setattr("sparsemtl.engine.engine.machine", lambda: "another machine")
    found = Engine.load(folder).explain()
    assert "timed here (another machine)" in found.chosen
    assert "the engine's file has those of" in found.chosen


@native
def test_both_machines_choices_are_saved(folder, tmp_path, monkeypatch):
    engine = Engine.load(folder)
    monkeypatch.setattr("sparsemtl.engine.engine.machine", lambda: "another machine")
    engine.plan(SHAPE)
    engine.save(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / PLAN).read_text())["plan"]["choices"]
    assert len(kept) == 2
    assert {item["machine"] for item in kept} > {"another machine"}


def edit(folder, change):
    whole = json.loads((folder / PLAN).read_text())
    change(whole["plan"]["choices"])
    whole["crc32"] = zlib.crc32(json.dumps(whole["plan"], sort_keys=True).encode())
    (folder / PLAN).write_text(json.dumps(whole, sort_keys=True))


@native
def test_choices_that_miss_a_layer_are_made_anew(folder):
    def lose_one(kept):
        kept[0]["selection"]["whole"] = "native"
        kept[0]["selection"]["layers"].popitem()

    edit(folder, lose_one)
    assert "timed here" in Engine.load(folder).explain().chosen


@native
@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.append(3),
        lambda kept: kept.extend(kept * 65),
        lambda kept: kept[0].update(inputs=[["a"]]),
        lambda kept: kept[0].update(machine=3),
        lambda kept: kept[0].update(selection=[]),
        lambda kept: kept[0]["selection"].update(whole="fast"),
        lambda kept: kept[0]["selection"]["layers"].update(
            x=["x", 0.5, {}, "element/table/99", ""]
        ),
        lambda kept: kept[0]["selection"]["layers"].update(x=["x", 7, {}, "dense", ""]),
        lambda kept: kept[0]["selection"]["layers"].update(
            x=["x", 0.5, {"dense": -1}, "dense", ""]
        ),
    ],
)
def test_choices_that_nobody_wrote_are_refused(folder, change):
    edit(folder, change)
    with pytest.raises(EngineFileError, match="Expected"):
        Engine.load(folder)


def test_names_that_stand_twice_are_refused(folder):
    text = (folder / PLAN).read_text()
    (folder / PLAN).write_text(text.replace('"nodes": ', '"nodes": [], "nodes": ', 1))
    with pytest.raises(EngineFileError, match="once in an object"):
        Engine.load(folder)


def test_both_files_can_be_read_by_whoever_can_read_one(folder):
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1
