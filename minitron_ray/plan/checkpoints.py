"""How many checkpoints of a search's trials are on disk at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def most_checkpoints(cohorts: Iterable[Sequence[int]], kept: int, keep_stopped: bool) -> int:
    """At most, those that are being written beside the `kept` ones before them included.

    Of each cohort it is given how many trials train up to each rung. A trial leaves a checkpoint at every
    rung but the last. At its end they are removed, except those of a stopped trial with `keep_stopped`:
    these stay until all cohorts have ended, when as many as all of them may be trained on.
    """
    most = stopped_before = trained_on = 0
    for counts in cohorts:
        last, stopped = len(counts) - 1, 0
        for place in range(last):
            writing = counts[place] * (min(place, kept) + 1)
            most = max(most, stopped_before + stopped + writing)
            if keep_stopped:
                ended = counts[place] - counts[place + 1]
                stopped += ended * min(place + 1, kept)
                written = min(last - 1, kept) + 1 if place + 1 < last else min(place + 1, kept)
                trained_on += ended * written
        stopped_before += stopped
    return max(most, trained_on)
