"""The native kernels of soft_threshold: every instruction set, any number of threads, same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsemtl.ops import SOFT_THRESHOLD, soft_threshold_component, soft_threshold_stats
from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.ops.soft_threshold_backends import native_backward
from tests.ops.test_soft_threshold import CASES, DTYPES, check, gradients_for, make_weights

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
ISAS = native_module().usable_isas() if why_not_native() is None else []


@pytest.fixture
def isa(request):
    before = native_module().isa()
    native_module().force_isa(request.param)
    yield request.param
    native_module().force_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_instruction_set_matches_the_reference(case, dtype, isa):
    weights, alpha = make_weights(case, "cpu", dtype)
    check("native", weights, alpha, gradients_for(weights))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_16_bit_value_is_converted_as_torch_does(isa):
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        for alpha in (0.0, 1e-3, 0.3333):
            threshold = torch.tensor(alpha)
            found = SOFT_THRESHOLD.explain([every], threshold)
            assert found["native"] is None
            values = soft_threshold_stats([every], threshold).values[0]
            wide = every.float()
            expected = torch.where(wide.abs() <= alpha, 0.0, wide - threshold * wide.sign())
            torch.testing.assert_close(
                values, expected.to(dtype), rtol=0.0, atol=0.0, equal_nan=True
            )


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_streaming_stores_write_the_same(isa, dtype):
    count = (1 << 23) + 77  # 16 MiB of output and more goes past the caches
    whole = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad, alpha = whole.flip(0), torch.tensor(0.8)
    stats = soft_threshold_stats([whole], alpha, bitmask=True)
    (gradient,), total = native_backward([whole], alpha, [grad])
    parts = [slice(0, 1 << 22), slice(1 << 22, 1 << 23), slice(1 << 23, count)]
    totals = []
    for part in parts:  # each small enough for plain stores
        small = soft_threshold_stats([whole[part].clone()], alpha, bitmask=True)
        assert torch.equal(stats.values[0][part], small.values[0])
        bits = slice(part.start // 8, -(-part.stop // 8))
        assert torch.equal(stats.bitmasks[0][bits], small.bitmasks[0])
        (small_gradient,), small_total = native_backward([whole[part]], alpha, [grad[part]])
        assert torch.equal(gradient[part], small_gradient)
        totals.append(small_total)
    torch.testing.assert_close(total, sum(totals))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_any_number_of_threads_gives_the_same_bits(isa, threads):
    case = ([(300_001,), (64, 64, 3, 3), (7,), (200_000,)], 0.4)
    weights, alpha = make_weights(case, "cpu", torch.float32)
    weights = [w.requires_grad_() for w in weights]
    alpha.requires_grad_()
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        values = soft_threshold_component(weights, alpha)
        found.append((*values, *torch.autograd.grad(values, [*weights, alpha], weights)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"generic on this machine, got 'sse9'"):
        native_module().force_isa("sse9")


@pytest.mark.parametrize("name", [*ISAS[-1:], "sse9"])
def test_the_variable_forces_an_instruction_set(name):
    code = (
        "import torch; from sparsemtl.ops import soft_threshold; "
        "soft_threshold(torch.ones(3), torch.tensor(0.5)); "
        "from sparsemtl.ops.availability import native_module; print(native_module().isa())"
    )
    environment = {**os.environ, "SPARSEMTL_CPU_ISA": name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if name in ISAS:
        assert done.stdout.strip() == name, done.stderr
    else:
        assert done.returncode != 0
        assert "SPARSEMTL_CPU_ISA: Expected one of" in done.stderr


def test_the_border_checks_what_python_hands_over():
    module, weight = native_module(), torch.ones(4)
    address, size = [weight.data_ptr()], [4]
    with pytest.raises(ValueError, match="outs to hold 1 entries, got 0"):
        module.soft_threshold_forward(0, address, size, [], 0.5, [], 0, 1)
    with pytest.raises(ValueError, match="outs to point at memory, got null"):
        module.soft_threshold_forward(0, address, size, [0], 0.5, [], 0, 1)
    with pytest.raises(ValueError, match="sums to hold 1 entries, got 0"):
        module.soft_threshold_backward(0, address, size, address, address, 0.5, 0, 0, 1)
