"""`minitron-ray run --rehearse`: every stage of the same files on the same cluster, in miniature.

A rehearsal begins anew each time, since one that reuses what another has finished proves nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from filelock import FileLock, Timeout

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.units import format_count, format_seconds
from minitron_ray.models.families import family_of, rewritten
from minitron_ray.plan import Plan, StartConfig, make_plan
from minitron_ray.plan.miniature import TRAINED_SEQUENCES, lost_layers, small_config, small_experiment
from minitron_ray.results.cache import Cache
from minitron_ray.results.files import make_folder, remove_tree
from minitron_ray.results.runs import REHEARSALS, REHEARSED, resolve_run
from minitron_ray.stages.stand_ins import (
    BYTES,
    FoundModel,
    FoundText,
    Sampler,
    look_at_model,
    random_model,
)
from minitron_ray.stages.start import Earlier, find_student, known_start
from minitron_ray.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from minitron_ray.cli.launch import Loaded
    from minitron_ray.execution.settings import ClusterSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """An experiment file with all that could be found of what it names."""

    loaded: Loaded
    plan: Plan
    """The real one."""
    teacher: FoundModel
    start: FoundModel | None
    """Of `start.path`; None where another experiment's student or the teacher is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """One experiment that was gone through. `problems` are what a real run would stumble over."""

    experiment: str
    run_id: str
    folder: str
    seconds: float
    real: str
    """Shape of the model that is cut."""
    small: str
    """Of what stood in for it."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds of each."""
    problems: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"problems": list(self.problems), "rehearsal": True}


def rehearse(
    experiments: Sequence[Loaded],
    results: Path,
    settings: ClusterSettings,
    *,
    quiet: bool,
    as_json: bool,
    as_events: bool = False,
) -> None:
    """Goes through the experiments in order and prints what was found.

    Raises what a stage raised; ConfigError where nothing is known of a model, or another rehearsal is under
    way in the same results folder, and at the end where inputs are missing that the real run needs.
    """
    results = results.expanduser().resolve()
    with _alone(results) as folder:
        outlines = outlined(experiments, results)
        spare = sum(lost_layers(one.plan) for one in outlines)
        names = {one.loaded.experiment.name for one in outlines}
        found: list[Rehearsal] = []
        for outline in outlines:
            runs = {one.experiment: one.run_id for one in found}
            found.append(_go_through(outline, folder, settings, spare, runs, names, quiet, as_events))
            if not as_json:
                click.echo("\n".join(told(found[-1])))
        if as_json:
            click.echo(json.dumps([one.as_json() for one in found], indent=2, allow_nan=False))
        else:
            click.echo("\n".join(verdict(found)))
        refuse_missing(found)


@contextmanager
def _alone(results: Path) -> Iterator[Path]:
    """The emptied folder of rehearsals, held."""
    folder = results / REHEARSALS
    lock = FileLock(make_folder(results) / f"{REHEARSALS}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another rehearsal is under way in {results}; wait for it to end, or give this one another folder "
            "with --results DIR"
        ) from None
    try:
        remove_tree(folder)
        yield make_folder(folder)
    finally:
        lock.release()


def outlined(experiments: Sequence[Loaded], results: Path) -> list[Outline]:
    """Each experiment with its real plan, in order. Raises ConfigError where a plan cannot be made."""
    found: list[Outline] = []
    for loaded in experiments:
        earlier = {one.loaded.experiment.name: Earlier(plan=one.plan, base=one.loaded.base) for one in found}
        found.append(_outline(loaded, Cache(results), earlier))
    return found


def _outline(loaded: Loaded, cache: Cache, earlier: Mapping[str, Earlier]) -> Outline:
    experiment, base = loaded.experiment, loaded.base
    teacher = look_at_model(experiment.teacher, "teacher", base, cache)
    if teacher.config is None:
        raise ConfigError(
            f"{teacher.problem}; nothing is known of the model then: give teacher.config, so that {experiment.name} "
            "can be rehearsed without it"
        )
    section, start, config = experiment.start, None, None
    if section is not None and section.path is not None:
        start = look_at_model(section, "start", base, cache)
        config = None if start.config is None else StartConfig(config=start.config, source=section.path)
    elif section is not None:
        config = known_start(experiment, base, cache, earlier)
    plan = make_plan(experiment, teacher.config, config)
    return Outline(loaded=loaded, plan=plan, teacher=teacher, start=start)


def _go_through(
    outline: Outline,
    folder: Path,
    settings: ClusterSettings,
    spare: int,
    runs: Mapping[str, str],
    names: set[str],
    quiet: bool,
    as_events: bool,
) -> Rehearsal:
    from minitron_ray.cli.launch import drive

    started, experiment, plan = time.monotonic(), outline.loaded.experiment, outline.plan
    cache, real = Cache(folder), outline.teacher
    vocabulary = None if real.folder is not None else BYTES
    assert real.config is not None
    config = small_config(family_of(real.config), real.config, spare, vocabulary)
    teacher = random_model(config, real.folder, experiment.seed, cache)
    start = experiment.start
    if start is not None and (before := start.experiment) is not None and before in names:
        start = start.model_copy(update={"config": None})
        config = Checkpoint(find_student(folder, before, runs[before]).folder).config
    elif start is not None:
        config = small_config(family_of(plan.start_config), plan.start_config, spare, vocabulary)
        cut = random_model(config, real.folder, experiment.seed + 1, cache)
        start = type(start)(path=str(cut))
    as_type = experiment.export.as_type
    small = plan.family.read(config if as_type is None else rewritten(config, as_type))
    sized = small_experiment(plan, small)
    text = _text(outline, folder, sized.data.sequence_length)
    sized = sized.model_copy(
        update={
            "teacher": type(sized.teacher)(path=str(teacher), correction=sized.teacher.correction),
            "start": start,
            "data": sized.data.model_copy(update={"source": text.source}),
        }
    )
    miniature = replace(outline.loaded, experiment=sized, rehearsal=True)
    run = drive(miniature, folder, settings, quiet=quiet, runs=runs, as_events=as_events)
    ended = [row for row in run.store.read("stages").to_pylist() if row["status"] == "finished"]
    problems = (real.problem, None if outline.start is None else outline.start.problem, *text.problems)
    return Rehearsal(
        experiment=experiment.name,
        run_id=run.run_id,
        folder=str(run.folder),
        seconds=time.monotonic() - started,
        real=plan.start.shape_text(),
        small=small.shape_text(),
        stages={stage: _spent(ended, stage) for stage in resolve_run(folder, run.run_id).stages_done},
        problems=tuple(problem for problem in problems if problem is not None),
    )


def _text(outline: Outline, folder: Path, length: int) -> FoundText:
    """A little of the text, enough for every part of the miniature."""
    loaded = outline.loaded
    sampler = Sampler(
        base=loaded.base,
        real=Cache(folder.parent),
        cache=Cache(folder),
        rows=2 * TRAINED_SEQUENCES,
        length=length,
        vocabulary=None if outline.teacher.folder is not None else BYTES.end,
    )
    return sampler.look_at(loaded.experiment.data.source)


def _spent(rows: Sequence[Mapping[str, Any]], stage: str) -> float:
    return float(sum(row["seconds"] for row in rows if row["stage"] == stage))


def told(found: Rehearsal) -> list[str]:
    """What a rehearsal did, for people."""
    spent = ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in found.stages.items())
    return [
        f"rehearsed {found.experiment} in {format_seconds(found.seconds)}: all {len(found.stages)} stages, on a "
        f"model of {found.small} with random weights in the place of {found.real}",
        f"  {spent}",
        f"  {found.folder}",
    ]


def missing(found: Sequence[Rehearsal]) -> dict[str, list[str]]:
    """What the real run needs and stand-ins were used for, with the experiments that need it."""
    by_problem: dict[str, list[str]] = {}
    for one in found:
        for problem in one.problems:
            by_problem.setdefault(problem, []).append(one.experiment)
    return by_problem


def refuse_missing(found: Sequence[Rehearsal]) -> None:
    """Raises ConfigError where a real run would stop, which a script that goes on with one must hear of."""
    if problems := missing(found):
        first, *others = problems
        more = f" (and {format_count(len(others))} more)" if others else ""
        raise ConfigError(
            f"the real run can't begin: {first}{more}; every stage went through with stand-ins: put in place what "
            "is missing, then rehearse again"
        )


def verdict(found: Sequence[Rehearsal]) -> list[str]:
    """What is to be done before the real run, for people."""
    by_problem = missing(found)
    lines = [f"this was {REHEARSED}"]
    if not by_problem:
        return [*lines, "every model and every text that the files name was found and could be read"]
    lines.append(
        f"missing for the real run, {format_count(len(by_problem))} in all; stand-ins were used for it:"
    )
    return lines + [f"  {', '.join(names)}: {problem}" for problem, names in by_problem.items()]
