"""Sets are disjoint, and the order of training is a function of seed, epoch and step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.batches import batch_indices, rank_slice
from minitron_ray.data.splits import split


def test_splits_cover_everything_once() -> None:
    sets = split(100, 32, 16, 4, 256)
    assert (len(sets.calibration), len(sets.validation), len(sets.train)) == (32, 16, 52)
    assert sorted([*sets.calibration, *sets.validation, *sets.train]) == list(range(100))


def test_exactly_enough_and_one_too_few() -> None:
    assert len(split(68, 32, 32, 4, 256).train) == 4
    expected = (
        r"the text gives 67 sequences of 256 tokens; calibration 32 \+ validation 32 \+ at least 4 for "
        r"training need 68; add text, or lower data\.calibration"
    )
    with pytest.raises(ConfigError, match=expected):
        split(67, 32, 32, 4, 256)


@given(
    start=st.integers(0, 50), length=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 2**40)
)
def test_every_epoch_sees_every_sequence_once(start: int, length: int, batch: int, seed: int) -> None:
    train = range(start, start + length)
    steps = -(-2 * length // batch)
    stream = np.concatenate([batch_indices(train, step, batch, seed) for step in range(steps)])
    for epoch in (0, 1):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(train)


def test_order_depends_on_seed_and_epoch_and_not_on_the_batch() -> None:
    train = range(64, 164)
    first = batch_indices(train, 0, 100, seed=3)
    assert first.dtype == np.int64
    assert np.array_equal(first, np.concatenate([batch_indices(train, step, 20, 3) for step in range(5)]))
    assert not np.array_equal(first, batch_indices(train, 1, 100, 3))
    assert not np.array_equal(first, batch_indices(train, 0, 100, 4))
    first[:] = 0  # a caller's copy: the order itself stays
    assert len(set(batch_indices(train, 0, 100, 3).tolist())) == 100


def test_the_order_is_pinned() -> None:
    """Resuming a run with another version of numpy must not change what it trains on."""
    assert batch_indices(range(10, 20), 0, 10, seed=0).tolist() == PINNED


PINNED = [14, 16, 12, 17, 13, 15, 19, 10, 18, 11]


@given(batch=st.integers(1, 20), world=st.integers(1, 24))
def test_ranks_share_a_batch(batch: int, world: int) -> None:
    indices = np.arange(batch)
    shares = [rank_slice(indices, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="no batch 0 of 4 out of 0 sequences"):
        batch_indices(range(0), 0, 4, 0)
    with pytest.raises(ValueError, match="no rank 2 among 2"):
        rank_slice(np.arange(4), 2, 2)
