"""Blocks of a stored signal: which sequences go together, and the files of one block.

A block is a folder with one file of bytes for each array and `block.json`, which says what they are:

    hidden.bin, entries.bin, ...    rows of the array, one batch after the other
    block.json                      {name: {"dtype": "<i2", "row": [tokens, hidden]}}

The sequences that training sees stand in one order, whatever the token budget: a smaller budget sees a
beginning of it. Blocks have fixed places in that order, so that a larger one adds blocks to those that
are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.errors import MinitronError
from minitron_ray.results.cache import DONE

FIRST_TOKENS: Final = 2**12
"""Size of the block at the beginning: small experiments have work for several workers."""
LARGEST_TOKENS: Final = 2**18
"""Largest block: some GB of final hidden states, and thousands of blocks for billions of tokens."""
LIST: Final = "signal.json"
"""Names the blocks of one signal, in a folder beside theirs."""
_INDEX: Final = "block.json"


def cover(count: int, length: int, available: int, exists: Callable[[range], bool]) -> list[range]:
    """Blocks that hold the first `count` of `available` sequences of `length` tokens, as ranges of places.

    A block has 2^k sequences and begins at a multiple of 2^k. At each place the largest block that
    exists is taken, else the largest that does not go past `count`: nothing is computed that is there,
    or that is not needed.
    """
    largest, first = (_power(tokens // length) for tokens in (LARGEST_TOKENS, FIRST_TOKENS))
    blocks, start = [], 0
    while start < count:
        # The lowest bit of a place is the largest power of two that divides it.
        size = min(largest, start & -start if start else first)
        sizes = [size >> k for k in range(size.bit_length())]
        ranges = [range(start, start + size) for size in sizes if start + size <= available]
        found = next((block for block in ranges if exists(block)), None)
        block = found or next(block for block in ranges if block.stop <= count)
        blocks.append(block)
        start = block.stop
    return blocks


def _power(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << (max(1, number).bit_length() - 1)


def write_block(folder: Path, batches: Iterable[Mapping[str, NDArray]]) -> None:
    """Write arrays, given batch by batch, all batches with the same names, types and rows."""
    layout: dict[str, dict[str, Any]] = {}
    files: dict[str, BinaryIO] = {}
    with ExitStack() as stack:
        for arrays in batches:
            for name, array in arrays.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.bin").open("wb"))
                    layout[name] = {"dtype": array.dtype.str, "row": list(array.shape[1:])}
                np.ascontiguousarray(array).tofile(files[name])
    (folder / _INDEX).write_text(json.dumps(layout, sort_keys=True) + "\n")


def open_block(folder: Path) -> dict[str, NDArray]:
    """The arrays of a block, memory-mapped. Raises MinitronError where it is not there."""
    try:
        layout: dict[str, dict[str, Any]] = json.loads((folder / _INDEX).read_text())
        return {
            name: np.memmap(folder / f"{name}.bin", dtype=item["dtype"], mode="r").reshape(-1, *item["row"])
            for name, item in layout.items()
        }
    except FileNotFoundError as error:
        raise MinitronError(
            f"the teacher's signal is incomplete: {error.filename} is missing; remove the folder "
            f"{folder} and run again"
        ) from None


def blocks_exist(listed: Path) -> bool:
    """Whether all blocks that the folder `listed` names are there, whole."""
    if not (listed / LIST).is_file():
        return False
    parts = json.loads((listed / LIST).read_bytes())
    return all((listed / part["block"] / DONE).is_file() for part in parts)


def block_bytes(folder: Path) -> int:
    """Size of a block's arrays on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.bin"))
