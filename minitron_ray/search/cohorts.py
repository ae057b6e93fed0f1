"""`Cohorts`: which trial to run next, and which to end, without a clock and without Ray.

Its answers follow from the losses that it was told: neither the order in which they came, nor the
number of trials at a time, nor how often the process was killed and told them anew matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from minitron_ray.search.halving import Fate, Halving, State, decide, in_order
from minitron_ray.search.propose import Told

FINISHED: Final = object()
"""Said by `next` when no trial is left to run."""

_IN_VAIN: Final = 2
"""For each student that is kept, so many of those that replace failed trials may fail as well."""

Propose = Callable[[int, Sequence[Told], int], list[str]]
"""`propose(cohort, told, count)`: new candidates for a cohort, fewer than `count` where no more are left."""
Ties = Callable[[str, Mapping[str, int]], Sequence[str]]
"""`ties(winner, stopped)`: of the stopped trials (candidate to tokens) those that tie with the winner."""


@dataclass(kw_only=True)
class Known:
    """What is known of a trial."""

    cohort: int | None = None
    losses: dict[int, float] = field(default_factory=dict)
    """By distillation tokens; 0 for the undistilled cut."""
    cost: float | None = None
    """The second figure, where the search is for a front."""
    failed: bool = False


class Cohorts:
    """The state of a search."""

    def __init__(
        self,
        *,
        trials: int,
        size: int,
        rule: Halving,
        propose: Propose,
        ties: Ties | None = None,
        costed: bool = False,
        known: Mapping[str, Known] | None = None,
    ) -> None:
        """`known` is what earlier attempts left. At the end of a search stopped trials are run to the end: the best,
        where those that went on in their places have failed and fewer are completed than are kept, and with
        `ties` those that tie. `costed`: every trial that reports has a cost."""
        self._trials, self._size, self._rule = trials, size, rule
        self._propose, self._ties, self._costed = propose, ties, costed
        self._known = dict(known or {})
        self._members: list[list[str]] = []
        self._again: list[str] = []
        self._tied_found = False
        self._fates: dict[str, Fate] = {}
        self._exhausted = False
        self._advance()

    @property
    def rungs(self) -> tuple[int, ...]:
        return self._rule.rungs

    @property
    def cohort_of(self) -> dict[str, int]:
        """Of every candidate proposed so far."""
        return {name: number for number, members in enumerate(self._members) for name in members}

    @property
    def fates(self) -> Mapping[str, Fate]:
        return self._fates

    def next(self, live: Sequence[str]) -> str | object | None:
        """A candidate to run, of those that are not `live`; None while there is none, or FINISHED."""
        self._advance()
        for name, fate in self._fates.items():
            if fate.state == "running" and name not in live:
                return name
        return None if live or not self._over else FINISHED

    def report(self, candidate_id: str, tokens: int, loss: float, cost: float | None = None) -> Fate:
        """What is decided of a trial that stands at `tokens`. What was told before stays as it was."""
        known = self._known.setdefault(candidate_id, Known())
        known.losses.setdefault(tokens, loss)
        known.cost = cost if known.cost is None else known.cost
        self._decide()
        return self._fates[candidate_id]

    def fail(self, candidate_id: str) -> None:
        self._known.setdefault(candidate_id, Known()).failed = True
        self._decide()

    def told(self) -> list[Told]:
        """Every trial that has ended, as the sampler hears of it."""
        return [self._told(name) for name, fate in self._fates.items() if fate.ended]

    def _told(self, name: str) -> Told:
        fate, known = self._fates[name], self._known.get(name, Known())
        if fate.state == "failed":
            return Told(candidate_id=name)
        completed = fate.state == "completed"
        rungs = [(tokens, loss) for tokens, loss in sorted(known.losses.items()) if 0 < tokens <= fate.tokens]
        costs = (known.cost,) if self._costed and known.cost is not None else ()
        values = (rungs[-1][1], *costs) if completed or (rungs and costs) else ()
        return Told(candidate_id=name, rungs=tuple(rungs), completed=completed, values=values)

    @property
    def _over(self) -> bool:
        return self._exhausted and all(fate.ended for fate in self._fates.values())

    def _advance(self) -> None:
        """Proposes a cohort once those before have ended; after the last, takes stopped ones up again."""
        self._decide()
        while not self._exhausted and all(fate.ended for fate in self._fates.values()):
            count = min(self._size, self._trials - len(self._fates))
            members = self._cohort(count) if count else []
            if members:
                self._members.append(members)
            else:
                self._exhausted = True
            self._decide()
        while self._over and (names := self._replacements() or self._ties_once() or self._ended_before()):
            self._again += names
            self._decide()

    def _cohort(self, count: int) -> list[str]:
        """Those that an earlier attempt began, and what is proposed beside them."""
        number = len(self._members)
        begun = [name for name, known in self._known.items() if known.cohort == number]
        proposed = self._propose(number, self.told(), count)
        # Another release of the sampler may propose others; what was begun is paid for.
        return [*begun, *(name for name in proposed if name not in begun)][:count]

    def _in_state(self, state: State) -> dict[str, int]:
        """The trials in this state, and at how many tokens."""
        return {name: fate.tokens for name, fate in self._fates.items() if fate.state == state}

    def _ended_before(self) -> list[str]:
        """The stopped that an earlier attempt ran to the end, in the place of others, which have not failed now."""
        last = self._rule.rungs[-1]
        return [name for name in self._in_state("stopped") if last in self._known[name].losses]

    def _replacements(self) -> list[str]:
        """For those that failed after they had been let go on: the stopped that came furthest, the best first."""
        in_vain = sum(self._fates[name].state == "failed" for name in self._again)
        stopped, missing = self._in_state("stopped"), self._rule.keep - len(self._in_state("completed"))
        count = max(0, min(missing, _IN_VAIN * self._rule.keep - in_vain))
        order: list[str] = []
        for rung in sorted(set(stopped.values()), reverse=True):
            losses = {name: self._known[name].losses[rung] for name, at in stopped.items() if at == rung}
            order += in_order(losses, self._costs() if self._costed else None)
        return order[:count]

    def _ties_once(self) -> list[str]:
        completed, stopped = self._in_state("completed"), self._in_state("stopped")
        if self._ties is None or self._tied_found or not completed or not stopped:
            return []
        self._tied_found = True
        winner = in_order({name: self._known[name].losses[tokens] for name, tokens in completed.items()})[0]
        return list(self._ties(winner, stopped))

    def _costs(self) -> dict[str, float]:
        return {name: known.cost for name, known in self._known.items() if known.cost is not None}

    def _decide(self) -> None:
        losses = {name: known.losses for name, known in self._known.items()}
        failed = {name for name, known in self._known.items() if known.failed}
        costs = self._costs() if self._costed else None
        fates: dict[str, Fate] = {}
        for members in self._members:
            fates |= decide(members, losses, failed, self._rule, costs)
        last = self._rule.rungs[-1]
        for name in self._again:
            if last in losses[name]:
                fates[name] = Fate(state="completed", tokens=last)
            else:
                fates[name] = Fate(state="failed" if name in failed else "running")
        self._fates = fates
