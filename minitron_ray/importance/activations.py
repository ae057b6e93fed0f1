"""`Activations`: the hidden states of the whole calibration set between two layers of a streamed model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor


class Activations:
    """A context. The residual stream of every batch before the last `depth` positions that were put.

    In host memory, or in memory-mapped files that are gone when the context ends. Numbers are kept as they
    are: numpy has no bfloat16, so its bits are stored.
    """

    def __init__(self, batches: int, depth: int, folder: Path | None) -> None:
        """`folder` is where the files go; None keeps everything in memory."""
        self._depth, self._parent = depth, folder
        self._slots: list[list[Tensor | None]] = [[None] * batches for _ in range(depth)]
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        if self._parent is not None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(prefix="activations-", dir=self._parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slots.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, position: int, batch: int, stream: Tensor) -> None:
        """Keep the stream before layer `position`; what was kept `depth` positions before is overwritten."""
        slot = self._slots[position % self._depth]
        if self._folder is None:
            slot[batch] = stream.cpu()
            return
        if (file := slot[batch]) is None:
            path = Path(self._folder.name, f"{position % self._depth}-{batch}")
            bits = np.memmap(path, dtype=np.uint8, mode="w+", shape=stream.numel() * stream.element_size())
            file = slot[batch] = torch.from_numpy(bits).view(stream.dtype).view(stream.shape)
        file.copy_(stream)

    def get(self, position: int, batch: int, device: torch.device) -> Tensor:
        """A stream that was put, on `device`; not to be written to."""
        kept = self._slots[position % self._depth][batch]
        assert kept is not None
        return kept.to(device) if kept.device != device or self._folder is None else kept.clone()
