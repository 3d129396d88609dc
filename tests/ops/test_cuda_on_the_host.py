"""The CUDA C++ kernels' own arithmetic, run on the CPU: their sources are compiled for the host.

tests/ops/cuda_host stands in for CUDA's headers; threads are fibers between barriers. On a GPU the
same kernels are checked by `make gpu`, under compute-sanitizer too.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsemtl.ops import AdamRule, soft_threshold_reference, threshold_adam, use_backend
from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.ops.threshold_adam_backends import number_rules

ROOT = Path(__file__).parent.parent.parent
HOST = Path(__file__).parent / "cuda_host"
SOURCES = ("pack_pattern", "soft_threshold", "sparse_conv2d", "threshold_adam")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PANEL = 64  # kPanel of csrc/cuda/pack_pattern.h

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cuda_host")
    flags = ["-std=c++17", "-O1", "-fPIC", "-mf16c", "-ffp-contract=off", "-w"]
    flags += [f"-I{HOST}", f"-I{ROOT / 'csrc'}", "-c"]
    children, objects = [], []
    for source in [HOST / "driver.cpp", *(ROOT / "csrc" / "cuda" / f"{s}.cu" for s in SOURCES)]:
        objects.append(str(folder / f"{source.stem}.o"))
        command = ["g++", *flags, "-x", "c++", str(source), "-o", objects[-1]]
        children.append(subprocess.Popen(command))
    assert [child.wait() for child in children] == [0] * len(children)
    library = str(folder / "cuda_host.so")
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    return ctypes.CDLL(library)


def addresses(tensors) -> ctypes.Array:
    return (ctypes.c_uint64 * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))


def integers(values) -> ctypes.Array:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def pointer(tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


SIZES = [(1,), (0,), (31,), (33,), (4095,), (4097,), (9000,)]


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [*((d, d) for d in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
def test_soft_threshold(host, dtype, narrow):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rng).to(dtype) for s in SIZES] * 12  # more than a table
    weights[6][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    alpha = torch.tensor(0.5)
    grads = [torch.randn(w.shape, generator=rng).to(narrow) for w in weights]
    values = [torch.full_like(w, 7.0, dtype=narrow) for w in weights]
    found = [torch.full_like(w, 7.0) for w in weights]
    sizes, n = integers([w.numel() for w in weights]), ctypes.c_int64(len(weights))
    given = (DTYPES[dtype], DTYPES[narrow], n, addresses(weights), sizes)
    host.host_soft_threshold(*given, addresses(values), pointer(alpha))
    chunks = sum(-(-w.numel() // 4096) for w in weights)
    sums, total = torch.empty(chunks, dtype=torch.float64), torch.empty(1, dtype=torch.float64)
    host.host_soft_threshold_backward(
        *given, addresses(grads), addresses(found), pointer(alpha), pointer(sums), pointer(total)
    )
    expected = 0.0
    for w, g, s, gw in zip(weights, grads, values, found, strict=True):
        shrunk = soft_threshold_reference(w, alpha).to(narrow)
        torch.testing.assert_close(s, shrunk, equal_nan=True)
        alive = ~(w.float().abs() <= 0.5)
        assert torch.equal(gw, torch.where(alive, g, torch.zeros_like(g)).to(dtype))
        expected -= (gw.double() * torch.nan_to_num(w.double().sign())).sum().item()
    assert abs(total.item() - expected) <= 1e-5 * sum(g.float().abs().sum().item() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", ["none", "values", "masks"])
def test_threshold_adam_gives_the_bits_of_the_cpu(host, dtype, outputs):
    rng = torch.Generator().manual_seed(0)
    shapes = SIZES * 8  # more than one table holds
    state = [[torch.randn(s, generator=rng) for s in shapes] for _ in range(3)]
    state.append([torch.rand(s, generator=rng) for s in shapes])  # squares
    state[1][6][:3] = torch.tensor([float("nan"), float("inf"), 0.0])
    rules = [AdamRule(0.01, weight_decay=0.1), AdamRule(0.1, (0.3, 0.9), decoupled=True, step=7)]
    rules = [rules[i % 2] for i in range(len(shapes))]
    alpha, owners = torch.tensor([0.3, 0.0]), [i % 2 for i in range(len(shapes))]
    expected = [[t.clone() for t in group] for group in state]
    shrinks = outputs != "none"
    with use_backend("reference"):
        out = threshold_adam(
            *expected, rules, alpha if shrinks else None, owners if shrinks else [],
            dtype=dtype, bitmask=True,
        )  # fmt: skip
    values = [torch.full(s, 7.0, dtype=dtype) for s in shapes]
    masks = [torch.full((-(-t.numel() // 8),), 77, dtype=torch.uint8) for t in state[0]]
    counts = torch.zeros(len(shapes), dtype=torch.int64)
    numbers, which = number_rules(rules)
    host.host_threshold_adam(
        ctypes.c_int64(len(shapes)), addresses([t for group in state for t in group]),
        integers([t.numel() for t in state[0]]), (ctypes.c_float * len(numbers))(*numbers),
        ctypes.c_int64(len(numbers) // 8), integers(which), DTYPES[dtype],
        addresses(values) if shrinks else None, addresses(masks) if outputs == "masks" else None,
        integers(owners) if shrinks else None, pointer(alpha), pointer(counts),
    )  # fmt: skip
    for found, wanted in zip(state, expected, strict=True):
        for f, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-7, equal_nan=True)
    if shrinks:
        # Thresholds cut what is stored here: exact but for the roundings of the step above.
        for i, (w, s, mask) in enumerate(zip(state[0], values, masks, strict=True)):
            torch.testing.assert_close(s, soft_threshold_reference(w, alpha[i % 2]).to(dtype),
                                       equal_nan=True)  # fmt: skip
            alive = ~(w.abs() <= alpha[i % 2])
            assert counts[i] == alive.sum()
            if outputs == "masks":
                bits = (mask[:, None] >> torch.arange(8)) & 1
                assert torch.equal(bits.reshape(-1)[: w.numel()].bool(), alive)
                assert not bits.reshape(-1)[w.numel() :].any()
            else:
                assert (mask == 77).all()
        assert len(out.values) == len(values)


def pack_bits(alive) -> torch.Tensor:
    flat = torch.zeros(-(-alive.numel() // 8) * 8, dtype=torch.int64)
    flat[: alive.numel()] = alive.reshape(-1)
    return (flat.reshape(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def pack(host, weight, transposed=False, capacity=None):
    """Lists of a weight [K, C, kh, kw] by its rows, or by its channels."""
    k, c, taps = weight.shape[0], weight.shape[1], weight[0, 0].numel()
    shape = [c, k, taps, taps, c * taps, 1] if transposed else [k, c, taps, c * taps, taps, 1]
    panels = -(-shape[1] // PANEL)
    capacity = weight.numel() if capacity is None else capacity
    starts = torch.full((taps * panels * shape[0] + 1,), -7, dtype=torch.int32)
    entries = torch.full((capacity, 2), 7, dtype=torch.int32)
    sources = torch.full((capacity,), -7, dtype=torch.int32)
    bits = pack_bits(weight != 0)  # named: an address borrows, it does not own
    host.host_pack_pattern(
        integers(shape), pointer(bits), pointer(weight), pointer(starts),
        pointer(entries), pointer(sources), ctypes.c_int64(capacity),
    )  # fmt: skip
    return starts, entries, sources, shape, panels


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("shape", "density"),
    [((5, 3, 3, 3), 0.3), ((17, 130, 1, 1), 0.1), ((9, 64, 3, 2), 1.0), ((4, 4, 1, 1), 0.0),
     ((40, 65, 3, 3), 0.02)],
)  # fmt: skip
def test_pack_pattern_lists_every_live_weight_once(host, shape, density, transposed):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=rng) * (torch.rand(shape, generator=rng) < density)
    starts, entries, sources, (rows, _, _, *strides), panels = pack(host, weight, transposed)
    count = int((weight != 0).sum())
    assert starts[-1] == count
    assert (starts.diff() >= 0).all()
    assert torch.equal(entries[:count, 1].view(torch.float32), weight.reshape(-1)[sources[:count]])
    slots = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    block, row = slots // rows, slots % rows
    tap, channel = block // panels, block % panels * PANEL + entries[:count, 0]
    flat = row * strides[0] + channel * strides[1] + tap * strides[2]
    assert torch.equal(flat, sources[:count].long())
    assert torch.equal(flat.sort().values, (weight.reshape(-1) != 0).nonzero()[:, 0])
    other = torch.randn(shape, generator=rng)
    host.host_refresh_values(
        pointer(starts), pointer(entries), pointer(sources), ctypes.c_int64(len(sources)),
        ctypes.c_int64(len(starts) - 1), pointer(other),
    )  # fmt: skip
    assert torch.equal(entries[:count, 1].view(torch.float32), other.reshape(-1)[sources[:count]])


def test_a_full_list_is_not_overrun(host):
    weight = torch.ones(4, 4, 1, 1)
    starts, _, sources, *_ = pack(host, weight, capacity=5)
    assert starts[-1] == 16
    assert (sources >= 0).all()


CONVOLUTIONS = {  # x, weight, stride, padding, dilation
    "1x1": ((2, 70, 5, 6), (20, 70, 1, 1), (1, 1), (0, 0), (1, 1)),
    "dilated": ((1, 9, 13, 12), (130, 9, 3, 3), (1, 1), (6, 6), (6, 6)),
    "past-the-map": ((1, 5, 5, 5), (3, 5, 3, 3), (1, 1), (9, 9), (9, 9)),
    "stride": ((2, 6, 9, 10), (7, 6, 3, 3), (2, 3), (1, 0), (1, 2)),
    "one-pixel": ((1, 3, 1, 1), (5, 3, 1, 1), (1, 1), (0, 0), (1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_sparse_conv2d_and_its_input_gradient(host, case, dtype):
    x_shape, w_shape, stride, padding, dilation = case
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(x_shape, generator=rng).to(dtype)
    weight = torch.randn(w_shape, generator=rng) * (torch.rand(w_shape, generator=rng) < 0.2)
    bias = torch.randn(w_shape[0], generator=rng).to(dtype)
    wide = x.double().requires_grad_()
    y = F.conv2d(wide, weight.double(), bias.double(), stride, padding, dilation)
    grad = torch.randn(y.shape, generator=rng).to(dtype)
    (grad_x,) = torch.autograd.grad(y, wide, grad.double())
    sizes = [*w_shape[2:], *stride, *padding, *dilation]
    for transposed, source, expected, given, activation in (
        (0, x, y.relu(), bias, 1), (0, x, y.clamp(0, 6), bias, 2), (1, grad, grad_x, None, 0),
    ):  # fmt: skip
        found = torch.full(expected.shape, 7.0, dtype=dtype)
        numbers = [source.shape[0], *source.shape[1:], *found.shape[1:], *sizes, transposed]
        starts, entries, sources, *_ = pack(host, weight, bool(transposed))
        host.host_sparse_conv2d(
            DTYPES[dtype], integers(numbers), pointer(starts), pointer(entries), pointer(sources),
            ctypes.c_int64(len(sources)), pointer(source), pointer(given), pointer(found),
            activation,
        )  # fmt: skip
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        bound = tolerance * expected.detach().abs().max().item()
        assert (found.double() - expected).abs().max().item() <= bound


@pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
@pytest.mark.skipif(torch.cuda.is_available(), reason="there a launch does not fail")
def test_a_failed_launch_names_the_kernel_and_its_arguments():
    module = native_module()
    if not module.HAS_CUDA:
        pytest.skip("built without nvcc")
    shape = [4, 3, 9, 27, 9, 1]
    with pytest.raises(RuntimeError, match=r"pack_pattern_cuda.*\(rows 4, channels 3, taps 9\): "):
        module.pack_pattern_cuda(shape, 0, 0, [0, 0, 0], 0, 0)
    numbers = [1, 3, 5, 5, 2, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1, 0]
    with pytest.raises(RuntimeError, match=r"sparse_conv2d_cuda\(pixels 25, source channels 3"):
        module.sparse_conv2d_cuda(0, numbers, [0, 0, 0], 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="Expected shape to hold 16 entries, got 3"):
        module.sparse_conv2d_cuda(0, numbers[:3], [0, 0, 0], 0, 0, 0, 0, 0, 0)
