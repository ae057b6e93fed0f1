"""Take a finished stage over from another run of the same results folder.

A stage's fingerprint covers everything that decides its result, so another run's record with the
same fingerprint is this run's result: its rows are copied under this run's name, its folders linked.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from minitron_ray.results.run import Run
from minitron_ray.results.runs import find_runs
from minitron_ray.results.store import Store

TABLES: Final = {
    "importance": (("importance", "importance"),),
    "search": (("candidates", "space"), ("trials", "trial-"), ("sequence_losses", "trial-")),
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
