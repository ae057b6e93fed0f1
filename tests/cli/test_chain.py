"""Several experiments of one command: their order, and what is refused before any of them is run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from minitron_ray.cli.chain import check_starts, in_order
from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.results.run import Run
from minitron_ray.stages.start import find_student

EXPERIMENT = """
name: {name}
teacher: {{path: ./teacher}}
data: {{source: {{kind: files, path: t}}, sequence_length: 32}}
shape: {{layers: 2}}
{more}
"""
SEARCH = "budget: {parameters: 45k}\nsearch: {space: {layers: 2..3}}\n"


def experiment(folder: Path, name: str, start: str | None = None) -> Experiment:
    path = folder / f"{name}.yaml"
    more = "" if start is None else f"start: {{experiment: {start}}}"
    path.write_text(EXPERIMENT.format(name=name, more=more))
    return load(path, Experiment, ())[0]


def names(items: list[Experiment]) -> list[str]:
    return [one.name for one in in_order(items, lambda one: one)]


def test_in_whatever_order_what_another_starts_from_comes_first(tmp_path: Path) -> None:
    chain = [experiment(tmp_path, "a"), experiment(tmp_path, "b", "a"), experiment(tmp_path, "c", "b")]
    chain.append(experiment(tmp_path, "d", "a"))
    for given in itertools.permutations(chain):
        found = names(list(given))
        assert sorted(found) == ["a", "b", "c", "d"]
        assert all(found.index(x) < found.index(y) for x, y in ("ab", "bc", "ad"))
    assert names(chain[::-1]) == ["a", "d", "b", "c"]  # else as given


def test_files_that_do_not_depend_on_each_other_stay_as_given(tmp_path: Path) -> None:
    assert names([experiment(tmp_path, "z"), experiment(tmp_path, "a"), experiment(tmp_path, "m", "x")]) == [
        "z",
        "a",
        "m",
    ]


def test_a_circle_is_named(tmp_path: Path) -> None:
    circle = [experiment(tmp_path, "a", "b"), experiment(tmp_path, "b", "a")]
    with pytest.raises(ConfigError, match="a starts from b starts from a, a circle"):
        names(circle)


def test_a_name_that_two_files_have_is_no_start(tmp_path: Path) -> None:
    twice = [experiment(tmp_path, "a"), experiment(tmp_path, "a"), experiment(tmp_path, "b", "a")]
    with pytest.raises(ConfigError, match="2 of the files are named a, and b starts from it"):
        names(twice)


def test_a_search_that_keeps_no_weights_is_no_start(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(EXPERIMENT.format(name="a", more="").replace("shape: {layers: 2}\n", SEARCH))
    searched = load(path, Experiment, ())[0]
    with pytest.raises(ConfigError, match=r"a exports no student.*section distill, so that b can"):
        names([searched, experiment(tmp_path, "b", "a")])


def opened(results: Path, name: str, fingerprint: str, *, stages: tuple[str, ...] = ("export",)) -> Run:
    return Run.open(results, name, fingerprint, source=b"", resolved={}, environment={}, stages=stages)


def exported(run: Run, losses: dict[str, float]) -> None:
    """A finished run with students of these losses."""
    for name in losses:
        folder = run.folder / "exports" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    row = {"phase": "distilled", "metric": "val_loss", "sequences": 1, "tokens": 1, "distill_tokens": 1}
    rows = [row | {"subject": name, "value": loss, "stderr": None} for name, loss in losses.items()]
    run.store.append("evaluations", rows, writer="evaluate-x", sequence=0)
    run.finish_stage("export", "f", {"paths": {name: f"exports/{name}" for name in losses}}, "", 0.0)
    run.set_status("succeeded")


def test_the_best_student_of_the_newest_finished_run(tmp_path: Path) -> None:
    older, newer = opened(tmp_path, "a", "1"), opened(tmp_path, "a", "2")
    exported(older, {"x": 1.0})
    exported(newer, {"x": 3.0, "y": 2.0, "z": 4.0})
    opened(tmp_path, "a", "3").set_status("interrupted")
    newest = find_student(tmp_path, "a")
    assert newest.folder == newer.folder / "exports" / "y"
    assert newest.source == f"a/{newer.run_id}, y"
    assert find_student(tmp_path, "a", older.run_id).folder == older.folder / "exports" / "x"


def test_a_run_that_is_driven_again_keeps_its_student(tmp_path: Path) -> None:
    run = opened(tmp_path, "a", "1")
    exported(run, {"x": 1.0})
    for status in ("interrupted", "failed"):
        run.set_status(status)
        assert find_student(tmp_path, "a").folder == run.folder / "exports" / "x"


def test_a_start_without_a_student_is_said_before_anything_runs(tmp_path: Path) -> None:
    results, second = tmp_path / "results", experiment(tmp_path, "b", "a")
    check_starts([second, experiment(tmp_path, "a")], results)  # in the same command
    with pytest.raises(ConfigError, match=r"there is no run of a in .*; run it first, or name its file"):
        check_starts([second], results)
    opened(results, "a", "1").set_status("interrupted")
    with pytest.raises(ConfigError, match="of a is interrupted and has no student yet; run a again"):
        check_starts([second], results)
    opened(results, "a", "2", stages=("search",)).set_status("succeeded")
    with pytest.raises(ConfigError, match="a exports no student, its trials keep no weights"):
        check_starts([second], results)


def test_a_student_that_is_gone_is_missed(tmp_path: Path) -> None:
    run = opened(tmp_path, "a", "1")
    exported(run, {"x": 1.0})
    (run.folder / "exports" / "x" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"is gone from .*; run a again to export it"):
        find_student(tmp_path, "a")
