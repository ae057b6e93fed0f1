"""The model that an experiment cuts where it is not its teacher: found among finished runs, or by its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.experiment import Experiment, Start
from minitron_ray.plan import Plan, StartConfig, largest_student
from minitron_ray.results.cache import Cache
from minitron_ray.results.runs import RunInfo, find_runs
from minitron_ray.stages.reuse import STUDENT_OF, run_of
from minitron_ray.weights.fetch import CONFIG, given_config, read_config_only, resolve_teacher

NO_RUNS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """An exported student of a finished run."""

    folder: Path
    source: str
    """Where it comes from: `experiment/run id, candidate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """An experiment that another one of the same command may start from."""

    plan: Plan
    base: Path
    """Its file's folder."""


NONE_EARLIER: Final[Mapping[str, Earlier]] = MappingProxyType({})


def find_student(results: Path, experiment: str, run_id: str | None = None) -> Student:
    """The best student that a run of `experiment` exported: of the run of that id, or of the newest
    that did. The best is that of the lowest validation loss, distilled where any is. A rehearsal is only
    taken by its id, which another rehearsal has.

    A run that is driven again keeps what it has exported, however that ends. Raises ConfigError where
    there is no such run, or none that has exported.
    """
    runs = [info for info in find_runs(results) if info.experiment == experiment]
    runs = [info for info in runs if not info.rehearsal or info.run_id == run_id]
    if not runs:
        raise ConfigError(
            f"start.experiment: there is no run of {experiment} in {results}; run it first, or name its file "
            "in the same command"
        )
    wanted = [info for info in runs if run_id in (None, info.run_id)]
    exported = [info for info in wanted if "export" in info.stages_done]
    if not exported:
        raise ConfigError(f"start.experiment: {_without_student(runs[-1] if not wanted else wanted[-1])}")
    return _best(exported[-1])


def start_folder(start: Start, base: Path, cache: Cache, runs: Mapping[str, str]) -> Student:
    """The folder of the model that is cut, fetched and converted where needed; of another experiment the run
    is that of `runs` (run ids by experiment), where it names one. Raises ConfigError where there is none."""
    if start.experiment is not None:
        return find_student(cache.folder.parent, start.experiment, runs.get(start.experiment))
    assert start.path is not None
    try:
        found = resolve_teacher(start.path, start.revision, start.sha256, base, cache)
    except ConfigError as error:
        raise ConfigError(_of_start(error.message)) from None
    return Student(folder=found.folder, source=start.path)


def known_start(
    experiment: Experiment, base: Path, cache: Cache, earlier: Mapping[str, Earlier] = NONE_EARLIER
) -> StartConfig | None:
    """What is known of the model that is cut without a download: the finished student; else the config
    that is given; else, of an experiment in `earlier` (by name), its largest shape. Of an experiment in
    `earlier` only a run of that very plan counts. None where the experiment has no `start`, or nothing
    is known."""
    start = experiment.start
    if start is None:
        return None
    if start.path is not None:
        try:
            config = read_config_only(start.path, start.revision, start.config, base, cache)
        except ConfigError as error:
            raise ConfigError(_of_start(error.message)) from None
        return None if config is None else StartConfig(config=config, source=start.path)
    assert start.experiment is not None
    results, run_id = cache.folder.parent, None
    if (before := earlier.get(start.experiment)) is not None:
        run_id = run_of(results, before.plan, before.base)
        if run_id is None:
            return _expected(start, base, earlier)
    try:
        student = find_student(results, start.experiment, run_id)
    except ConfigError:
        return _expected(start, base, earlier)
    config = json.loads((student.folder / CONFIG).read_bytes())
    return StartConfig(config=config, source=f"{STUDENT_OF}{student.source}")


def _expected(start: Start, base: Path, earlier: Mapping[str, Earlier]) -> StartConfig | None:
    name = start.experiment
    assert name is not None
    if start.config is not None:
        try:
            config = given_config(start.config, base)
        except ConfigError as error:
            raise ConfigError(_of_start(error.message)) from None
        assert config is not None
        return StartConfig(config=config, source=f"start.config, since {name} has no student yet")
    if name in earlier:
        largest = f"the largest shape of {name}, which has no student yet"
        return StartConfig(config=largest_student(earlier[name].plan), source=largest)
    return None


def _best(info: RunInfo) -> Student:
    paths = json.loads((info.folder / "stages" / "export.json").read_bytes())["output"]["paths"]
    losses = {
        (row["subject"], row["phase"]): row["value"]
        for row in info.store.read("evaluations").to_pylist()
        if row["metric"] == "val_loss"
    }
    phase = "distilled" if any((name, "distilled") in losses for name in paths) else "cut"
    name = min(paths, key=lambda name: (losses[name, phase], name))
    folder = info.folder / paths[name]
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"start.experiment: the student of run {info.run_id} is gone from {folder}; run "
            f"{info.experiment} again to export it"
        )
    return Student(folder=folder, source=f"{info.experiment}/{info.run_id}, {name}")


def _without_student(info: RunInfo) -> str:
    if "export" not in info.stages:
        return (
            f"{info.experiment} exports no student, its trials keep no weights; give it a section distill "
            "and run it again"
        )
    return (
        f"run {info.run_id} of {info.experiment} is {info.status} and has no student yet; run "
        f"{info.experiment} again to finish it"
    )


def _of_start(message: str) -> str:
    """An error of a model, said of the right section."""
    found = message.replace("teacher.", "start.")
    return found if "start." in found else f"start: {found}"
