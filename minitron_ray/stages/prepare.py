"""Stage `prepare`: the teacher's folder and the packed tokens, from the cache or made now.

It looks on every run, so that a changed file under the same name is noticed: digests of what it
finds are part of every later stage's fingerprint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_ray.core.fingerprint import digest
from minitron_ray.core.units import format_count
from minitron_ray.data.sources.hub import Hub
from minitron_ray.data.splits import Splits, split
from minitron_ray.data.tokens import TokenStore, build_tokens
from minitron_ray.experiment import Experiment
from minitron_ray.models.families import family_of
from minitron_ray.plan import steps
from minitron_ray.results.cache import Cache
from minitron_ray.stages.context import Context
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.fetch import resolve_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the other stages stand on."""

    setting: Setting
    config: dict[str, Any]
    teacher_digest: str
    data_digest: str


def teacher_folder(experiment: Experiment, base: Path, cache: Cache) -> Path:
    """The teacher as a local model folder, fetched and converted if need be."""
    teacher = experiment.teacher
    return resolve_teacher(teacher.path, teacher.revision, teacher.sha256, base, cache).folder


def run(context: Context) -> Prepared:
    """Fetches, converts, tokenises, splits. Raises ConfigError for input that cannot be used."""
    started = time.monotonic()
    context.current = "prepare"
    context.events.emit("stage_started", stage="prepare", total=None, unit="sequences")
    experiment = context.experiment
    folder = teacher_folder(experiment, context.base, context.cache)
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    arch = family.read(checkpoint.config)
    checkpoint.check(family, arch)
    context.check_stop()
    tokens = _tokens(context, folder)
    splits = split_tokens(experiment, tokens)
    prepared = Prepared(
        setting=Setting(
            experiment=experiment,
            teacher_folder=folder.resolve(),
            tokens_folder=tokens.folder.resolve(),
            splits=splits,
            micro_batch=context.cluster.settings.micro_batch,
        ),
        config=checkpoint.config,
        teacher_digest=checkpoint.digest(),
        data_digest=tokens.digest,
    )
    sizes = {name: getattr(arch, name) for name in ("layers", "hidden", "heads", "kv_heads", "mlp")}
    output = {
        "teacher": {**sizes, "parameters": family.parameters(arch)},
        "teacher_digest": prepared.teacher_digest,
        "data_digest": prepared.data_digest,
        "counts": tokens.counts,
        "validation": [splits.validation.start, splits.validation.stop],
    }
    context.outputs["prepare"] = output
    summary = (
        f"{format_count(family.parameters(arch))} {family.model_type}, {len(tokens):,} sequences of "
        f"{experiment.data.sequence_length} tokens: {len(splits.calibration)} to calibrate, "
        f"{len(splits.validation)} to validate, {len(splits.train):,} to train"
    )
    _record(context, output, summary, time.monotonic() - started)
    return prepared


def split_tokens(experiment: Experiment, tokens: TokenStore) -> Splits:
    """Raises ConfigError where the text is too short to train even one batch."""
    data = experiment.data
    minimum = max(experiment.distill.batch, experiment.search.retrain.batch)
    return split(len(tokens), data.calibration, data.validation, minimum, data.sequence_length)


def _tokens(context: Context, teacher: Path) -> TokenStore:
    experiment = context.experiment
    data, retrain, distill = experiment.data, experiment.search.retrain, experiment.distill
    batches = max(
        section.batch * steps(section.tokens, section.batch, data.sequence_length)
        for section in (retrain, distill)
    )
    return build_tokens(
        data.source,
        teacher,
        sequence_length=data.sequence_length,
        base=context.base,
        cache=context.cache,
        minimum_sequences=data.calibration + data.validation + max(retrain.batch, distill.batch),
        # A hub corpus may be larger than any disk; what is local is read whole.
        limit_sequences=data.calibration + data.validation + batches
        if isinstance(data.source, Hub)
        else None,
        progress=lambda n: context.events.emit(
            "stage_progress", stage="prepare", done=n, total=None, unit="sequences"
        ),
    )


def _record(context: Context, output: dict[str, Any], summary: str, seconds: float) -> None:
    fingerprint = digest(output)
    if context.run.record("prepare", fingerprint) is not None:
        context.events.emit("stage_reused", stage="prepare", summary=summary)
        return
    context.run.finish_stage("prepare", fingerprint, output, summary, seconds)
    context.events.emit("stage_finished", stage="prepare", summary=summary, seconds=seconds)
