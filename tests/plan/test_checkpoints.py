"""Checkpoints on disk, against trials that are played through rung by rung."""

from __future__ import annotations

import random

import pytest

from minitron_ray.distillation.checkpoints import KEPT
from minitron_ray.plan.checkpoints import most_checkpoints
from minitron_ray.plan.costs import DISTILL_CHECKPOINTS, GROUP_CHECKPOINTS


class Disk:
    """Checkpoints of trials; remembers how many there were at most."""

    def __init__(self, kept: int) -> None:
        self.kept, self.held, self.most = kept, dict[int, int](), 0

    def train(self, trials: list[int], at_once: int, ending: bool = False) -> None:
        """So many at a time, each of which writes more than are kept on its way to the next rung; when it is
        `ending` there, it leaves nothing."""
        # The few first, so that the more wait when most write; last where those before are gone by then.
        first = 0 if ending else len(trials) % at_once
        lots = [trials[:first], *(trials[n : n + at_once] for n in range(first, len(trials), at_once))]
        for lot in lots:
            for _ in range(self.kept + 1):
                self.write(lot)
            if ending:
                for trial in lot:
                    del self.held[trial]

    def write(self, trials: list[int]) -> None:
        """All at the same time: the new ones are whole before old ones go."""
        for trial in trials:
            self.held[trial] = self.held.get(trial, 0) + 1
        self.most = max(self.most, sum(self.held.values()))
        for trial in trials:
            self.held[trial] = min(self.held[trial], self.kept)


def play(
    cohorts: list[list[int]], kept: int, ties: float | None, draw: random.Random, at_once: int = 100
) -> int:
    """The most checkpoints of a search; of a share `ties` of the stopped trials that are trained on."""
    disk, stopped, number = Disk(kept), list[int](), 0
    for counts in cohorts:
        going = list(range(number, number + counts[0]))
        number += counts[0]
        for place in range(len(counts) - 1):
            disk.train(going, at_once)
            draw.shuffle(going)
            for trial in going[counts[place + 1] :]:
                if ties is None:
                    del disk.held[trial]
                else:
                    stopped.append(trial)
            going = going[: counts[place + 1]]
        disk.train(going, at_once, ending=True)
    if ties is not None:
        again = [one for one in stopped if draw.random() < ties]
        disk.train(again, at_once, ending=True)
    return disk.most


@pytest.mark.parametrize("kept", [1, 2])
def test_no_search_has_more(kept: int) -> None:
    draw = random.Random(kept)
    for _ in range(300):
        rungs = draw.randint(1, 5)
        cohorts = [
            sorted((draw.randint(1, 9) for _ in range(rungs)), reverse=True)
            for _ in range(draw.randint(1, 4))
        ]
        assert play(cohorts, kept, None, draw) == most_checkpoints(cohorts, kept, keep_stopped=False)
        at_once = draw.randint(1, 9)
        most = most_checkpoints(cohorts, kept, keep_stopped=False, at_once=at_once)
        assert play(cohorts, kept, None, draw, at_once) == most
        for ties in (0.0, 0.5):
            most = most_checkpoints(cohorts, kept, keep_stopped=True, at_once=at_once)
            assert play(cohorts, kept, ties, draw, at_once) <= most
        assert play(cohorts, kept, 1.0, draw, at_once) == most


def test_by_hand() -> None:
    cohorts = [[4, 2, 1]] * 3
    assert most_checkpoints(cohorts, 1, keep_stopped=False) == 8, "one, and a second in the making"
    assert most_checkpoints(cohorts, 1, keep_stopped=False, at_once=1) == 5, "one of them writes, three wait"
    # Nine have stopped, each with one; all of them are trained on at a time, or two.
    assert most_checkpoints(cohorts, 1, keep_stopped=True) == 18
    assert most_checkpoints(cohorts, 1, keep_stopped=True, at_once=2) == 12
    assert most_checkpoints([[3, 3, 3, 3]], 2, keep_stopped=False) == 9, "two, and a third in the making"
    assert most_checkpoints([[5]], 2, keep_stopped=True, at_once=2) == 6, "without rungs before it none waits"


def test_plans_know_how_many_are_kept() -> None:
    assert GROUP_CHECKPOINTS == KEPT and DISTILL_CHECKPOINTS == KEPT + 1
