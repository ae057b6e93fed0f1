"""The runs in a results folder, for those who read them: `find_runs`, `resolve_run`."""

from __future__ import annotations

import difflib
import json
import os
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from minitron_ray.core.errors import EnvironmentFailure, NotFound
from minitron_ray.results.store import Store

STAGES: Final = (
    "prepare",
    "correct",
    "importance",
    "teacher",
    "zero_shot",
    "search",
    "baselines",
    "distill",
    "evaluate",
    "export",
)
"""All stages that a run can have, in order."""


REHEARSALS: Final = ".rehearsal"
"""Folder of a results folder that has the runs of its last rehearsal, and their cache; nothing else reads it."""
REHEARSED: Final = (
    "a rehearsal: random weights and a little training, its figures say nothing about any model"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What run.json and the stage records say of a run. `created` is UTC."""

    folder: Path
    experiment: str
    run_id: str
    fingerprint: str
    status: str
    """As recorded, except that a run whose process is gone from this machine is `interrupted`."""
    created: datetime
    stages: tuple[str, ...]
    """The stages that this run has."""
    stages_done: tuple[str, ...]
    rehearsal: bool = False
    """Whether its models have random weights: it is never ranked, and no other run takes anything of it."""

    @property
    def stages_waiting(self) -> tuple[str, ...]:
        """The stages that are not done, in their order."""
        return tuple(stage for stage in self.stages if stage not in self.stages_done)

    @property
    def store(self) -> Store:
        return Store(self.folder, self.experiment, self.run_id)


def read_info(folder: Path) -> RunInfo:
    """Reads a run folder. Raises EnvironmentFailure if its run.json is not one of ours."""
    try:
        manifest = json.loads((folder / "run.json").read_bytes())
        info = RunInfo(
            folder=folder,
            experiment=manifest["experiment"],
            run_id=manifest["run_id"],
            fingerprint=manifest["fingerprint"],
            status=_status(folder, manifest["status"]),
            created=datetime.fromisoformat(manifest["created"]),
            stages=tuple(manifest.get("stages", STAGES)),
            stages_done=_stages_done(folder),
            rehearsal=bool(manifest.get("rehearsal", False)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentFailure(
            f"{folder / 'run.json'}: not a run's manifest ({error!r}); move the folder away"
        ) from error
    return info


def find_runs(results: Path) -> list[RunInfo]:
    """All runs, the newest last. Folders without run.json are no runs."""
    infos = [read_info(path.parent) for path in Path(results).glob("*/*/run.json")]
    return sorted(infos, key=lambda info: (info.created, info.run_id))


def names_run(results: Path, name: str) -> bool:
    """Whether `name` is, in full, that of a run or of an experiment that has one."""
    return any(name in _full_names(run) for run in find_runs(results))


def _full_names(run: RunInfo) -> tuple[str, str, str]:
    """Run id, `experiment/run id`, experiment."""
    return run.run_id, f"{run.experiment}/{run.run_id}", run.experiment


def resolve_run(results: Path, name: str | None = None) -> RunInfo:
    """The run meant by a run id, `experiment/run id`, an experiment's name (its newest), or the start of
    one run id; the newest of all if None. Raises NotFound with the nearest names."""
    runs = find_runs(results)
    if not runs:
        raise NotFound(f"no runs in {results}; start one with `minitron-ray run EXPERIMENT`")
    if name is None:
        return runs[-1]
    for meant in (slice(0, 2), slice(2, 3)):
        matches = [run for run in runs if name in _full_names(run)[meant]]
        if matches:
            return matches[-1]
    starting = [run for run in runs if run.run_id.startswith(name)]
    if len(starting) == 1:
        return starting[0]
    if starting:
        listed = ", ".join(run.run_id for run in starting)
        raise NotFound(f"{name!r} begins several runs: {listed}; give more of it")
    raise NotFound(f"no run {name!r} in {results}; {_nearest(name, runs)}")


def _nearest(name: str, runs: list[RunInfo]) -> str:
    known = list(dict.fromkeys([run.run_id for run in runs] + [run.experiment for run in runs]))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return "`minitron-ray runs` lists them"


def _status(folder: Path, recorded: str) -> str:
    """A driver that was killed could not say so."""
    if recorded != "running":
        return recorded
    try:
        driver = json.loads((folder / "driver.json").read_bytes())
        if driver["host"] == socket.gethostname():
            os.kill(driver["process"], 0)
    except ProcessLookupError:
        return "interrupted"
    except (OSError, ValueError, KeyError):
        return recorded
    return recorded


def _stages_done(folder: Path) -> tuple[str, ...]:
    done = {path.stem for path in (folder / "stages").glob("*.json")}
    return tuple(stage for stage in STAGES if stage in done)
