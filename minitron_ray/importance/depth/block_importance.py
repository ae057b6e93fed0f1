"""Block Importance: how far layers turn the residual stream (paper §2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from minitron_ray.core.errors import ConfigError
from minitron_ray.importance.metric import ListeningLayerMetric

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class BlockImportance(ListeningLayerMetric):
    """BI = 1 - E[cos(input of layer i, input of layer i+n)] over samples and tokens; what changes nothing
    scores 0. n is 1 for single layers, and each of `blocks`."""

    kind: Literal["block_importance"] = "block_importance"

    @property
    def label(self) -> str:
        return "block_importance"

    def evidence(self, layers: int) -> CosineEvidence:
        if self.blocks and self.blocks[-1] >= layers:
            raise ConfigError(
                f"importance.depth.blocks: a block of {self.blocks[-1]} layers cannot go from a teacher of "
                f"{layers}; name shorter ones"
            )
        return CosineEvidence(layers, (1, *self.blocks))


class CosineEvidence:
    """Sums of cosines, float64."""

    def __init__(self, layers: int, lengths: tuple[int, ...]) -> None:
        self._layers, self.lengths = layers, lengths
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._tokens = 0
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, start: int, length: int, before: Tensor, after: Tensor) -> None:
        import torch

        norms = (self._squares(before) * self._squares(after)).sqrt_().clamp_min_(1e-12)
        total = torch.linalg.vecdot(before.float(), after.float()).div_(norms).sum(dtype=torch.float64)
        key = (length, start)
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        if start == 0 and length == 1:
            self._tokens += norms.numel()

    def _squares(self, stream: Tensor) -> Tensor:
        """Squared norms at each token; kept for the call after, where a layer's output is the next one's input."""
        import torch

        if self._last is None or self._last[0] is not stream:
            wide = stream.float()
            self._last = stream, torch.linalg.vecdot(wide, wide)
        return self._last[1]

    def merge(self, later: CosineEvidence) -> None:
        self._tokens += later._tokens
        for key, value in later._sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def rest(self) -> None:
        self._last = None
        self._sums = {key: value.cpu() for key, value in self._sums.items()}

    def scores(self) -> Mapping[int, NDArray]:
        import numpy as np

        return {
            length: np.asarray(
                [
                    1.0 - float(self._sums[length, start]) / self._tokens
                    for start in range(self._layers - length + 1)
                ]
            )
            for length in self.lengths
        }
