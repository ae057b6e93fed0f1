"""`write_study`: the search as an Optuna study in a file, for `optuna-dashboard` and notebooks.

Made from the run's tables each time, and never read back: what is tried next depends on the tables
alone (`search.propose`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.propose import MINIMIZE, Told
from minitron_ray.search.sampler import SearchSampler

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

NAME: Final = "search"


def write_study(
    path: Path,
    proposals: ShapeProposals,
    sampler: SearchSampler,
    told: Sequence[Told],
    zero_shot: Mapping[str, float],
    attributes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the study `search` as an Optuna journal, in one piece.

    One trial for each of `told`, in that order: completed with its values, stopped (PRUNED) with its
    rungs by tokens, or failed where it has neither. User attributes are `candidate_id`,
    `zero_shot_loss` where measured, and what `attributes` has for the candidate (JSON values).

    Raises OSError where it can't be written; what was there before stays then.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".study-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        journal = Path(folder) / path.name
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage, study_name=NAME, directions=[MINIMIZE] * len(sampler.objectives)
        )
        study.set_metric_names(list(sampler.objectives))
        for trial in told:
            known: dict[str, Any] = {"candidate_id": trial.candidate_id}
            if trial.candidate_id in zero_shot:
                known |= {"zero_shot_loss": zero_shot[trial.candidate_id]}
            known |= attributes.get(trial.candidate_id, {})
            study.add_trial(_frozen(proposals, trial, known))
        journal.replace(path)


def _frozen(proposals: ShapeProposals, told: Told, attributes: dict[str, Any]) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    state = TrialState.PRUNED if told.rungs else TrialState.FAIL
    return create_trial(
        state=TrialState.COMPLETE if told.completed else state,
        values=told.values if told.completed else None,
        params=proposals.parameters(told.candidate_id),
        distributions=proposals.distributions(),
        intermediate_values=dict(told.rungs),
        user_attrs=attributes,
        constraints={"budget": 0.0},
    )
