"""Batches are a function of (seed, step) alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemtl.training.batches import BatchStream


@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    start=st.integers(0, 20),
    seed=st.integers(0, 5),
)
def test_a_resumed_stream_continues_the_same_batches(size, batch_size, start, seed):
    whole = list(BatchStream(size, batch_size, seed, 0, 25))
    assert list(BatchStream(size, batch_size, seed, start, 25)) == whole[start:]
    assert all(len(batch) == batch_size for batch in whole)


@given(size=st.integers(1, 30), batch_size=st.integers(1, 10))
def test_each_epoch_sees_every_sample_once(size, batch_size):
    flat = [p for batch in BatchStream(size, batch_size, 0, 0, 3 * size) for p in batch]
    for epoch in range(2):
        seen = [i for i, e in flat if e == epoch]
        assert sorted(seen) == list(range(size))


def test_seeds_differ():
    assert list(BatchStream(100, 10, 0, 0, 5)) != list(BatchStream(100, 10, 1, 0, 5))


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match="Expected at least one training sample, got 0"):
        BatchStream(0, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="Expected batch_size >= 1, got 0"):
        BatchStream(1, 0, 0, 0, 1)
