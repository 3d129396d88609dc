"""Pattern: what is alive, the lists that kernels walk, and following a weight that changes."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemtl.ops import pack_pattern, sparse_conv2d
from sparsemtl.ops.availability import why_not_native
from sparsemtl.ops.pattern import STRUCTURES, PackedList, Pattern, live_mask

needs_native = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


def sparse_weight(shape: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=rng)
    return weight * (torch.rand(shape, generator=rng) < density)


def walk(packed: PackedList, groups: int, taps: int, channels: int) -> Tensor:
    """Read a list as a kernel does, back into the dense matrix [groups, rows, taps · channels]."""
    arrays, vector = packed.arrays, packed.sizes[3]
    parts = arrays["parts"].tolist()
    rows = parts[0][3] * vector if parts else 0
    dense = torch.zeros(groups, rows, taps * channels)
    for first_block, n_blocks, _, n_rows, group in parts:
        for block in range(first_block, first_block + n_blocks):
            first_column, n_columns, entry, low, high = arrays["blocks"][block].tolist()
            columns = arrays["columns"][first_column : first_column + n_columns]
            counts = arrays["counts"][entry : entry + n_rows].tolist()
            assert counts == sorted(counts, reverse=True)
            if n_columns:
                at = columns // channels
                assert (int(at.min()), int(at.max())) == (low, high)
            nonzero = int(arrays["first_nonzero"][block])
            for e in range(n_rows):
                row = int(arrays["rows"][entry + e]) * vector
                for i in range(nonzero, nonzero + counts[e]):
                    column = int(columns[arrays["positions"][i].item() & 0xFFFF])
                    values = packed.values[i * vector : (i + 1) * vector]
                    dense[group, row : row + vector, column] = values
                nonzero += counts[e]
    return dense


def by_column(weight: Tensor, groups: int) -> Tensor:
    """[groups, K / groups, taps · channels], columns as the lists number them."""
    k, c, kh, kw = weight.shape
    return (
        weight.reshape(groups, k // groups, c, kh * kw)
        .transpose(2, 3)
        .reshape(groups, k // groups, -1)
    )


def transposed_by_column(weight: Tensor, groups: int) -> Tensor:
    k, c, kh, kw = weight.shape
    turned = weight.reshape(groups, k // groups, c, kh * kw).permute(0, 2, 3, 1)
    return turned.reshape(groups, c, -1)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 9), st.integers(0, 40), st.sampled_from([1, 3, 9]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.sampled_from(sorted(STRUCTURES)),
)  # fmt: skip
def test_lists_hold_exactly_the_nonzeros(groups, rows, channels, taps, density, structure):
    weight = sparse_weight((groups * rows, channels, taps, 1), density)
    pattern = pack_pattern(weight, groups=groups, structure=structure)
    mask = live_mask(weight, groups, STRUCTURES[structure])
    assert torch.equal(pattern.mask(), mask)
    assert pattern.nonzeros == int(mask.sum())
    if weight.numel() == 0:
        return
    forward = walk(pattern.forward_list(), groups, taps, channels)
    assert torch.equal(forward[:, :rows], by_column(weight, groups))
    assert not forward[:, rows:].any()
    transposed = walk(pattern.transposed_list(), groups, taps, rows)
    assert torch.equal(transposed, transposed_by_column(weight, groups))
    element = pattern.element_list()
    assert element.nonzeros == pattern.nonzeros
    assert torch.equal(walk(element, groups, taps, channels), by_column(weight, groups))


@needs_native
@pytest.mark.parametrize("shape", [(40, 300, 3, 3), (300, 7, 3, 3), (5, 1, 7, 7), (3, 700, 1, 1)])
def test_large_lists_are_cut_into_blocks_and_lose_nothing(shape):
    weight = sparse_weight(shape, 0.2)
    k, c, kh, kw = shape
    pattern = pack_pattern(weight)
    assert torch.equal(walk(pattern.forward_list(), 1, kh * kw, c), by_column(weight, 1))
    assert torch.equal(
        walk(pattern.transposed_list(), 1, kh * kw, k), transposed_by_column(weight, 1)
    )


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_lists_do_not_depend_on_threads(threads):
    weight = sparse_weight((33, 20, 3, 3), 0.2)
    before = torch.get_num_threads()
    expected = pack_pattern(weight)
    lists = (expected.forward_list(), expected.transposed_list())
    try:
        torch.set_num_threads(threads)
        found = pack_pattern(weight)
        for a, b in zip((found.forward_list(), found.transposed_list()), lists, strict=True):
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.sources, b.sources)
            assert torch.equal(a.arrays["positions"], b.arrays["positions"])
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinity_are_alive_and_negative_zero_is_not():
    weight = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-45]).reshape(5, 1, 1, 1)
    assert pack_pattern(weight).mask().flatten().tolist() == [True, True, False, False, True]


@needs_native
def test_new_values_are_copied_and_the_lists_are_kept():
    weight = sparse_weight((8, 8, 3, 3), 0.3)
    pattern = pack_pattern(weight)
    first = pattern.forward_list()
    weight.mul_(2.0)
    assert not pattern.follows(weight)
    assert pattern.update(weight) is False
    assert pattern.forward_list() is first
    assert torch.equal(walk(first, 1, 9, 8), by_column(weight, 1))
    assert torch.equal(walk(pattern.transposed_list(), 1, 9, 8), transposed_by_column(weight, 1))


@needs_native
def test_a_new_nonzero_rebuilds():
    weight = sparse_weight((8, 8, 3, 3), 0.3)
    pattern = pack_pattern(weight)
    before, first = pattern.nonzeros, pattern.forward_list()
    weight.view(-1)[(weight == 0).view(-1).nonzero()[0]] = 7.0
    assert pattern.update(weight) is True
    assert pattern.nonzeros == before + 1
    assert pattern.forward_list() is not first
    assert torch.equal(walk(pattern.forward_list(), 1, 9, 8), by_column(weight, 1))


def test_the_same_tensor_is_followed_and_a_new_one_at_its_address_is_not():
    weight = sparse_weight((4, 4, 1, 1), 1.0)
    pattern = pack_pattern(weight)
    assert pattern.follows(weight)
    assert pattern.follows(weight.view(4, 4, 1, 1))
    assert not pattern.follows(weight.transpose(0, 1))
    assert not pattern.follows(weight.clone())
    del weight
    gc.collect()
    assert not pattern.follows(sparse_weight((4, 4, 1, 1), 1.0, seed=1))


def test_an_inference_tensor_is_never_taken_for_granted():
    with torch.inference_mode():
        weight = sparse_weight((4, 4, 1, 1), 0.5)
        pattern = pack_pattern(weight)
        assert not pattern.follows(weight)
        weight.fill_(1.0)
        assert pattern.update(weight) is True
        assert pattern.nonzeros == 16


def test_a_mask_keeps_live_zeros_and_refuses_what_it_does_not_cover():
    weight = torch.zeros(4, 4, 1, 1)
    keep = torch.zeros(4, 4, 1, 1, dtype=torch.bool)
    keep[1, 2] = True
    pattern = pack_pattern(weight, keep=keep)
    assert pattern.nonzeros == 1
    weight[1, 2] = 3.0
    assert pattern.update(weight) is False
    weight[0, 0] = 1.0
    with pytest.raises(ValueError, match="Expected weight to be zero wherever"):
        pattern.update(weight)
    with pytest.raises(ValueError, match="Expected weight to be zero wherever"):
        pack_pattern(weight, keep=keep)


BAD = {
    "not-a-tensor": (lambda w: pack_pattern([1.0]), TypeError, "weight to be a Tensor, got list"),
    "integers": (lambda w: pack_pattern(w.long()), TypeError, "floating tensor, got"),
    "three-axes": (lambda w: pack_pattern(w[0]), ValueError, "4 axes"),
    "structure": (lambda w: pack_pattern(w, structure="row"), ValueError, "structure to be one of"),
    "groups": (lambda w: pack_pattern(w, groups=3), ValueError, "groups to be a positive divisor"),
    "no-groups": (lambda w: pack_pattern(w, groups=0), ValueError, "groups to be a positive"),
    "mask-shape": (
        lambda w: pack_pattern(w, keep=torch.ones(2, dtype=torch.bool)),
        ValueError,
        "keep to be a bool tensor of shape",
    ),
    "mask-type": (lambda w: pack_pattern(w, keep=w), ValueError, "keep to be a bool tensor"),
    "other-weight": (lambda w: pack_pattern(w).update(w[:2]), ValueError, "shape .*got"),
    "too-large": (
        lambda w: pack_pattern(torch.empty(1).expand(1 << 16, 1 << 15, 1, 1)),
        ValueError,
        "fewer than 2\\^31",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(4, 2, 3, 3))


def test_a_pattern_can_be_made_without_native_kernels(monkeypatch):
    weight = sparse_weight((10, 4, 3, 3), 0.1)
    monkeypatch.setattr("sparsemtl.ops.pattern.why_not_native", lambda *_: "not built")
    pattern = pack_pattern(weight, groups=2, structure="vector(4)")
    assert isinstance(pattern, Pattern)
    assert torch.equal(pattern.mask(), live_mask(weight, 2, 4))
    weight.fill_(1.0)
    assert pattern.update(weight) is True


@needs_native
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_outlives_its_pattern(copied):
    weight = sparse_weight((40, 30, 3, 3), 0.3)
    x = torch.randn(1, 30, 9, 9)
    pattern = pack_pattern(weight)
    expected = sparse_conv2d(x, weight, pattern=pattern)
    found = copied(pattern)
    del pattern
    gc.collect()
    other = [torch.full((40 * 30 * 9,), float("nan")) for _ in range(20)]  # where the lists were
    assert torch.equal(sparse_conv2d(x, weight, pattern=found), expected)
    assert len(other) == 20


@needs_native
@pytest.mark.parametrize("vector", [1, 8])
def test_a_whole_list_is_one_block(vector):
    weight = sparse_weight((16, 300, 3, 3), 0.05)
    structure = "element" if vector == 1 else f"vector({vector})"
    pattern = pack_pattern(weight, structure=structure)
    packed = pattern.forward_list(whole=True)
    assert packed.sizes[1] == 1
    blocked = pattern.forward_list()
    assert torch.equal(walk(packed, 1, 9, 300), walk(blocked, 1, 9, 300))
