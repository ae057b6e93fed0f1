"""Take a finished stage over from another run of the same results folder.

A stage's fingerprint covers everything that decides its result, so another run's record with the
same fingerprint is this run's result: its rows are copied under this run's name, its folders linked.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from minitron_ray.experiment import Experiment
from minitron_ray.plan import Inputs, Plan, run_fingerprint, stage_fingerprints
from minitron_ray.results.run import Run
from minitron_ray.results.runs import find_runs
from minitron_ray.results.store import Store

TABLES: Final = {
    "importance": (("importance", "importance"),),
    "zero_shot": (("zero_shot", "zero_shot"),),
    "search": (("trials", "trial-"), ("sequence_losses", "trial-")),
    "baselines": (("trials", "baseline-"), ("sequence_losses", "baseline-")),
    "distill": (("steps", "distill-"),),
    "evaluate": (("evaluations", "evaluate-"), ("sequence_losses", "evaluate-")),
}
"""What a stage wrote: tables, and how the names of its fragments begin. Other stages are not taken over."""


def take_over(run: Run, stage: str, fingerprint: str) -> dict[str, Any] | None:
    """The record of another run's stage, its rows and folders now in `run` too; None if there is none."""
    if stage not in TABLES:
        return None
    for info in reversed(find_runs(run.folder.parent.parent)):
        path = info.folder / "stages" / f"{stage}.json"
        if info.folder == run.folder or not path.is_file():
            continue
        record: dict[str, Any] = json.loads(path.read_bytes())
        if record["fingerprint"] == fingerprint and outputs_exist(info.folder, record["output"]):
            _copy(info.folder, run, stage, record["output"])
            return record
    return None


def finished(results: Path, plan: Plan, base: Path) -> dict[str, str]:
    """The stages of a plan that an earlier run has finished, and which run that is.

    Digests of models and text are those of the newest run with the same sections `teacher`, `start` and
    `data`: they are not hashed again, so whether they still hold shows when the run begins. `base` is
    the experiment file's folder. Raises ConfigError where a file of the depth metric cannot be read.
    """
    runs = list(reversed(find_runs(results)))
    inputs = next((found for info in runs if (found := _inputs(info.folder, plan.experiment))), None)
    if inputs is None:
        return {}
    inputs = replace(inputs, depth=plan.experiment.importance.depth.inputs(base))
    marks = stage_fingerprints(plan, inputs)
    own = run_fingerprint(plan, inputs)
    known: dict[str, str] = {}
    for info in runs:
        for stage, mark in marks.items():
            path = info.folder / "stages" / f"{stage}.json"
            # A signal is in the cache; an export stays with its run.
            ours = stage in TABLES or stage == "teacher" or info.fingerprint == own
            if stage in known or not ours or not path.is_file():
                continue
            record: dict[str, Any] = json.loads(path.read_bytes())
            if record["fingerprint"] == mark and outputs_exist(info.folder, record["output"]):
                known[stage] = f"{info.experiment}/{info.run_id}"
    return {stage: known[stage] for stage in plan.stages if stage in known}


def _inputs(folder: Path, experiment: Experiment) -> Inputs | None:
    """What a run found for its teacher and its text, where it names the same as `experiment`."""
    resolved, prepared = folder / "resolved.yaml", folder / "stages" / "prepare.json"
    if not resolved.is_file() or not prepared.is_file():
        return None
    there = YAML(typ="safe", pure=True).load(resolved) or {}
    here = experiment.model_dump(mode="json", include={"teacher", "start", "data"})
    for section, unread in (
        ("teacher", "config"),
        ("start", "config"),
        ("data", "calibration"),
        ("data", "validation"),
    ):
        for fields in (there.get(section) or {}, here[section] or {}):
            fields.pop(unread, None)
    if any(there.get(section) != here[section] for section in here):
        return None
    output = json.loads(prepared.read_bytes())["output"]
    return Inputs(
        teacher=output["teacher_digest"], data=output["data_digest"], start=output.get("start_digest")
    )


def outputs_exist(folder: Path, output: dict[str, Any]) -> bool:
    """Whether the folders that a stage's output names are still there."""
    named = [*output.get("folders", {}).values(), *output.get("paths", {}).values()]
    if isinstance(output.get("folder"), str):
        named.append(output["folder"])
    return all((folder / path).is_dir() for path in named)


def _copy(source: Path, run: Run, stage: str, output: dict[str, Any]) -> None:
    there = Store(source, run.experiment, run.run_id)
    for table, writers in TABLES[stage]:
        for writer, sequence, rows in there.fragments(table, writers):
            run.store.append(table, rows, writer=writer, sequence=sequence)
    for path in output.get("folders", {}).values():
        target = run.folder / path
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source / path, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    """A second name for the same bytes; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
