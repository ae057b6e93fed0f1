"""How many checkpoints of a search's trials are on disk at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def most_checkpoints(
    cohorts: Iterable[Sequence[int]], kept: int, keep_stopped: bool, at_once: int | None = None
) -> int:
    """At most, those that are being written beside the `kept` ones before them included.

    Of each cohort it is given how many trials train up to each rung: where these are several rungs, they
    wait for one another there. A trial in training writes checkpoints at rungs and between them; of one
    cohort `at_once` are in training at the same time, or all of them. At a trial's end its checkpoints are
    removed, except those of a stopped trial with `keep_stopped`: these stay until all cohorts have ended,
    when as many as all of them may be trained on.
    """
    most = stopped = 0
    for counts in cohorts:
        for place, count in enumerate(counts):
            training = _training(count, at_once)
            waiting = count - training if len(counts) > 1 else 0
            most = max(most, (stopped + waiting) * kept + training * (kept + 1))
            if keep_stopped and place + 1 < len(counts):
                stopped += count - counts[place + 1]
    return max(most, stopped * kept + _training(stopped, at_once))


def _training(count: int, at_once: int | None) -> int:
    return count if at_once is None else min(count, at_once)
