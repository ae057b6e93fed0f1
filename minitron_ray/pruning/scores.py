"""`scores_for`: the importance scores that a cut goes by, measured by a run or taken from the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.experiment import Experiment
from minitron_ray.importance.controls import CONTROLS, control_scores
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family
from minitron_ray.results.runs import RunInfo, read_info, resolve_run
from minitron_ray.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class CutScores:
    """The scores, and what the student's record tells about them."""

    scores: Scores
    told: dict[str, Any]


def scores_for(
    importance: str,
    seed: int,
    checkpoint: Checkpoint,
    family: Family,
    teacher: Architecture,
    results: Path,
) -> CutScores:
    """`importance` is `magnitude`, `random`, or a run: its folder, its id or the start of it, or an
    experiment's name.

    Raises ConfigError where weights are not finite or the run scored another teacher, NotFound where
    there is no such run.
    """
    for control in CONTROLS:
        if importance == control:
            try:
                scores = control_scores(control, seed, checkpoint, family, teacher)
            except MinitronError as error:
                raise ConfigError(f"{checkpoint.folder}: {error.message}") from None
            told = {"kind": control} | ({"seed": seed} if control == "random" else {})
            return CutScores(scores=scores, told=told)
    return _of_run(importance, checkpoint, results)


def _of_run(name: str, checkpoint: Checkpoint, results: Path) -> CutScores:
    folder = Path(name).expanduser()
    run = read_info(folder) if (folder / "run.json").is_file() else resolve_run(results, name)
    table = run.store.read("importance")
    if not len(table):
        raise ConfigError(
            f"run {run.run_id} has no importance table (it is {run.status}); run it until units are scored"
        )
    scored, given = _teacher_digest(run), checkpoint.digest()
    if scored != given:
        raise ConfigError(
            f"run {run.run_id} scored another teacher (sha256 {scored[:12]}…, {checkpoint.folder} has "
            f"{given[:12]}…); name its own teacher, or a run of this one"
        )
    section = _experiment(run).importance
    width, depth = section.width.label, section.depth.label
    return CutScores(
        scores=Scores.from_table(table, width, depth),
        told={"kind": "run", "run": run.run_id, "width": width, "depth": depth, "teacher_digest": given},
    )


def _teacher_digest(run: RunInfo) -> str:
    found = json.loads((run.folder / "run.json").read_bytes()).get("teacher_digest")
    prepared = run.folder / "stages" / "prepare.json"
    if prepared.is_file():  # where the model that was cut is not the teacher, it is the one that was scored
        found = json.loads(prepared.read_bytes())["output"].get("start_digest", found)
    if not isinstance(found, str):
        raise ConfigError(
            f"run {run.run_id} does not say which teacher it scored; run it until units are scored"
        )
    return found


def _experiment(run: RunInfo) -> Experiment:
    try:
        return Experiment.model_validate(YAML(typ="safe", pure=True).load(run.folder / "resolved.yaml"))
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{run.folder / 'resolved.yaml'} can't be read ({reason}); score again") from None
