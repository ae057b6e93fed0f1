"""The teacher as students see it: running beside them, or read from what was stored of it.

Whoever measures a student gets the final hidden states, which are exact. Whoever trains one gets
`targets`: final hidden states too, or a few probabilities a token (see `signals/`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import path
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from minitron_ray.distillation import SignalKind
from minitron_ray.distillation.blocks import LIST, open_block, write_block
from minitron_ray.distillation.signal import StoredSignal
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.weights.headless import Headless, final_hidden
from minitron_ray.weights.vocabulary import common_rows

EXACT: Final = FinalHidden()
"""The signal that losses are measured with."""
_SEQUENCES: Final = "sequences.npy"
_OPEN_BLOCKS: Final = 64
"""Blocks that stay mapped; training goes through them in order."""

Targets: TypeAlias = Tensor | SparseTargets
"""Final hidden states (samples, tokens, hidden), or sparse targets (samples, tokens - 1, slots)."""


class TeacherSignal(Protocol):
    """What the student learns from. `head` is the LM head's weight, (vocabulary, hidden), without rows that
    the student's has not; `softcap` the soft cap of its logits."""

    @property
    def head(self) -> Tensor: ...

    @property
    def softcap(self) -> float | None: ...

    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        """Final hidden states (samples, tokens, hidden) of the sequences with these indices and tokens."""

    def targets(self, indices: Sequence[int], input_ids: Tensor) -> Targets:
        """What a student is trained with on these sequences."""


class OnlineTeacher:
    """Runs the teacher on each batch. Its parameters are frozen, in the dtype of the computation, and spread
    over the workers or not, but for the head, of which the first `vocabulary` rows count (None: all)."""

    def __init__(self, model: Headless, vocabulary: int | None = None) -> None:
        self.model = model
        self._head = common_rows(model.head.detach(), vocabulary)

    @property
    def head(self) -> Tensor:
        return self._head

    @property
    def softcap(self) -> float | None:
        return self.model.softcap

    @torch.no_grad()
    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        return self.model(input_ids, final_hidden)

    def targets(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        return self.hidden(indices, input_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalBlock:
    """A block of a stored signal, and the sequences that it holds, in their order."""

    folder: Path
    signal: StoredSignal
    sequences: Sequence[int]


class StoredTeacher:
    """Reads what `write_signal` listed, memory-mapped. `head` and `softcap` come from the teacher's checkpoint."""

    def __init__(self, folder: Path, head: Tensor, softcap: float | None = None) -> None:
        self._head, self._softcap = head, softcap
        self._blocks = list(read_signal(folder))
        self._places = {
            int(sequence): (number, row)
            for number, block in enumerate(self._blocks)
            for row, sequence in enumerate(block.sequences)
        }
        self._open = lru_cache(maxsize=_OPEN_BLOCKS)(open_block)

    @property
    def head(self) -> Tensor:
        return self._head

    @property
    def softcap(self) -> float | None:
        return self._softcap

    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        """Raises ValueError for sequences of which something else is stored: losses would not be exact."""
        signal = self._signal(indices)
        if signal != EXACT:
            raise ValueError(
                f"of sequence {indices[0]} is stored {signal.label}, not the final hidden states"
            )
        found = self.targets(indices, input_ids)
        assert isinstance(found, Tensor)
        return found

    def targets(self, indices: Sequence[int], input_ids: Tensor) -> Targets:
        signal, rows = self._signal(indices), []
        for index in indices:
            number, row = self._places[int(index)]
            rows.append(signal.row(self._open(self._blocks[number].folder), row))
        return signal.decode(rows, input_ids.device)

    def _signal(self, indices: Sequence[int]) -> StoredSignal:
        """The kind that all of these sequences have. Raises KeyError for one that has none."""
        kinds = [self._blocks[self._places[int(index)][0]].signal for index in indices]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"one batch holds sequences of {kinds[0].label} and of another kind")
        return kinds[0]


def write_signal(folder: Path, blocks: Sequence[SignalBlock]) -> None:
    """List the blocks of a signal in `folder`; they are named relative to it."""
    parts = [
        {
            "block": path.relpath(block.folder, folder),
            "signal": block.signal.model_dump(mode="json"),
            "sequences": len(block.sequences),
        }
        for block in blocks
    ]
    numbers: NDArray = np.concatenate([np.asarray(block.sequences, dtype=np.int64) for block in blocks])
    np.save(folder / _SEQUENCES, numbers)
    (folder / LIST).write_text(json.dumps(parts, indent=1) + "\n")


def read_signal(folder: Path) -> Iterator[SignalBlock]:
    """What `write_signal` listed."""
    kind: TypeAdapter[StoredSignal] = TypeAdapter(SignalKind)
    numbers, start = np.load(folder / _SEQUENCES), 0
    for part in json.loads((folder / LIST).read_text()):
        stop = start + part["sequences"]
        yield SignalBlock(
            folder=folder / part["block"],
            signal=kind.validate_python(part["signal"]),
            sequences=numbers[start:stop].tolist(),
        )
        start = stop


def compute_block(
    block: SignalBlock,
    folder: Path | None,
    teacher: Headless,
    sequences: Callable[[NDArray], NDArray],
    *,
    dtype: torch.dtype,
    batch: int,
    seed: int,
    vocabulary: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    ranks: dist.ProcessGroup | None = None,
) -> None:
    """Run the teacher on a block's sequences and write what its signal keeps to `folder`.

    `sequences(indices)` gives the tokens, int64 (n, tokens); `progress` is called with the number of
    sequences done so far. Final hidden states are rounded to `dtype`, that of the computation. Probabilities
    are over the first `vocabulary` rows of the LM head, None for all.

    Of several `ranks` all must call: they take turns at the batches, which are those of one process, and rank 0
    writes; the others' `folder` is None.
    """
    device, numbers = teacher.head.device, np.asarray(block.sequences, dtype=np.int64)
    head = common_rows(teacher.head.detach(), vocabulary).to(dtype)
    rank, world = (0, 1) if ranks is None else (dist.get_rank(ranks), dist.get_world_size(ranks))

    def batches() -> Iterator[dict[str, NDArray]]:
        for start in range(0, len(numbers), batch * world):
            chosen = numbers[start + rank * batch :][:batch]
            with torch.no_grad():
                # As many passes on every rank: where the teacher is spread over them they are collectives.
                ids = sequences(chosen if len(chosen) else numbers[:1])
                hidden = teacher(torch.from_numpy(ids).to(device), final_hidden).to(dtype)
                arrays = None
                if len(chosen):
                    arrays = block.signal.encode(hidden, head, teacher.softcap, chosen.tolist(), seed)
            yield from _in_order(arrays, ranks)
            progress(min(start + batch * world, len(numbers)))

    if folder is not None:
        write_block(folder, batches())
        return
    for _ in batches():
        pass


def _in_order(
    arrays: dict[str, NDArray] | None, ranks: dist.ProcessGroup | None
) -> Iterator[dict[str, NDArray]]:
    """The batches of one turn, each a rank's (None: it had none), on rank 0; none on the others."""
    found = [arrays]
    if ranks is not None:
        found = [None] * dist.get_world_size(ranks)
        dist.gather_object(arrays, found if dist.get_rank(ranks) == 0 else None, group=ranks, group_dst=0)
    yield from (one for one in found if one is not None)
