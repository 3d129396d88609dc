"""soft_threshold on every backend against the float64 reference, values and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemtl.ops import (
    SOFT_THRESHOLD,
    SOFT_THRESHOLD_STATS,
    soft_threshold,
    soft_threshold_component,
    soft_threshold_reference,
    soft_threshold_stats,
    use_backend,
)
from tests.ops.support import assert_matches, assert_sum_matches, backends_of, skip_if_unusable

NAN, INF = float("nan"), float("inf")
CHUNK = 1 << 16  # of the native kernels; a Triton block is 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CASES = {  # shapes of a component's weights, α
    "one-weight": ([(1,)], 0.1),
    "scalar-weight": ([()], 0.1),
    "no-weights": ([(0, 3)], 0.1),
    "prime": ([(131,)], 0.3),
    "conv": ([(7, 5, 3, 3)], 0.5),
    "below-the-block": ([(1023,)], 0.5),
    "past-the-block": ([(1025,)], 0.5),
    "below-the-chunk": ([(CHUNK - 1,)], 0.5),
    "past-the-chunk": ([(CHUNK + 1,)], 0.5),
    "all-dead": ([(7, 5, 3, 3)], 99.0),
    "all-alive": ([(7, 5, 3, 3)], 0.0),
    "component": ([(64, 3, 7, 7), (0,), (64,), (33, 64, 3, 3), (1, 1)], 0.7),
    "infinite-threshold": ([(40,)], INF),
}


def make_weights(case, device, dtype, seed=0):
    shapes, alpha = case
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes]
    return weights, torch.tensor(alpha, device=device)


def gradients_for(weights, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=rng).to(w.device, w.dtype) for w in weights]


def expect(weights, alpha, grads):
    """Values and gradients of the reference in float64, on the CPU, by torch's own autograd."""
    wide = [w.detach().cpu().double().requires_grad_() for w in weights]
    a = alpha.detach().cpu().double().requires_grad_()
    values = [soft_threshold_reference(w, a) for w in wide]
    found = torch.autograd.grad(values, [*wide, a], [g.cpu().double() for g in grads])
    return [v.detach() for v in values], list(found[:-1]), found[-1]


def check(backend, weights, alpha, grads):
    skip_if_unusable(SOFT_THRESHOLD, backend, weights, alpha)
    weights = [w.detach().requires_grad_() for w in weights]
    alpha = alpha.detach().requires_grad_()
    with use_backend(backend):
        values = soft_threshold_component(weights, alpha)
    *grad_weights, grad_alpha = torch.autograd.grad(values, [*weights, alpha], grads)
    expected = expect(weights, alpha, grads)
    for value, grad, weight, s, g in zip(
        values, grad_weights, weights, expected[0], expected[1], strict=True
    ):
        assert value.shape == weight.shape
        assert_matches(value, s, weight.dtype)
        assert_matches(grad, g, weight.dtype)
    assert grad_alpha.shape == alpha.shape
    assert_sum_matches(grad_alpha, expected[2].reshape(alpha.shape), grads)


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_match_the_reference(case, dtype, backend, device):
    weights, alpha = make_weights(case, device, dtype)
    check(backend, weights, alpha, gradients_for(weights))


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights_survive(dtype, backend, device):
    tiny = torch.finfo(dtype).smallest_normal
    special = [NAN, INF, -INF, 0.0, -0.0, 0.5, -0.5, tiny, -tiny, tiny / 4, 1.0, -1.0]
    weight = torch.tensor(special * 9, device=device, dtype=dtype)  # vectors and a rest
    grad = gradients_for([weight])
    check(backend, [weight], torch.tensor(0.5, device=device), grad)
    check(backend, [weight], torch.tensor(0.0, device=device), grad)


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
def test_a_nan_threshold_kills_nothing(backend, device):
    weight = torch.linspace(-1, 1, 37, device=device)
    alpha = torch.tensor(NAN, device=device)
    skip_if_unusable(SOFT_THRESHOLD, backend, [weight], alpha)
    with use_backend(backend):
        assert soft_threshold(weight, alpha).isnan().all()


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
def test_a_non_finite_gradient_is_lost_only_where_the_weight_is_dead(backend, device):
    weight = torch.tensor([0.1, 2.0, -2.0] * 20, device=device, requires_grad=True)
    alpha = torch.tensor(1.0, device=device, requires_grad=True)
    skip_if_unusable(SOFT_THRESHOLD, backend, [weight], alpha)
    with use_backend(backend):
        value = soft_threshold(weight, alpha)
    grad = torch.tensor([INF, 1.0, NAN] * 20, device=device)
    grad_weight, grad_alpha = torch.autograd.grad(value, [weight, alpha], grad)
    assert (grad_weight[0::3] == 0).all()
    assert grad_weight[2::3].isnan().all()
    assert grad_alpha.isnan()


LAYOUTS = {
    "channels-last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1),
    "permuted": lambda w: w.permute(2, 0, 3, 1),
    "strided": lambda w: w[:, ::2],
    "offset": lambda w: w.flatten()[3:],
    "expanded": lambda w: w[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_memory_layout_is_taken_and_kept(lay, backend, device):
    (weight,), alpha = make_weights(([(6, 10, 3, 5)], 0.6), device, torch.float32)
    weight = lay(weight)
    (grad,) = gradients_for([weight])
    check(backend, [weight], alpha, [grad])
    check(backend, [weight], alpha, [lay_out_backwards(grad)])
    with use_backend(backend):
        assert soft_threshold(weight, alpha).stride() == torch.empty_like(weight).stride()
        stats = soft_threshold_stats([weight], alpha).values if backend != "cuda" else []
    assert all(value.stride() == torch.empty_like(weight).stride() for value in stats)


def lay_out_backwards(tensor):
    axes = list(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD_STATS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_statistics_count_the_live_weights(case, dtype, backend, device):
    weights, alpha = make_weights(case, device, dtype)
    weights = [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
    skip_if_unusable(SOFT_THRESHOLD_STATS, backend, weights, alpha)
    with use_backend(backend):
        stats = soft_threshold_stats(weights, alpha, bitmask=True)
        plain = soft_threshold_stats(weights, alpha)
    assert plain.bitmasks is None
    assert stats.nonzeros.dtype is torch.int64
    for i, weight in enumerate(weights):
        flat = weight.double().permute(0, 2, 3, 1) if weight.dim() == 4 else weight.double()
        alive = flat.flatten().abs() > alpha.double()  # in the order of memory
        assert stats.nonzeros[i] == plain.nonzeros[i] == alive.sum()
        expected = soft_threshold_reference(weight.double(), alpha.double())
        assert_matches(stats.values[i], expected, dtype)
        assert torch.equal(unpack(stats.bitmasks[i], weight.numel()), alive)


def unpack(mask, count):
    bits = (mask[:, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    assert not bits.flatten()[count:].any(), "the last byte is padded with zeros"
    return bits.flatten()[:count].bool()


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
def test_only_the_gradients_asked_for_come_back(backend, device):
    weights, alpha = make_weights(([(5,), (6,), (7,)], 0.5), device, torch.float32)
    skip_if_unusable(SOFT_THRESHOLD, backend, weights, alpha)
    weights[0].requires_grad_()
    weights[1].requires_grad_()
    with use_backend(backend):
        first, _, fixed = soft_threshold_component(weights, alpha)
    (first.sum() + fixed.sum()).backward()
    assert torch.equal(weights[0].grad, (weights[0].abs() > alpha).float())
    assert weights[1].grad is None
    assert weights[2].grad is None
    assert alpha.grad is None
    alpha.requires_grad_()
    with use_backend(backend):
        soft_threshold(weights[2], alpha).backward(torch.ones(7, device=device))
    live = weights[2].abs() > alpha
    torch.testing.assert_close(alpha.grad, -(weights[2].sign() * live).sum())


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
def test_single_tensor_equals_component_of_one_bit_for_bit(backend, device):
    (weight,), alpha = make_weights(([(4000,)], 0.5), device, torch.float32)
    skip_if_unusable(SOFT_THRESHOLD, backend, [weight], alpha)
    with use_backend(backend):
        assert torch.equal(
            soft_threshold(weight, alpha), soft_threshold_component([weight], alpha)[0]
        )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_alpha_may_have_any_shape_of_one_value_and_its_own_type(shape):
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        alpha = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
        soft_threshold(weight, alpha).sum().backward()
        assert alpha.grad.shape == alpha.shape
        assert alpha.grad.dtype is dtype
        live = weight.detach().abs() > 0.5
        expected = -(weight.detach().sign() * live).sum()
        torch.testing.assert_close(alpha.grad.double().reshape(()), expected.double())


def test_float64_is_computed_in_float64():
    weight = torch.randn(30, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert SOFT_THRESHOLD.choose([weight], alpha).name == "reference"
    assert torch.autograd.gradcheck(soft_threshold, (weight, alpha))
    assert torch.autograd.gradcheck(soft_threshold_reference, (weight, alpha))


def test_weights_changed_between_forward_and_backward_are_refused():
    weight = torch.ones(5, requires_grad=True)
    value = soft_threshold(weight, torch.tensor(0.5))
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


BAD = {
    "weight-not-a-tensor": (lambda: soft_threshold([1.0], torch.tensor(0.1)), TypeError, "weight"),
    "alpha-not-a-tensor": (lambda: soft_threshold(torch.ones(2), 0.1), TypeError, "alpha"),
    "integer-weight": (
        lambda: soft_threshold(torch.ones(2, dtype=torch.int64), torch.tensor(0.1)),
        TypeError,
        "int64",
    ),
    "sparse-weight": (
        lambda: soft_threshold(torch.eye(2).to_sparse(), torch.tensor(0.1)),
        TypeError,
        "strided",
    ),
    "two-alphas": (lambda: soft_threshold(torch.ones(2), torch.ones(2)), ValueError, r"\[2\]"),
    "integer-alpha": (lambda: soft_threshold(torch.ones(2), torch.tensor(1)), ValueError, "int64"),
    "negative-alpha": (
        lambda: soft_threshold(torch.ones(2), torch.tensor(-0.5)),
        ValueError,
        "-0.5",
    ),
    "other-device": (
        lambda: soft_threshold(torch.ones(2), torch.tensor(0.1, device="meta")),
        ValueError,
        "meta",
    ),
    "empty-component": (
        lambda: soft_threshold_component([], torch.tensor(0.1)),
        ValueError,
        "at least one",
    ),
    "mixed-types": (
        lambda: soft_threshold_component(
            [torch.ones(2), torch.ones(2).bfloat16()], torch.tensor(0.1)
        ),
        ValueError,
        "bfloat16",
    ),
}


@pytest.mark.parametrize(("call", "error", "names"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names) as caught:
        call()
    assert "soft_threshold" in str(caught.value)
    assert "Expected" in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300), st.floats(0.0, 2.0, width=32), st.integers(0, 99))
def test_a_larger_threshold_never_revives_a_weight(count, alpha, seed):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    alive, fewer = (soft_threshold(weight, torch.tensor(a)) != 0 for a in (alpha, 2 * alpha))
    assert not (fewer & ~alive).any()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.floats(0.0, 2.0, width=32), st.integers(0, 99))
def test_the_result_is_odd_and_shrinks_by_alpha(count, alpha, seed):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    value = soft_threshold(weight, torch.tensor(alpha))
    assert torch.equal(soft_threshold(-weight, torch.tensor(alpha)), -value)
    assert (value.abs() <= weight.abs()).all()
    assert ((weight - value).abs() <= math.nextafter(alpha, 3) + 1e-6).all()
