"""What a run takes over from another, and what it does again: from tables and records written by hand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_ray.core.errors import Interrupted
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.pipeline import execute, plan_for
from minitron_ray.plan import Plan, run_fingerprint, stage_fingerprints
from minitron_ray.results.cache import Cache
from minitron_ray.results.run import Run
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.propose import Told
from minitron_ray.search.study import write_study
from minitron_ray.stages.context import Context
from minitron_ray.stages.prepare import prepare
from minitron_ray.stages.reuse import finished
from tests.search.test_study import load as load_study

LAST = 1024
MARK = "f" * 64


@dataclass(kw_only=True)
class Lab:
    """A results folder, and one experiment that searches and distills nothing."""

    folder: Path

    def open(self, *overrides: str) -> tuple[Context, Plan]:
        """A run of the experiment under these options; Ray is not started before a stage asks for it."""
        experiment, _ = load(self.folder / "x.yaml", Experiment, overrides)
        cache, events, stop = Cache(self.folder / "results"), EventBus(), StopSignal()
        ready = prepare(experiment, self.folder, cache, events, stop, micro_batch=4)
        plan = plan_for(experiment, self.folder, ready)
        run = Run.open(
            self.folder / "results",
            experiment.name,
            run_fingerprint(plan, ready.inputs),
            source=b"",
            resolved=experiment.model_dump(mode="json"),
            environment={},
            stages=plan.stages,
        )
        run.finish_stage("prepare", "p", ready.output, ready.summary, 0.0)
        cluster = Cluster(ClusterSettings(), run.folder, events, stop)
        context = Context(
            experiment=experiment,
            ready=ready,
            run=run,
            cache=cache,
            cluster=cluster,
            events=events,
            stop=stop,
        )
        return context, plan


@pytest.fixture
def lab(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> Lab:
    (tmp_path / "x.yaml").write_text(
        f"""
name: x
precision: float32
teacher: {{path: {tiny_llama}}}
data:
  source: {{kind: files, path: {tiny_text}/**/*.txt}}
  sequence_length: 32
  calibration: 4
  validation: 8
budget: {{parameters: 75k, tolerance: 20%}}
search:
  space: {{layers: 3..4, mlp: [48, 64]}}
  sampler: {{kind: random}}
  trials: 3
  zero_shot: null
  halving: null
  retrain: {{tokens: {LAST}, rungs: 1}}
"""
    )
    return Lab(folder=tmp_path)


def write_trial(run: Run, name: str, loss: float, status: str = "completed", **more: Any) -> None:
    """A trial that was measured as a cut and at its end, where it did not fail before."""
    origin = more.get("origin", "search")
    writer = f"trial-{name}" if origin == "search" else f"baseline-{origin}-{name}"
    ends = [(0, 9.0), (LAST, loss)] if status == "completed" else [(0, 9.0)]
    for rung, (tokens, value) in enumerate(ends):
        last = rung == len(ends) - 1
        row = {
            "candidate_id": name,
            "rung": rung,
            "tokens": tokens,
            "val_loss": value,
            "final": last,
            "status": status if last else "running",
            "reason": "CUDA out of memory" if status == "failed" else None,
            "origin": origin,
            "cohort": 0,
        }
        run.store.append("trials", [row | more], writer=writer, sequence=rung)
        noise = np.random.default_rng(rung).normal(0, 0.01, 8)
        losses = [
            {
                "subject": name if origin == "search" else f"{origin}:{name}",
                "phase": ("search" if rung else "cut") if origin == "search" else "baseline",
                "tokens": tokens,
                "sequence": number,
                "loss": value + float(noise[number] - noise.mean()),
            }
            for number in range(8)
        ]
        run.store.append("sequence_losses", losses, writer=writer, sequence=rung)


def states(run: Run) -> dict[str, str]:
    """Of each trial the state in its last row."""
    rows = sorted(run.store.read("trials").to_pylist(), key=lambda row: row["rung"])
    return {row["candidate_id"]: row["status"] for row in rows}


@dataclass
class Work:
    """A stage's work that writes one trial, and counts how often it was asked to, and what it found."""

    context: Context
    found: list[dict[str, str]] = field(default_factory=list)

    def writing(self, name: str, status: str, **more: Any) -> Callable[[], tuple[dict[str, Any], str]]:
        def work() -> tuple[dict[str, Any], str]:
            self.found.append(states(self.context.run))
            write_trial(self.context.run, name, 3.0, status, **more)
            return {"chosen": ["a"]}, "done"

        return work


@pytest.mark.parametrize(("stage", "origin"), [("search", "search"), ("baselines", "scratch")])
def test_a_stage_of_which_a_trial_failed_is_neither_final_nor_shared(
    lab: Lab, stage: str, origin: str
) -> None:
    (one, _), (other, _) = lab.open(), lab.open("search.keep=2")
    assert one.run.folder != other.run.folder
    mine, theirs = Work(one), Work(other)
    write_trial(one.run, "a", 2.0, origin=origin)
    one.stage(stage, MARK, mine.writing("b", "failed", origin=origin))
    other.stage(stage, MARK, theirs.writing("b", "completed", origin=origin))
    assert len(theirs.found) == 1, "the failure was not taken over"
    third, _ = lab.open("search.keep=3")
    other.run.drop_stage(stage)  # so that nobody else has it
    one.stage(stage, MARK, mine.writing("b", "failed", origin=origin))
    reopened = "running" if stage == "search" else "failed"
    assert mine.found == [{"a": "completed"}, {"a": "completed", "b": reopened}], "tried once more"
    one.stage(stage, MARK, mine.writing("b", "completed", origin=origin))
    one.stage(stage, MARK, mine.writing("b", "completed", origin=origin))
    assert len(mine.found) == 3, "without a failure it is done"
    work = Work(third)
    third.stage(stage, MARK, work.writing("c", "completed", origin=origin))
    assert work.found == [] and states(third.run) == {"a": "completed", "b": "completed"}
    noted = [row for row in one.run.store.read("stages").to_pylist() if row["status"] == "failed"]
    assert {row["summary"] for row in noted} == {"some of its trials failed: they are tried again"}


def test_a_clean_search_of_another_run_replaces_one_that_failed(lab: Lab) -> None:
    (one, _), (other, _) = lab.open(), lab.open("search.keep=2")
    one.stage("search", MARK, Work(one).writing("odd", "failed"))
    other.stage("search", MARK, Work(other).writing("a", "completed"))
    work = Work(one)
    one.stage("search", MARK, work.writing("odd", "failed"))
    assert work.found == [] and states(one.run) == {"a": "completed"}


def test_baselines_follow_the_search_that_they_stand_beside(lab: Lab) -> None:
    """Whose winner, and for how many tokens, a search with failures does not say by its fingerprint."""
    (one, _), (other, _) = lab.open(), lab.open("search.keep=2")
    one.stage("baselines", MARK, Work(one).writing("a", "completed", origin="scratch"))
    write_trial(other.run, "b", 3.0, "failed")
    work = Work(other)
    other.stage("baselines", MARK, work.writing("a", "completed", origin="scratch"))
    assert len(work.found) == 1


def test_measured_times_stay_with_the_run_that_measured_them(lab: Lab) -> None:
    (one, _), (other, _) = lab.open(), lab.open("search.keep=2")
    for context in (one, other):
        work = Work(context)
        for _ in range(2):
            context.stage("search", MARK, work.writing("a", "completed", latency=0.25))
        assert len(work.found) == 1, "reused by its own run, and by no other"


def test_a_plan_promises_what_a_run_takes_over(lab: Lab) -> None:
    context, plan = lab.open()
    marks = stage_fingerprints(plan, context.ready.inputs)
    _, other = lab.open("search.keep=2")
    name = plan.feasible[0].candidate.id

    def promised(plan: Plan) -> set[str]:
        return set(finished(lab.folder / "results", plan, lab.folder))

    for status, more, own, others in (
        ("completed", {}, {"search"}, {"search"}),
        ("failed", {}, set(), set()),
        ("completed", {"latency": 0.5}, {"search"}, set()),
    ):
        context.run.store.remove("trials", f"trial-{name}")
        write_trial(context.run, name, 3.0, status, **more)
        context.run.finish_stage("search", marks["search"], {"chosen": [name]}, "", 1.0)
        assert promised(plan) & {"search"} == own
        assert promised(other) & {"search"} == others


def test_without_halving_a_search_is_taken_over_for_another_number_to_keep(lab: Lab) -> None:
    """The shapes are those of the tables: chosen anew, and nobody is distilled for another's choice."""

    def record(context: Context, plan: Plan, names: list[str]) -> dict[str, str]:
        marks = stage_fingerprints(plan, context.ready.inputs)
        outputs = {"teacher": {"folder": None}, "evaluate": {"perplexity": {"teacher": {}}}}
        outputs["evaluate"]["perplexity"] |= {name: {} for name in names}
        for stage, output in outputs.items():
            context.run.finish_stage(stage, marks[stage], output, "", 1.0)
        return marks

    one, plan = lab.open()
    worst, best, second = (row.candidate.id for row in plan.feasible[:3])
    marks = record(one, plan, [best])
    for name, loss in ((worst, 4.0), (best, 2.0), (second, 3.0)):
        write_trial(one.run, name, loss)
    one.run.finish_stage("importance", marks["importance"], {}, "", 1.0)
    one.run.finish_stage("search", marks["search"], {"chosen": [best]}, "one is kept", 1.0)
    proposals = ShapeProposals.of(plan.rows, one.experiment.searched.space, plan.start.hidden)
    told = [Told(candidate_id=best, rungs=((LAST, 2.0),), completed=True, values=(2.0,))]
    sampler = one.experiment.searched.sampler
    write_study(one.run.folder / "study.journal", proposals, sampler, told, {}, {})
    execute(one, plan)

    two, other = lab.open("search.keep=2")
    others = record(two, other, [best, second])
    execute(two, other)
    found = two.run.record("search", marks["search"])
    assert found is not None and found["output"] == {"chosen": [best, second]}
    assert "3 completed" in found["summary"] and two.run.status == "succeeded"
    assert states(two.run) == states(one.run)
    assert others["evaluate"] != marks["evaluate"], "whom it measures follows the choice"
    [trial] = load_study(two.run.folder / "study.journal").trials
    assert trial.value == 2.0 and trial.user_attrs["candidate_id"] == best


def test_a_record_of_other_students_does_not_count(lab: Lab) -> None:
    (one, _), (other, _) = lab.open(), lab.open("search.keep=2")
    asked: list[str] = []

    def evaluate(context: Context, name: str) -> None:
        def work() -> tuple[dict[str, Any], str]:
            asked.append(name)
            row = {"subject": name, "phase": "cut", "metric": "val_loss", "value": 1.0}
            context.run.store.append("evaluations", [row], writer=f"evaluate-{name}", sequence=0)
            return {"perplexity": {"teacher": {}, name: {}}}, ""

        context.stage("evaluate", MARK, work, students=[name])

    for context, name in ((one, "a"), (one, "a"), (other, "a"), (other, "b"), (one, "b")):
        evaluate(context, name)
    assert asked == ["a", "b"]
    for context in (one, other):
        rows = context.run.store.read("evaluations").to_pylist()
        assert [row["subject"] for row in rows] == ["b"], "the other student's figures are gone"
        record = json.loads((context.run.folder / "stages" / "evaluate.json").read_bytes())
        assert set(record["output"]["perplexity"]) == {"teacher", "b"}


def attempts(run: Run) -> list[tuple[str, int | None, bool]]:
    """Of a run's attempts at a search: how each ended, the tokens that it told, whether it took time."""
    rows = [row for row in run.store.read("stages").to_pylist() if row["stage"] == "search"]
    rows.sort(key=lambda row: row["at"])
    return [(row["status"], row["tokens"], bool(row["seconds"])) for row in rows]


def test_attempts_tell_what_this_run_has_done_itself(lab: Lab) -> None:
    (one, _), (other, _) = lab.open(), lab.open("search.keep=2")

    def stopped() -> tuple[dict[str, Any], str]:
        one.tokens = 640
        raise Interrupted("stopped by request")

    with pytest.raises(Interrupted):
        one.stage("search", MARK, stopped)
    for _ in range(2):
        one.stage("search", MARK, Work(one).writing("a", "completed"))
    assert attempts(one.run) == [
        ("interrupted", 640, True),
        ("finished", None, True),
        ("reused", None, False),
    ]
    for _ in range(2):
        other.stage("search", MARK, Work(other).writing("a", "completed"))
    assert attempts(other.run) == [("taken_over", None, False), ("reused", None, False)]


def _kill() -> tuple[dict[str, Any], str]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}, "not reached"


def test_an_attempt_that_is_killed_is_not_forgotten(lab: Lab) -> None:
    """Killed in the middle of its work, where nothing can be written any more."""
    context, _ = lab.open()
    child = os.fork()
    if child == 0:
        try:
            context.stage("search", MARK, _kill)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    again, _ = lab.open()
    again.stage("search", MARK, Work(again).writing("a", "completed"))
    assert attempts(again.run) == [("running", None, False), ("finished", None, True)]
