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

    def write(self, trials: list[int]) -> None:
        """All at the same time: the new ones are whole before old ones go."""
        for trial in trials:
            self.held[trial] = self.held.get(trial, 0) + 1
        self.most = max(self.most, sum(self.held.values()))
        for trial in trials:
            self.held[trial] = min(self.held[trial], self.kept)


def play(cohorts: list[list[int]], kept: int, ties: float | None, draw: random.Random) -> int:
    """The most checkpoints of a search; of a share `ties` of the stopped trials that are trained on."""
    disk, stopped, number = Disk(kept), list[tuple[int, int]](), 0
    for counts in cohorts:
        going = list(range(number, number + counts[0]))
        number += counts[0]
        for place in range(len(counts) - 1):
            disk.write(going)
            draw.shuffle(going)
            for trial in going[counts[place + 1] :]:
                if ties is None:
                    del disk.held[trial]
                else:
                    stopped.append((trial, place))
            going = going[: counts[place + 1]]
        for trial in going:
            disk.held.pop(trial, None)
    if ties is not None:
        again = [one for one in stopped if draw.random() < ties]
        for trial, _ in set(stopped) - set(again):
            disk.held.pop(trial)
        for place in range(1, len(cohorts[0]) - 1):
            disk.write([trial for trial, before in again if before < place])
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
        for ties in (0.0, 0.5, 1.0):
            assert play(cohorts, kept, ties, draw) <= most_checkpoints(cohorts, kept, keep_stopped=True)


def test_by_hand() -> None:
    cohorts = [[4, 2, 1]] * 3
    assert most_checkpoints(cohorts, 1, keep_stopped=False) == 4
    # Six that stopped at the first rung have two each while they are written again, three one.
    assert most_checkpoints(cohorts, 1, keep_stopped=True) == 15
    assert most_checkpoints([[3, 3, 3, 3]], 2, keep_stopped=False) == 9, "two, and a third in the making"
    assert most_checkpoints([[5]], 2, keep_stopped=True) == 0, "the last rung leaves none"


def test_plans_know_how_many_are_kept() -> None:
    assert GROUP_CHECKPOINTS == KEPT and DISTILL_CHECKPOINTS == KEPT + 1
