"""Each op of the native executor against torch, on awkward shapes."""

from __future__ import annotations

import pytest
import torch

from sparsemtl.ops.availability import why_not_native
from tests.engine.native_graphs import Maker, all_native, assert_same

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")

# id: input shape, output channels, kernel, keywords
CONVS = {
    "1x1": ((1, 5, 7, 11), 3, 1, {}),
    "1x1 strided": ((2, 9, 13, 8), 7, 1, {"stride": (2, 2)}),
    "1x1 offset phase": ((1, 4, 9, 9), 3, 1, {"stride": (3, 2), "padding": (1, 1)}),
    "3x3": ((1, 16, 23, 17), 33, 3, {"padding": (1, 1)}),
    "3x3 batch": ((3, 8, 5, 31), 12, 3, {"padding": (1, 1), "activation": "relu"}),
    "3x3 no padding": ((2, 6, 9, 9), 5, 3, {"activation": "relu6"}),
    "3x3 strided": ((2, 7, 15, 14), 9, 3, {"stride": (2, 2), "padding": (1, 1)}),
    "odd stride": ((1, 5, 29, 22), 6, 3, {"stride": (3, 5), "padding": (2, 0)}),
    "5x2": ((1, 5, 12, 13), 6, (5, 2), {"padding": (2, 1)}),
    "7x7 stem": ((1, 3, 33, 35), 16, 7, {"stride": (2, 2), "padding": (3, 3)}),
    "dilated": ((1, 24, 19, 21), 17, 3, {"padding": (2, 2), "dilation": (2, 2)}),
    "dilation beyond the map": ((2, 9, 5, 7), 11, 3, {"padding": (12, 12), "dilation": (12, 12)}),
    "much padding": ((1, 3, 4, 4), 5, 3, {"padding": (5, 4)}),
    "one pixel": ((1, 64, 1, 1), 32, 3, {"padding": (1, 1)}),
    "groups": ((2, 12, 9, 10), 8, 3, {"padding": (1, 1), "groups": 4}),
    "groups strided": ((1, 6, 9, 10), 9, 3, {"stride": (2, 1), "padding": (1, 1), "groups": 3}),
    "no bias": ((1, 8, 9, 9), 8, 3, {"padding": (1, 1), "bias": False}),
    "all dead": ((1, 8, 9, 9), 8, 3, {"padding": (1, 1), "sparsity": 1.1}),
    "dense": ((1, 8, 9, 9), 24, 3, {"padding": (1, 1), "sparsity": 0.0}),
    "very sparse": ((1, 64, 20, 20), 64, 3, {"padding": (1, 1), "sparsity": 0.99}),
    "few pixels, many rows": ((1, 96, 5, 5), 256, 3, {"padding": (1, 1), "sparsity": 0.5}),
    "few pixels, all dead": ((1, 96, 5, 5), 256, 1, {"sparsity": 1.1}),
    "many channels": ((1, 320, 11, 11), 40, 3, {"padding": (6, 6), "dilation": (6, 6)}),
}


@pytest.mark.parametrize(("shape", "out", "kernel", "more"), CONVS.values(), ids=CONVS.keys())
def test_conv2d(shape, out, kernel, more):
    maker = Maker()
    y = maker.conv(maker.input(*shape), out, kernel, **more)
    assert all_native(assert_same(maker, y))


DEPTHWISE = {
    "3x3": ((2, 8, 13, 19), 1, 3, {"padding": (1, 1), "activation": "relu6"}),
    "strided": ((1, 7, 12, 15), 1, 3, {"stride": (2, 2), "padding": (1, 1)}),
    "stride 3, 5x3": ((1, 4, 17, 16), 1, (5, 3), {"stride": (3, 2), "padding": (2, 0)}),
    "dilated": ((1, 6, 9, 40), 1, 3, {"padding": (3, 3), "dilation": (3, 3)}),
    "multiplier": ((1, 5, 8, 9), 3, 3, {"padding": (1, 1)}),
    "1x1 strided, offset": ((1, 4, 9, 9), 1, 1, {"stride": (2, 2), "padding": (1, 1)}),
    "dilation beyond the map": ((1, 3, 4, 5), 1, 3, {"padding": (9, 9), "dilation": (9, 9)}),
    "one pixel": ((3, 16, 1, 1), 1, 3, {"padding": (1, 1)}),
    "all dead": ((1, 4, 6, 6), 1, 3, {"sparsity": 1.1}),
}


@pytest.mark.parametrize(
    ("shape", "multiplier", "kernel", "more"), DEPTHWISE.values(), ids=DEPTHWISE.keys()
)
def test_depthwise(shape, multiplier, kernel, more):
    maker = Maker()
    channels = shape[1]
    y = maker.conv(
        maker.input(*shape), channels * multiplier, kernel, groups=channels,
        **{"sparsity": 0.3, **more},
    )  # fmt: skip
    assert all_native(assert_same(maker, y))


def test_a_residual_is_added_before_the_activation_in_its_own_place():
    maker = Maker()
    x = maker.input(2, 6, 9, 11)
    h = maker.conv(x, 6, 1)
    for _ in range(3):  # a residual chain, as in ResNet: zeros around must survive
        inner = maker.conv(h, 6, 3, padding=(2, 2), dilation=(2, 2), activation="relu")
        h = maker.conv(inner, 6, 3, padding=(1, 1), residual=h, activation="relu")
    wide = maker.conv(h, 6, 3, groups=6, padding=(1, 1), residual=h, sparsity=0.2)
    assert all_native(assert_same(maker, wide, h))


def test_a_value_is_not_overwritten_while_somebody_needs_it():
    maker = Maker()
    x = maker.input(1, 4, 8, 8)
    a = maker.conv(x, 4)
    b = maker.node("relu", a)
    c = maker.node("add", a, b)
    d = maker.node("sum", c, c, a)
    assert all_native(assert_same(maker, d, b))


POOLS = [
    ("max_pool2d", (2, 3, 11, 13), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
    ("max_pool2d", (1, 2, 12, 9), {"kernel": (2, 2), "stride": (2, 2), "ceil_mode": True}),
    ("max_pool2d", (1, 2, 15, 40), {"kernel": (3, 2), "stride": (1, 1), "dilation": (2, 3)}),
    ("max_pool2d", (1, 2, 7, 23), {"kernel": (5, 4), "stride": (3, 3), "padding": (2, 1)}),
    ("avg_pool2d", (2, 3, 11, 13), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
    ("avg_pool2d", (1, 2, 12, 9), {"kernel": (2, 5), "stride": (2, 2), "ceil_mode": True}),
    (
        "avg_pool2d",
        (1, 2, 12, 9),
        {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "ceil_mode": True,
         "count_include_pad": False},
    ),
    ("adaptive_avg_pool2d", (2, 5, 11, 7), {"size": (1, 1)}),
    ("adaptive_avg_pool2d", (1, 3, 11, 7), {"size": (4, 3)}),
    ("adaptive_avg_pool2d", (1, 3, 2, 3), {"size": (5, 4)}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "attrs"), POOLS)
def test_pooling(op, shape, attrs):
    if op != "adaptive_avg_pool2d":
        attrs = {"padding": (0, 0), "ceil_mode": False, **attrs}
    if op == "avg_pool2d":
        attrs = {"count_include_pad": True, **attrs}
    if op == "max_pool2d":
        attrs = {"dilation": (1, 1), **attrs}
    maker = Maker()
    assert all_native(assert_same(maker, maker.node(op, maker.input(*shape), **attrs)))


def test_max_pooling_keeps_nan():
    maker = Maker()
    x = maker.input(1, 1, 4, 4)
    y = maker.node(
        "max_pool2d", x, kernel=(2, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 1),
        ceil_mode=False,
    )  # fmt: skip
    executor = assert_same(maker, y)
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    image[0, 0, 1, 2] = float("nan")
    expected = torch.nn.functional.max_pool2d(image, 2, 1)
    torch.testing.assert_close(executor(image)["t0"], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("mode", "corners"), [("nearest", False), ("bilinear", False), ("bilinear", True)]
)
@pytest.mark.parametrize(
    ("source", "out"), [((5, 7), (11, 20)), ((41, 41), (17, 5)), ((1, 3), (4, 4)), ((6, 6), (1, 1))]
)
def test_resize(mode, corners, source, out):
    maker = Maker()
    x = maker.input(2, 3, *source)
    y = maker.node("resize", x, mode=mode, align_corners=corners, size=out)
    assert all_native(assert_same(maker, y))


@pytest.mark.parametrize("op", ["relu", "relu6", "sigmoid", "silu", "hardswish", "clamp"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 37), (2, 5, 64), (11,)])
def test_activations(op, shape):
    maker = Maker()
    attrs = {"min": -0.5, "max": 0.75} if op == "clamp" else {}
    assert all_native(assert_same(maker, maker.node(op, maker.input(*shape), **attrs)))


def test_activations_far_from_zero():
    far = torch.tensor([-1e4, -104.0, -88.5, -20.0, 20.0, 88.5, 104.0, 1e4, float("nan")])
    for op in ("sigmoid", "silu", "hardswish", "relu", "relu6"):
        maker = Maker()
        executor = assert_same(maker, maker.node(op, maker.input(9)))
        expected = getattr(torch.nn.functional, op)(far)
        torch.testing.assert_close(executor(far)["t0"], expected, equal_nan=True)


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize(
    "other", [(2, 5, 6, 7), (2, 5, 1, 1), (1, 5, 1, 1), (2, 1, 6, 7), (1, 1, 1, 7), (2, 5, 6, 1)]
)
def test_broadcasting(op, other):
    maker = Maker()
    x, y = maker.input(2, 5, 6, 7), maker.input(*other)
    assert all_native(assert_same(maker, maker.node(op, y, x), maker.node(op, x, y)))


def test_a_sum_of_many():
    maker = Maker()
    inputs = [maker.input(2, 3, 5, 7) for _ in range(18)]
    assert all_native(assert_same(maker, maker.node("sum", *inputs)))


def test_concatenation_in_place_and_not():
    maker = Maker()
    x = maker.input(2, 3, 9, 7)
    a, b = maker.conv(x, 5, 1), maker.conv(x, 4, 3, padding=(1, 1))
    inner = maker.node("concat", a, x, b, dim=1)
    twice = maker.node("concat", inner, a, inner, dim=1)
    y = maker.conv(twice, 6, 3, padding=(2, 2), dilation=(2, 2))
    z = maker.conv(a, 3, 3, padding=(1, 1))  # a stands in the concatenation, between zeros
    assert all_native(assert_same(maker, y, z, inner))


def test_concatenation_of_rows():
    maker = Maker()
    x, y = maker.input(3, 5), maker.input(3, 4)
    z = maker.node("relu", maker.node("concat", maker.node("sigmoid", x), y, dim=-1))
    assert all_native(assert_same(maker, z))


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 13, 5, 7), 1), ((3, 11), 1), ((3, 11), 0), ((2, 3, 5), -1), ((1, 1), 1)]
)
def test_softmax_and_argmax(shape, dim):
    maker = Maker()
    x = maker.input(*shape)
    y = maker.node("softmax", x, dim=dim)
    best = [maker.node("argmax", x, dim=dim, keepdim=keep) for keep in (False, True)]
    assert all_native(assert_same(maker, y, *best))


def test_argmax_takes_the_first_of_equals_and_nan():
    maker = Maker()
    executor = assert_same(
        maker, maker.node("argmax", maker.input(1, 4, 1, 3), dim=1, keepdim=False)
    )
    x = torch.tensor(
        [[1.0, 2.0, 0.0], [3.0, 2.0, float("nan")], [3.0, 1.0, float("nan")], [0, 0, 9]]
    )
    assert executor(x.reshape(1, 4, 1, 3))["t0"].flatten().tolist() == [1, 0, 1]


@pytest.mark.parametrize("shape", [(1, 7), (5, 7), (40, 33), (2, 3, 20), (17,)])
@pytest.mark.parametrize("more", [(), ("residual",)])
def test_linear(shape, more):
    maker = Maker()
    x = maker.input(*shape)
    inputs = [x, *[maker.input(*shape[:-1], 9) for _ in more]]
    weights = {"weight": maker.weight(9, shape[-1]), "bias": maker.tensor(9)}
    y = maker.node("linear", *inputs, weights=weights, activation="relu")
    assert all_native(assert_same(maker, y))


def test_a_classifier_end():
    maker = Maker()
    h = maker.conv(maker.input(3, 4, 9, 9), 12, 3, padding=(1, 1), activation="relu")
    pooled = maker.node("mean", h, dims=(2, 3), keepdim=True)
    flat = maker.node("flatten", pooled, start=1, end=3)
    again = maker.node("mean", h, dims=(-1, -2), keepdim=False)
    rows = maker.node("reshape", h, shape=(3, 12, 81))
    y = maker.node("add", flat, again)
    image = maker.node("reshape", h, shape=(3, 9, 12, 9))
    assert all_native(assert_same(maker, y, rows, image))


def test_batch_norm_alone():
    maker = Maker()
    x = maker.input(2, 5, 6, 7)
    weights = {
        "mean": maker.tensor(5), "var": maker.tensor(5).abs() + 0.1, "weight": maker.tensor(5),
        "bias": maker.tensor(5),
    }  # fmt: skip
    h = maker.node("batch_norm", x, weights=weights, eps=1e-5)
    del weights["weight"], weights["bias"]
    y = maker.node("batch_norm", maker.conv(h, 5), weights=weights, eps=1e-3)
    assert all_native(assert_same(maker, y, h))


def test_squeeze_and_excite():
    maker = Maker()
    h = maker.conv(maker.input(2, 3, 10, 9), 8, 3, padding=(1, 1))
    s = maker.node("adaptive_avg_pool2d", h, size=(1, 1))
    s = maker.node("sigmoid", maker.conv(maker.node("silu", maker.conv(s, 4, 1)), 8, 1))
    assert all_native(assert_same(maker, maker.conv(maker.node("mul", h, s), 5, 3)))


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5)])
def test_what_is_empty_goes_through_torch(shape):
    maker = Maker()
    y = maker.node("relu", maker.input(*shape))
    assert not all_native(assert_same(maker, y))


def test_what_is_unknown_goes_through_torch_between_native_stretches():
    maker = Maker()
    a = maker.conv(maker.input(1, 4, 6, 6), 5, 3, padding=(1, 1))
    b = maker.node("softmax", a, dim=3)  # along rows: not a native op
    c = maker.node("add", maker.conv(b, 5, 1), a)
    executor = assert_same(maker, c, b)
    assert [kind for kind, _ in executor.segments] == [True, False, True]
