"""What decides the result of each stage, as a digest: equal digests, equal results, in any run.

Never paths, cluster, numbers of workers, or the experiment's name: what one run has finished, another
run that asks for the same takes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from minitron_ray.core.fingerprint import digest
from minitron_ray.experiment import Experiment
from minitron_ray.importance.metric import RemovalMetric
from minitron_ray.plan.plan import Plan
from minitron_ray.plan.signal import choose_signal, signal_tokens

VERSIONS: Final = MappingProxyType(
    {
        "correct": 2,
        "importance": 2,
        "teacher": 2,
        "zero_shot": 1,
        "search": 3,
        "baselines": 4,
        "distill": 3,
        "evaluate": 2,
        "export": 1,
    }
)
"""Counted up where the same inputs give another result than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Digests of what an experiment names, by content: the teacher's folder, and text, tokenizer, packing."""

    teacher: str
    data: str
    start: str | None = None
    """The folder's of the model that is cut; None where that is the teacher."""
    depth: Mapping[str, Any] = field(default_factory=dict)
    """Digests of the files that the depth metric reads."""


def experiment_fingerprint(experiment: Experiment) -> str:
    """Digest of an experiment. Descriptions of models for planning are not part of it."""
    fields = experiment.model_dump(mode="json")
    for section in ("teacher", "start"):
        (fields[section] or {}).pop("config", None)
    return digest(fields)


def run_fingerprint(plan: Plan, inputs: Inputs) -> str:
    """Digest of the experiment, of what it names, and of the stages' versions: another text is another run."""
    stages = stage_fingerprints(plan, inputs)
    return digest({"experiment": experiment_fingerprint(plan.experiment), "stages": stages})


def stage_fingerprint(stage: str, fields: Any, needs: list[str], **inputs: Any) -> str:
    """Digest of one stage: its version, its own fields, what it needs, and its other inputs."""
    return digest(
        {"stage": stage, "version": VERSIONS[stage], "fields": fields, "needs": needs, "inputs": inputs}
    )


def correction_fingerprint(experiment: Experiment, inputs: Inputs) -> str:
    """Digest of a corrected teacher: the same for all experiments that would make the same one, whatever
    they cut and search."""
    correction, data = experiment.teacher.correction, experiment.data
    assert correction is not None
    return stage_fingerprint(
        "correct",
        {"correction": correction.recipe, "trained": data.calibration + data.validation},
        [],
        teacher=inputs.teacher,
        data=inputs.data,
        precision=experiment.precision,
        seed=experiment.seed,
    )


def corrected(experiment: Experiment, inputs: Inputs) -> Inputs:
    """`inputs` as all stages behind `correct` see them: in the teacher's place what it becomes."""
    if experiment.teacher.correction is None:
        return inputs
    return replace(inputs, teacher=correction_fingerprint(experiment, inputs))


def stage_fingerprints(plan: Plan, inputs: Inputs) -> dict[str, str]:
    """By stage, of the stages that the plan has."""
    e = plan.experiment
    marks: dict[str, str] = {}
    if e.teacher.correction is not None:
        marks["correct"] = correction_fingerprint(e, inputs)
        inputs = corrected(e, inputs)
    found = {"teacher": inputs.teacher, "data": inputs.data, "precision": e.precision}
    seeded = {"seed": e.seed, "as": e.export.as_type}
    validation = [e.data.calibration, e.data.validation]  # where it begins, and how long it is

    def mark(stage: str, fields: Any, *needs: str, **more: Any) -> None:
        marks[stage] = stage_fingerprint(stage, fields, [marks[n] for n in needs], **(found | more))

    # Of the model that is cut, whatever is learnt from: all that comes of a cut needs this stage.
    mark("importance", _importance(plan), teacher=inputs.start or inputs.teacher, files=dict(inputs.depth))
    signal: dict[str, Any] = {"validation": validation, "as": e.export.as_type}
    student = ["importance"]
    ranking = [e.importance.width_label, e.importance.depth.label]  # one table may hold several
    cut = {"cut": e.cut, "ranking": ranking, "shapes": [row.candidate.id for row in plan.feasible]}
    if e.search is not None and signal_tokens(e):
        signal |= {"tokens": e.search.retrain.tokens, "batch": e.search.retrain.batch, "seed": e.seed}
    chosen = choose_signal(e, plan.teacher)
    if plan.start.vocab < plan.teacher.vocab:
        signal |= {"vocabulary": plan.start.vocab}
    mark("teacher", {**signal, "signal": chosen})
    if e.search is not None:
        scored = ["zero_shot"] if "zero_shot" in plan.stages else []
        if scored:
            cuts = {"zero_shot": e.search.zero_shot, "validation": validation, **cut}
            mark("zero_shot", cuts, "importance", **seeded)
        # Without halving all trials are trained to the end, however many are kept of them then.
        choice = {"keep": e.search.keep} if e.search.halving is None else {}
        search = e.search.model_dump(mode="json", exclude={"baselines", *choice})
        if "flops" in e.search.sampler.objectives and plan.limits is not None:
            search["flops_at"] = plan.limits.load.length
        mark("search", {"search": search, **cut}, "importance", "teacher", *scored, **seeded)
        if "baselines" in plan.stages:
            mark("baselines", {**_baselines(e), **cut}, "search", **seeded)
        student, cut = ["search"], {**cut, **choice}
    if e.distill is not None:
        mark("distill", {"distill": e.distill, "validation": validation, **cut}, *student, **seeded)
        student = ["distill"]
    mark("evaluate", {"validation": validation, **cut}, *student, **seeded)
    if "export" in plan.stages:
        mark("export", {"export": e.export}, "evaluate")
    return marks


def _baselines(e: Experiment) -> dict[str, Any]:
    asked = e.searched.baselines
    fields: dict[str, Any] = {"baselines": sorted(asked)}
    if "largest_first" in asked and e.budget is not None:
        fields["count"] = e.budget.count  # by which parameters a shape is large
    return fields


def _importance(plan: Plan) -> dict[str, Any]:
    """What the scores depend on: of the students' shapes only what the metrics look at."""
    e = plan.experiment
    fields: dict[str, Any] = {"calibration": e.data.calibration, "importance": e.importance.identity}
    if e.importance.iterations > 1:
        fields["targets"] = [row.candidate.id for row in plan.feasible]
    if isinstance(e.importance.depth, RemovalMetric) and e.importance.depth.iterative:
        fields["fewest_layers"] = min(row.candidate.layers for row in plan.feasible)
    return fields
