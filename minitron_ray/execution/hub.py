"""How workers tell the driver what they are doing, and hear that they should stop.

One small actor: workers push events (of progress at most two a second each, whose answers they do not
wait for), the driver drains them in a thread. `ray.train.report` waits for its controller and a train
callback runs in another process, so neither can feed a live view.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle

from minitron_ray.core.errors import EnvironmentFailure

_PUSH_INTERVAL_S = 0.5
_DRAIN_INTERVAL_S = 0.4
_STALE_S = 2.0
"""An answer is waited for where the last is older: of a worker that asks seldom."""
_ANSWER_S = 10.0


class _Mailbox:
    def __init__(self) -> None:
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._stop = False
        self._regroup: str | None = None

    def push(self, events: list[tuple[str, dict[str, Any]]]) -> tuple[bool, str | None]:
        self._events.extend(events)
        return self._stop, self._regroup

    def ping(self) -> None:
        """Answers."""

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        self._stop = True

    def request_regroup(self, group: str) -> None:
        self._regroup = group


class Reporter:
    """A worker's end, pickled into workers. Progress that comes too fast is dropped, nothing else is."""

    def __init__(self, mailbox: ActorHandle, part: tuple[int, int] | None = None) -> None:
        """`part` says of which piece of work this is which part: the stage's progress is told with it."""
        self._mailbox = mailbox
        self._part = part
        self._last_told = 0.0  # not the last push: asking for a stop would then drop most progress
        self._last_push = self._last_answer = 0.0
        self._asked: Any = None
        """The answer that nobody waits for."""
        self._stop = False
        self._regroup: str | None = None

    def __reduce__(self) -> tuple[type[Reporter], tuple[Any, ...]]:
        """Where it goes the clock is another one."""
        return Reporter, (self._mailbox, self._part)

    def __call__(self, kind: str, **fields: Any) -> None:
        """Tell the driver; progress only if it was told nothing for half a second."""
        progress, now = kind.endswith("_progress"), time.monotonic()
        if progress and now - self._last_told < _PUSH_INTERVAL_S:
            return
        self._last_told = now
        of_part = self._part is not None and kind == "stage_progress"
        self._push([(kind, fields | ({"part": self._part} if of_part else {}))], wait=not progress)

    def stop_requested(self) -> bool:
        """Whether the user asked to stop, as of two seconds ago at most."""
        if time.monotonic() - self._last_push >= _PUSH_INTERVAL_S:
            self._push([], wait=False)
        return self._stop

    def regroup_requested(self, group: str) -> bool:
        """Whether that group of workers should end at its next checkpoint, to begin again as a larger one."""
        self.stop_requested()
        return self._regroup == group

    def _push(self, events: list[tuple[str, dict[str, Any]]], wait: bool) -> None:
        """Calls arrive in order, and what is waited for has arrived: only progress can be lost with a worker."""
        self._last_push = time.monotonic()
        before, self._asked = self._asked, self._mailbox.push.remote(events)
        if wait or self._last_push - self._last_answer >= _STALE_S:
            before, self._asked = self._asked, None
        elif before is None or not ray.wait([before], timeout=0)[0]:
            return
        self._stop, self._regroup = ray.get(before)
        self._last_answer = time.monotonic()


class Hub:
    """The driver's end: the mailbox and the thread that hands its events on."""

    def __init__(self, emit: Callable[..., None]) -> None:
        actor = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(_Mailbox)
        self._mailbox = actor.remote()
        self._emit = emit
        self._work = 0
        self._done: dict[int, int] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._drain, name="hub", daemon=True)
        self._thread.start()

    def reporter(self) -> Reporter:
        return Reporter(self._mailbox)

    def part_reporters(self, parts: int) -> list[Reporter]:
        """For those who each do a part of one piece of work: their progress is added up. What parts of
        earlier work still have to say of their progress is dropped."""
        self._work += 1
        self._done = {}
        return [Reporter(self._mailbox, (self._work, number)) for number in range(parts)]

    def request_stop(self) -> None:
        self._mailbox.request_stop.remote()

    def request_regroup(self, group: str) -> None:
        """For the group of that name."""
        self._mailbox.request_regroup.remote(group)

    def answers(self) -> bool:
        """Whether the mailbox is alive, and with it the node where Ray was started."""
        try:
            ray.get(self._mailbox.ping.remote(), timeout=_ANSWER_S)
        except (ray.exceptions.RayError, ConnectionError, RuntimeError):
            return False
        return True

    def abandon(self) -> None:
        """Ends the thread of a mailbox that is lost."""
        self._closing.set()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=5)

    def _drain(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(_DRAIN_INTERVAL_S)  # once more after the end
            try:
                events = ray.get(self._mailbox.drain.remote())
            except (ray.exceptions.RayError, ConnectionError, RuntimeError):
                return  # the cluster is gone, or left; the call that runs on it says so
            for kind, fields in events:
                if part := fields.pop("part", None):
                    work, number = part
                    if work != self._work:
                        continue
                    self._done[number] = fields["done"]
                    fields["done"] = sum(self._done.values())
                with suppress(EnvironmentFailure):  # a full disk: those who compute will say so
                    self._emit(kind, **fields)
