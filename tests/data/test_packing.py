"""Rows are the documents' stream cut up, however the documents come; sources take turns by weight."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.data.packing import Group, Rows, Turns, rows_of_each

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), max_size=12)


def groups(documents: list[list[int]], cuts: list[int]) -> Iterator[Group]:
    """The documents, in groups that end at the cuts."""
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(documents)}), len(documents)]
    for low, high in itertools.pairwise(bounds):
        if low < high:
            yield Group.of([np.array(ids, dtype=np.uint32) for ids in documents[low:high]])


def counted(documents: list[list[int]], length: int, limit: int | None, taken: int | None) -> dict[str, int]:
    """What one pass over the documents, one at a time, would count."""
    begun = read = 0
    wanted = limit if taken is None else taken
    for ids in documents:
        if wanted is not None and read >= wanted * length:
            break
        begun, read = begun + 1, read + len(ids)
    sequences = read // length if wanted is None else min(wanted, read // length)
    return {
        "documents": begun,
        "sequences": sequences,
        "tokens": sequences * length,
        "dropped": read - sequences * length,
    }


@given(
    documents=DOCUMENTS,
    length=st.integers(1, 9),
    limit=st.none() | st.integers(1, 5),
    cuts=st.lists(st.integers(1, 11), max_size=5),
    steps=st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_packing_loses_only_the_tail(
    documents: list[list[int]], length: int, limit: int | None, cuts: list[int], steps: list[int]
) -> None:
    rows = Rows(groups(documents, cuts), length, limit)
    taken = [rows.take(step) for step in steps]
    while len(block := rows.take(3)):
        taken.append(block)
    stream = [token for ids in documents for token in ids]
    expected = len(stream) // length if limit is None else min(limit, len(stream) // length)
    packed = np.concatenate(taken)
    assert packed.shape == (expected, length) and packed.dtype == np.uint32
    assert packed.ravel().tolist() == stream[: expected * length]
    assert rows.counts() == counted(documents, length, limit, None)


@given(
    documents=DOCUMENTS,
    length=st.integers(1, 9),
    take=st.integers(0, 5),
    cuts=st.lists(st.integers(1, 11), max_size=5),
)
def test_what_was_read_ahead_is_not_counted(
    documents: list[list[int]], length: int, take: int, cuts: list[int]
) -> None:
    """However large the groups are: tasks read more at once than a single process."""
    rows = Rows(groups(documents, cuts), length)
    taken = len(rows.take(take))
    whole = taken == sum(map(len, documents)) // length
    assert rows.counts() == counted(documents, length, None, None if whole else taken)


@given(
    shares=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    blocks=st.lists(st.integers(0, 40), min_size=1, max_size=8),
)
def test_sources_take_turns_by_weight_and_not_by_blocks(shares: list[int], blocks: list[int]) -> None:
    weights = [share / sum(shares) for share in shares]
    turns = Turns(weights)
    found = np.concatenate([turns.take(block) for block in blocks])
    due = [(0.5 / weight, number, 0) for number, weight in enumerate(weights)]
    heapq.heapify(due)
    expected = []
    for _ in range(sum(blocks)):
        _, number, had = due[0]
        expected.append(number)
        heapq.heapreplace(due, ((had + 1.5) / weights[number], number, had + 1))
    assert found.tolist() == expected
    for rows in range(len(found) + 1):
        counts = np.bincount(found[:rows], minlength=len(weights))
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - rows * weight) <= (1 + len(weights)) / 2
    assert rows_of_each(weights, len(found)) == np.bincount(found, minlength=len(weights)).tolist()


def test_the_order_of_a_mixture_is_pinned() -> None:
    """A run that goes on with another version of numpy must find the same order."""
    assert Turns([0.5, 0.3, 0.2]).take(10).tolist() == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]


def test_many_rows_are_counted_in_blocks() -> None:
    assert rows_of_each([0.75, 0.25], 0) == [0, 0]
    assert rows_of_each([0.75, 0.25], 200_000) == [150_000, 50_000]
