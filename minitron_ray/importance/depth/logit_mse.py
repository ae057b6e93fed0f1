"""How far the logits move when layers are removed (paper's follow-ups: Nemotron Nano 2, Nemotron Elastic)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from minitron_ray.importance.metric import RemovalMetric

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from minitron_ray.evaluation.task import Batch


class LogitMSE(RemovalMetric):
    """Mean squared difference of the whole network's logits and those without the layers, on the
    calibration sequences; needs no labels, so that all positions count, whether documents are apart or not."""

    kind: Literal["logit_mse"] = "logit_mse"
    normalised: bool = False
    """Divide by the mean square of the whole network's logits: 1 is as far off as logits of zero."""

    @property
    def label(self) -> str:
        options = [name for name in ("normalised", "iterative") if getattr(self, name)]
        return f"logit_mse({', '.join(options)})" if options else "logit_mse"

    def values(
        self, outputs: Sequence[Tensor], batch: Batch, head: Tensor, softcap: float | None = None
    ) -> NDArray:
        """The first row is the mean square of the whole network's logits."""
        import numpy as np
        import torch

        from minitron_ray.weights.vocabulary import chunk_logits, chunks

        samples, tokens, _ = outputs[0].shape
        sums = np.zeros((len(outputs), samples))
        for sample in range(samples):
            # Chunk by chunk, so that the whole network's logits are computed once and held for a chunk only.
            for part in chunks(tokens, len(head), head.device):
                whole = chunk_logits(outputs[0][sample, part], head, softcap)
                sums[0, sample] += float(whole.square().sum(dtype=torch.float64))
                for row, hidden in enumerate(outputs[1:], start=1):
                    moved = chunk_logits(hidden[sample, part], head, softcap).sub_(whole)
                    sums[row, sample] += float(moved.square_().sum(dtype=torch.float64))
        return sums / (tokens * len(head))

    def reduce(self, values: NDArray) -> NDArray:
        means: NDArray = values.mean(axis=1)
        return means[1:] / means[0] if self.normalised else means[1:]
