"""A search with its baselines, killed among them, and taken up again."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.report.plan_actual import plan_against_actual
from minitron_ray.results.runs import read_info
from tests.end_to_end.desk import EXPERIMENT, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAMES = ("random", "largest_first", "magnitude", "scratch")
SEARCHED = (
    EXPERIMENT[: EXPERIMENT.index("distill:")]
    .replace("trials: 7", "trials: 3")
    .replace("halving: null", "halving: {reduction: 2}")
    .replace("retrain:", f"baselines: [{', '.join(NAMES)}]\n  retrain:")
)
FIGURES = ("tokens", "val_loss", "val_divergence", "train_loss", "final", "status", "parameters")


def trials(desk: Desk) -> dict[Any, tuple[Any, ...]]:
    """Figures by origin, candidate and rung."""
    rows = desk.rows("trials")
    keys = Counter((row["origin"], row["candidate_id"], row["rung"]) for row in rows)
    assert max(keys.values()) == 1, f"{keys.most_common(1)} is there more than once"
    return {
        (row["origin"], row["candidate_id"], row["rung"]): tuple(row[name] for name in FIGURES)
        for row in rows
    }


def losses(desk: Desk) -> dict[Any, float]:
    rows = [row for row in desk.rows("sequence_losses") if row["phase"] == "baseline"]
    found = {(row["subject"], row["tokens"], row["sequence"]): row["loss"] for row in rows}
    assert len(found) == len(rows), "a loss is there more than once"
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> Desk:
    """A run that nothing interrupted."""
    desk = Desk.lay(tmp_path_factory.mktemp("whole"), tiny_llama, tiny_text)
    (desk.folder / "tiny.yaml").write_text(SEARCHED)
    _, err = desk.run()
    assert "Traceback" not in err and "baselines: finished" in err
    assert all(f"trial {name} " in err for name in ("magnitude", "scratch"))
    return desk


def test_baselines_have_the_searchs_recipe_and_at_least_its_tokens(whole: Desk) -> None:
    rows = whole.rows("trials")
    ends = [row for row in rows if row["final"]]
    spent = sum(row["tokens"] for row in ends if row["origin"] == "search")
    winner = min(
        (row for row in ends if (row["origin"], row["status"]) == ("search", "completed")),
        key=lambda row: row["val_loss"],
    )
    by_origin = {
        name: [row for row in ends if row["origin"] == name and row["status"] == "completed"]
        for name in NAMES
    }
    assert all({row["tokens"] for row in found} == {2048} for found in by_origin.values())
    lot = len(by_origin["random"])
    assert 2048 * (lot - 1) < spent <= 2048 * lot
    for name in ("magnitude", "scratch"):
        [row] = by_origin[name]
        assert row["candidate_id"] == winner["candidate_id"] and row["val_loss"] != winner["val_loss"]
    [largest] = by_origin["largest_first"]
    cuts = [row for row in rows if row["origin"] == "largest_first" and row["rung"] == 0]
    assert len(cuts) == 7, "every feasible shape, as there are fewer than ten"
    assert min(cuts, key=lambda row: row["val_loss"])["candidate_id"] == largest["candidate_id"]


def test_what_was_on_disk_is_known_when_it_is_gone(whole: Desk) -> None:
    """A student that waits at a rung leaves its weights and Adam's two moments, 12 bytes a parameter; of tiny
    ones a file's frame is the larger part of what is above that."""
    run = whole.run_folder()
    assert not (run / "trials").exists() and not (run / "baselines").exists()
    rows = {row.stage: row for row in plan_against_actual(read_info(run))}
    smallest = min(row["parameters"] for row in whole.rows("trials"))
    for stage in ("search", "baselines"):
        disk, planned = rows[stage].disk, rows[stage].planned_disk
        assert disk is not None and 12 * smallest <= disk <= 1.5 * planned, (stage, disk, planned)


def test_equal_students_have_equal_figures(whole: Desk) -> None:
    found = trials(whole)
    ends = {(origin, name): row for (origin, name, _), row in found.items() if row[5] == "completed"}
    by_shape: dict[str, set[Any]] = {}
    for (origin, name), row in ends.items():
        if origin in ("search", "random", "largest_first"):
            by_shape.setdefault(name, set()).add(row)
    assert all(len(rows) == 1 for rows in by_shape.values())
    subjects = {subject for subject, tokens, _ in losses(whole) if tokens == 2048}
    assert subjects == {f"{origin}:{name}" for origin, name in ends if origin != "search"}


def test_the_report_has_them_against_the_winner(whole: Desk) -> None:
    out, _ = whole.call("report", whole.run_folder().name)
    assert all(name in out for name in NAMES)
    rows = [row for row in whole.rows("comparisons") if row["phase"] == "baseline"]
    last = {row["subject"]: row["difference"] for row in rows if row["tokens"] == 2048}
    ends = {(r["origin"], r["candidate_id"]): r["val_loss"] for r in whole.rows("trials") if r["final"]}
    winner = next(row["other"] for row in rows)
    for subject, difference in last.items():
        origin, name = subject.split(":")
        assert difference == pytest.approx(ends[origin, name] - ends["search", winner], abs=1e-9)


def test_a_kill_among_the_baselines_trains_no_finished_one_again(whole: Desk, tmp_path: Path) -> None:
    desk = Desk(folder=Path(shutil.copytree(whole.folder, tmp_path / "copy")))
    run = desk.run_folder()  # back to where the search has just ended
    for path in [*run.glob("tables/*/baseline-*"), *run.glob("stages/baselines.json")]:
        path.unlink()

    def fragments() -> dict[str, int]:
        """The last rungs of baselines that are there, and when they were written."""
        paths = run.glob("tables/trials/baseline-*-00000003.arrow")
        return {path.name: path.stat().st_mtime_ns for path in paths}

    try:
        code, _ = desk.stop_when(lambda: bool(fragments()), signal.SIGKILL)
        assert code == -signal.SIGKILL
        before = fragments()
        assert not (run / "stages/baselines.json").exists(), "killed too late to prove anything"
        _, err = desk.run()
    finally:
        desk.clear()
    assert "search: reused" in err and "baselines: finished" in err
    after = fragments()
    assert before.items() <= after.items() and len(before) < len(after)
    assert trials(desk) == trials(whole) and losses(desk) == losses(whole)


def test_other_baselines_take_the_search_over(whole: Desk) -> None:
    _, err = whole.run("--set", "search.baselines=[scratch]")
    assert "search: reused" in err and "(from another run)" in err and "baselines: finished" in err
