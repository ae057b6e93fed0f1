"""A `Setting` for tests that call a stage's parts without a run."""

from __future__ import annotations

from pathlib import Path

from minitron_ray.data.splits import Splits
from minitron_ray.data.tokens import build_tokens
from minitron_ray.experiment import Experiment
from minitron_ray.results.cache import Cache
from minitron_ray.stages.setting import Setting


def setting_of(experiment: Experiment, model: Path, folder: Path, splits: Splits) -> Setting:
    """With the experiment's text packed to a cache in `folder`, and two sequences in a forward pass."""
    tokens = build_tokens(
        experiment.data.source,
        model,
        sequence_length=experiment.data.sequence_length,
        base=folder,
        cache=Cache(folder),
        minimum_sequences=splits.train.stop,
    )
    return Setting(
        experiment=experiment,
        teacher_folder=model,
        tokens_folder=tokens.folder.resolve(),
        splits=splits,
        micro_batch=2,
    )
