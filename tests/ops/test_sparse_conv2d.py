"""sparse_conv2d: every backend and instruction set against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemtl.ops import (
    SPARSE_CONV2D,
    pack_pattern,
    register_flops,
    sparse_conv2d,
    sparse_conv2d_reference,
    use_backend,
)
from sparsemtl.ops.availability import native_module, why_not_native
from tests.ops.support import backends_of, skip_if_unusable

needs_native = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
ISAS = native_module().usable_isas() if why_not_native() is None else []
RELATIVE = 1e-5  # of the largest sum of absolute terms


@pytest.fixture
def isa() -> Iterator[None]:
    best = native_module().isa()
    yield
    native_module().force_isa(best)


def weight_of(
    shape: tuple[int, ...], density: float, rng: torch.Generator, vector: int = 1, groups: int = 1
) -> Tensor:
    weight = torch.randn(shape, generator=rng)
    rows = shape[0] // groups
    keep = torch.rand(groups, -(-rows // vector), *shape[1:], generator=rng) < density
    return weight * keep.repeat_interleave(vector, 1)[:, :rows].reshape(shape)


def all_of(call, tensors: list[Tensor | None], grad: Tensor, **options):
    """Value and the gradient of each tensor."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = call(leaves[0], leaves[1], leaves[2], residual=leaves[3], **options)
    present = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, present, grad.to(y.dtype))]


def assert_close(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.isfinite().all()
    if found.numel():
        bound = RELATIVE * max(scale.abs().max().item(), 1e-30)
        assert (found.double() - expected).abs().max().item() <= bound


def check(tensors: list[Tensor | None], mask: Tensor, **options) -> None:
    """Found equals the float64 reference; tolerance by the same sums over absolute values."""
    wide = [None if t is None else t.double() for t in tensors]
    pattern = options.pop("pattern", None)
    activation = options.pop("activation", None)
    before = sparse_conv2d_reference(*wide[:3], residual=wide[3], **options)
    rng = torch.Generator().manual_seed(1)
    grad = torch.randn(before.shape, generator=rng)
    for kink in (0.0, 6.0):  # an activation may round to either side of its kink
        grad = grad * ((before - kink).abs() > 1e-3)
    options["activation"] = activation
    expected = all_of(sparse_conv2d_reference, wide, grad.double(), **options)
    size = [None if t is None else t.abs() for t in wide]
    options["activation"] = None
    sizes = all_of(sparse_conv2d_reference, size, grad.double().abs(), **options)
    options["activation"] = activation
    found = all_of(sparse_conv2d, tensors, grad, pattern=pattern, **options)
    expected[2] = expected[2] * mask
    for f, e, s in zip(found, expected, sizes, strict=True):
        assert_close(f, e, s)


@st.composite
def convolutions(draw):
    small = st.integers(1, 3)
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    far = draw(st.sampled_from([2, 30]))
    dilation = (draw(st.integers(1, far)), draw(st.integers(1, far)))
    padding = (draw(st.integers(0, far)), draw(st.integers(0, far)))
    least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    assume(max(least) <= 40)  # else the kernel is larger than any image
    height, width = (draw(st.integers(max(1, n), 40)) for n in least)
    groups = draw(st.sampled_from([1, 1, 2, 3, 7]))
    channels = draw(st.integers(1, 70 // groups))
    rows = draw(st.integers(1, 70 // groups))
    if draw(st.integers(0, 5)) == 0:  # depthwise
        groups, channels, rows = draw(st.integers(1, 70)), 1, draw(st.integers(1, 2))
    return {
        "x": (draw(st.integers(0, 3)), groups * channels, height, width),
        "weight": (groups * rows, channels, *kernel),
        "groups": groups,
        "stride": (draw(small), draw(small)),
        "padding": padding,
        "dilation": dilation,
        "density": draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])),
        "vector": draw(st.sampled_from([1, 1, 4, 8, 16])),
        "activation": draw(st.sampled_from([None, "relu", "relu6"])),
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@needs_native
@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=30, deadline=None)
@given(c=convolutions())
def test_any_convolution_matches_float64(name, c):
    best = native_module().isa()
    native_module().force_isa(name)
    try:
        rng = torch.Generator().manual_seed(c["seed"])
        x = torch.randn(c["x"], generator=rng)
        if c["channels_last"]:
            x = x.contiguous(memory_format=torch.channels_last)
        weight = weight_of(c["weight"], c["density"], rng, c["vector"], c["groups"])
        structure = "element" if c["vector"] == 1 else f"vector({c['vector']})"
        pattern = pack_pattern(weight, groups=c["groups"], structure=structure)
        options = {n: c[n] for n in ("stride", "padding", "dilation", "groups")}
        y = sparse_conv2d_reference(x, weight, **options)
        bias = torch.randn(c["weight"][0], generator=rng)
        residual = torch.randn(y.shape, generator=rng)
        tensors = [x, weight, bias, residual]
        check(tensors, pattern.mask(), pattern=pattern, activation=c["activation"], **options)
    finally:
        native_module().force_isa(best)


CASES = {  # x, weight, options: each takes another path of the kernels
    "1x1-flat": ((2, 300, 9, 9), (40, 300, 1, 1), {}),
    "1x1-one-row": ((2, 70, 17, 19), (40, 70, 1, 1), {}),  # 323 pixels: a tail behind masks
    "1x1-groups": ((2, 12, 16, 16), (20, 6, 1, 1), {"groups": 2}),
    "few-channels": ((1, 16, 33, 31), (20, 16, 3, 3), {"padding": 1}),
    "many-channels": ((1, 300, 12, 11), (8, 300, 3, 3), {"padding": 2, "dilation": 2}),
    "regions": ((2, 300, 17, 17), (8, 300, 3, 3), {"padding": 12, "dilation": 12}),
    "dilation-past-map": ((1, 40, 9, 9), (8, 40, 3, 3), {"padding": 24, "dilation": 24}),
    "stride": ((1, 24, 19, 18), (30, 24, 3, 3), {"padding": 1, "stride": 2}),
    "stem": ((2, 3, 21, 23), (16, 3, 7, 7), {"padding": 3, "stride": 2}),
    "stride-past-kernel": ((1, 8, 13, 13), (8, 8, 1, 1), {"stride": 3}),
    "depthwise": ((2, 20, 14, 15), (20, 1, 3, 3), {"padding": 1, "groups": 20}),
    "tap-grid-past-64": ((1, 4, 20, 20), (4, 4, 9, 9), {"padding": 4}),
    "one-pixel": ((1, 5, 1, 1), (7, 5, 1, 1), {}),
    "narrow": ((3, 5, 40, 1), (7, 5, 3, 1), {"padding": (1, 0)}),
}


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("backend", backends_of(SPARSE_CONV2D))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_and_gradients_match_the_reference(case, backend, density):
    x_shape, weight_shape, options = case
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(x_shape, generator=rng)
    weight = weight_of(weight_shape, density, rng)
    reason = SPARSE_CONV2D.explain(x, weight)[backend] or ""
    if "taps" in reason:  # a limit of the Triton kernel, on whatever device
        pytest.skip(reason)
    skip_if_unusable(SPARSE_CONV2D, backend, x, weight)
    with use_backend(backend):
        check([x, weight, torch.ones(weight_shape[0]), None], weight != 0, **options)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_repeat(threads):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 30, 30, generator=rng)
    weight = weight_of((50, 40, 3, 3), 0.2, rng)
    grad = torch.randn(2, 50, 30, 30, generator=rng)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        runs = [all_of(sparse_conv2d, [x, weight, None, None], grad, padding=1) for _ in range(3)]
        for run in runs[1:]:
            for a, b in zip(run, runs[0], strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_forward_bits_do_not_depend_on_threads():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 30, 30, generator=rng)
    weight = weight_of((50, 40, 3, 3), 0.2, rng)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(sparse_conv2d(x, weight, padding=1))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 300, 3, 3)])
def test_what_is_not_finite_reaches_exactly_what_live_weights_connect(bad, shape):
    rng = torch.Generator().manual_seed(0)
    weight = weight_of(shape, 0.3, rng)
    x = torch.randn(1, shape[1], 20, 19, generator=rng)
    clean = sparse_conv2d(x, weight, padding=1)
    x[0, 2, 5, 18] = bad  # at the right border, beside the gap between rows
    y = sparse_conv2d(x, weight, padding=1)
    reached = torch.zeros_like(x)
    reached[0, 2, 5, 18] = 1.0
    live = (weight != 0).float()
    hit = torch.nn.functional.conv2d(reached, live, padding=1) > 0
    assert torch.equal(~y.isfinite(), hit)
    assert torch.equal(y[~hit], clean[~hit])


@needs_native
@pytest.mark.parametrize("structure", ["element", "vector(8)"])
def test_a_flat_image_is_read_to_its_last_pixel_and_no_further(structure):
    """x ends where its memory ends: what lies behind would be NaN."""
    rng = torch.Generator().manual_seed(0)
    memory = torch.full((3 * 20 * 323,), float("nan"))
    x = memory[: 2 * 20 * 323].view(2, 20, 17, 19)
    x.copy_(torch.randn(x.shape, generator=rng))
    weight = weight_of((16, 20, 1, 1), 0.2, rng, 8).requires_grad_()
    pattern = pack_pattern(weight, structure=structure)
    y = sparse_conv2d(x, weight, pattern=pattern)
    torch.testing.assert_close(y, sparse_conv2d_reference(x, weight))
    y.sum().backward()
    expected = x.sum((0, 2, 3)) * (weight.detach() != 0)[:, :, 0, 0]
    torch.testing.assert_close(weight.grad[:, :, 0, 0], expected, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_gradients_of_what_is_not_finite(bad):
    rng = torch.Generator().manual_seed(0)
    weight = weight_of((6, 4, 3, 3), 0.5, rng).requires_grad_()
    x = torch.randn(1, 4, 20, 19, generator=rng)
    x[0, 2, 5, 18] = bad
    sparse_conv2d(x, weight, padding=1).sum().backward()
    live = weight.detach() != 0
    # The last column is never read by the left taps of any output pixel, and by no dead weight.
    expected = torch.zeros_like(live)
    expected[:, 2] = live[:, 2]
    expected[:, 2, :, 0] = False
    assert torch.equal(~weight.grad.isfinite(), expected)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_is_rounded_once(dtype):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 20, 13, 13, generator=rng).to(dtype)
    weight = weight_of((10, 20, 3, 3), 0.3, rng).to(dtype)
    y = sparse_conv2d(x, weight, padding=1)
    exact = sparse_conv2d_reference(x.double(), weight.double(), padding=1)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


OUT_OF_MEMORY = """
import resource, torch
from sparsemtl.ops import pack_pattern, sparse_conv2d
torch.set_num_threads(1)
x, weight = torch.ones(1, 64, 900, 900), torch.ones(1, 64, 3, 3)
pattern = pack_pattern(weight)
sparse_conv2d(x[:, :, :9, :9].contiguous(), weight, pattern=pattern, padding=1)
used = 1024 * int(next(l for l in open("/proc/self/status") if "VmSize" in l).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    sparse_conv2d(x, weight, pattern=pattern, padding=100, dilation=100)
except MemoryError:
    print("refused")
y = sparse_conv2d(torch.ones(1, 64, 9, 9), weight, pattern=pattern, padding=1)
assert y[0, 0, 4, 4] == 9 * 64
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory by /proc")
@pytest.mark.skipif("SPARSEMTL_TEST_NATIVE" in os.environ, reason="sanitizers map all of memory")
def test_running_out_of_memory_is_an_exception_and_leaves_the_op_usable():
    found = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "refused"


def test_float64_takes_the_reference():
    x, weight = torch.randn(1, 3, 5, 5).double(), torch.randn(2, 3, 3, 3).double()
    y = sparse_conv2d(x, weight)
    torch.testing.assert_close(y, sparse_conv2d_reference(x, weight))


@needs_native
def test_a_changed_weight_is_seen():
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3)
    first = sparse_conv2d(x, weight)
    weight.mul_(2.0)
    torch.testing.assert_close(sparse_conv2d(x, weight), 2.0 * first)
    weight.zero_()
    assert not sparse_conv2d(x, weight).any()


@needs_native
def test_a_backward_pass_uses_the_weight_of_its_forward():
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    first, second = (
        torch.randn(2, 3, 3, 3),
        torch.randn(2, 3, 3, 3) * (torch.rand(2, 3, 3, 3) < 0.5),
    )
    pattern = pack_pattern(first)
    y = sparse_conv2d(x, first, pattern=pattern)
    sparse_conv2d(x, second, pattern=pattern)
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(sparse_conv2d_reference(x, first).sum(), x)
    torch.testing.assert_close(found, expected)


@needs_native
def test_live_zeros_of_a_mask_get_gradients():
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    keep = torch.rand(2, 3, 3, 3) < 0.5
    pattern = pack_pattern(weight, keep=keep)
    x = torch.rand(1, 3, 5, 5) + 1.0
    sparse_conv2d(x, weight, pattern=pattern).sum().backward()
    assert torch.equal(weight.grad != 0, keep)


def tensors(**changes):
    made = {"x": torch.randn(1, 4, 6, 6), "weight": torch.randn(6, 4, 3, 3)}
    made.update(changes)
    return made


BAD = {
    "x-dtype": (tensors(x=torch.ones(1, 4, 6, 6).int()), TypeError, "x to be strided float32"),
    "dtypes-differ": (tensors(x=torch.ones(1, 4, 6, 6).half()), ValueError, "weight to be torch.f"),
    "x-axes": (tensors(x=torch.ones(4, 6, 6)), ValueError, r"x to be \[B, 4, H, W\]"),
    "x-channels": (tensors(x=torch.ones(1, 5, 6, 6)), ValueError, r"x to be \[B, 4, H, W\]"),
    "weight-axes": (tensors(weight=torch.ones(6, 4)), ValueError, "weight to have 4 axes"),
    "weight-kind": (tensors(weight=3), TypeError, "weight to be a Tensor, got int"),
    "bias": (tensors(bias=torch.ones(5)), ValueError, r"bias to have shape \[6\], got \[5\]"),
    "residual": (tensors(residual=torch.ones(1, 6, 6, 6)), ValueError, "residual to have the out"),
    "stride": (tensors(stride=0), ValueError, "stride to be an integer ≥ 1"),
    "padding": (tensors(padding=(1, -1)), ValueError, "padding to be an integer ≥ 0"),
    "padding-text": (tensors(padding="same"), ValueError, "padding to be an integer ≥ 0"),
    "dilation": (tensors(dilation=(1, 2, 3)), ValueError, "dilation to be an integer ≥ 1"),
    "groups": (tensors(groups=4), ValueError, "groups to divide the 6 output channels"),
    "too-small": (tensors(dilation=9), ValueError, "at least as large as the dilated kernel"),
    "activation": (tensors(activation="gelu"), ValueError, "activation to be None, 'relu'"),
    "pattern-kind": (tensors(pattern=3), TypeError, "pattern to be a Pattern, got int"),
    "pattern-other": (
        tensors(pattern=pack_pattern(torch.ones(6, 4, 1, 1))),
        ValueError,
        "pattern to be built for weight",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        sparse_conv2d(**arguments)


def test_registration_holds():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 9, 9, generator=rng, requires_grad=True)
    weight = weight_of((6, 4, 3, 3), 0.4, rng).requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    geometry = ([2, 1], [1, 0], [1, 2], 1, "element")
    torch.library.opcheck(
        torch.ops.sparsemtl.sparse_conv2d.default, (x, weight, bias, None, None, *geometry, "relu")
    )
    torch.library.opcheck(
        torch.ops.sparsemtl.sparse_conv2d.default,
        (x, weight, None, None, (weight != 0).detach(), *geometry, None),
    )


def test_a_compiled_call_is_one_graph_and_agrees():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 9, 9, generator=rng)
    weight = weight_of((8, 4, 3, 3), 0.4, rng, vector=4).requires_grad_()
    pattern = pack_pattern(weight, structure="vector(4)")

    def step(x, weight):
        return sparse_conv2d(x, weight, padding=1, pattern=pattern, activation="relu") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, weight), step(x, weight)
    torch.testing.assert_close(found, expected)
    (a,) = torch.autograd.grad(found.sum(), weight)
    (b,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(a, b)


def test_flops_count_live_weights():
    from torch.utils.flop_counter import FlopCounterMode

    register_flops()
    x, weight = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3)
    weight[2:] = 0.0
    with FlopCounterMode(display=False) as counter:
        sparse_conv2d(x, weight, padding=1)
    assert counter.get_total_flops() == 2 * int((weight != 0).sum()) * 2 * 81
