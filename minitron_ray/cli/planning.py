"""Experiment files to their plans, without a download."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from minitron_ray.cli.chain import in_order
from minitron_ray.core.errors import ConfigError
from minitron_ray.core.hardware import Hardware
from minitron_ray.core.loading import load
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan, make_plan
from minitron_ray.results.cache import Cache
from minitron_ray.stages.hardware import known_hardware, probed_hardware
from minitron_ray.stages.start import Earlier, known_start
from minitron_ray.weights.fetch import read_config_only


def plan_files(paths: Iterable[Path], results: Path, overrides: tuple[str, ...]) -> list[tuple[Path, Plan]]:
    """The plan of each file, what another starts from first. Raises ConfigError as `plan_file`."""
    loaded = [(path, load(path, Experiment, overrides)[0]) for path in paths]
    plans: list[tuple[Path, Plan]] = []
    for path, experiment in in_order(loaded, lambda pair: pair[1]):
        earlier = {
            plan.experiment.name: Earlier(plan=plan, base=before.resolve().parent) for before, plan in plans
        }
        plans.append((path, plan_file(path, experiment, results, earlier)))
    return plans


def plan_file(path: Path, experiment: Experiment, results: Path, earlier: Mapping[str, Earlier]) -> Plan:
    """The plan of one file; of the experiments `earlier` it may start from one that has not been run.

    Raises ConfigError for a file that is wrong, or where a model's config is not at hand.
    """
    base, cache = path.resolve().parent, Cache(results)
    teacher = experiment.teacher
    config = read_config_only(teacher.path, teacher.revision, teacher.config, base, cache)
    if config is None:
        raise ConfigError(
            f"{path}: the config.json of {experiment.teacher.path} is not on this machine yet; run the experiment "
            "once, or give teacher.config"
        )
    try:
        return make_plan(experiment, config, known_start(experiment, base, cache, earlier))
    except ConfigError as error:
        if experiment.start is None:
            raise
        raise ConfigError(f"{path}: {error.message}") from None


def hardware_of(plan: Plan, settings: ClusterSettings, results: Path, *, probe: bool) -> Hardware | None:
    """What the plan is timed for, see `stages.hardware`; with `probe` measured here where nothing is known."""
    cache = Cache(results)
    if not probe:
        return known_hardware(settings, cache, plan)
    from minitron_ray.stages.probe import probe as measure

    return probed_hardware(settings, cache, plan, measure)
