"""`prune`: cut a checkpoint to an explicit shape. No run, no search, no distillation, no Ray.

The folder is complete when it has its `cut.json`; until then `cut.partial.json` says what it is to
become, and the same call goes on from there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from minitron_ray import __version__
from minitron_ray.core.errors import ConfigError, Interrupted
from minitron_ray.core.fingerprint import digest
from minitron_ray.core.units import format_bytes
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of, rewritten
from minitron_ray.models.family import Family
from minitron_ray.models.kept import Kept
from minitron_ray.pruning.record import CutRecord, read_record
from minitron_ray.pruning.scores import CutScores, scores_for
from minitron_ray.pruning.shape import shape_for
from minitron_ray.results.cache import Cache
from minitron_ray.results.files import write_json
from minitron_ray.search.selection import PLAIN, CutRules, select
from minitron_ray.weights.checkpoint import CONFIG, INDEX, Checkpoint, torch_dtype
from minitron_ray.weights.companions import copy_companions
from minitron_ray.weights.device import one_thread
from minitron_ray.weights.fetch import resolve_teacher
from minitron_ray.weights.resuming import (
    PROGRESS,
    Report,
    discard,
    is_whole,
    locked,
    read_progress,
    write_slices,
)
from minitron_ray.weights.slicing import Slice, cut_slices
from minitron_ray.weights.writing import SHARD_BYTES, Shard, index_of, layout, typed

VERSION: Final = 1
"""Part of the fingerprint: raise it when the same request would give other bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRequest:
    """All that decides the student."""

    teacher: str
    """As `teacher.path` of an experiment."""
    revision: str | None = None
    sizes: Mapping[str, int]
    """Axis to size; axes not named keep the teacher's."""
    importance: str
    """`magnitude`, `random`, or a run that scored this teacher."""
    seed: int = 0
    dtype: str | None = None
    """The teacher's where None."""
    shard_bytes: int = SHARD_BYTES
    rules: CutRules = PLAIN
    as_type: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What came of it."""

    folder: Path
    teacher: Architecture
    student: Architecture
    teacher_parameters: int
    parameters: int
    bytes: int
    """Of the weight files."""
    files: int
    seconds: float
    dropped_layers: tuple[int, ...]
    fingerprint: str
    reused: int
    """Weight files that an earlier call had finished."""


def prune(request: PruneRequest, out: Path, results: Path, *, force: bool = False, report: Report) -> Pruned:
    """Cuts, and writes `out`. `results` holds runs and the cache; `report` hears how far it is.

    Raises ConfigError for anything that cannot be done, before the first byte is written where that
    can be known; Interrupted after Ctrl-C.
    """
    started = time.monotonic()
    source = _Source.open(request, results)
    if out.resolve() == source.checkpoint.folder.resolve():
        raise ConfigError(f"--out {out} is the teacher's own folder; choose another one")
    candidate = shape_for(source.family, source.teacher, request.sizes, request.rules)
    scored = scores_for(
        request.importance, request.seed, source.checkpoint, source.family, source.teacher, results
    )
    try:
        kept = select(scored.scores, candidate, source.teacher, request.rules)
    except ValueError as error:
        raise ConfigError(f"--importance {request.importance}: {error}") from None
    job = _Job.plan(request, source, kept, scored)
    with locked(out):
        whole, reused = job.found(out)
        if not whole:
            _check_folder(out, job, force)
            _check_space(out, job, reused)
            _write(out, job, report)
        return job.outcome(out, time.monotonic() - started, reused)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The teacher, checked, as the model type that the student is written as."""

    checkpoint: Checkpoint
    family: Family
    teacher: Architecture
    config: dict[str, Any]

    @classmethod
    def open(cls, request: PruneRequest, results: Path) -> _Source:
        found = resolve_teacher(
            request.teacher, request.revision, None, Path(), Cache(results), tokenizer=False
        )
        checkpoint = Checkpoint(found.folder)
        family = family_of(checkpoint.config)
        checkpoint.check(family, family.read(checkpoint.config))
        config = checkpoint.config
        if request.as_type is not None:
            config = rewritten(config, request.as_type)
            family = family_of(config)
        return cls(checkpoint=checkpoint, family=family, teacher=family.read(config), config=config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A cut that is decided in every detail."""

    request: PruneRequest
    source: _Source
    kept: Kept
    student: Architecture
    dtype: str
    shards: list[Shard]
    config: dict[str, Any]
    fingerprint: str
    scored: CutScores

    @classmethod
    def plan(cls, request: PruneRequest, source: _Source, kept: Kept, scored: CutScores) -> _Job:
        family, student = source.family, kept.architecture(source.teacher)
        dtype = request.dtype or _dtype_of(source)
        config = family.student_config(source.config, student, kept)
        kind = torch_dtype(dtype)
        shards = layout(family.shapes(student), dtype, kind.itemsize, request.shard_bytes)
        stored = [source.checkpoint.folder / name for name in source.checkpoint.files]
        fingerprint = digest(
            {
                "version": [VERSION, __version__],
                "teacher": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in stored],
                "config": typed(config, dtype),
                "kept": kept.as_dict(),
                "shards": [[shard.file, shard.size] for shard in shards],
            }
        )
        return cls(
            request=request,
            source=source,
            kept=kept,
            student=student,
            dtype=dtype,
            shards=shards,
            config=typed(config, dtype),
            fingerprint=fingerprint,
            scored=scored,
        )

    @property
    def size(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(shard.size + len(shard.header) for shard in self.shards)

    def slices(self, names: Set[str]) -> Iterator[Slice]:
        """The student's weights, of the tensors named."""
        return cut_slices(
            self.source.checkpoint,
            self.source.family,
            self.source.teacher,
            self.kept,
            dtype=self.dtype,
            only=names,
        )

    def found(self, out: Path) -> tuple[bool, int]:
        """Whether the folder is already this cut, and how many of its weight files are whole."""
        record, progress = read_record(out), read_progress(out)
        if record is not None and record.get("fingerprint") == self.fingerprint and progress is None:
            count = sum(is_whole(out, shard) for shard in self.shards)
            return count == len(self.shards), 0 if count < len(self.shards) else count
        if progress is None or progress.fingerprint != self.fingerprint:
            return False, 0
        return False, sum(shard.file in progress.whole and is_whole(out, shard) for shard in self.shards)

    def record(self) -> CutRecord:
        request, family = self.request, self.source.family
        return CutRecord(
            fingerprint=self.fingerprint,
            teacher_path=request.teacher,
            revision=request.revision,
            model_type=family.model_type,
            teacher=self.source.teacher,
            student=self.student,
            teacher_parameters=family.parameters(self.source.teacher),
            parameters=family.parameters(self.student),
            dtype=self.dtype,
            importance=self.scored.told,
            rules=request.rules.model_dump(mode="json"),
            kept=self.kept,
            files={shard.file: len(shard.header) + shard.size for shard in self.shards},
        )

    def outcome(self, out: Path, seconds: float, reused: int) -> Pruned:
        family = self.source.family
        kept = set(self.kept.layers)
        return Pruned(
            folder=out,
            teacher=self.source.teacher,
            student=self.student,
            teacher_parameters=family.parameters(self.source.teacher),
            parameters=family.parameters(self.student),
            bytes=self.size,
            files=len(self.shards),
            seconds=seconds,
            dropped_layers=tuple(layer for layer in range(self.source.teacher.layers) if layer not in kept),
            fingerprint=self.fingerprint,
            reused=reused,
        )


def _dtype_of(source: _Source) -> str:
    """The type of most of the teacher's weights: that of its embedding."""
    return source.checkpoint.dtype(f"{source.family.embedding}.weight")


def _write(out: Path, job: _Job, report: Report) -> None:
    """Weight files first, `cut.json` last, so that a folder that has one is complete."""
    try:
        with one_thread():
            write_slices(out, job.shards, job.slices, fingerprint=job.fingerprint, report=report)
        if len(job.shards) > 1:
            write_json(out / INDEX, index_of(job.shards))
        write_json(out / CONFIG, job.config)
        copy_companions(job.source.checkpoint.folder, out)
        record = job.record()
        (out / "README.md").write_text(record.card(), encoding="utf-8")
        record.write(out)
        (out / PROGRESS).unlink()
    except ConfigError:  # no use in going on: what is wrong with the weights stays wrong
        discard(out)
        raise
    except KeyboardInterrupt:
        _, done = job.found(out)
        raise Interrupted(
            f"interrupted; {done} of {len(job.shards)} weight files in {out} are finished and will be kept"
        ) from None


def _check_folder(out: Path, job: _Job, force: bool) -> None:
    """Raises ConfigError for a folder that holds something else, unless `force` lets it be replaced."""
    progress = read_progress(out)
    if progress is not None and progress.fingerprint == job.fingerprint:
        return
    present = sorted(path for path in out.iterdir())
    if not present:
        return
    if not force:
        what = "an unfinished cut of another kind" if progress is not None else f"{present[0].name}"
        more = f" and {len(present) - 1} more" if len(present) > 1 and progress is None else ""
        raise ConfigError(
            f"--out {out} holds {what}{more}; --force replaces the files in it, or choose another folder"
        )
    for path in present:
        if path.is_dir() and not path.is_symlink():
            raise ConfigError(
                f"--out {out} holds the folder {path.name}, which --force won't remove; do it yourself"
            )
    for path in present:
        path.unlink()


def _check_space(out: Path, job: _Job, reused: int) -> None:
    whole = sum(path.stat().st_size for path in out.glob("*.safetensors")) if reused else 0
    needed, free = job.size - whole, shutil.disk_usage(out).free
    if needed > free:
        raise ConfigError(
            f"the student takes {format_bytes(needed)} on the disk of {out}, which has {format_bytes(free)} free; "
            f"make room or choose another place"
        )
