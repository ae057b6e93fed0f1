"""Blocks cover what is needed, take what is there, and come back as they were written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.distillation.blocks import block_bytes, cover, open_block, write_block

LENGTH = 512
"""Tokens a sequence: blocks begin with 8 sequences and grow to 512."""


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
def test_every_budget_finds_what_the_ones_before_it_made(budgets: list[int]) -> None:
    made: set[range] = set()
    sequences: set[int] = set()
    for count in budgets:
        blocks = cover(count, LENGTH, 3000, made.__contains__)
        assert blocks[0].start == 0 and count <= blocks[-1].stop <= 3000
        assert all(a.stop == b.start for a, b in pairwise(blocks))
        for block in blocks:
            assert len(block) & (len(block) - 1) == 0 and block.start % len(block) == 0 and len(block) <= 512
        new = [block for block in blocks if block not in made]
        assert all(block.stop <= count for block in new)  # nothing that is not needed
        assert not sequences & {place for block in new for place in block}  # nothing twice
        made |= set(new)
        sequences |= {place for block in new for place in block}


def test_a_small_experiment_has_work_for_two_and_a_large_one_few_blocks() -> None:
    def sizes(count: int) -> list[int]:
        return [len(block) for block in cover(count, LENGTH, count, lambda block: False)]

    assert sizes(32) == [8, 8, 16]
    assert sizes(21) == [8, 8, 4, 1]
    assert len(sizes(1_000_000)) < 1_000_000 / 512 + 20
    assert cover(0, LENGTH, 10, lambda block: False) == []
    assert [len(block) for block in cover(3, 2**20, 3, lambda block: False)] == [1, 1, 1]


def test_arrays_come_back_as_they_were_appended(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    batches = [
        {"a": source.normal(size=(n, 3)).astype(np.float16), "b": source.integers(0, 9, (2 * n, 1, 2))}
        for n in (4, 1, 2)
    ]
    write_block(tmp_path, batches)
    found = open_block(tmp_path)
    for name in ("a", "b"):
        np.testing.assert_array_equal(found[name], np.concatenate([batch[name] for batch in batches]))
    assert block_bytes(tmp_path) == sum(array.nbytes for batch in batches for array in batch.values())
