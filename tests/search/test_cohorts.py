"""The course of a search: the same trials and the same winner whatever the timing, and however often killed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from minitron_ray.core.fingerprint import digest
from minitron_ray.search.cohorts import FINISHED, Cohorts, Known, Propose
from minitron_ray.search.halving import Halving, in_order
from minitron_ray.search.propose import Told

RUNGS = (10, 20, 40)
SPACE = [f"c{number:02d}" for number in range(40)]


def loss(name: str, tokens: int) -> float:
    """A made-up learning curve: of each candidate its own, and not always in the same order."""
    draw = random.Random(f"{name} {tokens}").random()
    return random.Random(name).random() + 10 / (1 + tokens) + 0.2 * draw


def by_history(cohort: int, told: Sequence[Told], count: int) -> list[str]:
    """Proposals that depend on everything that is told, so that a difference anywhere shows."""
    tried = {trial.candidate_id for trial in told}
    history = sorted((trial.candidate_id, trial.rungs, trial.completed, trial.values) for trial in told)
    lot = random.Random(digest({"cohort": cohort, "told": repr(history)}))
    left = [name for name in SPACE if name not in tried]
    return lot.sample(left, min(count, len(left)))


class Desk:
    """Tables that outlive a process: what each trial reported, and how often a rung was computed."""

    def __init__(self, failing: Sequence[str] = (), **settings: object) -> None:
        self.known: dict[str, Known] = {}
        self.trained: list[tuple[str, int]] = []
        self.failing, self.settings = failing, settings

    def cohorts(self, propose: Propose = by_history) -> Cohorts:
        known = {
            name: Known(cohort=trial.cohort, losses=dict(trial.losses), failed=trial.failed)
            for name, trial in self.known.items()
        }
        settings = {"trials": 12, "size": 4, "rule": Halving(rungs=RUNGS, reduction=2)} | self.settings
        return Cohorts(propose=propose, known=known, **settings)  # type: ignore[arg-type]

    def play(self, lot: random.Random, at_once: int, steps: int | None = None) -> Cohorts | None:
        """Until the end, or a kill after so many reports (None); who reports next is drawn by lot."""
        cohorts, live = self.cohorts(), list[str]()
        while True:
            while len(live) < at_once and isinstance(found := cohorts.next(live), str):
                live.append(found)
            if not live:
                assert cohorts.next(live) is FINISHED
                return cohorts
            if steps is not None and (steps := steps - 1) < 0:
                return None
            name = lot.choice(live)
            kept = self.known.setdefault(name, Known(cohort=cohorts.cohort_of[name]))
            if name in self.failing and 10 in kept.losses:
                kept.failed = True
                cohorts.fail(name)
                live.remove(name)
                continue
            tokens = next(rung for rung in RUNGS if rung not in kept.losses)
            self.trained.append((name, tokens))
            kept.losses[tokens] = loss(name, tokens)
            fate = cohorts.report(name, tokens, loss(name, tokens))
            if fate.ended or fate.state == "waiting":
                live.remove(name)


def outcome(cohorts: Cohorts) -> tuple[dict[str, object], list[Told]]:
    return dict(cohorts.fates), sorted(cohorts.told(), key=lambda trial: trial.candidate_id)


def tied(winner: str, stopped: Mapping[str, int]) -> list[str]:
    """Those whose loss where they stopped is near the winner's there."""
    return [name for name, tokens in stopped.items() if loss(name, tokens) - loss(winner, tokens) < 0.3]


@pytest.mark.parametrize("failing", [(), ("c03", "c17", "c30")])
@pytest.mark.parametrize("ties", [None, tied])
def test_neither_timing_nor_kills_matter(failing: tuple[str, ...], ties: object) -> None:
    alone = Desk(failing, ties=ties)
    found = alone.play(random.Random(0), at_once=1)
    assert found is not None and len(found.fates) == 12
    for seed in range(12):
        desk, lot = Desk(failing, ties=ties), random.Random(seed)
        for _ in range(3):
            desk.play(lot, at_once=lot.randint(1, 6), steps=lot.randint(0, 8))
        other = desk.play(lot, at_once=lot.randint(1, 6))
        assert other is not None
        assert outcome(other) == outcome(found)
        assert sorted(desk.trained) == sorted(set(alone.trained)), "no rung is trained twice"


def test_ties_are_run_to_the_end_and_nothing_else_is() -> None:
    desk = Desk(ties=tied)
    found = desk.play(random.Random(0), at_once=2)
    plain = Desk().play(random.Random(0), at_once=2)
    assert found is not None and plain is not None
    completed = {name: loss(name, 40) for name, fate in plain.fates.items() if fate.state == "completed"}
    stopped = {name: fate.tokens for name, fate in plain.fates.items() if fate.state == "stopped"}
    expected = tied(in_order(completed)[0], stopped)
    assert expected and len(expected) < len(stopped)
    assert {n for n, f in found.fates.items() if f.state == "completed"} == {*completed, *expected}


def first_at_ten(count: int) -> list[str]:
    """Of twelve trials in one cohort the best at the first rung, of which three go on."""
    plain = Desk(size=12).play(random.Random(0), at_once=2)
    assert plain is not None
    return in_order({name: loss(name, 10) for name in plain.fates})[:count]


@pytest.mark.parametrize(
    ("size", "keep", "failures"), [(12, 1, 3), (12, 1, 4), (12, 2, 3), (12, 3, 2), (12, 3, 5), (4, 3, 3)]
)
@pytest.mark.parametrize("ties", [None, tied])
def test_who_fails_after_it_went_on_is_replaced(size: int, keep: int, failures: int, ties: object) -> None:
    """As many are completed as are kept; whatever the timing, and wherever it was killed."""
    settings = {"size": size, "rule": Halving(rungs=RUNGS, reduction=4, keep=keep), "ties": ties}
    failing = first_at_ten(failures) if size == 12 else ["c03", "c17", "c30"]
    alone = Desk(failing, **settings)
    found = alone.play(random.Random(0), at_once=1)
    assert found is not None
    completed = {name for name, fate in found.fates.items() if fate.state == "completed"}
    assert len(completed) >= keep and not completed & set(failing)
    if ties is None and size == 12:
        stopped = [name for name, fate in found.fates.items() if fate.state == "stopped"]
        assert len(completed) == keep or failures < keep
        assert max(loss(name, 10) for name in completed) < min(
            loss(name, 10) for name in stopped if found.fates[name].tokens == 10
        )
    for steps in range(len(alone.trained) + failures + 1):
        desk, lot = Desk(failing, **settings), random.Random(steps)
        desk.play(lot, at_once=lot.randint(1, 6), steps=steps)
        other = desk.play(lot, at_once=lot.randint(1, 6))
        assert other is not None and outcome(other) == outcome(found)
        assert sorted(desk.trained) == sorted(set(alone.trained)), "no rung is trained twice"


@pytest.mark.parametrize("keep", [1, 2])
def test_what_fails_in_every_trial_is_not_tried_in_all_of_them(keep: int) -> None:
    settings = {"size": 12, "rule": Halving(rungs=RUNGS, reduction=4, keep=keep)}
    found = Desk(SPACE, **settings).play(random.Random(0), at_once=3)
    assert found is not None
    states = [fate.state for fate in found.fates.values()]
    assert states.count("failed") == 3 + 2 * keep and states.count("stopped") == 12 - 3 - 2 * keep


def test_a_replacement_stays_completed_when_the_failed_are_tried_again() -> None:
    settings = {"size": 12, "rule": Halving(rungs=RUNGS, reduction=4)}
    desk = Desk(first_at_ten(3), **settings)
    before = desk.play(random.Random(0), at_once=2)
    assert before is not None
    [replacement] = [name for name, fate in before.fates.items() if fate.state == "completed"]
    desk.failing = ()
    for known in desk.known.values():
        known.failed = False
    desk.trained.clear()
    after = desk.play(random.Random(0), at_once=2)
    assert after is not None
    completed = {name for name, fate in after.fates.items() if fate.state == "completed"}
    best = min(first_at_ten(3), key=lambda name: (loss(name, 20), name))
    assert completed == {replacement, best} and replacement not in {name for name, _ in desk.trained}


def test_a_replacement_that_has_lost_its_state_begins_anew() -> None:
    """It reports what it reported before, which stays as it was."""
    desk = Desk(trials=2, size=2, rule=Halving(rungs=(10, 20), reduction=2))
    cohorts = desk.cohorts(lambda cohort, told, count: ["c01", "c02"] if not cohort else [])
    cohorts.report("c01", 10, 1.0)
    assert cohorts.report("c02", 10, 2.0).state == "stopped"
    cohorts.fail("c01")
    assert cohorts.next(()) == "c02" and cohorts.next(("c02",)) is None
    assert cohorts.report("c02", 10, 2.5).state == "running"
    assert cohorts.report("c02", 20, 1.9).state == "completed" and cohorts.next(()) is FINISHED
    assert cohorts.told()[1].rungs == ((10, 2.0), (20, 1.9))


def test_only_what_has_ended_is_told() -> None:
    """One that runs or waits would stand in the study as a failed or a stopped one."""
    desk = Desk(trials=4, rule=Halving(rungs=RUNGS, reduction=2))
    cohorts = desk.cohorts(lambda cohort, told, count: ["c01", "c02", "c03", "c04"] if not cohort else [])
    assert cohorts.told() == []
    assert cohorts.report("c01", 10, 1.0).state == "waiting"
    cohorts.fail("c04")
    assert cohorts.told() == [Told(candidate_id="c04")]
    for name, value in (("c02", 2.0), ("c03", 3.0)):
        cohorts.report(name, 10, value)
    states = {name: fate.state for name, fate in cohorts.fates.items()}
    assert states == {"c01": "running", "c02": "stopped", "c03": "stopped", "c04": "failed"}
    assert [trial.candidate_id for trial in cohorts.told()] == ["c02", "c03", "c04"]


def test_told_says_what_the_sampler_needs() -> None:
    desk = Desk(("c05",), trials=4, rule=Halving(rungs=RUNGS, reduction=2))
    cohorts = desk.cohorts(lambda cohort, told, count: ["c01", "c02", "c05", "c09"] if not cohort else [])
    for name, tokens, value in (("c01", 10, 3.0), ("c02", 10, 1.0), ("c05", 10, 2.0), ("c09", 10, 4.0)):
        cohorts.report(name, 0, 9.0)
        cohorts.report(name, tokens, value)
    cohorts.fail("c05")
    cohorts.report("c02", 20, 1.0)
    cohorts.report("c02", 40, 0.5)
    told = {trial.candidate_id: trial for trial in cohorts.told()}
    assert told["c02"] == Told(
        candidate_id="c02", rungs=((10, 1.0), (20, 1.0), (40, 0.5)), completed=True, values=(0.5,)
    )
    assert told["c09"] == Told(candidate_id="c09", rungs=((10, 4.0),))
    assert told["c05"] == Told(candidate_id="c05")


def test_a_cost_decides_and_is_told() -> None:
    desk = Desk(trials=2, size=2, costed=True, rule=Halving(rungs=(10, 20), reduction=2))
    cohorts = desk.cohorts(lambda cohort, told, count: ["c01", "c02"] if not cohort else [])
    cohorts.report("c01", 10, 1.0, cost=7.0)
    assert cohorts.report("c02", 10, 2.0, cost=3.0).state == "stopped"  # both on the front: the loss decides
    cohorts.report("c01", 20, 1.5, cost=8.0)  # measured again: the first figure stands
    assert cohorts.told()[0].values == (1.5, 7.0)


def test_a_begun_trial_stays_in_its_cohort() -> None:
    """Where another release of the sampler proposes others, what was begun is not thrown away."""
    desk = Desk(trials=4)
    desk.known = {"c39": Known(cohort=0, losses={10: 1.0})}
    cohorts = desk.cohorts(lambda cohort, told, count: ["c01", "c02", "c03", "c04"])
    assert list(cohorts.fates) == ["c39", "c01", "c02", "c03"]


def test_a_space_smaller_than_the_trials_ends_the_search() -> None:
    desk = Desk(trials=60, size=8)
    found = desk.play(random.Random(1), at_once=3)
    assert found is not None and sorted(found.fates) == SPACE
