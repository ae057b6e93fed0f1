"""`make_plan`: everything about a run that can be known before a tensor is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_ray.core.errors import ConfigError
from minitron_ray.experiment import Experiment
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Band
from minitron_ray.models.families import family_of, rewritten
from minitron_ray.models.family import Family
from minitron_ray.plan.costs import StageCost, costs
from minitron_ray.plan.shape import fixed_shape
from minitron_ray.search.space import Candidate, CandidateRow, enumerate_candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked experiment, its teacher on paper, and the shapes of its students."""

    experiment: Experiment
    config: dict[str, Any]
    """The teacher's, as the model type that it is taken as."""
    family: Family
    teacher: Architecture
    band: Band | None
    """None where the shape is fixed."""
    rows: tuple[CandidateRow, ...]
    """The searched space, or the one fixed shape."""
    costs: tuple[StageCost, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        return stages_of(self.experiment)

    @property
    def feasible(self) -> tuple[CandidateRow, ...]:
        return tuple(row for row in self.rows if row.in_budget)

    @property
    def fixed(self) -> CandidateRow | None:
        """The student's shape where the experiment gives it."""
        return self.rows[0] if self.experiment.shape is not None else None

    def candidate(self, candidate_id: str) -> Candidate:
        """Raises KeyError for a candidate that is not in the space."""
        for row in self.rows:
            if row.candidate.id == candidate_id:
                return row.candidate
        raise KeyError(candidate_id)

    @property
    def trials(self) -> int:
        """Trials that will be run: no shape is tried twice."""
        search = self.experiment.search
        return 0 if search is None else min(search.trials, len(self.feasible))


def stages_of(experiment: Experiment) -> tuple[str, ...]:
    """The stages that a run of this experiment has, in order."""
    searches, distills = experiment.search is not None, experiment.distill is not None
    return (
        "prepare",
        "importance",
        "teacher",
        *(("search",) if searches else ()),
        *(("distill",) if distills else ()),
        "evaluate",
        # Trials keep no weights: a search alone ends with its ranking.
        *(("export",) if distills or not searches else ()),
    )


def make_plan(experiment: Experiment, config: Mapping[str, Any]) -> Plan:
    """Plan `experiment` for a teacher with this `config.json`.

    Raises ConfigError for a family that is not supported, a budget that the space cannot reach, a
    shape that cannot be cut, or settings that contradict each other.
    """
    if (as_type := experiment.export.as_type) is not None:
        try:
            config = rewritten(config, as_type)
        except ConfigError as error:
            raise ConfigError(f"export.as: {error.message}") from None
    family = family_of(config)
    teacher = family.read(config)
    band: Band | None = None
    rows: tuple[CandidateRow, ...]
    if experiment.shape is not None:
        rows = (fixed_shape(family, teacher, experiment.shape, experiment.cut),)
    else:
        budget = experiment.budget
        assert budget is not None
        band = Band.of(budget.parameters, budget.tolerance, budget.count)
        rows = tuple(enumerate_candidates(family, teacher, experiment.searched.space, band, experiment.cut))
    _check(experiment, config, rows)
    _check_blocks(experiment.importance.depth.blocks, teacher.layers, rows)
    students = [row.candidate.architecture(teacher) for row in rows if row.in_budget]
    return Plan(
        experiment=experiment,
        config=dict(config),
        family=family,
        teacher=teacher,
        band=band,
        rows=rows,
        costs=costs(experiment, family, teacher, students),
    )


def check_same_model(given: Mapping[str, Any], real: Mapping[str, Any]) -> None:
    """Raises ConfigError where the config given for planning describes another network than the real one."""
    planned, found = (family_of(config).read(config) for config in (given, real))
    if planned != found:
        raise ConfigError(
            f"teacher.config describes {planned}, but the teacher's own config.json {found}; "
            "correct teacher.config or leave it out"
        )


def _check(experiment: Experiment, config: Mapping[str, Any], rows: tuple[CandidateRow, ...]) -> None:
    length, positions = experiment.data.sequence_length, config.get("max_position_embeddings")
    if isinstance(positions, int) and length > positions:
        raise ConfigError(
            f"data.sequence_length: {length} is longer than the teacher's context of {positions}; "
            f"set it to {positions} or less"
        )
    if experiment.search is None:
        return
    feasible = sum(row.in_budget for row in rows)
    keep, trials = experiment.search.keep, experiment.search.trials
    if keep > min(feasible, trials):
        raise ConfigError(
            f"search.keep: {keep} students cannot be kept of {min(feasible, trials)} trials "
            f"({feasible} shapes are inside the budget); lower keep or widen search.space"
        )


def _check_blocks(blocks: tuple[int, ...], layers: int, rows: tuple[CandidateRow, ...]) -> None:
    """All students lose their layers by the same rule: in a block, where blocks are scored."""
    if not blocks:
        return
    named = ", ".join(map(str, blocks))
    if blocks[-1] >= layers:
        raise ConfigError(
            f"importance.depth.blocks: a block of {blocks[-1]} layers cannot go from a teacher of {layers}; "
            "name shorter ones"
        )
    lost = {layers - row.candidate.layers for row in rows if row.in_budget} - {0, 1}
    if missing := sorted(lost - set(blocks)):
        raise ConfigError(
            f"importance.depth.blocks: blocks of {named} layers are scored, but students of "
            f"{layers - missing[0]} layers lose {missing[0]}; write {sorted(lost)}"
        )
