"""The engine as a user meets it: equal outputs, bad input refused, plans kept and dropped."""

from __future__ import annotations

import os
import random
import threading
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sparsemtl
from sparsemtl.engine.engine import Engine
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops.dispatch import BackendUnavailable
from sparsemtl.sparsity.sparsify import sparsify
from tests.engine.networks import Standardised, TimmStyle, TwoHeads
from tests.engine.support import assert_close_tasks, expected_of, randomise

# Capturing takes torch two to four seconds a network; the promise is checked with 36 of them.
CONFIGURATIONS = int(os.environ.get("SPARSEMTL_TEST_CONFIGURATIONS", "9"))
TASKS = {"segmentation": 7, "normals": 3, "depth": 1, "edges": 1}


def prune(model: nn.Module, structure: str, sparsity: float, seed: int) -> None:
    """Zero whole groups of weights at random: single ones, vectors of output channels, filters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            rows, *rest = module.weight.shape
            if structure == "channel":
                mask = torch.rand(rows, 1, 1, 1, generator=generator) >= sparsity
            elif structure == "vector":
                mask = torch.rand(-(-rows // 8), *rest, generator=generator) >= sparsity
                mask = mask.repeat_interleave(8, 0)[:rows]
            else:
                mask = torch.rand(module.weight.shape, generator=generator) >= sparsity
            with torch.no_grad():
                module.weight.mul_(mask)


def configuration(place: int):
    rng = random.Random(place)
    name = ("deeplab-resnet18", "mobilenetv2", "deeplab-resnet34")[place % 3]
    tasks = dict(rng.sample(sorted(TASKS.items()), rng.randint(1, 3)))
    shape = (rng.randint(1, 4), 3, rng.randint(9, 75), rng.randint(9, 75))
    sparsity = rng.choice((0.0, 0.3, 0.7, 0.9, 0.99))
    structure = ("element", "vector", "channel")[rng.randrange(3)]
    return ModelConfig(name, width=rng.choice((0.05, 0.1, 0.15))), tasks, shape, sparsity, structure


@pytest.mark.parametrize("place", range(CONFIGURATIONS))
def test_random_configurations_equal_torch(place):
    config, tasks, shape, sparsity, structure = configuration(place)
    torch.manual_seed(place)
    model = randomise(build_model(config, tasks), 0.0, seed=place)
    prune(model, structure, sparsity, place)
    engine = sparsemtl.compile(model, shape, executor="sparse")
    on_device = Engine(engine.graph, executor="device")
    for size in (shape, (shape[0] + 1, 3, shape[3], shape[2])):
        x = torch.randn(size)
        expected = expected_of(model, x)
        assert all(bool(value.isfinite().all()) for value in expected.values())
        assert_close_tasks(engine(x), expected)
        assert_close_tasks(on_device(x), expected)


@pytest.mark.parametrize("network", [TwoHeads, TimmStyle, Standardised])
def test_a_network_of_anyones_compiles_with_no_registration(network):
    model = randomise(network(), 0.5)
    x = torch.randn(2, 3, 18, 25)
    engine = sparsemtl.compile(model, x)
    assert_close_tasks(engine(x), expected_of(model, x))


def test_explain_names_every_operator_that_torch_runs():
    engine = sparsemtl.compile(TwoHeads(), (1, 3, 16, 16))
    found = engine.explain()
    for operator in ("aten::gelu.default", "aten::conv_transpose2d.input", "aten::log_softmax.int"):
        assert operator in found.through_torch
        assert operator in str(found).splitlines()[-1]
    names = [row.layer for row in found.rows]
    assert len(names) == len(set(names)) == len(engine.plan((1, 3, 16, 16)).graph.nodes)
    assert all(row.runs_as and row.because for row in found.rows)
    assert found.to_json()["layers"][0]["output"] == [1, 8, 8, 8]


def test_densities_are_those_of_the_layers():
    model = randomise(build_model(ModelConfig(width=0.1), {"depth": 1}), 0.8)
    rows = sparsemtl.compile(model, (1, 3, 33, 33), executor="sparse").explain().rows
    densities = [row.density for row in rows if row.density is not None]
    assert len(densities) > 30
    assert abs(sum(densities) / len(densities) - 0.2) < 0.05
    assert {row.density for row in rows if row.op == "max_pool2d"} == {None}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return sparsemtl.compile(TwoHeads(), (2, 3, 16, 16))


WRONG = {
    "channels": (torch.zeros(2, 4, 16, 16), ValueError, r"3 channels.*got \[2, 4, 16, 16\]"),
    "dimensions": (torch.zeros(3, 16, 16), ValueError, r"4 dimensions.*got \[3, 16, 16\]"),
    "dtype": (torch.zeros(2, 3, 16, 16).double(), TypeError, "float32, got torch.float64"),
    "integers": (torch.zeros(2, 3, 16, 16).byte(), TypeError, "float32, got torch.uint8"),
    "device": (torch.zeros(2, 3, 16, 16, device="meta"), ValueError, "on cpu, got meta"),
    "no-tensor": ([[1.0]], TypeError, "to be a tensor, got list"),
    "empty": (torch.zeros(0, 3, 16, 16), ValueError, "size 1 to any in dimension 0"),
}


@pytest.mark.parametrize(("x", "error", "words"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_refused_before_anything_runs(engine, x, error, words):
    with pytest.raises(error, match=words):
        engine(x)


def test_the_number_of_inputs_is_checked(engine):
    with pytest.raises(TypeError, match="Expected 1 inputs"):
        engine(torch.zeros(2, 3, 16, 16), torch.zeros(1))


def test_bad_arguments_of_compile_are_named():
    with pytest.raises(TypeError, match="to be a module, got int"):
        sparsemtl.compile(3, (1, 3, 8, 8))
    with pytest.raises(TypeError, match="tensor, tensors or a shape"):
        sparsemtl.compile(TwoHeads(), "image")
    with pytest.raises(ValueError, match="executor to be one of"):
        sparsemtl.compile(TwoHeads(), (1, 3, 8, 8), executor="cud")
    with pytest.raises(ValueError, match="most_plans"):
        sparsemtl.compile(TwoHeads(), (1, 3, 8, 8), most_plans=0)


def test_a_measured_engine_says_what_it_measured():
    model = randomise(TwoHeads(), 0.9)
    engine = sparsemtl.compile(model, (1, 3, 24, 24), executor="native")
    first = engine.explain().rows[0]
    assert {"dense"} < set(first.candidates)
    assert all(seconds > 0 for seconds in first.candidates.values())
    x = torch.randn(1, 3, 24, 24)
    assert_close_tasks(engine(x), expected_of(model, x))


def test_what_an_engine_returns_may_be_changed():
    engine = sparsemtl.compile(TwoHeads(), (1, 3, 16, 16), executor="sparse")
    found = engine(torch.randn(1, 3, 16, 16))
    found["depth"].mul_(2)
    assert not found["depth"].is_inference()


def test_native_by_name_never_falls_back():
    with pytest.raises(BackendUnavailable, match="not float32"):
        sparsemtl.compile(TwoHeads().double(), torch.zeros(1, 3, 8, 8).double(), executor="native")


def test_a_plan_for_each_size_and_no_more_than_asked_for():
    engine = sparsemtl.compile(TwoHeads(), (1, 3, 16, 16), most_plans=2)
    first = engine.plan((1, 3, 16, 16))
    assert engine.plan((1, 3, 16, 16)) is first
    engine.plan((1, 3, 8, 8))
    assert engine.plan((1, 3, 16, 16)) is first
    engine.plan((2, 3, 8, 8))  # the second goes, as the least recently used
    assert engine.plan((1, 3, 16, 16)) is first
    engine.plan((3, 3, 8, 8))
    engine.plan((4, 3, 8, 8))
    assert engine.plan((1, 3, 16, 16)) is not first


def test_an_engine_keeps_the_weights_coded_between_plans():
    model = randomise(build_model(ModelConfig(width=0.15), {"depth": 1}), 0.9)
    engine = sparsemtl.compile(model, (1, 3, 33, 33), executor="sparse")
    weights = [w for node in engine.graph.nodes for w in node.weights.values()]
    assert all(w.is_meta for w in weights if w.numel() > 4096)
    plan = engine.plan((1, 3, 33, 33))
    assert not any(node.weights for _, part in plan.executor._run.segments for node in part.nodes)
    for shape in ((1, 3, 33, 33), (2, 3, 40, 33)):
        x = torch.randn(shape)
        assert_close_tasks(engine(x), expected_of(model, x))


@dataclass
class Answers:
    depth: torch.Tensor
    features: tuple[torch.Tensor, torch.Tensor]
    aux: torch.Tensor | None = None


Pair = namedtuple("Pair", ["low", "high"])
SHAPES_OF_ANSWERS = {
    "dataclass": (
        lambda y: Answers(y, (y + 1, 2 * y)),
        lambda y: {"depth": y, "features.0": y + 1, "features.1": 2 * y},
    ),
    "named": (lambda y: Pair(y, -y), lambda y: {"low": y, "high": -y}),
    "list": (lambda y: [y, y * y], lambda y: {"output0": y, "output1": y * y}),
    "nested": (lambda y: {"a": {"b": [y, 3 * y]}}, lambda y: {"a.b.0": y, "a.b.1": 3 * y}),
    "tensor": (lambda y: y, lambda y: {"output": y}),
}


@pytest.mark.parametrize("kind", SHAPES_OF_ANSWERS)
def test_answers_in_other_forms_than_a_dict(kind):
    answer, flat = SHAPES_OF_ANSWERS[kind]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return answer(self.conv(x))

    model, x = Model(), torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        expected = flat(model.conv(x))
    assert_close_tasks(sparsemtl.compile(model, x, executor="sparse")(x), expected)
    assert "forward" not in vars(model)


def test_several_engines_and_callers_at_once():
    models = [randomise(TwoHeads(), 0.5, seed=seed) for seed in range(2)]
    engines = [sparsemtl.compile(model, (1, 3, 16, 16), executor="sparse") for model in models]
    inputs = [torch.randn(1 + place % 2, 3, 16 + place % 3, 16) for place in range(18)]
    found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def work(who: int) -> None:
        for place in range(who % 3, len(inputs), 3):
            found[who % 2, place] = engines[who % 2](inputs[place])

    threads = [threading.Thread(target=work, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 * len(inputs)
    for (which, place), answer in found.items():
        assert_close_tasks(answer, expected_of(models[which], inputs[place]))


def test_an_input_that_wants_gradients_gets_none():
    engine = sparsemtl.compile(randomise(TwoHeads(), 0.3), (1, 3, 16, 16), executor="sparse")
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    assert not any(value.requires_grad for value in engine(x).values())
    assert_close_tasks(engine(x), engine(x.detach()), 0.0)


def test_several_callers_at_once_get_their_own_answers():
    model = randomise(TwoHeads(), 0.5)
    engine = sparsemtl.compile(model, (1, 3, 16, 16))
    inputs = [torch.randn(1 + place % 3, 3, 16, 16 + place % 2) for place in range(24)]
    found: dict[int, dict[str, torch.Tensor]] = {}

    def work(start: int) -> None:
        for place in range(start, len(inputs), 4):
            found[place] = engine(inputs[place])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, x in enumerate(inputs):
        assert_close_tasks(found[place], expected_of(model, x))


def test_a_sparsified_model_compiles_as_it_is():
    model = randomise(build_model(ModelConfig("mobilenetv2", width=0.1), {"depth": 1}), 0.0)
    sparsify(model, theta_init=-2.0)
    x = torch.randn(1, 3, 40, 33)
    engine = sparsemtl.compile(model, x, executor="sparse")
    assert_close_tasks(engine(x), expected_of(model, x))


def test_double_precision_and_other_layouts_of_the_input():
    model = randomise(TwoHeads(), 0.3).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_close_tasks(sparsemtl.compile(model, x)(x), expected_of(model, x), 1e-12)
    model = randomise(build_model(ModelConfig(width=0.1), {"depth": 1}), 0.3)
    x = torch.randn(2, 3, 33, 40).to(memory_format=torch.channels_last)
    engine = sparsemtl.compile(model, (2, 3, 33, 40), executor="sparse")
    assert_close_tasks(engine(x), expected_of(model, x))
    view = torch.randn(2, 5, 40, 33)[:, 1:4].transpose(2, 3)
    assert_close_tasks(engine(view), expected_of(model, view))


def test_the_engine_keeps_its_weights_when_the_model_changes():
    model = randomise(TwoHeads(), 0.3)
    x = torch.randn(1, 3, 16, 16)
    engine, expected = sparsemtl.compile(model, x), expected_of(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close_tasks(engine(x), expected)
