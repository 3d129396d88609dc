"""Structures: names, groups, and masks of whole groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemtl.sparsity.structure import n_of_m_mask, parse_structure, take_largest

NAMES = ["element", "vector(8)", "block(64,64)", "block(3,2)", "channel", "2:4", "1:4"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_and_written(name):
    structure = parse_structure(name)
    assert str(structure) == name
    assert parse_structure(f" {name} ".replace(",", " , ")) == structure
    assert parse_structure(structure) is structure


@pytest.mark.parametrize(
    "bad", ["", "blocks", "block(64)", "vector(0)", "block(0,4)", "4:2", "0:4"]
)
def test_another_name_is_refused(bad):
    with pytest.raises(ValueError, match=r"parse_structure: Expected one of element, vector"):
        parse_structure(bad)
    with pytest.raises(TypeError, match="Expected a str, got int"):
        parse_structure(3)


def test_groups_by_hand():
    weight = torch.arange(12.0).reshape(3, 4, 1, 1)
    block = parse_structure("block(2,3)")
    assert block.sizes(weight.shape).flatten().tolist() == [6, 2, 3, 1]
    sums = [0 + 1 + 4 + 16 + 25 + 36, 9 + 49, 64 + 81 + 100, 121]
    torch.testing.assert_close(block.norms(weight).flatten() ** 2, torch.tensor(sums).float())
    roots = block.magnitudes(weight).flatten() ** 2 * torch.tensor([6, 2, 3, 1])
    torch.testing.assert_close(roots, torch.tensor(sums).float())
    means = block.scores(weight).flatten()
    torch.testing.assert_close(means, torch.tensor([3.0, 5.0, 9.0, 11.0]))
    spread = block.expand(torch.arange(4.0).reshape(2, 2, 1), weight.shape)
    assert spread.reshape(3, 4).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [2, 2, 2, 3]]


def test_a_channel_is_all_taps_of_an_output():
    weight = torch.randn(5, 3, 3, 2)
    channel = parse_structure("channel")
    assert channel.sizes(weight.shape).flatten().tolist() == [18] * 5
    torch.testing.assert_close(channel.norms(weight).flatten(), weight.flatten(1).norm(dim=1))


@given(
    shape=st.sampled_from(
        [(7, 5, 3, 3), (64, 3, 7, 7), (1, 1), (6, 9), (4, 0, 1, 1), (5, 70, 1, 1)]
    ),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 9),
    share=st.floats(0.0, 1.0),
)
def test_masks_are_whole_groups_and_meet_the_count(shape, name, seed, share):
    structure = parse_structure(name)
    rng = torch.Generator().manual_seed(seed)
    scores = [[torch.rand(shape, generator=rng) + 1e-3], [torch.rand(11, 4, 3, 3, generator=rng)]]
    sizes = [structure.sizes(layer.shape).flatten() for group in scores for layer in group]
    total = sum(int(s.sum()) for s in sizes)
    if structure.n_of_m is not None:
        n, m = structure.n_of_m
        total = sum(int(n_of_m_mask(layer, n, m).sum()) for group in scores for layer in group)
    kept = int(share * total)
    masks, cut = structure.masks(scores, kept)
    found = sum(int(m.sum()) for group in masks for m in group)
    left = []
    for mask, layer in (
        (m, s) for g, h in zip(masks, scores, strict=True) for m, s in zip(g, h, strict=True)
    ):
        assert mask.shape == layer.shape
        assert mask.dtype is torch.bool
        if layer.numel() == 0:
            continue
        if structure.n_of_m is not None:
            assert not (mask & ~n_of_m_mask(layer, *structure.n_of_m)).any()
            continue
        alive = structure.scores(mask.float())
        assert ((alive == 0) | (alive == 1)).all()  # no group is half alive
        left += structure.sizes(layer.shape)[(alive == 0)].tolist()
        assert (structure.scores(layer)[alive == 1] >= cut).all()
    if structure.grouped:
        assert found <= kept < found + min(left, default=kept - found + 1)
    else:
        assert found == kept


def test_the_largest_that_fit_are_taken():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 2.0, 1.0])
    sizes = torch.tensor([4, 8, 4, 2, 2, 1])
    assert take_largest(scores, sizes, 11).tolist() == [True, False, True, True, False, True]
    assert take_largest(scores, sizes, 0).tolist() == [False] * 6
    assert take_largest(scores, sizes, 21).tolist() == [True] * 6


def test_n_of_m_breaks_ties_by_the_lower_channel():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, 0.0, 2.0]])
    assert n_of_m_mask(scores, 2, 4).int().tolist() == [[1, 1, 0, 0, 1, 0, 1]]


def test_too_many_for_n_of_m_and_nan_are_refused():
    with pytest.raises(ValueError, match="at most 8 weights to keep with 2:4, got 9"):
        parse_structure("2:4").masks([[torch.ones(4, 4)]], 9)
    with pytest.raises(ValueError, match="without NaN"):
        parse_structure("block(2,2)").masks([[torch.full((4, 4), float("nan"))]], 4)
