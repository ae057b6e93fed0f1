"""Activation magnitudes, aggregated over the sequence first and then over the batch (paper §2.2).

The default, l2 over the batch of the mean over the sequence, F = sqrt(sum_b (mean_s |a|)^2), is the
paper's best (Table 11). Tensors are batch first: aggregating dim 0 first would silently compute
another metric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from minitron_ray.importance.metric import UnitMetric

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Aggregation = Literal["mean", "l2", "var"]


class Activation(UnitMetric):
    """`mean` takes absolute values, `l2` is the root of the sum of squares, `var` the population variance."""

    kind: Literal["activation"] = "activation"
    batch: Aggregation = "l2"
    sequence: Aggregation = "mean"

    @property
    def label(self) -> str:
        return f"activation(batch={self.batch}, sequence={self.sequence})"

    def evidence(self) -> ActivationEvidence:
        return ActivationEvidence(self.batch, self.sequence)


class ActivationEvidence:
    """Sums over samples in float64, so that the split into batches does not show in the scores."""

    def __init__(self, batch: Aggregation, sequence: Aggregation) -> None:
        self._batch, self._sequence = batch, sequence
        self._samples = 0
        self._sum: NDArray = np.zeros(())
        self._squares: NDArray = np.zeros(())

    def add(self, activations: Tensor) -> None:
        values = activations.detach().float()
        match self._sequence:
            case "mean":
                per_sample = values.abs().mean(dim=1)
            case "l2":
                per_sample = values.square().sum(dim=1).sqrt()
            case "var":
                per_sample = values.var(dim=1, correction=0)
        samples = per_sample.double().cpu().numpy()
        self._samples += len(samples)
        self._sum = self._sum + samples.sum(axis=0)
        self._squares = self._squares + np.square(samples).sum(axis=0)

    def scores(self) -> NDArray:
        mean = self._sum / self._samples
        match self._batch:
            case "mean":
                return mean
            case "l2":
                return np.sqrt(self._squares)
            case "var":
                return np.maximum(self._squares / self._samples - np.square(mean), 0.0)
