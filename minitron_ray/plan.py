"""`make_plan`: an experiment and the teacher's config become a checked, counted, costed plan.

Arithmetic only: no tensor, no torch, no ray. `minitron-ray plan` prints it and stops; `run` starts
from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest
from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.experiment import Experiment
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Band
from minitron_ray.models.cost import distillation_flops, forward_flops, training_flops
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.search.space import Candidate, CandidateRow, enumerate_candidates

LARGEST_SIGNAL: Final = 64 * 2**30
"""Bytes of stored teacher signal above which the teacher runs online in every trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """An upper bound: halving only ever does less."""

    stage: str
    what: str
    tokens: int
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about a run that can be known before a tensor is touched."""

    experiment: Experiment
    config: dict[str, Any]
    family: Family
    teacher: Architecture
    band: Band
    rows: tuple[CandidateRow, ...]
    costs: tuple[StageCost, ...]

    @property
    def fingerprint(self) -> str:
        """Digest of everything in the experiment that decides the result."""
        return experiment_fingerprint(self.experiment)

    @property
    def feasible(self) -> tuple[CandidateRow, ...]:
        return tuple(row for row in self.rows if row.in_budget)

    def candidate(self, candidate_id: str) -> Candidate:
        """Raises KeyError for a candidate that is not in the space."""
        for row in self.rows:
            if row.candidate.id == candidate_id:
                return row.candidate
        raise KeyError(candidate_id)

    @property
    def trials(self) -> int:
        """Trials that will be run: no shape is tried twice."""
        return min(self.experiment.search.trials, len(self.feasible))


def make_plan(experiment: Experiment, config: Mapping[str, Any]) -> Plan:
    """Plan `experiment` for a teacher with this `config.json`.

    Raises ConfigError for a family that is not supported, a budget that the space cannot reach, or
    settings that contradict each other.
    """
    family = family_of(config)
    teacher = family.read(config)
    budget = experiment.budget
    band = Band.of(budget.parameters, budget.tolerance, budget.count)
    rows = tuple(enumerate_candidates(family, teacher, experiment.search.space, band))
    _check(experiment, config, rows)
    return Plan(
        experiment=experiment,
        config=dict(config),
        family=family,
        teacher=teacher,
        band=band,
        rows=rows,
        costs=_costs(experiment, family, teacher, rows),
    )


def experiment_fingerprint(experiment: Experiment) -> str:
    """Digest of an experiment. A description of the teacher for planning is not part of it."""
    fields = experiment.model_dump(mode="json")
    fields["teacher"].pop("config")
    return digest(fields)


def stage_fingerprint(stage: str, version: int, fields: Any, needs: list[str], **inputs: Any) -> str:
    """Digest of one stage: its own fields, its version, what it needs, and its other inputs."""
    return digest({"stage": stage, "version": version, "fields": fields, "needs": needs, "inputs": inputs})


def given_config(experiment: Experiment, base: Path) -> dict[str, Any] | None:
    """The teacher's config as the experiment states it, inline or in a file beside it; None if it does not.

    Raises ConfigError where the file is missing or no JSON object.
    """
    config = experiment.teacher.config
    if not isinstance(config, str):
        return config
    path = base / Path(config).expanduser()
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"teacher.config: {path} cannot be read ({error.strerror}); the path is relative to the experiment file"
        ) from None
    except ValueError as error:
        raise ConfigError(f"teacher.config: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"teacher.config: {path} holds no JSON object, but a config.json is one")
    return value


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
    feasible = sum(row.in_budget for row in rows)
    keep = experiment.search.keep
    if keep > min(feasible, experiment.search.trials):
        raise ConfigError(
            f"search.keep: {keep} students cannot be kept of {min(feasible, experiment.search.trials)} trials "
            f"({feasible} shapes are inside the budget); lower keep or widen search.space"
        )


def _costs(
    experiment: Experiment, family: Family, teacher: Architecture, rows: tuple[CandidateRow, ...]
) -> tuple[StageCost, ...]:
    data, search, distill = experiment.data, experiment.search, experiment.distill
    length = data.sequence_length

    students = [row.candidate.architecture(teacher) for row in rows if row.in_budget]
    of_teacher = forward_flops(family, teacher, length)
    largest = max(students, key=lambda student: forward_flops(family, student, length))
    of_student = forward_flops(family, largest, length)
    trials = min(search.trials, len(students))
    calibration, validation = data.calibration * length, data.validation * length
    measured = validation * (search.retrain.rungs + 1)
    signal = search.retrain.tokens + validation
    stored = signal * signal_bytes_a_token(teacher)
    online = stored > LARGEST_SIGNAL
    train = training_flops(family, largest, length)
    return (
        StageCost(
            stage="importance",
            what=f"{data.calibration} calibration sequences, forward",
            tokens=calibration,
            flops=float(calibration * of_teacher),
        ),
        StageCost(
            stage="teacher",
            what=f"online in each trial: stored it would take {format_bytes(stored)}"
            if online
            else f"the teacher's signal on search and validation tokens, {format_bytes(stored)} on disk",
            tokens=0 if online else signal,
            flops=0.0 if online else float(signal * of_teacher),
        ),
        StageCost(
            stage="search",
            what=f"{trials} trials of {format_count(search.retrain.tokens)} tokens",
            tokens=trials * search.retrain.tokens,
            flops=float(
                trials
                * (
                    search.retrain.tokens * train
                    + measured * of_student
                    + (signal * of_teacher if online else 0)
                )
            ),
        ),
        StageCost(
            stage="distill",
            what=f"{search.keep} student{'s' if search.keep > 1 else ''}, teacher online",
            tokens=search.keep * distill.tokens,
            flops=float(search.keep * distill.tokens * distillation_flops(family, teacher, largest, length)),
        ),
        StageCost(
            stage="evaluate",
            what=f"{data.validation} validation sequences, teacher and students",
            tokens=validation * (1 + search.keep),
            flops=float(validation * (of_teacher + search.keep * of_student)),
        ),
    )


def signal_bytes_a_token(teacher: Architecture) -> int:
    """Bytes of the teacher's final hidden states, at most (float32)."""
    return 4 * teacher.hidden


def steps(tokens: int, batch: int, sequence_length: int) -> int:
    """Optimizer steps that see at least `tokens`."""
    return math.ceil(tokens / (batch * sequence_length))


def distilled_tokens(experiment: Experiment) -> int:
    """Tokens that each chosen student sees in its distillation."""
    distill = experiment.distill
    return tokens_seen(distill.tokens, distill.batch, experiment.data.sequence_length)


def tokens_seen(tokens: int, batch: int, sequence_length: int) -> int:
    """`tokens` rounded up to whole optimizer steps: what training really sees."""
    return steps(tokens, batch, sequence_length) * batch * sequence_length
