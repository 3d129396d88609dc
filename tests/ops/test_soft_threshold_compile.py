"""soft_threshold under torch.compile, torch.export, opcheck, fake tensors and functorch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sparsemtl.ops import (
    BackendUnavailable,
    soft_threshold,
    soft_threshold_component,
    use_backend,
)

OPS = torch.ops.sparsemtl


def inputs():
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 3, 3, 3, generator=rng), torch.randn(17, generator=rng)]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    return [w.requires_grad_() for w in weights], torch.tensor(0.5, requires_grad=True)


def single(weights, alpha):
    return (soft_threshold(weights[0], alpha),)


def component(weights, alpha):
    return soft_threshold_component(weights, alpha)


@pytest.mark.parametrize("call", [single, component])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_the_same_result(call, backend):
    weights, alpha = inputs()
    compiled = torch.compile(lambda w, a: call(w, a * 1.0), fullgraph=True, backend=backend)
    for found, expected in zip(compiled(weights, alpha), call(weights, alpha), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        leaves = [w for w in weights if w.shape == found.shape] + [alpha]
        wanted = torch.autograd.grad(expected.sin().sum(), leaves, retain_graph=True)
        got = torch.autograd.grad(found.sin().sum(), leaves, retain_graph=True)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("call", [single, component])
def test_exports(call):
    class Shrink(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weights, alpha = inputs()
            self.weights = torch.nn.ParameterList(w.detach() for w in weights)
            self.alpha = torch.nn.Parameter(alpha.detach())

        def forward(self, x):
            return x + sum(s.sum() for s in call(list(self.weights), self.alpha))

    model, x = Shrink(), torch.ones(2)
    program = torch.export.export(model, (x,))
    assert "sparsemtl.soft_threshold" in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_registration_passes_opcheck(dtype):
    weights, alpha = inputs()
    weights = [w.detach().to(dtype).requires_grad_() for w in weights]
    grads = [torch.ones_like(w) for w in weights]
    torch.library.opcheck(OPS.soft_threshold.default, (weights[0], alpha))
    torch.library.opcheck(OPS.soft_threshold_component.default, (weights, alpha))
    free = [w.detach() for w in weights]
    a = alpha.detach()
    torch.library.opcheck(OPS.soft_threshold_backward.default, (free[0], a, grads[0]))
    torch.library.opcheck(OPS.soft_threshold_component_backward.default, (free, a, grads))


def test_fake_tensors_pass_through():
    with FakeTensorMode():
        weight = torch.empty(3, 4, 2, 2).to(memory_format=torch.channels_last)
        value = soft_threshold(weight, torch.tensor(0.5))
        assert value.shape == weight.shape
        assert value.stride() == weight.stride()


def test_an_unused_output_of_the_registered_op_adds_nothing():
    weights, alpha = inputs()
    first, _ = OPS.soft_threshold_component(weights, alpha)
    first.sum().backward()
    assert torch.equal(weights[0].grad, (weights[0].abs() > alpha).float())
    live = weights[0].abs() > alpha
    torch.testing.assert_close(alpha.grad, -(weights[0].sign() * live).sum())


def test_flop_counting_does_not_disturb():
    weights, alpha = inputs()
    with FlopCounterMode(display=False) as counter:
        value = soft_threshold(weights[0], alpha)
    assert counter.get_total_flops() == 0
    assert torch.equal(value, soft_threshold(weights[0], alpha))


def test_functional_gradients():
    weights, alpha = inputs()
    weight, a = weights[1].detach(), alpha.detach()
    found = torch.func.grad(lambda w, t: soft_threshold(w, t).sum(), argnums=(0, 1))(weight, a)
    live = (weight.abs() > a).float()
    torch.testing.assert_close(found[0], live)
    torch.testing.assert_close(found[1], -(live * weight.sign()).sum())
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"torch\.func"):
        torch.func.vmap(soft_threshold, in_dims=(0, None))(weights[0].detach(), a)
    mapped = torch.func.vmap(soft_threshold, in_dims=(0, None))(weights[0].detach(), a)
    assert torch.equal(mapped, soft_threshold(weights[0].detach(), a))


def test_batched_gradients():
    weights, alpha = inputs()
    values = soft_threshold_component(weights, alpha)
    rows = [torch.randn(3, *v.shape, generator=torch.Generator().manual_seed(2)) for v in values]
    leaves = [*weights, alpha]
    batched = torch.autograd.grad(values, leaves, rows, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(values, leaves, [r[i] for r in rows], retain_graph=True)
        for found, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(found[i], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own first use
def test_forward_mode_keeps_the_tangent():
    weights, alpha = inputs()
    weight, a = weights[1].detach(), alpha.detach()
    tangent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        found = forward_ad.unpack_dual(soft_threshold(dual, a)).tangent
    assert torch.equal(found, tangent * (weight.abs() > a))


def test_gradients_of_gradients():
    weights, alpha = inputs()
    weight = weights[1]
    value = soft_threshold(weight, alpha)
    first = torch.autograd.grad(value.pow(3).sum(), (weight, alpha), create_graph=True)
    second = torch.autograd.grad(first[0].sum() + first[1], (weight, alpha))
    live, sign = (weight.abs() > alpha).float(), weight.sign()
    curvature = 6 * value.detach() * live
    torch.testing.assert_close(second[0], curvature * (1 - sign))
    torch.testing.assert_close(second[1], (curvature * (1 - sign) * -sign).sum())
