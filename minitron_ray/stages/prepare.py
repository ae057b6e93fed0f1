"""Stage `prepare`: the teacher's folder and the packed tokens, from the cache or made now.

It looks before every run, so that a changed file under the same name is noticed: digests of what it
finds are part of every later stage's fingerprint, and of the run's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_ray.core.events import EventBus
from minitron_ray.core.units import format_count
from minitron_ray.data.sources.hub import Hub
from minitron_ray.data.splits import Splits, split
from minitron_ray.data.tokens import TokenStore, build_tokens
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.models.families import family_of
from minitron_ray.plan import tokens_seen
from minitron_ray.results.cache import Cache
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.fetch import resolve_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the other stages stand on. `output` is what the run records of it."""

    setting: Setting
    config: dict[str, Any]
    teacher_digest: str
    data_digest: str
    output: dict[str, Any]
    summary: str
    seconds: float


def prepare(
    experiment: Experiment, base: Path, cache: Cache, events: EventBus, stop: StopSignal, micro_batch: int
) -> Prepared:
    """Fetches, converts, tokenises, splits; leaves nothing but cache entries.

    `base` is the experiment file's folder. Raises ConfigError for input that cannot be used,
    Interrupted if the user asked to stop.
    """
    started = time.monotonic()
    events.emit("stage_started", stage="prepare", total=None, unit="sequences")
    teacher = experiment.teacher
    folder = resolve_teacher(teacher.path, teacher.revision, teacher.sha256, base, cache).folder
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    arch = family.read(checkpoint.config)
    checkpoint.check(family, arch)
    stop.check()
    tokens = _tokens(experiment, base, cache, events, folder)
    splits = split_tokens(experiment, tokens)
    stop.check()
    digests = {"teacher_digest": checkpoint.digest(), "data_digest": tokens.digest}
    sizes = {name: getattr(arch, name) for name in ("layers", "hidden", "heads", "kv_heads", "mlp")}
    summary = (
        f"{format_count(family.parameters(arch))} {family.model_type}, {len(tokens):,} sequences of "
        f"{experiment.data.sequence_length} tokens: {len(splits.calibration)} to calibrate, "
        f"{len(splits.validation)} to validate, {len(splits.train):,} to train"
    )
    seconds = time.monotonic() - started
    events.emit("stage_finished", stage="prepare", summary=summary, seconds=seconds)
    return Prepared(
        setting=Setting(
            experiment=experiment,
            teacher_folder=folder.resolve(),
            tokens_folder=tokens.folder.resolve(),
            splits=splits,
            micro_batch=micro_batch,
        ),
        config=checkpoint.config,
        **digests,
        output={
            "teacher": {**sizes, "parameters": family.parameters(arch)},
            **digests,
            "counts": tokens.counts,
        },
        summary=summary,
        seconds=seconds,
    )


def split_tokens(experiment: Experiment, tokens: TokenStore) -> Splits:
    """Raises ConfigError where the text is too short to train even one batch."""
    data = experiment.data
    minimum = max(experiment.distill.batch, experiment.search.retrain.batch)
    return split(len(tokens), data.calibration, data.validation, minimum, data.sequence_length)


def _tokens(experiment: Experiment, base: Path, cache: Cache, events: EventBus, teacher: Path) -> TokenStore:
    data, retrain, distill = experiment.data, experiment.search.retrain, experiment.distill
    trained = max(tokens_seen(s.tokens, s.batch, data.sequence_length) for s in (retrain, distill))
    return build_tokens(
        data.source,
        teacher,
        sequence_length=data.sequence_length,
        base=base,
        cache=cache,
        minimum_sequences=data.calibration + data.validation + max(retrain.batch, distill.batch),
        # A hub corpus may be larger than any disk; what is local is read whole.
        limit_sequences=data.calibration + data.validation + trained // data.sequence_length
        if isinstance(data.source, Hub)
        else None,
        progress=lambda n: events.emit(
            "stage_progress", stage="prepare", done=n, total=None, unit="sequences"
        ),
    )
