"""The order of several experiments of one command: what another starts from comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from minitron_ray.core.errors import ConfigError
from minitron_ray.experiment import Experiment
from minitron_ray.stages.start import find_student

Item = TypeVar("Item")


def in_order(items: Sequence[Item], experiment: Callable[[Item], Experiment]) -> list[Item]:
    """`items` with each after the one that it starts from, else in the order given.

    Raises ConfigError where experiments start from each other in a circle, where two have the name that a
    third starts from, or where that exports no student.
    """
    named: dict[str, list[Item]] = {}
    for item in items:
        named.setdefault(experiment(item).name, []).append(item)
    ordered: list[Item] = []
    for item in items:
        path: list[Item] = []
        before: Item | None = item
        while before is not None and not _holds(ordered, before):
            if _holds(path, before):
                names = [experiment(one).name for one in path]
                raise ConfigError(
                    f"start.experiment: {' starts from '.join([*names, experiment(before).name])}, a circle; "
                    "let one of them start from its teacher"
                )
            path.append(before)
            before = _before(experiment(before), named, experiment)
        ordered.extend(reversed(path))
    return ordered


def check_starts(experiments: Sequence[Experiment], results: Path) -> None:
    """What each starts from is one of these experiments or has finished in `results`. Raises ConfigError."""
    names = {one.name for one in experiments}
    for one in experiments:
        if one.start is not None and one.start.experiment is not None and one.start.experiment not in names:
            find_student(results, one.start.experiment)


def _before(one: Experiment, named: dict[str, list[Item]], of: Callable[[Item], Experiment]) -> Item | None:
    """What `one` starts from, where it is in the command."""
    name = None if one.start is None else one.start.experiment
    if name is None or name not in named:
        return None
    if len(named[name]) > 1:
        raise ConfigError(
            f"start.experiment: {len(named[name])} of the files are named {name}, and {one.name} starts from "
            "it; name one of them, or give the others other names"
        )
    found = of(named[name][0])
    if found.search is not None and found.distill is None:
        raise ConfigError(
            f"start.experiment: {name} exports no student, its trials keep no weights; give it a section "
            f"distill, so that {one.name} can start from it"
        )
    return named[name][0]


def _holds(items: Sequence[Item], item: Item) -> bool:
    return any(one is item for one in items)
