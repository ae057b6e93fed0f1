"""Run folders: found again by fingerprint, driven by one process, written whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from minitron_ray.core.errors import ConfigError, EnvironmentFailure, NotFound
from minitron_ray.core.events import Event, EventBus
from minitron_ray.results.run import Run
from minitron_ray.results.runs import find_runs, read_info, resolve_run

SOURCE = b"name: exp\n# a comment\n"
RESOLVED: dict[str, Any] = {
    "name": "exp",
    "seed": 7,
    "teacher": {"path": "./teacher", "revision": None},
    "budget": {"parameters": {"low": 1, "high": 2}},
    "rate": 5e-4,
}
ONE, TWO = "1" * 64, "2" * 64


def open_run(results: Path, fingerprint: str = ONE, experiment: str = "exp") -> Run:
    return Run.open(results, experiment, fingerprint, SOURCE, RESOLVED, {"versions": {"ray": "2.60"}})


def test_a_new_run_has_its_files(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert run.status == "created"
    assert run.folder == tmp_path / "exp" / run.run_id and run.run_id.endswith("-111111")
    assert (run.folder / "experiment.yaml").read_bytes() == SOURCE
    resolved = YAML(typ="safe").load(run.folder / "resolved.yaml")
    assert resolved == RESOLVED and list(resolved) == list(RESOLVED)
    assert json.loads((run.folder / "environment.json").read_text())["versions"] == {"ray": "2.60"}
    for name in ("tables", "checkpoints", "exports", "logs"):
        assert (run.folder / name).is_dir()


def test_the_same_fingerprint_resumes_the_newest(tmp_path: Path) -> None:
    first = open_run(tmp_path)
    other = open_run(tmp_path, TWO)
    elsewhere = open_run(tmp_path, ONE, "second")
    again = open_run(tmp_path)
    assert again.folder == first.folder
    assert len({run.folder for run in (first, other, elsewhere)}) == 3
    assert elsewhere.folder.parent.name == "second"


def test_two_fingerprints_with_one_start_in_one_second_get_two_folders(tmp_path: Path) -> None:
    runs = [open_run(tmp_path, "1" * 63 + last) for last in "123"]
    assert len({run.folder for run in runs}) == 3


def test_a_half_made_folder_is_no_run(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    (run.folder / "run.json").unlink()
    assert find_runs(tmp_path) == []
    assert open_run(tmp_path).folder != run.folder


def test_status_is_kept_and_rows_are_added(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.set_status("running")
    run.set_status("running", teacher_digest="t", data_digest="d")
    run.set_status("succeeded")
    assert open_run(tmp_path).status == "succeeded"
    rows = run.store.read("runs").to_pylist()
    assert [row["status"] for row in rows] == ["running", "running", "succeeded"]
    assert [row["teacher_digest"] for row in rows] == [None, "t", "t"]
    assert (rows[0]["teacher"], rows[0]["seed"], rows[0]["fingerprint"]) == ("./teacher", 7, ONE)
    assert json.loads(rows[0]["versions"]) == {"ray": "2.60"}
    with pytest.raises(ValueError, match="unknown status 'done'; one of created, running"):
        run.set_status("done")


def test_a_stage_record_counts_for_its_own_fingerprint(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert run.record("search", "s1") is None
    run.finish_stage("search", "s1", {"winner": "c", "loss": float("nan")}, "best is c", 1.5)
    record = open_run(tmp_path).record("search", "s1")
    assert record is not None and record["output"] == {"winner": "c", "loss": None}
    assert (record["summary"], record["seconds"]) == ("best is c", 1.5)
    assert run.record("search", "s2") is None
    assert read_info(run.folder).stages_done == ("search",)
    with pytest.raises(ValueError, match="unknown stage 'serach'; one of prepare"):
        run.finish_stage("serach", "s1", {}, "", 0.0)


def test_stage_rows_of_a_repeated_finish_do_not_double(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for _ in range(2):  # killed after the row, before the record: the stage is finished once more
        run.finish_stage("search", "s1", {}, "done", 1.0)
    run.note_stage("search", "s1", "reused", "done", 0.0)
    run.note_stage("search", "s1", "reused", "done", 0.0)
    assert sorted(run.store.read("stages")["status"].to_pylist()) == ["finished", "reused", "reused"]


def test_an_attempt_that_is_killed_leaves_its_beginning(tmp_path: Path) -> None:
    open_run(tmp_path).begin_stage("search", "s1")
    run = open_run(tmp_path)
    run.begin_stage("search", "s1")
    run.note_stage("search", "s1", "interrupted", "", 2.0, tokens=5)
    run.begin_stage("search", "s1")
    run.finish_stage("search", "s1", {}, "done", 1.0, tokens=7)
    run.note_stage("search", "s1", "reused", "done", 0.0)
    rows = sorted(run.store.read("stages").to_pylist(), key=lambda row: row["at"])
    assert [(row["status"], row["seconds"], row["tokens"]) for row in rows] == [
        ("running", None, None),
        ("interrupted", 2.0, 5),
        ("finished", 1.0, 7),
        ("reused", 0.0, None),
    ]


def test_what_is_taken_over_took_its_time_elsewhere(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.finish_stage("search", "s1", {}, "done", 700.0, taken_over=True)
    [row] = run.store.read("stages").to_pylist()
    assert (row["status"], row["seconds"]) == ("taken_over", 0.0)
    record = run.record("search", "s1")
    assert record is not None and record["seconds"] == 700.0


def test_stages_are_listed_in_the_order_they_go(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for stage in ("search", "prepare", "importance"):
        run.finish_stage(stage, "f", {}, "", 0.0)
    assert read_info(run.folder).stages_done == ("prepare", "importance", "search")


HOLDER = """
import sys, time
from pathlib import Path
from minitron_ray.results.run import Run
run = Run(Path(sys.argv[1]))
with run.lock():
    run.set_status("running")
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_process_drives_a_run_until_it_dies(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(run.folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(ConfigError, match=rf"already being driven by process {holder.pid}\b"),
            run.lock(),
        ):
            pass
        assert read_info(run.folder).status == "running"
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert read_info(run.folder).status == "interrupted", "the killed driver could not say so itself"
    with run.lock():
        assert json.loads((run.folder / "driver.json").read_text())["process"] == os.getpid()


def test_events_are_lines_of_json_from_any_thread(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    bus = EventBus(run.log_event)

    def emit(name: str) -> None:
        for number in range(50):
            bus.emit("stage_progress", stage=name, done=number, loss=float("inf"))

    threads = [threading.Thread(target=emit, args=(name,)) for name in ("search", "distill")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert len(lines) == 100 and all(line["loss"] is None and line["at"] > 0 for line in lines)
    assert [line["done"] for line in lines if line["stage"] == "search"] == list(range(50))


def test_a_line_cut_by_a_kill_does_not_swallow_the_next(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    path = run.folder / "events.jsonl"
    path.write_text('{"kind": "note", "te')
    open_run(tmp_path).log_event(Event(kind="note", fields={"text": "on"}))
    assert json.loads(path.read_text().splitlines()[-1])["text"] == "on"


def test_runs_are_resolved_by_id_experiment_or_beginning(tmp_path: Path) -> None:
    old = open_run(tmp_path, ONE, "first")
    new = open_run(tmp_path, TWO, "second")
    newest = open_run(tmp_path, ONE, "second")
    ordered = [info.run_id for info in find_runs(tmp_path)]
    assert set(ordered) == {old.run_id, new.run_id, newest.run_id}
    assert resolve_run(tmp_path).run_id == ordered[-1]
    assert resolve_run(tmp_path, new.run_id).folder == new.folder
    assert resolve_run(tmp_path, "first").folder == old.folder
    assert resolve_run(tmp_path, f"second/{new.run_id}").folder == new.folder
    assert resolve_run(tmp_path, new.run_id[:-1]).folder == new.folder
    with pytest.raises(NotFound, match=r"begins several runs: .*; give more of it"):
        resolve_run(tmp_path, old.run_id[:4])
    with pytest.raises(NotFound, match=r"no run 'secnd' in .*; did you mean second"):
        resolve_run(tmp_path, "secnd")
    with pytest.raises(NotFound, match=r"no run 'zzz' in .*`minitron-ray runs` lists them"):
        resolve_run(tmp_path, "zzz")


def test_no_runs_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no runs in .*; start one with"):
        resolve_run(tmp_path / "nowhere")


def test_a_foreign_manifest_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("[]")
    with pytest.raises(EnvironmentFailure, match=r"a/b/run\.json: not a run's manifest"):
        find_runs(tmp_path)


def test_results_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentFailure, match=r"^cannot write to .*/results/exp: .*--results DIR"):
        open_run(tmp_path / "results")
    with pytest.raises(ValueError, match="cannot name an experiment folder"):
        open_run(tmp_path, ONE, "../up")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(EnvironmentFailure, match=r"cannot write to .*: permission denied"):
            open_run(tmp_path)
    finally:
        tmp_path.chmod(0o755)
