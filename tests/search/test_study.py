"""The study file, read back with Optuna's own loader."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from minitron_ray.core.units import Choices
from minitron_ray.experiment import Space
from minitron_ray.models.budget import Band, Limits
from minitron_ray.models.families import family_of
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.propose import Told
from minitron_ray.search.samplers.nsga2 import NSGA2
from minitron_ray.search.samplers.tpe import TPE
from minitron_ray.search.space import enumerate_candidates
from minitron_ray.search.study import write_study

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


def make_proposals() -> ShapeProposals:
    family = family_of(CONFIG)
    space = Space(layers=Choices.parse("2..4"), mlp=Choices.parse([32, 40, 96]))
    limits = Limits.on(Band.of(60_000, 0.5))
    return ShapeProposals.of(enumerate_candidates(family, family.read(CONFIG), space, limits), space, 48)


def load(path: Path) -> optuna.Study:
    return optuna.load_study(study_name="search", storage=JournalStorage(JournalFileBackend(str(path))))


def test_states_values_and_attributes(tmp_path: Path) -> None:
    proposals = make_proposals()
    a, b, c = proposals.feasible[:3]
    told = [
        Told(candidate_id=b, rungs=((8, 4.0), (16, 3.5)), completed=True, values=(3.5,)),
        Told(candidate_id=a, rungs=((8, 4.25),)),
        Told(candidate_id=c),
    ]
    path = tmp_path / "run" / "study.journal"
    write_study(path, proposals, TPE(), told, {a: 9.5}, {a: {"shape": "small", "parameters": 12}})
    study = load(path)
    done, stopped, failed = study.trials
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert done.value == 3.5 and done.intermediate_values == {8: 4.0, 16: 3.5}
    assert done.params == proposals.parameters(b) and done.user_attrs == {"candidate_id": b}
    assert stopped.intermediate_values == {8: 4.25}
    assert stopped.user_attrs == {
        "candidate_id": a,
        "zero_shot_loss": 9.5,
        "shape": "small",
        "parameters": 12,
    }
    assert failed.params == proposals.parameters(c)
    assert study.best_trial.user_attrs["candidate_id"] == b
    assert study.metric_names == ["val_loss"]


def test_written_again_it_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    proposals, path = make_proposals(), tmp_path / "study.journal"
    told = [
        Told(candidate_id=name, rungs=((8, 4.0),), completed=True, values=(4.0,))
        for name in proposals.feasible[:2]
    ]
    for count in (1, 2):
        write_study(path, proposals, TPE(), told[:count], {}, {})
    assert len(load(path).trials) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["study.journal"]


def test_a_front_has_two_values(tmp_path: Path) -> None:
    proposals, path = make_proposals(), tmp_path / "study.journal"
    a, b = proposals.feasible[:2]
    told = [
        Told(candidate_id=a, rungs=((8, 4.0),), completed=True, values=(4.0, 10.0)),
        Told(candidate_id=b, rungs=((8, 5.0),), completed=True, values=(5.0, 20.0)),
    ]
    write_study(path, proposals, NSGA2(against="parameters"), told, {}, {})
    study = load(path)
    assert [t.values for t in study.best_trials] == [[4.0, 10.0]]
    assert study.metric_names == ["val_loss", "parameters"]
