"""The searcher alone, driven as Ray Tune drives it, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from minitron_ray.core.units import Choices
from minitron_ray.execution.optuna_search import FeasibleSearch
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Space
from minitron_ray.models.budget import Band
from minitron_ray.models.families import family_of
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.samplers.random import Random
from minitron_ray.search.samplers.tpe import TPE
from minitron_ray.search.space import enumerate_candidates

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}


def proposals(mlp: Any = "32..96 by 8", tolerance: float = 0.05) -> ShapeProposals:
    family = family_of(CONFIG)
    teacher = family.read(CONFIG)
    space = Space(
        layers=Choices.parse("2..4"),
        hidden=Choices.parse([36, 42, 48]),
        heads=Choices.parse([3, 6]),
        mlp=Choices.parse(mlp),
    )
    band = Band.of(60_000, tolerance)
    return ShapeProposals.of(enumerate_candidates(family, teacher, space, band), space, band, teacher.hidden)


def searcher(tmp_path: Path, trials: int, stop: StopSignal | None = None, **space: Any) -> FeasibleSearch:
    return FeasibleSearch(
        proposals(**space), TPE().build(0), tmp_path / "study.journal", stop or StopSignal(), trials
    )


def drive(search: FeasibleSearch, count: int, first: int = 0) -> list[str]:
    """Asks and completes `count` trials; the loss prefers candidates late in the order."""
    seen = []
    for number in range(first, first + count):
        asked = search.suggest(f"t{number}")
        if not isinstance(asked, dict):
            break
        seen.append(asked["candidate_id"])
        loss = 1.0 / (1 + search._proposals.feasible.index(seen[-1]))
        search.on_trial_result(f"t{number}", {"val_loss": loss, "tokens": 10, "final": True})
        search.on_trial_complete(f"t{number}", {"val_loss": loss, "tokens": 10, "final": True})
    return seen


def study(tmp_path: Path) -> optuna.Study:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    return optuna.load_study(study_name="search", storage=storage)


def test_only_feasible_shapes_each_once(tmp_path: Path) -> None:
    search = searcher(tmp_path, trials=8)
    assert len(search._proposals.feasible) == 15
    seen = drive(search, 20)
    assert len(seen) == 8 == len(set(seen))
    assert set(seen) <= set(search._proposals.feasible)
    states = {trial.state for trial in study(tmp_path).trials}
    assert TrialState.RUNNING not in states and TrialState.WAITING not in states


def test_no_more_shapes_than_trials_means_every_one(tmp_path: Path) -> None:
    search = searcher(tmp_path, trials=500)
    seen = drive(search, 500)
    assert seen == list(search._proposals.feasible)


def test_ratios_of_the_hidden_size(tmp_path: Path) -> None:
    found = proposals(mlp={"ratio": [1, 1.5, 2]}, tolerance=0.3)
    assert dict(found.axes)["mlp_ratio"] == (1.0, 1.5, 2.0)
    search = searcher(tmp_path, trials=6, mlp={"ratio": [1, 1.5, 2]}, tolerance=0.3)
    assert len(set(drive(search, 6))) == 6


def test_parameters_lead_back_to_the_candidate() -> None:
    found = proposals()
    for candidate_id in found.feasible:
        assert found.candidate_id(found.parameters(candidate_id)) == candidate_id
        assert found.violation(found.parameters(candidate_id)) == 0.0
    outside = {"layers": 4, "hidden": 48, "heads": 6, "mlp": 96}
    assert found.candidate_id(outside) is None and found.violation(outside) > 0.1


def test_the_seed_decides_the_proposals(tmp_path: Path) -> None:
    one = drive(searcher(tmp_path / "a", trials=6), 6)
    same = drive(searcher(tmp_path / "b", trials=6), 6)
    other = drive(FeasibleSearch(proposals(), Random().build(7), tmp_path / "c.journal", StopSignal(), 6), 6)
    assert one == same != other


def test_a_killed_search_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    first = searcher(tmp_path, trials=8)
    done = drive(first, 3)
    cut_off = first.suggest("unfinished")
    assert isinstance(cut_off, dict)
    again = searcher(tmp_path, trials=8)
    for candidate_id in done:
        again.know(candidate_id, ended=True)
    again.know(cut_off["candidate_id"], ended=False)
    assert again.remaining == 5
    rest = drive(again, 20, first=100)
    assert rest[0] == cut_off["candidate_id"]
    assert len(rest) == 5 and not set(rest) & set(done)
    assert TrialState.RUNNING not in {trial.state for trial in study(tmp_path).trials}


def test_how_each_end_is_told(tmp_path: Path) -> None:
    search = searcher(tmp_path, trials=8)
    for name in ("stopped", "failed", "nan"):
        assert isinstance(search.suggest(name), dict)
    search.on_trial_result("stopped", {"val_loss": 1.0, "tokens": 5})
    search.on_trial_complete("stopped", {"val_loss": 1.0, "tokens": 5, "final": False})
    search.on_trial_complete("failed", {"val_loss": 1.0, "tokens": 5}, error=True)
    search.on_trial_complete("nan", {"val_loss": float("nan"), "tokens": 5, "final": True})
    told = {t.user_attrs["candidate_id"]: t for t in study(tmp_path).trials if t.user_attrs}
    by_name = {name: told[search._candidate_of[name]] for name in ("stopped", "failed", "nan")}
    assert by_name["stopped"].state == TrialState.PRUNED
    assert by_name["stopped"].intermediate_values == {5: 1.0}
    assert by_name["failed"].state == by_name["nan"].state == TrialState.FAIL


def test_nothing_is_proposed_once_the_user_wants_to_stop(tmp_path: Path) -> None:
    stop = StopSignal()
    search = searcher(tmp_path, trials=8, stop=stop)
    assert isinstance(search.suggest("a"), dict)
    stop.request()
    assert search.suggest("b") == search.FINISHED


@pytest.mark.parametrize("reduction", [2.0, 3.0])
def test_halving_remembers_earlier_attempts(reduction: float) -> None:
    """A trial worse than all that an earlier attempt recorded is stopped at its first rung."""
    from types import SimpleNamespace

    from minitron_ray.execution.tune_search import KnownTrial, SearchRequest, _scheduler

    known = tuple(
        KnownTrial(candidate_id=f"c{i}", rungs=((100, 1.0 + i), (400, 0.5 + i)), ended=True) for i in range(4)
    )
    request = SearchRequest(
        objective=print,
        proposals=proposals(),
        sampler=TPE().build(0),
        study=Path("unused"),
        trials=8,
        rungs=(100, 400, 900),
        reduction=reduction,
        known=known,
    )
    scheduler = _scheduler(request)
    for name, tokens, loss, expected in (
        ("bad", 100, 9.0, "STOP"),
        ("good", 100, 0.1, "CONTINUE"),
        ("late", 400, 9.0, "STOP"),  # 400 is no power of the reduction: the rungs are those given
    ):
        trial: Any = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        result = {"tokens": tokens, "val_loss": loss}
        assert scheduler.on_trial_result(None, trial, result) == expected  # type: ignore[arg-type]
