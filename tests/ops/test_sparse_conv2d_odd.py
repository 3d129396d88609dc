"""sparse_conv2d on unusual inputs: empty, strided, not finite, differentiated in unusual ways."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparsemtl.ops import pack_pattern, sparse_conv2d, sparse_conv2d_reference
from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.ops.sparse_conv2d import sparse_conv2d_grads
from sparsemtl.ops.sparse_conv2d_checks import geometry

needs_native = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
ISAS = native_module().usable_isas() if why_not_native() is None else []


def problem(
    x: tuple[int, ...] = (2, 5, 9, 8), weight: tuple[int, ...] = (6, 5, 3, 3), density: float = 0.4
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    alive = torch.rand(weight, generator=rng) < density
    return torch.randn(x, generator=rng), torch.randn(weight, generator=rng) * alive


def compare(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> None:
    """Value and gradients against the reference in float64."""
    given = [t for t in (x, weight, bias) if t is not None]
    leaves = [t.detach().requires_grad_() for t in given]
    wide = [t.detach().double().requires_grad_() for t in given]
    y, expected = sparse_conv2d(*leaves, **options), sparse_conv2d_reference(*wide, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]
    wanted = [expected, *torch.autograd.grad(expected, wide, grad.to(y.dtype).double())]
    tolerance = 1e-5 if x.dtype is torch.float32 else 4 * torch.finfo(x.dtype).eps
    for f, e in zip(found, wanted, strict=True):
        assert f.dtype is x.dtype
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance)


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
def test_defaults_of_torch_change_nothing(defaults, stride):
    x, weight = problem((1, 40, 20, 20), (48, 40, 3, 3))
    expected = sparse_conv2d_reference(x, weight, None, stride, 1)
    grad = torch.randn(expected.shape)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    for structure in ("element", "vector(4)"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        pattern = pack_pattern(leaves[1], structure=structure)
        y = sparse_conv2d(*leaves, None, stride, 1, pattern=pattern)
        y.backward(grad)
        assert y.dtype is torch.float32
        assert pattern.mask().is_cpu
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize(
    ("x", "weight", "padding"),
    [
        ((0, 5, 9, 8), (6, 5, 3, 3), 1),
        ((2, 0, 9, 8), (6, 0, 3, 3), 1),
        ((2, 0, 17, 17), (6, 0, 1, 1), 0),
        ((2, 5, 9, 8), (0, 5, 3, 3), 0),
        ((2, 5, 0, 8), (6, 5, 3, 3), 2),
    ],
)
def test_what_is_empty(x, weight, padding):
    given = problem(x, weight)
    bias = torch.randn(weight[0])
    if weight[0] > 0 and x[2] > 0:  # else the dense convolution refuses
        compare(*given, bias, padding=padding)
    leaves = [t.requires_grad_() for t in given]
    y = sparse_conv2d(*leaves, bias, padding=padding)
    assert y.shape == (x[0], weight[0], x[2] + 2 * padding - weight[2] + 1, y.shape[3])
    assert torch.equal(y, bias[:, None, None].expand_as(y))  # nothing is summed
    y.sum().backward()
    assert not any(leaf.grad.any() for leaf in leaves)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_tiny_maps(isa):
    """Less than a vector in all: what is filled around them must not begin before them."""
    best = native_module().isa()
    native_module().force_isa(isa)
    try:
        for height, width in ((1, 1), (1, 3), (2, 2), (5, 1)):
            for channels in (1, 3):
                for kernel, padding in ((1, 0), (2, 1), (3, 1), (3, 4)):
                    x, weight = problem(
                        (1, channels, height, width), (2, channels, kernel, kernel), 0.7
                    )
                    compare(x, weight, padding=padding)
    finally:
        native_module().force_isa(best)


def noncontiguous(x: Tensor) -> list[Tensor]:
    b, c, h, w = x.shape
    wide = x.new_zeros(b, 2 * c, 2 * h, 3 * w)
    wide[:, ::2, ::2, ::3] = x
    complex_ = torch.complex(torch.zeros_like(x), -x)
    return [
        wide[:, ::2, ::2, ::3],
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        complex_.conj().imag,  # marked as negated, which addresses do not tell
        torch._neg_view(-x),  # the same without strides
    ]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_give_the_same_bits(dtype):
    x, weight = problem()
    x, weight, bias = x.to(dtype), weight.to(dtype), torch.randn(6).to(dtype)
    plain = [t.clone().requires_grad_() for t in (x, weight)]
    y = sparse_conv2d(*plain, bias, padding=1, stride=(1, 2))
    grad = torch.randn(y.shape).to(dtype)
    expected = [y, *torch.autograd.grad(y, plain, grad)]
    for a in noncontiguous(x.float()):
        for b in noncontiguous(weight.float()):
            if dtype is not torch.float32 and (a.is_neg() or b.is_neg()):
                continue  # a change of type resolves it
            leaves = [t.to(dtype).detach().requires_grad_() for t in (a, b)]
            y = sparse_conv2d(*leaves, bias, padding=1, stride=(1, 2))
            assert y.is_contiguous()
            found = [y, *torch.autograd.grad(y, leaves, grad)]
            for f, e in zip(found, expected, strict=True):
                assert torch.equal(f, e)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_storage_rounds_each_gradient_once(dtype):
    x, weight = problem()
    compare(x.to(dtype), weight.to(dtype), torch.randn(6).to(dtype), padding=1)


@needs_native
@pytest.mark.parametrize("stride", [1000, (3, 500), (500, 2), 100])
def test_strides_past_everything(stride):
    x, weight = problem((1, 3, 120, 130), (4, 3, 3, 2))
    compare(x, weight, stride=stride, padding=1)


@needs_native
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_of_what_is_not_finite_reach_what_live_weights_connect(bad):
    x, weight = problem((1, 5, 20, 19))
    x.requires_grad_()
    grad = torch.randn(1, 6, 20, 19)
    grad[0, 2, 5, 18] = bad
    (found,) = torch.autograd.grad(sparse_conv2d(x, weight, padding=1), x, grad)
    hit = torch.zeros_like(grad)
    hit[0, 2, 5, 18] = 1.0
    live = (weight != 0).float()
    reached = torch.nn.grad.conv2d_input(x.shape, live, hit, padding=1) > 0
    assert torch.equal(~found.isfinite(), reached)


@needs_native
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("channels", [5, 300])
def test_weights_that_are_not_finite_are_alive(bad, channels):
    x, weight = problem((1, channels, 20, 19), (6, channels, 3, 3))
    weight[2, 3, 1, 1] = bad
    y = sparse_conv2d(x, weight, padding=1)
    assert not y[:, 2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[:, others], sparse_conv2d(x, weight[others], padding=1))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch.func.jvp
def test_torch_func_and_second_derivatives_agree_with_the_reference():
    x, weight = problem()
    options = {"padding": 1, "stride": 2, "activation": "relu"}

    def loss(call, a: Tensor, b: Tensor) -> Tensor:
        return call(a, b, **options).square().sum()

    for number in (0, 1):
        found = torch.func.grad(lambda *t: loss(sparse_conv2d, *t), argnums=number)(x, weight)
        expected = torch.func.grad(lambda *t: loss(sparse_conv2d_reference, *t), argnums=number)
        torch.testing.assert_close(found, expected(x, weight), rtol=1e-4, atol=1e-4)
    found = torch.func.vmap(lambda a: sparse_conv2d(a[None], weight, **options)[0])(x)
    torch.testing.assert_close(found, sparse_conv2d(x, weight, **options))
    value, tangent = torch.func.jvp(lambda a: sparse_conv2d(a, weight, padding=1), (x,), (x,))
    torch.testing.assert_close(value, tangent)

    second = []
    for call in (sparse_conv2d, sparse_conv2d_reference):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        first = torch.autograd.grad(loss(call, *leaves), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(f.square().sum() for f in first), leaves))
    for f, e in zip(*second, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-2)


def test_batched_gradients_are_those_of_each():
    x, weight = problem()
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = sparse_conv2d(*leaves, padding=1)
    grads = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for f, e in zip(
            found, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(f[i], e, rtol=1e-4, atol=1e-4)


def test_batched_gradients_reach_layers_too():
    x, weight = problem()
    g, pattern = geometry(weight, 1, 1, 1, 1), pack_pattern(weight)
    grads = torch.randn(3, 2, 6, 9, 8)
    found = torch.func.vmap(
        lambda grad: sparse_conv2d_grads(grad, x, weight, g, pattern, (True, True))
    )(grads)
    for i, grad in enumerate(grads):
        expected = sparse_conv2d_grads(grad, x, weight, g, pattern, (True, True))
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f[i], e, rtol=1e-4, atol=1e-4)


def test_meta_tensors_have_shapes():
    x, weight = (t.to("meta").requires_grad_() for t in problem())
    y = sparse_conv2d(x, weight, stride=2)
    y.sum().backward()
    assert (y.shape, y.device.type) == ((2, 6, 4, 3), "meta")
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
    pattern = pack_pattern(problem()[1])
    assert sparse_conv2d(x, weight, pattern=pattern).is_meta
    with pytest.raises(ValueError, match="weight to hold values, got one on meta"):
        pack_pattern(weight)
    with pytest.raises(ValueError, match="weight to hold values, got one on meta"):
        pattern.update(weight)
    with pytest.raises(ValueError, match=r"weight to be torch.float32 on meta like x"):
        sparse_conv2d(x, problem()[1])


def test_numbers_past_the_index_type_are_named():
    x, weight = problem()
    for name, value in (("padding", 1 << 28), ("stride", (1, 1 << 40)), ("dilation", 1 << 27)):
        with pytest.raises(ValueError, match=f"{name} to reach over fewer than 2.28 pixels"):
            sparse_conv2d(x, weight, **{name: value})
    many = torch.zeros(1).expand(1, 5, 1 << 16, 1 << 15)
    with pytest.raises(ValueError, match=r"fewer than 2.31 pixels in a channel.*\[65536, 32768\]"):
        sparse_conv2d(many, weight)
    with pytest.raises(ValueError, match=r"fewer than 2.31 pixels.*\[9, 8\] and \[200"):
        sparse_conv2d(x, weight, padding=10**8)
