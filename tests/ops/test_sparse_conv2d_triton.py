"""The Triton convolution: its tables and lists by hand, its kernels against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemtl.ops import SPARSE_CONV2D, BackendUnavailable, sparse_conv2d, use_backend
from sparsemtl.ops import sparse_conv2d_triton as on_gpu
from sparsemtl.ops.block_pattern import BlockPattern, occupied_blocks, transpose_blocks
from sparsemtl.ops.group_threshold import group_threshold_reference
from sparsemtl.ops.sparse_conv2d_grouped import conv_branches
from sparsemtl.ops.sparse_conv2d_pixels import pixel_order, tap_offset
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_tiles import Tile, precision
from sparsemtl.ops.tiles import Tile as Tiles
from tests.ops.support import skip_if_unusable

SMALL = Tile(16, 16, 16, panel=2)  # an interpreter's tile


def geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1) -> Geometry:
    return Geometry(stride, padding, dilation, kernel, groups)


# Tables: where every live (pixel, tap) must be found exactly once, and no other.


def reads(g: Geometry, size: tuple[int, int], transposed: bool) -> dict[tuple[int, int], int]:
    """(destination, tap) → source, by the definition."""
    out, found = g.output_size(*size), {}
    for oy in range(out[0]):
        for ox in range(out[1]):
            for i in range(g.kernel[0]):
                for j in range(g.kernel[1]):
                    y = oy * g.stride[0] + i * g.dilation[0] - g.padding[0]
                    x = ox * g.stride[1] + j * g.dilation[1] - g.padding[1]
                    if 0 <= y < size[0] and 0 <= x < size[1]:
                        pixel, read = oy * out[1] + ox, y * size[1] + x
                        tap = i * g.kernel[1] + j
                        if transposed:
                            found[read, tap] = pixel
                        else:
                            found[pixel, tap] = read
    return found


@settings(max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dilation=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    tile=st.sampled_from([1, 4, 16, 64]),
    transposed=st.booleans(),
)
def test_every_read_is_found_once(kernel, stride, padding, dilation, size, tile, transposed):
    g = Geometry(stride, padding, dilation, kernel, 1)
    out = g.output_size(*size)
    assume(out[0] > 0 and out[1] > 0)
    order = pixel_order(g, 2, size, tile, transposed, torch.device("cpu"))
    expected = reads(g, size, transposed)
    planes = (size[0] * size[1], out[0] * out[1])
    dest_plane, source_plane = planes if transposed else planes[::-1]
    found, seen = {}, []
    sets = [order.tap_sets[c] for c in order.classes.tolist()]
    rows = zip(order.bases.tolist(), order.dests.tolist(), order.live.tolist(), strict=True)
    for place, (base, dest, live) in enumerate(rows):
        assert live & ~sets[place // tile] == 0
        if dest < 0:
            assert live == 0
            continue
        seen.append(dest)
        for tap in range(kernel[0] * kernel[1]):
            if live >> tap & 1:
                found[dest, tap] = base + tap_offset(tap, kernel[1], order.steps)
    assert sorted(seen) == list(range(2 * dest_plane))
    second = {(d + dest_plane, t): s + source_plane for (d, t), s in expected.items()}
    assert found == expected | second


# Nominal work that is executed at 41x41, of the four rates: kernels.md's exact counts, [E].
@pytest.mark.parametrize(
    ("batch", "tile", "most"), [(1, 64, 0.70), (1, 128, 0.79), (16, 128, 0.61), (16, 256, 0.61)]
)
def test_padding_taps_are_skipped(batch, tile, most):
    shares = []
    for rate in (6, 12, 18, 24):
        g = geometry(padding=(rate, rate), dilation=(rate, rate))
        order = pixel_order(g, batch, (41, 41), tile, False, torch.device("cpu"))
        shares.append(order.tile_taps * tile / (9 * batch * 41 * 41))
    assert sum(shares) / 4 <= most


def test_blocks_by_hand():
    alive = torch.zeros(6, 5, 1, 2, dtype=torch.bool)
    alive[0, 0, 0, 0] = alive[5, 4, 0, 1] = True
    found = occupied_blocks(alive, 1, 4, 2)  # [2, taps 2, 3]
    expected = torch.zeros(2, 2, 3, dtype=torch.bool)
    expected[0, 0, 0] = expected[1, 1, 2] = True
    assert torch.equal(found, expected)
    assert torch.equal(transpose_blocks(found, 1), expected.permute(2, 1, 0))
    in_groups = occupied_blocks(alive, 2, 2, 5)  # 3 rows a group: blocks of 2 and 1
    assert in_groups.flatten().tolist() == [True, False, False, False, False, False, False, True]


def test_lists_are_rewritten_in_place():
    weight = torch.zeros(32, 32, 1, 1)
    weight[0, 0], weight[20, 20] = 1.0, 1.0
    order = pixel_order(geometry((1, 1), padding=(0, 0)), 1, (2, 2), 4, False, weight.device)
    blocks = BlockPattern(weight, 1, (16, 16))
    entries, counts, rows = blocks.lists(order, 16, 16, False)
    assert counts.tolist() == [[1, 1]]
    assert entries[0, :, 0].tolist() == [0, 1]
    weight[0, 20] = 1.0
    blocks.follow(weight)
    assert counts.tolist() == [[2, 1]]
    assert rows.tolist() == [0, 1]
    blocks.follow(weight == 7.0)
    assert counts.tolist() == [[0, 0]]
    assert blocks.lists(order, 16, 16, False)[0] is entries


# Kernels.

CASES = {  # x, weight, geometry, block, density
    "dense-1x1": ((2, 20, 5, 4), (18, 20, 1, 1), {"padding": (0, 0)}, None, 1.0),
    "dense-dilated": (
        (1, 20, 9, 7),
        (17, 20, 3, 3),
        {"padding": (4, 4), "dilation": (4, 4)},
        None,
        1,
    ),
    "past-the-map": (
        (1, 6, 5, 5),
        (7, 6, 3, 3),
        {"padding": (9, 9), "dilation": (9, 9)},
        None,
        1.0,
    ),
    "blocks-of-16": ((1, 40, 5, 6), (40, 40, 3, 3), {}, (16, 16), 0.3),
    "blocks-of-32x16": ((2, 33, 4, 4), (65, 33, 1, 1), {"padding": (0, 0)}, (32, 16), 0.5),
    "all-dead": ((1, 16, 4, 4), (16, 16, 3, 3), {}, (16, 16), 0.0),
    "stride": ((1, 16, 9, 8), (16, 16, 3, 3), {"stride": (2, 2)}, (16, 16), 0.6),
    "stem": ((1, 3, 7, 6), (8, 3, 7, 7), {"stride": (2, 2), "padding": (3, 3)}, None, 1.0),
    "stride-past-kernel": (
        (1, 8, 7, 7),
        (8, 8, 1, 1),
        {"stride": (3, 2), "padding": (0, 1)},
        None,
        1,
    ),
    "uneven": ((1, 5, 7, 6), (9, 5, 3, 2), {"padding": (2, 0), "dilation": (1, 3)}, (16, 16), 0.9),
    "groups": ((1, 24, 5, 5), (36, 12, 3, 3), {"groups": 2}, (16, 16), 0.6),
    "depthwise": ((1, 3, 4, 5), (3, 1, 3, 3), {"groups": 3}, None, 1.0),
    "one-pixel": ((3, 4, 1, 1), (5, 4, 1, 1), {"padding": (0, 0)}, None, 1.0),
}


def make(case, device, dtype, seed=0) -> tuple[Tensor, Tensor, Geometry, BlockPattern]:
    x_shape, w_shape, options, block, density = case
    g = geometry(kernel=w_shape[2:], **options)
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(x_shape, generator=rng).to(device, dtype)
    weight = torch.randn(w_shape, generator=rng)
    if block is not None:
        rows, columns = w_shape[0] // g.groups, w_shape[1]
        tiles = (g.groups, -(-rows // block[0]), -(-columns // block[1]), *w_shape[2:])
        keep = (torch.rand(tiles, generator=rng) < density).repeat_interleave(block[0], 1)[:, :rows]
        keep = keep.repeat_interleave(block[1], 2)[:, :, :columns]
        weight = weight * keep.reshape(w_shape)
    weight = weight.to(device, dtype)
    return x, weight, g, BlockPattern(weight, g.groups, block)


def dtypes(device) -> list[torch.dtype]:
    """bfloat16 on a GPU alone: its arithmetic is wrong in the interpreter."""
    narrow = [torch.bfloat16] if device.type == "cuda" else []
    return [torch.float32, torch.float16, *narrow]


def assert_close(found: Tensor, expected: Tensor, sizes: Tensor) -> None:
    """Within roundings of the storage type, of the largest sum of absolute terms."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    relative = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype]
    if found.is_cuda and found.dtype is torch.float32 and precision() == "tf32":
        relative = 1e-3
    bound = relative * max(sizes.abs().max().item(), 1e-30)
    assert (found.double().cpu() - expected).abs().max().item() <= bound


def expect(x, weight, g, grad):
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*wide, None, g.stride, g.padding, g.dilation, g.groups)
    return [y.detach(), *torch.autograd.grad(y, wide, grad)]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_three_passes_match_float64(case, device):
    for dtype in dtypes(device):
        x, weight, g, blocks = make(case, device, dtype)
        skip_if_unusable(SPARSE_CONV2D, "triton", x, weight)
        shape = (x.shape[0], weight.shape[0], *g.output_size(x.shape[2], x.shape[3]))
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        expected = expect(x, weight, g, grad.cpu().double())
        sizes = expect(x.abs(), weight.abs(), g, grad.abs().cpu().double())
        for tile in (SMALL, None) if dtype is torch.float32 else (None,):
            found = [
                on_gpu.conv_blocks(x, weight, blocks, g, tile=tile),
                on_gpu.conv_blocks_input_grad(grad, x, weight, blocks, g, tile=tile),
                on_gpu.conv_blocks_weight_grad(grad, x, weight, blocks, g, tile=tile),
            ]
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found)
            if blocks.block is not None:
                expected[2] = expected[2] * (weight != 0).cpu()
                assert not found[2][weight == 0].any()  # dead blocks were not touched
            for f, e, s in zip(found, expected, sizes, strict=True):
                assert_close(f, e, s)


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_bias_residual_and_activation(activation, device):
    x, weight, g, blocks = make(CASES["dense-dilated"], device, torch.float32)
    skip_if_unusable(SPARSE_CONV2D, "triton", x, weight)
    y = expect(x, weight, g, torch.zeros(1, 17, 9, 7).double())[0]
    bias, residual = torch.randn(17).to(device), torch.randn(y.shape).to(device)
    y = 0.5 * (y + bias.cpu().double()[:, None, None] + residual.cpu().double())
    y = y if activation is None else F.relu(y) if activation == "relu" else F.relu6(y)
    half = (x, 0.5 * weight, blocks, g, 0.5 * bias, 0.5 * residual, activation)
    assert_close(on_gpu.conv_blocks(*half), y, 20 * torch.ones(1))
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    assert on_gpu.conv_blocks(bad, *half[1:])[0, :, 0, 0].isnan().all()  # no activation hides it


@pytest.mark.interpreter
def test_work_that_is_split_gives_the_same_sums(device, monkeypatch):
    x, weight, g, blocks = make(
        ((1, 33, 4, 4), (16, 33, 3, 3), {}, None, 1.0), device, torch.float32
    )
    skip_if_unusable(SPARSE_CONV2D, "triton", x, weight)
    grad = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    expected = expect(x, weight, g, grad.cpu().double())
    sizes = expect(x.abs(), weight.abs(), g, grad.abs().cpu().double())
    bias = torch.ones(16, device=device)
    for splits in (1, 2, 8):
        monkeypatch.setattr(on_gpu, "splits", lambda *_, s=splits: s)
        y = on_gpu.conv_blocks(x, weight, blocks, g, bias, None, "relu", tile=SMALL)
        assert_close(y, (expected[0] + 1.0).relu(), sizes[0])
        found = on_gpu.conv_blocks_input_grad(grad, x, weight, blocks, g, tile=SMALL)
        assert_close(found, expected[1], sizes[1])
        found = on_gpu.conv_blocks_weight_grad(grad, x, weight, blocks, g, tile=SMALL)
        assert_close(found, expected[2], sizes[2])
        again = on_gpu.conv_blocks_weight_grad(grad, x, weight, blocks, g, tile=SMALL)
        assert torch.equal(found, again)


@pytest.mark.interpreter
@pytest.mark.parametrize("splits", [1, 2])
def test_gradients_go_through_the_threshold(splits, device, monkeypatch):
    """The weight gradient's epilogue equals soft_threshold's own backward pass."""
    x, _, g, _ = make(CASES["blocks-of-16"], device, torch.float32)
    rng = torch.Generator().manual_seed(3)
    master = torch.randn(40, 40, 3, 3, generator=rng).to(device)
    master[:16, 16:32] *= 0.1  # a dead block
    alpha = torch.tensor(0.5, device=device)
    weight = torch.where(master.abs() <= alpha, 0.0, master - alpha * master.sign())
    blocks = BlockPattern(weight, 1, (16, 16))
    skip_if_unusable(SPARSE_CONV2D, "triton", x, weight)
    monkeypatch.setattr(on_gpu, "splits", lambda *_: splits)
    grad = torch.randn(1, 40, 5, 6, generator=rng).to(device)
    found, grad_alpha = on_gpu.conv_blocks_weight_grad(
        grad, x, weight, blocks, g, tile=SMALL, threshold=(master, alpha)
    )
    expected = expect(x, weight, g, grad.cpu().double())[2] * (weight != 0).cpu()
    sizes = expect(x.abs(), weight.abs(), g, grad.abs().cpu().double())[2]
    assert_close(found, expected, sizes)
    total = -(expected * master.sign().cpu()).sum()
    assert abs(grad_alpha.item() - total.item()) <= 1e-5 * sizes.sum().item()


@pytest.mark.interpreter
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("shape", "groups"), [((40, 40, 3, 3), 1), ((36, 12, 3, 3), 2), ((32, 48, 1, 1), 1)], ids=str
)
def test_gradients_go_through_the_group_threshold(splits, shape, groups, device, monkeypatch):
    """Groups of one tile each: the epilogue equals group_threshold's own backward pass."""
    rng = torch.Generator().manual_seed(4)
    g = geometry(shape[2:], padding=(shape[2] // 2,) * 2, groups=groups)
    x = torch.randn(1, shape[1] * groups, 5, 6, generator=rng).to(device)
    master = torch.randn(shape, generator=rng).to(device)
    master[:16, :16] *= 0.1  # dead blocks
    master[-1, -1] = 0.0
    alpha = torch.tensor(0.5, device=device)
    skip_if_unusable(SPARSE_CONV2D, "triton", x, master)
    monkeypatch.setattr(on_gpu, "splits", lambda *_: splits)
    group = (16, 16)
    leaves = [master.cpu().double().requires_grad_(), alpha.cpu().double().requires_grad_()]
    shrunk = [  # a convolution's groups are cut one by one
        group_threshold_reference(part, leaves[1], Tiles(*group))
        for part in leaves[0].chunk(groups)
    ]
    weight = torch.cat(shrunk)
    grad = torch.randn(1, shape[0], 5, 6, generator=rng).to(device)
    y = F.conv2d(x.cpu().double(), weight, None, 1, g.padding, 1, groups)
    expected = torch.autograd.grad(y, leaves, grad.cpu().double())
    values = weight.detach().float().to(device)
    blocks = BlockPattern(values, groups, group)
    assert on_gpu.fits_groups(SMALL, group)
    found, grad_alpha = on_gpu.conv_blocks_weight_grad(
        grad, x, values, blocks, g, SMALL, threshold=(master, alpha), grouped=True
    )
    sizes = expect(x.abs(), values.abs(), g, grad.abs().cpu().double())[2]
    assert_close(found, expected[0], sizes)
    assert not found[:16, :16].any()
    assert abs(grad_alpha.item() - expected[1].item()) <= 1e-5 * sizes.sum().item()
    whole = BlockPattern(values, groups, None)  # a list that also holds what is dead
    more = on_gpu.conv_blocks_weight_grad(
        grad, x, values, whole, g, SMALL, threshold=(master, alpha), grouped=True
    )
    assert_close(more[0], expected[0], sizes)


@pytest.mark.interpreter
def test_bits_repeat_and_lists_do_not_change_them(device, monkeypatch):
    monkeypatch.setattr(on_gpu, "splits", lambda *_: 1)  # a split sum is grouped by its list
    x, weight, g, blocks = make(CASES["blocks-of-16"], device, torch.float32)
    skip_if_unusable(SPARSE_CONV2D, "triton", x, weight)
    y = on_gpu.conv_blocks(x, weight, blocks, g, tile=SMALL)
    assert torch.equal(y, on_gpu.conv_blocks(x, weight, blocks, g, tile=SMALL))
    whole = BlockPattern(weight, 1, None)  # dead blocks add exact zeros
    assert torch.equal(y, on_gpu.conv_blocks(x, weight, whole, g, tile=SMALL))


@pytest.mark.interpreter
def test_branches_in_one_launch_are_the_branches_alone(device, monkeypatch):
    monkeypatch.setattr(on_gpu, "splits", lambda *_: 1)
    rng = torch.Generator().manual_seed(0)
    xs = [torch.randn(1, 20, 7, 7, generator=rng).to(device) for _ in range(2)]
    xs.append(xs[0])
    weights = [torch.randn(18, 20, 3, 3, generator=rng).to(device) for _ in range(3)]
    weights[1][:16] = 0.0
    gs = [geometry(padding=(r, r), dilation=(r, r)) for r in (1, 3, 6)]
    skip_if_unusable(SPARSE_CONV2D, "triton", xs[0], weights[0])
    blocks = [BlockPattern(w, 1, (16, 16)) for w in weights]
    biases = [torch.randn(18, generator=rng).to(device) for _ in range(3)]
    found = conv_branches(xs, weights, blocks, gs, biases, None, "relu", tile=SMALL)
    for i, y in enumerate(found):
        alone = (xs[i], weights[i], blocks[i], gs[i], biases[i], None, "relu", SMALL)
        assert torch.equal(y, on_gpu.conv_blocks(*alone))
    summed = conv_branches(xs, weights, blocks, gs, None, found, None, tile=SMALL)
    for i, y in enumerate(summed):
        alone = (xs[i], weights[i], blocks[i], gs[i], None, found[i], None, SMALL)
        assert torch.equal(y, on_gpu.conv_blocks(*alone))


def test_branches_that_differ_are_refused():
    x, weight, g = torch.ones(1, 4, 5, 5), torch.ones(6, 4, 3, 3), geometry()
    blocks = BlockPattern(weight, 1, None)
    with pytest.raises(ValueError, match="1 weights, as many as inputs, got 2"):
        conv_branches([x], [weight] * 2, [blocks], [g])
    with pytest.raises(ValueError, match="differ in dilation and padding only"):
        conv_branches([x] * 2, [weight] * 2, [blocks] * 2, [g, geometry(padding=(2, 2))])
    with pytest.raises(ValueError, match=r"xs of shape \[1, 4, 5, 5\]"):
        conv_branches([x, x[:, :, :4]], [weight] * 2, [blocks] * 2, [g] * 2)
    with pytest.raises(ValueError, match="at least one branch"):
        conv_branches([], [], [], [])


@pytest.mark.interpreter
def test_a_kernel_of_too_many_taps_is_refused_by_name_and_else_left_to_torch(device):
    x, weight = torch.randn(1, 2, 9, 9, device=device), torch.randn(2, 2, 8, 8, device=device)
    skip_if_unusable(SPARSE_CONV2D, "triton", x, weight[:, :, :7, :7])
    text = "the kernel has 64 taps, it takes up to 63"
    with use_backend("triton"), pytest.raises(BackendUnavailable, match=text):
        sparse_conv2d(x, weight)
    torch.testing.assert_close(sparse_conv2d(x, weight), F.conv2d(x, weight))


def test_more_pixels_than_indices_are_refused():
    x = torch.empty(1 << 17, 1, 1 << 7, 1 << 7, device="meta")
    reason = on_gpu.why_not_geometry(x, geometry())
    assert reason is not None
    assert "counts them in 32 bits" in reason


@pytest.mark.interpreter
def test_what_compilers_see_is_contiguous(device):
    """torch.compile plans with the fake kernel's strides; the kernel's own are channels_last."""
    x, weight, g, _ = make(CASES["blocks-of-16"], device, torch.float32)
    skip_if_unusable(SPARSE_CONV2D, "triton", x, weight)
    geometry_of = (list(g.stride), list(g.padding), list(g.dilation), 1, "element")
    with use_backend("triton"):
        eager = sparse_conv2d(x, weight, padding=1)
        seen = torch.ops.sparsemtl.sparse_conv2d(x, weight, None, None, None, *geometry_of, None)
        grads = torch.ops.sparsemtl.sparse_conv2d_backward(
            torch.ones_like(seen), x, weight, None, *geometry_of
        )
    assert eager.is_contiguous(memory_format=torch.channels_last)
    assert seen.is_contiguous()
    assert all(grad.is_contiguous() for grad in grads)
    assert torch.equal(seen, eager)
