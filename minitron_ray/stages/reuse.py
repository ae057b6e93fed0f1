"""Take a finished stage over from another run of the same results folder.

A stage's fingerprint covers everything that decides its result, so another run's record with the
same fingerprint is this run's result: its rows are copied under this run's name, its folders linked.
What a fingerprint does not cover is not taken over: trials that failed, and times that were measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from ruamel.yaml import YAML

from minitron_ray.distillation.blocks import blocks_exist
from minitron_ray.plan import Inputs, Plan, run_fingerprint, stage_fingerprints
from minitron_ray.results.files import link_or_copy
from minitron_ray.results.run import Run
from minitron_ray.results.runs import RunInfo, find_runs
from minitron_ray.results.store import Store

STUDENT_OF: Final = "student of "
"""Begins the source of a start in a plan, where that is another experiment's student."""
TABLES: Final = {
    "correct": (("steps", "correct-"), ("evaluations", "correct-")),
    "importance": (("importance", "importance"),),
    "zero_shot": (("zero_shot", "zero_shot"),),
    "search": (("trials", "trial-"), ("sequence_losses", "trial-")),
    "baselines": (("trials", "baseline-"), ("sequence_losses", "baseline-")),
    "distill": (("steps", "distill-"),),
    "evaluate": (("evaluations", "evaluate-"), ("sequence_losses", "evaluate-")),
}
"""What a stage wrote: tables, and how the names of its fragments begin. Other stages are not taken over."""


def take_over(
    run: Run, stage: str, fingerprint: str, students: Collection[str] | None = None
) -> dict[str, Any] | None:
    """The record of another run's stage, its rows and folders now in `run` too; None if there is none.

    `students` are those whose results it must have, where the stage has results of students.
    """
    if stage not in TABLES or (stage == "baselines" and not _settled(run.store)):
        return None
    for info in reversed(find_runs(run.folder.parent.parent)):
        if info.folder == run.folder or info.rehearsal != run.rehearsal:
            continue
        record = _record(info.folder, stage, fingerprint)
        if record is not None and _given_away(info.store, record, students):
            _copy(info.folder, run, stage, record["output"])
            return record
    return None


def usable(store: Store, record: dict[str, Any], students: Collection[str] | None = None) -> bool:
    """Whether a stage's record stands for its run: what it names is there, it is of these students where
    they are given, and none of its trials failed."""
    output = record["output"]
    there = next((output[key] for key in ("folders", "paths", "perplexity") if key in output), None)
    if students is not None and there is not None and set(there) - {"teacher"} != set(students):
        return False
    return outputs_exist(store.folder, output) and not _failed(store, record["stage"])


def withdraw(run: Run, record: dict[str, Any]) -> None:
    """Before a stage is done again: its record goes, and with a search's its failed trials are open again."""
    stage = record["stage"]
    if _failed(run.store, stage):
        told = "some of its trials failed: they are tried again"
        run.note_stage(stage, record["fingerprint"], "failed", told, 0.0)
    run.drop_stage(stage)
    if stage == "evaluate":
        _clear(run.store, TABLES[stage])  # of other students
    if stage == "export":
        _clear(run.store, (("exports", "export"),))  # likewise; the folders stay
    if stage == "search":
        run.drop_stage("baselines")  # of another winner, perhaps; what is trained stays
        reopen(run.store)


def reopen(store: Store) -> None:
    """Makes the search's failed trials unfinished ones: they are tried again."""
    for writer, sequence, rows in list(store.fragments("trials", "trial-")):
        if any(row["status"] == "failed" for row in rows):
            again = {"final": False, "status": "running", "reason": None}
            opened = [row | again if row["status"] == "failed" else row for row in rows]
            store.append("trials", opened, writer=writer, sequence=sequence)


def _given_away(store: Store, record: dict[str, Any], students: Collection[str] | None = None) -> bool:
    """Whether another run may have it, too."""
    follows = ("search", "baselines", *(("distill", "evaluate") if students is None else ()))
    return usable(store, record, students) and (record["stage"] not in follows or _settled(store))


def _settled(store: Store) -> bool:
    """Whether the search's result follows from its fingerprint: no trial failed, and none was timed."""
    rows = _trials(store, "search")
    return not any(row["status"] == "failed" or row["latency"] is not None for row in rows)


def _failed(store: Store, stage: str) -> bool:
    return any(row["status"] == "failed" for row in _trials(store, stage))


def _trials(store: Store, stage: str) -> Iterator[dict[str, Any]]:
    for table, writers in TABLES.get(stage, ()):
        if table == "trials":
            for _, _, rows in store.fragments(table, writers):
                yield from rows


def _record(folder: Path, stage: str, fingerprint: str) -> dict[str, Any] | None:
    path = folder / "stages" / f"{stage}.json"
    record: dict[str, Any] | None = json.loads(path.read_bytes()) if path.is_file() else None
    return record if record is not None and record["fingerprint"] == fingerprint else None


def finished(results: Path, plan: Plan, base: Path) -> dict[str, str]:
    """The stages of a plan that an earlier run has finished, and which run that is.

    Digests of models and text are those of the newest run with the same sections `teacher`, `start` and
    `data`: they are not hashed again, so whether they still hold shows when the run begins. `base` is
    the experiment file's folder. Raises ConfigError where a file of the depth metric cannot be read.
    """
    runs = [info for info in reversed(find_runs(results)) if not info.rehearsal]
    inputs = next((found for info in runs if (found := _inputs(info.folder, plan, base))), None)
    if inputs is None:
        return {}
    marks = stage_fingerprints(_settled_plan(plan, runs), inputs)
    own = run_fingerprint(plan, inputs)
    known: dict[str, str] = {}
    for info in runs:
        for stage, mark in marks.items():
            # A signal is in the cache; an export stays with its run.
            ours = stage in TABLES or stage == "teacher" or info.fingerprint == own
            if stage in known or not ours or (record := _record(info.folder, stage, mark)) is None:
                continue
            if (usable if info.fingerprint == own else _given_away)(info.store, record):
                known[stage] = f"{info.experiment}/{info.run_id}"
    return {stage: known[stage] for stage in plan.stages if stage in known}


def settled_precision(folder: Path) -> Literal["float32", "bfloat16"] | None:
    """The type of products of the run of a folder, see `stages/precision.py`; None where it does not say."""
    path = folder / "stages" / "prepare.json"
    if not path.is_file():
        return None
    found: Literal["float32", "bfloat16"] | None = json.loads(path.read_bytes())["output"].get("precision")
    return found


def _settled_plan(plan: Plan, runs: Iterable[RunInfo]) -> Plan:
    """With what `auto` was in the newest of the `runs` that were asked for it; as it is where none was."""
    if plan.experiment.precision != "auto":
        return plan
    for info in runs:
        known = settled_precision(info.folder)
        if known is not None and _resolved(info.folder).get("precision") == "auto":
            return replace(plan, experiment=plan.experiment.model_copy(update={"precision": known}))
    return plan


def _resolved(folder: Path) -> dict[str, Any]:
    """A run's whole experiment."""
    path = folder / "resolved.yaml"
    return (YAML(typ="safe", pure=True).load(path) or {}) if path.is_file() else {}


def run_of(results: Path, plan: Plan, base: Path) -> str | None:
    """The id of the newest run, whatever its status, of this very plan; None where there is none. `base`
    and digests as in `finished`."""
    for info in reversed(find_runs(results)):
        if info.experiment != plan.experiment.name or info.rehearsal:
            continue
        inputs = _inputs(info.folder, plan, base)
        if inputs is not None and run_fingerprint(plan, inputs) == info.fingerprint:
            return info.run_id
    return None


def _inputs(folder: Path, plan: Plan, base: Path) -> Inputs | None:
    """What a run found for its teacher, its text and the model that is cut, where it names the same as
    `plan` and, of another experiment's students, cut the same one."""
    experiment = plan.experiment
    prepared, there = folder / "stages" / "prepare.json", _resolved(folder)
    if not there or not prepared.is_file():
        return None
    here = experiment.model_dump(mode="json", include={"teacher", "start", "data"})
    for section, unread in (
        ("teacher", "config"),
        ("teacher", "correction"),
        ("start", "config"),
        ("data", "calibration"),
        ("data", "validation"),
    ):
        for fields in (there.get(section) or {}, here[section] or {}):
            fields.pop(unread, None)
    if any(there.get(section) != here[section] for section in here):
        return None
    output = json.loads(prepared.read_bytes())["output"]
    if plan.start_source is not None and output.get("start") != plan.start_source.removeprefix(STUDENT_OF):
        return None
    return Inputs(
        teacher=output["teacher_digest"],
        data=output["data_digest"],
        start=output.get("start_digest"),
        depth=experiment.importance.depth.inputs(base),
    )


def outputs_exist(folder: Path, output: dict[str, Any]) -> bool:
    """Whether the folders that a stage's output names are still there, and the blocks of a signal."""
    named = [*output.get("folders", {}).values(), *output.get("paths", {}).values()]
    if isinstance(output.get("folder"), str):
        named.append(output["folder"])
    if not all((folder / path).is_dir() for path in named):
        return False
    return "signal" not in output or blocks_exist(folder / output["folder"])


def _copy(source: Path, run: Run, stage: str, output: dict[str, Any]) -> None:
    there = Store(source, run.experiment, run.run_id)
    _clear(run.store, TABLES[stage])  # of an attempt of its own that did not end, or failed
    for table, writers in TABLES[stage]:
        for writer, sequence, rows in there.fragments(table, writers):
            run.store.append(table, rows, writer=writer, sequence=sequence)
    if stage == "search" and (journal := source / "study.journal").is_file():
        (run.folder / journal.name).unlink(missing_ok=True)
        link_or_copy(journal, run.folder / journal.name)
    for path in output.get("folders", {}).values():
        target = run.folder / path
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source / path, target, copy_function=link_or_copy)


def _clear(store: Store, written: Iterable[tuple[str, str]]) -> None:
    for table, writers in written:
        for writer in {writer for writer, _, _ in store.fragments(table, writers)}:
            store.remove(table, writer)
