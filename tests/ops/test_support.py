"""The comparison itself must fail on wrong results; a harness that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch

from tests.ops.support import TOLERANCE, assert_matches, assert_sum_matches

WRONG = {
    "scaled": lambda x: x * 1.01,
    "shifted": lambda x: x + 0.01,
    "negated": lambda x: -x,
    "transposed": lambda x: x.t().contiguous(),
    "zeroed": torch.zeros_like,
    "one-nan": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 3, float("nan"), x),
}


@pytest.mark.parametrize("storage", TOLERANCE, ids=str)
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_result_is_refused(change, storage):
    right = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(storage)
    assert_matches(right, right.double(), storage)
    with pytest.raises(AssertionError):
        assert_matches(change(right).to(storage), right.double(), storage)


def test_a_result_in_another_type_is_refused():
    with pytest.raises(AssertionError):
        assert_matches(torch.ones(3), torch.ones(3).double(), torch.bfloat16)


@pytest.mark.parametrize("factor", [0.99, -1.0, 0.0])
def test_a_wrong_sum_is_refused(factor):
    terms = [torch.rand(1000, generator=torch.Generator().manual_seed(0))]
    total = terms[0].double().sum()
    assert_sum_matches(total.float(), total, terms)
    with pytest.raises(AssertionError):
        assert_sum_matches((total * factor).float(), total, terms)


def test_fresh_memory_is_poisoned():
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.ones(5, dtype=torch.float16)).isnan().all()
