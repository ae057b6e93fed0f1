"""Which sequences a step trains on: a pure function of (seed, epoch, step), so resuming needs a number."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def batch_indices(train: range, step: int, batch: int, seed: int) -> np.ndarray:
    """The sequences of optimizer step `step` (from 0), int64 (batch,).

    Every epoch is its own permutation of `train`; epochs follow each other without a gap, so a batch
    may end one and begin the next. Independent of the number of workers.
    """
    if not train or batch < 1 or step < 0:
        raise ValueError(f"no batch {step} of {batch} out of {len(train)} sequences")
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs, places = np.divmod(positions, len(train))
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _order(len(train), seed, int(epoch))[places[here]]
    return train.start + chosen * train.step


def rank_slice(indices: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The share of one of `world` workers: every `world`-th sequence, starting at its rank."""
    if not 0 <= rank < world:
        raise ValueError(f"no rank {rank} among {world}")
    return indices[rank::world]


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False  # shared by every caller
    return order
