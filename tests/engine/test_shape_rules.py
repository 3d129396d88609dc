"""The shape rules against torch itself, on geometries with and without an answer."""

from __future__ import annotations

import random

import pytest
import torch

from sparsemtl.engine.graph import Node, Value
from sparsemtl.engine.ops import compute
from sparsemtl.engine.shape_rules import output_shape


def torch_shape(node: Node, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    try:
        return tuple(compute(node, *(torch.zeros(shape) for shape in shapes))[0].shape)
    except (RuntimeError, ValueError):
        return None


def pair(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    return rng.randint(low, high), rng.randint(low, high)


def conv(rng: random.Random):
    groups = rng.choice((1, 1, 2, 3))
    weight = torch.zeros(groups * rng.randint(1, 2), rng.randint(1, 3), *pair(rng, 1, 4))
    attrs = {"stride": pair(rng, 1, 3), "padding": pair(rng, 0, 4), "dilation": pair(rng, 1, 4)}
    attrs |= {"groups": groups, "activation": ""}
    channels = weight.shape[1] * groups + rng.choice((0, 0, 0, 1))
    weights = {"weight": weight, "bias": torch.zeros(weight.shape[0] + rng.choice((0, 0, 0, 1)))}
    return Node("conv2d", "n", ("x",), ("y",), attrs, weights), [(2, channels, *pair(rng, 1, 9))]


def pool(rng: random.Random):
    attrs = {"kernel": pair(rng, 1, 4), "stride": pair(rng, 1, 4), "padding": pair(rng, 0, 2)}
    attrs |= {"dilation": pair(rng, 1, 3), "ceil_mode": rng.random() < 0.5}
    return Node("max_pool2d", "n", ("x",), ("y",), attrs), [(2, 3, *pair(rng, 1, 9))]


def concat(rng: random.Random):
    sizes = [(rng.choice((2, 2, 2, 3)), rng.randint(1, 3), 4, 5) for _ in range(3)]
    return Node("concat", "n", ("a", "b", "c"), ("y",), {"dim": 1}), sizes


def add(rng: random.Random):
    return Node("add", "n", ("a", "b"), ("y",)), [(2, rng.choice((1, 3)), 4, 4), (2, 3, 4, 4)]


@pytest.mark.parametrize("make", [conv, pool, concat, add])
def test_a_rule_says_what_torch_says(make):
    answered = 0
    for place in range(400):
        node, shapes = make(random.Random(place))
        values = [Value(str(i), shape, torch.float32) for i, shape in enumerate(shapes)]
        found = output_shape(node, values)
        if found is not None:
            answered += 1
            assert found == torch_shape(node, shapes), (node, shapes)
    assert answered > 100


def test_a_residual_of_another_shape_has_no_answer():
    attrs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "activation": ""}
    node = Node("conv2d", "n", ("x", "r"), ("y",), attrs, {"weight": torch.zeros(3, 2, 1, 1)})
    x, r = Value("x", (1, 2, 4, 4), torch.float32), Value("r", (1, 1, 4, 4), torch.float32)
    assert output_shape(node, [x, r]) is None
    assert output_shape(node, [x, Value("r", (1, 3, 4, 4), torch.float32)]) == (1, 3, 4, 4)
    assert output_shape(node, [Value("x", x.shape, torch.int64), r]) is None
