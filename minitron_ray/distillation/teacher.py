"""The teacher's signal: its final hidden states, computed as needed or read from a file.

Final hidden states are exact (the LM head turns them back into logits) and cost `hidden` values a
token instead of `vocabulary`. Written once for the sequences that every candidate is trained and
judged on, they save each of them the teacher's forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minitron_ray.weights.headless import Headless, final_hidden


class TeacherSignal(Protocol):
    """What the student learns from. `head` is the LM head's weight, (vocabulary, hidden), `softcap` the soft
    cap of its logits."""

    @property
    def head(self) -> Tensor: ...

    @property
    def softcap(self) -> float | None: ...

    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        """Final hidden states (samples, tokens, hidden) of the sequences with these indices and tokens."""


class OnlineTeacher:
    """Runs the teacher on each batch. Its parameters are frozen, in the dtype of the computation."""

    def __init__(self, model: Headless) -> None:
        self._model = model
        head = model.head.detach()
        # Sharded models hold their head in parts; the loss needs it whole.
        self._head = head.full_tensor() if hasattr(head, "full_tensor") else head

    @property
    def head(self) -> Tensor:
        return self._head

    @property
    def softcap(self) -> float | None:
        return self._model.softcap

    @torch.no_grad()
    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        return self._model(input_ids, final_hidden)


class StoredTeacher:
    """Reads what `store_hidden` wrote, memory-mapped. `head` and `softcap` come from the teacher's checkpoint."""

    def __init__(self, folder: Path, head: Tensor, softcap: float | None = None) -> None:
        self._head, self._softcap = head, softcap
        self._rows = {int(index): row for row, index in enumerate(np.load(folder / "indices.npy"))}
        self._bits = np.load(folder / "hidden.npy", mmap_mode="r")
        self._dtype = getattr(torch, json.loads((folder / "signal.json").read_text())["dtype"])

    @property
    def head(self) -> Tensor:
        return self._head

    @property
    def softcap(self) -> float | None:
        return self._softcap

    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        rows = self._bits[[self._rows[int(index)] for index in indices]]
        return torch.from_numpy(rows).view(self._dtype).to(input_ids.device)


def store_hidden(
    teacher: Headless,
    sequences: Callable[[np.ndarray], np.ndarray],
    indices: np.ndarray,
    folder: Path,
    dtype: torch.dtype,
    batch: int,
    progress: Callable[[int], None],
) -> None:
    """Write the final hidden states of the sequences `indices` to `folder`.

    `sequences(indices)` gives the tokens, int64 (n, tokens); `progress` is called with the number
    of sequences done so far. numpy has no bfloat16: its bits are stored as int16.
    """
    bits = torch.int16 if dtype == torch.bfloat16 else torch.float32
    device = teacher.head.device
    file = None
    for start in range(0, len(indices), batch):
        chosen = indices[start : start + batch]
        with torch.no_grad():
            hidden = teacher(torch.from_numpy(sequences(chosen)).to(device), final_hidden)
        values = hidden.to(dtype).contiguous().view(bits).cpu().numpy()
        if file is None:
            file = np.lib.format.open_memmap(
                folder / "hidden.npy", mode="w+", dtype=values.dtype, shape=(len(indices), *values.shape[1:])
            )
        file[start : start + len(chosen)] = values
        progress(start + len(chosen))
    if file is not None:
        file.flush()
    np.save(folder / "indices.npy", indices)
    (folder / "signal.json").write_text(json.dumps({"dtype": str(dtype).removeprefix("torch.")}))
