"""`make_plan`: everything about a run that can be known before a tensor is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.hardware import Hardware
from minitron_ray.experiment import Experiment, Start
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Limits
from minitron_ray.models.families import family_of, rewritten
from minitron_ray.models.family import Family
from minitron_ray.plan.costs import StageCost, costs, timed
from minitron_ray.plan.intermediate import check_intermediate
from minitron_ray.plan.memory import Layout
from minitron_ray.plan.shape import fixed_shape
from minitron_ray.plan.signal import finds_correction, finds_signal
from minitron_ray.plan.training_memory import TrainingMemory
from minitron_ray.search.space import Candidate, CandidateRow, enumerate_candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """The model that is cut, where it is not the teacher, as far as a plan needs it."""

    config: Mapping[str, Any]
    """Its `config.json`."""
    source: str
    """Where that comes from, for people."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked experiment, its teacher on paper, and the shapes of its students."""

    experiment: Experiment
    config: dict[str, Any]
    """The teacher's, as the model type that it is taken as."""
    family: Family
    teacher: Architecture
    start: Architecture
    """The model that is cut: the teacher, or that of the section `start`."""
    start_config: dict[str, Any]
    """Its `config.json`, as the model type that it is taken as."""
    start_source: str | None
    """Where the model that is cut comes from; None where it is the teacher."""
    limits: Limits | None
    """None where the shape is fixed."""
    rows: tuple[CandidateRow, ...]
    """The searched space, or the one fixed shape."""

    @property
    def stages(self) -> tuple[str, ...]:
        return stages_of(self.experiment, len(self.feasible))

    @property
    def feasible(self) -> tuple[CandidateRow, ...]:
        return tuple(row for row in self.rows if row.in_budget)

    @property
    def fixed(self) -> CandidateRow | None:
        """The student's shape where the experiment gives it."""
        return self.rows[0] if self.experiment.shape is not None else None

    def candidate(self, candidate_id: str) -> Candidate:
        """Raises KeyError for a candidate that is not in the space."""
        return self._candidates[candidate_id]

    @cached_property
    def _candidates(self) -> dict[str, Candidate]:
        """By id, which is a digest: of a large space all of them take a while."""
        return {row.candidate.id: row.candidate for row in self.rows}

    def costs(
        self,
        hardware: Hardware | None = None,
        layout: Layout | None = None,
        before: Sequence[Plan] = (),
    ) -> tuple[StageCost, ...]:
        """What each stage takes, in order; with the time it takes where there is a `hardware`. What plans
        that are run `before` store of the teacher is not made again."""
        storing = (
            one.experiment.name
            for one in before
            if one.config == self.config and finds_signal(self.experiment, one.experiment, self.teacher)
        )
        found = costs(
            self.experiment,
            self.family,
            self.teacher,
            self.feasible,
            self.stages,
            start=self.start,
            layout=layout or Layout.on(hardware),
            signal_of=next(storing, None),
            corrected_by=next((one.experiment.name for one in before if self._corrected_by(one)), None),
        )
        return timed(found, hardware)

    def alone(self, layout: Layout) -> frozenset[str]:
        """The candidates whose trial is one process; those of the others are shared."""
        training = TrainingMemory.of(self.experiment, self.family, self.teacher, layout)
        shapes = ((row.candidate.id, row.candidate.architecture(self.start)) for row in self.feasible)
        return frozenset(name for name, arch in shapes if training.alone(arch))

    def _corrected_by(self, before: Plan) -> bool:
        """Whether a plan that is run before makes the corrected teacher of this one."""
        return before.config == self.config and finds_correction(self.experiment, before.experiment)

    @property
    def trials(self) -> int:
        """Trials that will be run: no shape is tried twice."""
        search = self.experiment.search
        return 0 if search is None else min(search.trials, len(self.feasible))


def stages_of(experiment: Experiment, feasible: int | None = None) -> tuple[str, ...]:
    """The stages that a run of this experiment has, in order.

    Of so many feasible shapes depends whether undistilled cuts are scored; without a number that
    stage is left out.
    """
    searches, distills = experiment.search is not None, experiment.distill is not None
    return (
        "prepare",
        *(("correct",) if experiment.teacher.correction is not None else ()),
        "importance",
        "teacher",
        *(("zero_shot",) if scores_cuts(experiment, feasible or 0) else ()),
        *(("search",) if searches else ()),
        *(("baselines",) if experiment.search is not None and experiment.search.baselines else ()),
        *(("distill",) if distills else ()),
        "evaluate",
        # Trials keep no weights: a search alone ends with its ranking.
        *(("export",) if distills or not searches else ()),
    )


def scores_cuts(experiment: Experiment, feasible: int) -> bool:
    """Whether undistilled cuts are scored: where the sampler can use it, and not every shape is tried."""
    search = experiment.search
    if search is None or search.zero_shot is None:
        return False
    return search.sampler.uses_zero_shot and feasible > search.trials


def make_plan(
    experiment: Experiment, config: Mapping[str, Any], start_config: StartConfig | None = None
) -> Plan:
    """Plan `experiment` for a teacher with this `config.json`, and the model that is cut where the
    experiment has a section `start`.

    Raises ConfigError for a family that is not supported, a budget that the space cannot reach, a
    shape that cannot be cut, or settings that contradict each other.
    """
    if experiment.start is not None and start_config is None:
        raise ConfigError(_unknown_start(experiment.start))
    config = _taken_as(config, experiment.export.as_type)
    family = family_of(config)
    teacher = family.read(config)
    cut_config, start = config, teacher
    if start_config is not None:
        cut_config = _taken_as(start_config.config, experiment.export.as_type)
        start = _read_start(cut_config, family)
    limits: Limits | None = None
    rows: tuple[CandidateRow, ...]
    if experiment.shape is not None:
        length = experiment.data.sequence_length
        rows = (fixed_shape(family, start, experiment.shape, experiment.cut, length),)
    else:
        budget = experiment.budget
        assert budget is not None
        limits, search = budget.limits(experiment.data.sequence_length), experiment.searched
        rows = tuple(
            enumerate_candidates(family, start, search.space, limits, experiment.cut, search.serving)
        )
    _check_length(experiment, config, "teacher")
    if start_config is not None:
        _check_length(experiment, cut_config, "start")
    _check(experiment, rows)
    for section in (experiment.search.retrain if experiment.search else None, experiment.distill):
        if section is not None:
            check_intermediate(section, family, teacher.layers, rows)
    _check_blocks(experiment.importance.depth.blocks, start.layers, rows)
    return Plan(
        experiment=experiment,
        config=dict(config),
        family=family,
        teacher=teacher,
        start=start,
        start_config=dict(cut_config),
        start_source=None if start_config is None else start_config.source,
        limits=limits,
        rows=rows,
    )


def largest_student(plan: Plan) -> dict[str, Any]:
    """The `config.json` of the largest shape that the plan may end with: what another experiment that
    starts from its student is planned for, before there is one."""
    largest = max(plan.feasible, key=lambda row: (row.parameters, row.candidate.id)).candidate
    arch = largest.architecture(plan.start)
    family, layers = plan.family, tuple(range(arch.layers))
    return family.attributes.write(plan.start_config, arch, family.causal_lm, layers)


def _unknown_start(start: Start) -> str:
    if start.experiment is None:
        return (
            f"start: the config.json of {start.path} is not on this machine yet; run the experiment once, or "
            "give start.config"
        )
    return (
        f"start.experiment: {start.experiment} has no finished run, so the shape of its student is not "
        f"known; name the file of {start.experiment} in the same command, run it first, or give start.config"
    )


def _taken_as(config: Mapping[str, Any], as_type: str | None) -> Mapping[str, Any]:
    if as_type is None:
        return config
    try:
        return rewritten(config, as_type)
    except ConfigError as error:
        raise ConfigError(f"export.as: {error.message}") from None


def _read_start(config: Mapping[str, Any], family: Family) -> Architecture:
    """Its vocabulary may be of another size: whether that is padding only the tokenizers say, which are compared
    as soon as both folders are there."""
    try:
        own = family_of(config)
        start = own.read(config)
    except ConfigError as error:
        raise ConfigError(f"start: {error.message}") from None
    if own.model_type != family.model_type:
        raise ConfigError(
            f"start: the model to cut is a {own.model_type}, the teacher a {family.model_type}; both must be of "
            "one model type: start from another model, or set export.as where one can be taken as the other"
        )
    return start


def check_same_model(given: Mapping[str, Any], real: Mapping[str, Any], section: str = "teacher") -> None:
    """Raises ConfigError where the config given for planning describes another network than the real one."""
    planned, found = (family_of(config).read(config) for config in (given, real))
    if planned != found:
        raise ConfigError(
            f"{section}.config describes {planned}, but the {section}'s own config.json {found}; "
            f"correct {section}.config or leave it out"
        )


def _check_length(experiment: Experiment, config: Mapping[str, Any], whose: str) -> None:
    length, positions = experiment.data.sequence_length, config.get("max_position_embeddings")
    if isinstance(positions, int) and length > positions:
        raise ConfigError(
            f"data.sequence_length: {length} is longer than the {whose}'s context of {positions}; "
            f"set it to {positions} or less"
        )


def _check(experiment: Experiment, rows: tuple[CandidateRow, ...]) -> None:
    if experiment.search is None:
        return
    feasible = sum(row.in_budget for row in rows)
    keep, trials = experiment.search.fewest_kept, experiment.search.trials
    if experiment.search.sampler.kind == "exhaustive" and feasible > trials:
        raise ConfigError(
            f"search.trials: {trials} trials do not try each of the {feasible} shapes inside the budget, which "
            f"`sampler: exhaustive` is for; set trials to {feasible}, narrow search.space, or take tpe"
        )
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
