"""Depth importance by removal: what the network loses without some of its layers (paper §2.2).

A network without layer i is the whole network up to there. All sets of layers go through the network
side by side, sharing what they have in common, so that of a set only the layers behind its first
removed one are computed, and each layer's weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.evaluation.task import Batch
from minitron_ray.importance.metric import RemovalMetric
from minitron_ray.weights.layerwise import Layerwise, State

Removed = tuple[int, ...]
"""Layers that are left out, ascending; a student keeps at least one."""

HELD_BYTES: Final = 2**31
"""Hidden states of all sets of layers that are held, where batches go through a layer together."""


def removal_values(
    network: Layerwise,
    batches: Sequence[Batch],
    metric: RemovalMetric,
    removals: Sequence[Removed],
    progress: Callable[[int], None] = lambda batches: None,
    held_bytes: int = HELD_BYTES,
) -> NDArray:
    """The metric's values of every example: of the whole network and without each set of layers, float64
    (1 + removals, examples), examples in the order of `batches`.

    Of a streamed network each layer is read once for as many batches as `held_bytes` allow. `progress`
    is called with the number of batches done. Raises MinitronError where a value is not finite.
    """
    check_removals(removals, network.layers)
    skipped = [frozenset(), *map(frozenset, removals)]
    values: list[NDArray] = []
    for together in _groups(network, batches, len(skipped), held_bytes):
        advanced = [_Batch(network, batch, len(skipped)) for batch in together]
        for layer in range(network.layers):
            for one in advanced:
                one.advance(layer, skipped)
        for one in advanced:
            values.append(one.values(metric))
            progress(len(values))
    joined = np.concatenate(values, axis=1)
    _check_finite(joined, removals)
    return joined


def check_removals(removals: Sequence[Removed], layers: int) -> None:
    """Raises ValueError for layers that are not there, and where none would be left."""
    for removed in removals:
        if any(not 0 <= layer < layers for layer in removed):
            raise ValueError(f"layers {removed} cannot be removed from a network of {layers}")
        if len(set(removed)) >= layers:
            raise ValueError(f"all {layers} layers would be removed; a student keeps at least one")


@dataclass(slots=True)
class _Stream:
    """Hidden states, and the sets of layers (by number) whose they are until now."""

    hidden: Tensor
    sets: list[int]


class _Batch:
    """One batch on its way through the network."""

    def __init__(self, network: Layerwise, batch: Batch, sets: int) -> None:
        self._network, self._batch = network, batch
        state = network.start(torch.from_numpy(batch.ids).to(network.device), batch.separator)
        self._state: State = state
        self._streams = [_Stream(state.hidden, list(range(sets)))]

    def advance(self, layer: int, skipped: Sequence[Collection[int]]) -> None:
        """Through one layer, or past it: a stream whose sets differ in that is two from there on."""
        streams = []
        for stream in self._streams:
            if past := [number for number in stream.sets if layer in skipped[number]]:
                streams.append(_Stream(stream.hidden, past))
            if through := [number for number in stream.sets if layer not in skipped[number]]:
                streams.append(_Stream(self._network.apply(layer, stream.hidden, self._state), through))
        self._streams = streams

    def values(self, metric: RemovalMetric) -> NDArray:
        """(sets, examples)"""
        network = self._network
        streams, self._streams = sorted(self._streams, key=lambda stream: stream.sets[0]), []
        outputs = [network.finish(stream.hidden) for stream in streams]
        found = metric.values(outputs, self._batch, network.head, network.softcap)
        rows = {number: row for stream, row in zip(streams, found, strict=True) for number in stream.sets}
        return np.stack([rows[number] for number in range(len(rows))])


def _groups(
    network: Layerwise, batches: Sequence[Batch], sets: int, held_bytes: int
) -> Iterator[Sequence[Batch]]:
    """Batches that go through each layer together: one, or of a network that is not in memory many."""
    if network.whole:
        yield from ([batch] for batch in batches)
        return
    group: list[Batch] = []
    held = 0
    for batch in batches:
        size = sets * batch.ids.size * network.token_bytes
        if group and held + size > held_bytes:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group


def _check_finite(values: NDArray, removals: Sequence[Removed]) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if not len(bad):
        return
    what = f"without layer {', '.join(map(str, removals[bad[0] - 1]))}" if bad[0] else "of the whole teacher"
    raise MinitronError(
        f"importance: the loss {what} is not finite; the weights hold NaN or infinity, or the precision "
        "overflows: set `precision: float32`"
    )


def score_layers(
    metric: RemovalMetric,
    layers: int,
    fewest: int,
    measure: Callable[[Sequence[Removed]], NDArray],
) -> Mapping[int, NDArray]:
    """Block length n to the scores of the layers i to i+n-1 together, float64 (layers - n + 1,).

    `measure` gives the metric's values with each set of layers left out, see `removal_values`. A metric
    that is iterative measures until `fewest` layers would be left, the least that any student keeps.
    Raises ConfigError for blocks as long as the network.
    """
    if metric.iterative:
        return {1: _ranks(metric, layers, fewest, measure)}
    if metric.blocks and metric.blocks[-1] >= layers:
        raise ConfigError(
            f"importance.depth.blocks: a block of {metric.blocks[-1]} layers cannot go from a teacher of "
            f"{layers}; name shorter ones"
        )
    lengths = (1, *metric.blocks)
    removals = [tuple(range(i, i + n)) for n in lengths for i in range(layers - n + 1)]
    scores = metric.reduce(measure(removals))
    ends = np.cumsum([layers - n + 1 for n in lengths])[:-1]
    return dict(zip(lengths, np.split(scores, ends), strict=True))


def _ranks(
    metric: RemovalMetric, layers: int, fewest: int, measure: Callable[[Sequence[Removed]], NDArray]
) -> NDArray:
    """Removed one after the other, then the others in the order of the last measurement."""
    gone: list[int] = []
    for _ in range(min(max(layers - fewest, 1), layers - 1)):
        left = [layer for layer in range(layers) if layer not in gone]
        scores = metric.reduce(measure([tuple(sorted((*gone, layer))) for layer in left]))
        order = [left[place] for place in np.argsort(scores, kind="stable")]
        gone.append(order[0])
    ranks = np.empty(layers)
    ranks[[*gone, *order[1:]]] = np.arange(layers)
    return ranks
