"""Undistilled cuts as a start for the search, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.end_to_end.desk import EXPERIMENT, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRIALS, SHAPES, SEQUENCES = 3, 6, 3
SEARCH = EXPERIMENT[: EXPERIMENT.index("distill:")]
SET = (
    f"search.zero_shot={{shapes: {SHAPES}, sequences: {SEQUENCES}}}",
    f"search.trials={TRIALS}",
    "search.space.mlp=48..96 by 8",
)
OVERRIDES = [text for one in SET for text in ("--set", one)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> Desk:
    """A finished search of fewer trials than shapes."""
    desk = Desk.lay(tmp_path_factory.mktemp("searched"), tiny_llama, tiny_text)
    (desk.folder / "tiny.yaml").write_text(SEARCH)
    desk.run(*OVERRIDES)
    return desk


def test_a_cuts_loss_is_what_its_trial_finds_before_training(searched: Desk) -> None:
    scored = {row["candidate_id"]: row["val_loss"] for row in searched.rows("zero_shot")}
    feasible = [row["candidate_id"] for row in searched.rows("candidates") if row["in_budget"]]
    assert len(scored) == SHAPES < len(feasible) and set(scored) <= set(feasible)
    tried: dict[str, dict[int, float]] = {}
    for row in searched.rows("sequence_losses"):
        if row["phase"] == "cut" and row["subject"] in scored:
            tried.setdefault(row["subject"], {})[row["sequence"]] = row["loss"]
    assert tried
    for name, losses in tried.items():
        first = [losses[sequence] for sequence in sorted(losses)[:SEQUENCES]]
        assert scored[name] == pytest.approx(np.mean(first), abs=1e-6)


def test_the_best_cuts_are_among_the_first_trials(searched: Desk) -> None:
    scored = sorted((row["val_loss"], row["candidate_id"]) for row in searched.rows("zero_shot"))
    tried = {row["candidate_id"] for row in searched.rows("trials")}
    assert len(tried) == TRIALS
    assert {name for _, name in scored[: (TRIALS + 1) // 2]} <= tried


def test_optuna_reads_the_study(searched: Desk) -> None:
    journal = JournalFileBackend(str(searched.run_folder() / "study.journal"))
    study = optuna.load_study(study_name="search", storage=JournalStorage(journal))
    ended = {row["candidate_id"]: row for row in searched.rows("trials") if row["final"]}
    assert {trial.user_attrs["candidate_id"] for trial in study.trials} == set(ended)
    for trial in study.trials:
        row = ended[trial.user_attrs["candidate_id"]]
        assert trial.value == row["val_loss"] and max(trial.intermediate_values) == row["tokens"]
        assert all(trial.params[axis] == row[axis] for axis in ("layers", "heads", "mlp"))


def test_cuts_that_are_there_are_not_scored_again(searched: Desk) -> None:
    run = searched.run_folder()
    before = {row["candidate_id"]: row["val_loss"] for row in searched.rows("zero_shot")}
    (run / "stages/zero_shot.json").unlink()  # as where a run was killed after five of six cuts
    lost, *kept = sorted((run / "tables/zero_shot").glob("*.arrow"))
    assert len(kept) == SHAPES - 1, "a fragment a cut"
    lost.unlink()
    written = {path: path.stat().st_mtime_ns for path in kept}
    _, err = searched.run(*OVERRIDES)
    assert "zero_shot: finished" in err and "search: reused" in err
    rows = [row for row in searched.rows("stages") if row["stage"] == "zero_shot"]
    tokens = [row["tokens"] for row in sorted(rows, key=lambda row: row["at"])]
    assert tokens == [SHAPES * SEQUENCES * 32, SEQUENCES * 32]
    assert {path: path.stat().st_mtime_ns for path in kept} == written
    assert {row["candidate_id"]: row["val_loss"] for row in searched.rows("zero_shot")} == before
