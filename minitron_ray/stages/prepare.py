"""Stage `prepare`: the folders of the teacher and of the model that is cut, and the packed tokens, from
the cache or made now.

It looks before every run, so that a changed file under the same name is noticed: digests of what it
finds are part of every later stage's fingerprint, and of the run's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_ray.core.events import EventBus
from minitron_ray.core.fingerprint import digest
from minitron_ray.core.units import format_count
from minitron_ray.data.shards import Spread
from minitron_ray.data.splits import Splits, split
from minitron_ray.data.tokenizer import check_same_tokenizer, load_tokenizer
from minitron_ray.data.tokens import TokenStore, build_tokens
from minitron_ray.distillation.engine import Engine
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.models.architecture import CUT_AXES
from minitron_ray.models.families import family_of
from minitron_ray.plan import Inputs, StartConfig
from minitron_ray.plan.tokens import sequences_needed, trainings
from minitron_ray.results.cache import Cache
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.start import NO_RUNS, start_folder
from minitron_ray.stages.text_sources import source_rows
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.fetch import resolve_teacher
from minitron_ray.weights.soundness import sound_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the other stages stand on. `output` is what the run records of it."""

    setting: Setting
    config: dict[str, Any]
    """The teacher's `config.json` as it stands in its folder."""
    inputs: Inputs
    base: Path
    """The experiment file's folder."""
    output: dict[str, Any]
    summary: str
    seconds: float
    start: StartConfig | None = None
    """The model that is cut; None where that is the teacher."""
    sources: tuple[dict[str, Any], ...] = ()
    """Rows of the table `sources`."""


def prepare(
    experiment: Experiment,
    base: Path,
    cache: Cache,
    events: EventBus,
    stop: StopSignal,
    micro_batch: int,
    runs: Mapping[str, str] = NO_RUNS,
    engine: Engine | None = None,
    spread: Spread | None = None,
) -> Prepared:
    """Fetches, converts, tokenises, splits; leaves nothing but cache entries.

    `base` is the experiment file's folder; `runs` has ids of runs by experiment, whose students others
    start from; `spread` are the tasks that tokenise much text. Raises ConfigError for input that cannot be
    used, Interrupted if the user asked to stop.
    """
    started = time.monotonic()
    events.emit("stage_started", stage="prepare", total=None, unit="sequences")
    start = _Start.of(experiment, base, cache, runs)
    teacher = experiment.teacher
    folder = resolve_teacher(teacher.path, teacher.revision, teacher.sha256, base, cache).folder
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    arch = family.read(checkpoint.config)
    checkpoint.check(family, arch)
    teacher_digest = sound_digest(checkpoint)  # before hours may go into the text
    if start is not None:
        check_same_tokenizer(folder, start.folder, (teacher.path, start.config.source))
    stop.check()
    tokens = _tokens(experiment, base, cache, events, stop, folder, spread)
    splits = split_tokens(experiment, tokens)
    stop.check()
    separator = load_tokenizer(folder).separator if experiment.data.documents == "apart" else None
    measured = experiment.importance.depth.inputs(base)
    inputs = Inputs(
        teacher=teacher_digest,
        data=tokens.digest if separator is None else digest([tokens.digest, {"apart": separator}]),
        start=None if start is None else start.digest,
        depth=measured,
    )
    sizes = {name: getattr(arch, name) for name in CUT_AXES}
    summary = (
        f"{format_count(family.parameters(arch))} {family.model_type}, {len(tokens):,} sequences of "
        f"{experiment.data.sequence_length} tokens: {len(splits.calibration)} to calibrate, "
        f"{len(splits.validation)} to validate, {len(splits.train):,} to train"
    )
    if start is not None:
        summary += f"; cut is {start.parameters} from {start.config.source}"
    seconds = time.monotonic() - started
    events.emit("stage_finished", stage="prepare", summary=summary, seconds=seconds)
    return Prepared(
        setting=Setting(
            experiment=experiment,
            teacher_folder=folder.resolve(),
            tokens_folder=tokens.folder.resolve(),
            splits=splits,
            micro_batch=micro_batch,
            start_folder=None if start is None else start.folder,
            separator=separator,
            engine=engine or Engine(),
        ),
        config=checkpoint.config,
        inputs=inputs,
        base=base.resolve(),
        output={
            "teacher": {**sizes, "parameters": family.parameters(arch)},
            "teacher_digest": inputs.teacher,
            "data_digest": inputs.data,
            "counts": tokens.counts,
            **({} if start is None else {"start": start.config.source, "start_digest": start.digest}),
        },
        summary=summary,
        seconds=seconds,
        start=None if start is None else start.config,
        sources=tuple(source_rows(experiment.data.source, tokens, splits)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """The model that is cut, checked."""

    folder: Path
    digest: str
    parameters: str
    config: StartConfig

    @classmethod
    def of(cls, experiment: Experiment, base: Path, cache: Cache, runs: Mapping[str, str]) -> _Start | None:
        """None where the teacher is cut."""
        if experiment.start is None:
            return None
        found = start_folder(experiment.start, base, cache, runs)
        checkpoint = Checkpoint(found.folder)
        family = family_of(checkpoint.config)
        arch = family.read(checkpoint.config)
        checkpoint.check(family, arch)
        return cls(
            folder=found.folder.resolve(),
            digest=sound_digest(checkpoint),
            parameters=format_count(family.parameters(arch)),
            config=StartConfig(config=checkpoint.config, source=found.source),
        )


def split_tokens(experiment: Experiment, tokens: TokenStore) -> Splits:
    """Raises ConfigError where the text is too short to train even one batch."""
    data = experiment.data
    minimum = max((part.batch for part in trainings(experiment)), default=0)
    return split(len(tokens), data.calibration, data.validation, minimum, data.sequence_length)


def _tokens(
    experiment: Experiment,
    base: Path,
    cache: Cache,
    events: EventBus,
    stop: StopSignal,
    teacher: Path,
    spread: Spread | None,
) -> TokenStore:
    data, parts = experiment.data, trainings(experiment)

    def progress(done: int) -> None:
        events.emit("stage_progress", stage="prepare", done=done, total=None, unit="sequences")
        stop.check()  # shards that are done are kept

    return build_tokens(
        data.source,
        teacher,
        sequence_length=data.sequence_length,
        base=base,
        cache=cache,
        minimum_sequences=data.calibration + data.validation + max((s.batch for s in parts), default=0),
        # A corpus of a hub or an object store may be larger than any disk; what is local is read whole.
        limit_sequences=sequences_needed(experiment) if data.source.bounded else None,
        progress=progress,
        spread=spread,
    )
