"""An experiment file to its plan, without a download."""

from __future__ import annotations

from pathlib import Path

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan, make_plan
from minitron_ray.results.cache import Cache
from minitron_ray.weights.fetch import read_config_only


def plan_file(path: Path, results: Path, overrides: tuple[str, ...]) -> Plan:
    """Raises ConfigError for a file that is wrong, or whose teacher's config is not at hand."""
    experiment, _ = load(path, Experiment, overrides)
    base = path.resolve().parent
    teacher = experiment.teacher
    config = read_config_only(teacher.path, teacher.revision, teacher.config, base, Cache(results))
    if config is None:
        raise ConfigError(
            f"{path}: the config.json of {experiment.teacher.path} is not on this machine yet; run the experiment "
            "once, or give teacher.config"
        )
    return make_plan(experiment, config)
