"""Stage `teacher`: run the teacher once over the sequences that every candidate is judged on, and those
that a search trains on.

Its final hidden states go to the cache, keyed by teacher and tokens, so that another budget or
another space reuses them. Where they would not fit (they take `hidden` values a token), the teacher
runs online in each trial instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minitron_ray.core.fingerprint import digest
from minitron_ray.core.units import format_bytes
from minitron_ray.distillation.teacher import store_hidden
from minitron_ray.plan import LARGEST_SIGNAL, Inputs, signal_bytes_a_token, steps
from minitron_ray.stages.context import Context
from minitron_ray.stages.same_function import prove_same_function
from minitron_ray.stages.setting import Setting

SIGNAL_VERSION = 1
"""Of the files in the cache."""


def run(context: Context, setting: Setting, inputs: Inputs) -> tuple[dict[str, Any], str]:
    """Returns the folder of the stored signal, or null where the teacher is to run online.

    Raises ConfigError where the teacher is to be taken as another model type and is another function then.
    """
    if setting.experiment.export.as_type is not None:
        context.cluster.call(prove_same_function, setting)
    indices = needed_sequences(setting)
    length = setting.experiment.data.sequence_length
    size = len(indices) * length * signal_bytes_a_token(setting.architecture)
    if size > LARGEST_SIGNAL:
        return {"folder": None}, f"online in each trial: stored it would take up to {format_bytes(size)}"
    key = digest(
        {
            "version": SIGNAL_VERSION,
            "teacher": inputs.teacher,
            "data": inputs.data,
            "precision": context.experiment.precision,
            "indices": indices.tolist(),
        }
    )
    describe = {"what": "final hidden states of the teacher", "sequences": len(indices)}
    found = context.cache.find("teacher_signal", key) is not None

    def fill(folder: Path) -> None:
        context.cluster.call(store_signal, setting, indices, folder.resolve())

    folder = context.cache.ensure("teacher_signal", key, describe, fill)
    stored = sum(path.stat().st_size for path in folder.glob("*.npy"))
    summary = (
        f"{len(indices) * length:,} tokens, {format_bytes(stored)}{' (from the cache)' if found else ''}"
    )
    return {"folder": str(folder.resolve())}, summary


def needed_sequences(setting: Setting) -> np.ndarray:
    """Indices of the validation sequences and of those that a search trains on, ascending."""
    validation = np.asarray(setting.splits.validation)
    if setting.experiment.search is None:
        return validation
    retrain = setting.experiment.search.retrain
    count = steps(retrain.tokens, retrain.batch, setting.experiment.data.sequence_length)
    trained = [setting.training_indices(step, retrain.batch) for step in range(1, count + 1)]
    return np.unique(np.concatenate([*trained, validation]))


def store_signal(setting: Setting, indices: np.ndarray, folder: Path, report: Callable[..., None]) -> None:
    """In a worker: write the signal."""
    share = setting.share()

    def progress(done: int) -> None:
        report("stage_progress", stage="teacher", done=done, total=len(indices), unit="sequences")

    sequences = setting.tokens().sequences
    store_hidden(
        setting.teacher(share), sequences, indices, folder, share.dtype, setting.micro_batch, progress
    )
