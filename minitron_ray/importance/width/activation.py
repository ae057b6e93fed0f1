"""Activation magnitudes, aggregated over the sequence first and then over the batch (paper §2.2).

The default, l2 over the batch of the mean over the sequence, F = sqrt(sum_b (mean_s |a|)^2), is the
paper's best (Table 11). Tensors are batch first: aggregating dim 0 first would silently compute
another metric.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from minitron_ray.importance.metric import ListeningUnitMetric

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Aggregation = Literal["mean", "l2", "var"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


class Activation(ListeningUnitMetric):
    """`mean` takes absolute values, `l2` is the root of the sum of squares, `var` the population variance."""

    kind: Literal["activation"] = "activation"
    batch: Aggregation = "l2"
    sequence: Aggregation = "mean"
    gather: Literal["chosen", "all"] = "chosen"
    """`all`: every combination of `batch` and `sequence` goes into the table, out of the same pass, so
    that experiments which differ in them share one measurement."""

    @property
    def label(self) -> str:
        return self._label(self.batch, self.sequence)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self._label(*pair) for pair in self._pairs())

    @property
    def identity(self) -> dict[str, Any]:
        fields = super().identity
        return fields if self.gather == "chosen" else fields | {"batch": "all", "sequence": "all"}

    def evidence(self) -> ActivationEvidence:
        return ActivationEvidence({self._label(*pair): pair for pair in self._pairs()})

    def _pairs(self) -> Iterator[tuple[Aggregation, Aggregation]]:
        if self.gather == "chosen":
            yield self.batch, self.sequence
        else:
            yield from itertools.product(AGGREGATIONS, AGGREGATIONS)

    def _label(self, batch: Aggregation, sequence: Aggregation) -> str:
        options = [f"batch={batch}", f"sequence={sequence}"]
        options += [f"heads={self.heads}"] if self.heads != "norm" else []
        options += ["final_norm"] if self.final_norm else []
        return f"activation({', '.join(options)})"


class ActivationEvidence:
    """For each aggregation over the sequence, the sums of the samples' values and of their squares.

    Values are float32, sums over samples float64, so that the split into batches does not show.
    """

    def __init__(self, pairs: Mapping[str, tuple[Aggregation, Aggregation]]) -> None:
        self._pairs = pairs
        self._sequence = tuple(dict.fromkeys(sequence for _, sequence in pairs.values()))
        self._samples = 0
        self._sums: dict[Aggregation, Tensor] = {}
        """(2, units) each: sum and sum of squares."""

    def add(self, activations: Tensor) -> None:
        values = activations.detach().float()
        self._take({name: _over_sequence(values, name) for name in self._sequence}, len(values))

    def add_routed(self, activations: Tensor, sample: Tensor, samples: int) -> None:
        import torch

        values = activations.detach().float()
        tokens = torch.bincount(sample, minlength=samples)
        present = tokens > 0
        count = tokens[present].float()[:, None]

        def total(of: Tensor) -> Tensor:
            summed = of.new_zeros(samples, of.shape[1])
            if of.is_cuda:  # `index_add_` adds there in any order; this one sorts first
                return summed.index_put_((sample,), of, accumulate=True)[present]
            return summed.index_add_(0, sample, of)[present]

        found: dict[Aggregation, Tensor] = {}
        for name in self._sequence:
            match name:
                case "mean":
                    found[name] = total(values.abs()).div_(count)
                case "l2":
                    found[name] = total(values.square()).sqrt_()
                case "var":
                    means = values.new_zeros(samples, values.shape[1])
                    means[present] = total(values).div_(count)
                    found[name] = total((values - means[sample]).square_()).div_(count)
        self._take(found, len(count))

    def _take(self, per_sample: Mapping[Aggregation, Tensor], samples: int) -> None:
        import torch

        self._samples += samples
        for name, values in per_sample.items():
            wide = values.double()
            sums = torch.stack([wide.sum(0), wide.square_().sum(0)])
            self._sums[name] = self._sums[name].add_(sums) if name in self._sums else sums

    def merge(self, later: ActivationEvidence) -> None:
        self._samples += later._samples
        for name, sums in later._sums.items():
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def rest(self) -> None:
        self._sums = {name: sums.cpu() for name, sums in self._sums.items()}

    def scores(self) -> Mapping[str, NDArray]:
        return {label: self._over_batch(*pair) for label, pair in self._pairs.items() if self._sums}

    def _over_batch(self, batch: Aggregation, sequence: Aggregation) -> NDArray:
        total, squares = self._sums[sequence].cpu().numpy()
        mean: NDArray = total / self._samples
        match batch:
            case "mean":
                return mean
            case "l2":
                return np.asarray(np.sqrt(squares))
            case "var":
                return np.maximum(squares / self._samples - np.square(mean), 0.0)


def _over_sequence(values: Tensor, aggregation: Aggregation) -> Tensor:
    """(samples, units) of (samples, tokens, units).

    A sample at a time, whose temporaries stay in a CPU's cache: a quarter of the time that a batch of them
    takes. Norms and `einsum` are many times slower there.
    """
    import torch

    return torch.stack([_over_tokens(sample, aggregation) for sample in values])


def _over_tokens(values: Tensor, aggregation: Aggregation) -> Tensor:
    """(units,) of (tokens, units)."""
    match aggregation:
        case "mean":
            return values.abs().sum(dim=0).div_(len(values))
        case "l2":
            return values.square().sum(dim=0).sqrt_()
        case "var":
            centred = values - values.sum(dim=0).div_(len(values))
            return centred.square_().sum(dim=0).div_(len(values))
