"""From an experiment file to a driven run: what `minitron-ray run` does."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from minitron_ray.ablation import is_ablation
from minitron_ray.core.errors import ConfigError, Interrupted
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.execution.other_files import refuse_cluster_starter
from minitron_ray.execution.ray_start import check_reachable, cluster_address
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment, Start, Teacher
from minitron_ray.plan import StartConfig, make_plan, run_fingerprint, stages_of
from minitron_ray.plan.rungs import early_halving, first_halving, steps_text
from minitron_ray.results.cache import Cache
from minitron_ray.results.run import Run
from minitron_ray.results.runs import REHEARSED, resolve_run
from minitron_ray.stages.start import NO_RUNS
from minitron_ray.weights.fetch import given_config, local_config

_PACKAGES = ("minitron-ray", "torch", "transformers", "ray", "optuna", "pyarrow", "safetensors", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checked experiment file. `base` is the folder that its paths are relative to."""

    experiment: Experiment
    base: Path
    source: bytes
    overrides: tuple[str, ...]
    rehearsal: bool = False


def read_experiments(paths: Iterable[Path], overrides: tuple[str, ...]) -> list[Loaded]:
    """All files, before any of them is run. Raises ConfigError."""
    loaded = []
    for path in paths:
        if is_ablation(path):
            raise ConfigError(f"{path}: an ablation file; run it with: minitron-ray ablation {path}")
        experiment, document = load(path, Experiment, overrides)
        loaded.append(
            Loaded(
                experiment=experiment,
                base=path.resolve().parent,
                source=document.source,
                overrides=overrides,
            )
        )
        check_plan(loaded[-1])
    return loaded


def check_plan(loaded: Loaded) -> None:
    """Plans for the models that the experiment describes, or that lie in a local folder, so that a budget out of
    reach is said before anything is fetched or read through. Raises ConfigError."""
    experiment, base = loaded.experiment, loaded.base

    def known(section: Teacher | Start, name: str) -> dict[str, Any] | None:
        given = given_config(section.config, base, name)
        return given or (None if section.path is None else local_config(section.path, base))

    config = known(experiment.teacher, "teacher")
    if experiment.start is None:
        if config is not None:
            make_plan(experiment, config)
        return
    start = known(experiment.start, "start")
    if config is not None and start is not None:
        make_plan(experiment, config, StartConfig(config=start, source="start.config"))


def cluster_settings(path: Path | None, address: str | None) -> ClusterSettings:
    """The cluster file's settings, with the address of the command line. Raises ConfigError."""
    if path is not None:
        refuse_cluster_starter(path)
    settings = load(path, ClusterSettings)[0] if path is not None else ClusterSettings()
    return settings if address is None else settings.model_copy(update={"address": address})


def launch(
    experiments: Iterable[Loaded],
    results: Path,
    settings: ClusterSettings,
    *,
    quiet: bool,
    as_json: bool,
    as_events: bool = False,
) -> None:
    """Drives a run of each in order, and prints its ranking; as JSON one list of those that ended well.

    Raises what a stage raised; Interrupted when the user asked to stop.
    """
    from rich.console import Console

    from minitron_ray.report.ranking import rank
    from minitron_ray.report.text import render
    from minitron_ray.results.files import finite

    results, runs = results.expanduser().resolve(), dict(NO_RUNS)
    shown: list[Any] = []
    try:
        for loaded in experiments:
            run = drive(loaded, results, settings, quiet=quiet, runs=runs, as_events=as_events)
            runs[run.experiment] = run.run_id
            ranking = rank(resolve_run(results, run.run_id))
            if as_json:
                shown.append(finite(ranking.as_json()))
            else:
                render(ranking, Console(highlight=False))
    finally:
        if shown:
            click.echo(json.dumps(shown, indent=2, allow_nan=False))


def drive(
    loaded: Loaded,
    results: Path,
    settings: ClusterSettings,
    *,
    quiet: bool,
    runs: Mapping[str, str] = NO_RUNS,
    as_events: bool = False,
) -> Run:
    """Prepares, opens (or resumes) the run and drives it to its end, with a live view on stderr.

    An experiment that starts from another's student takes that of the run in `runs` (run ids by
    experiment), else of the newest.

    Raises what a stage raised; Interrupted when the user asked to stop.
    """
    from minitron_ray.execution.cluster import Cluster
    from minitron_ray.execution.tokenizing import tokenizing
    from minitron_ray.pipeline import execute, plan_for
    from minitron_ray.report.live import open_view
    from minitron_ray.stages.context import Context
    from minitron_ray.stages.prepare import prepare

    results = results.expanduser().resolve()
    experiment, cache, events = loaded.experiment, Cache(results), EventBus()
    stop = StopSignal(
        lambda: events.emit("note", text="stopping at the next safe point; Ctrl-C again to abort")
    )
    try:
        with ExitStack() as stack:
            view = open_view(sys.stderr, quiet=quiet, as_events=as_events, stages=stages_of(experiment))
            events.add(stack.enter_context(view))
            stack.enter_context(stop.installed())
            _check_settings(experiment, settings)
            with tokenizing(settings, results, events, stop) as spread:
                ready = prepare(
                    experiment,
                    loaded.base,
                    cache,
                    events,
                    stop,
                    settings.micro_batch,
                    runs,
                    engine=settings.engine,
                    spread=spread,
                )
            plan = plan_for(experiment, loaded.base, ready)
            run = Run.open(
                results,
                experiment.name,
                run_fingerprint(plan, ready.inputs),
                source=loaded.source,
                resolved=experiment.model_dump(mode="json"),
                environment=environment(loaded.overrides),
                stages=plan.stages,
                rehearsal=loaded.rehearsal,
            )
            stack.enter_context(run.lock())
            events.add(run.log_event)
            if (note := _note(run, experiment)) is not None:
                events.emit("note", text=note)
            shared = [run.folder, *ready.setting.model_folders]
            cluster = stack.enter_context(Cluster(settings, run.folder, events, stop, shared))
            context = Context(
                experiment=experiment,
                ready=ready,
                run=run,
                cache=cache,
                cluster=cluster,
                events=events,
                stop=stop,
            )
            execute(context, plan)
    except (Interrupted, KeyboardInterrupt):
        again = shlex.join(["minitron-ray", *sys.argv[1:]])
        raise stop.interruption(
            f"interrupted, nothing finished is lost; to go on, run it again: {again}"
        ) from None
    return run


def _check_settings(experiment: Experiment, settings: ClusterSettings) -> None:
    """Before anything is fetched. Raises ConfigError, and EnvironmentFailure where the cluster does not answer."""
    from minitron_ray.stages.objectives import check_objectives

    check_objectives(experiment, settings)
    if address := cluster_address(settings):
        check_reachable(address)


def _note(run: Run, experiment: Experiment) -> str | None:
    """What is said once, when a run begins. The divided tokens of a rehearsal say nothing of when trials are
    stopped."""
    if run.rehearsal:
        return f"this is {REHEARSED}"
    first = first_halving(experiment)
    if first is None:
        return None
    return f"search: {early_halving(experiment) or f'the first halving comes after {steps_text(first)}'}"


def environment(overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a reader needs to know about where a run was made; no paths and no host names."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "set": list(overrides),
    }
