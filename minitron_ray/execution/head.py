"""The head of a cluster that was joined, which may be lost.

Ray waits a minute for a head that is gone, in whatever call there is, and then ends the process. Until then
nothing is heard of the workers either. So whoever waits for them asks a `HeadWatch`, and whoever asks for nodes
does it by `gcs`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from minitron_ray.core.errors import EnvironmentFailure

_LOOK_S: Final = 2.0
LOST_S: Final = 20.0
"""Without an answer for so long the head is lost. It leaves half a minute to leave it."""
_ANSWER_S: Final = 25.0
"""Likewise, of one question: a busy machine takes some seconds."""


class HeadLost(EnvironmentFailure):
    """What ran on the cluster is lost with its head."""


class HeadWatch:
    """A thread that connects to the head from time to time, until it is closed."""

    def __init__(self, address: str, tell: Callable[[str], None], knows_us: Callable[[], bool]) -> None:
        """`address` is host:port. `tell` hears once what has happened. `knows_us` is asked where the head answers
        again: whether it is still that of this process's cluster."""
        host, _, port = address.rpartition(":")
        self._place, self._address, self._tell = (host, int(port)), address, tell
        self._knows_us = knows_us
        self._closing, self._lost = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="head", daemon=True).start()

    def check(self) -> None:
        """Raises HeadLost."""
        if self._lost.is_set():
            raise _lost(f"the cluster's head at {self._address}")

    def close(self) -> None:
        self._closing.set()

    def _watch(self) -> None:
        answered, refused = time.monotonic(), False
        while not self._closing.wait(_LOOK_S):
            if not self._answers():
                refused = True
                if time.monotonic() - answered >= LOST_S:
                    return self._give_up(f"has not answered for {LOST_S:.0f} s")
                continue
            if refused and not self._knows_us():
                return self._give_up("is another one now")
            answered, refused = time.monotonic(), False

    def _give_up(self, why: str) -> None:
        self._lost.set()
        self._tell(
            f"the cluster's head at {self._address} {why}: what runs on the cluster is lost, what is saved stays"
        )

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._place, timeout=_LOOK_S).close()
        except OSError:
            return False
        return True


def gcs(ask: str) -> Any:
    """What the head's GCS answers to this method of its client. Raises HeadLost where it does not in time; Ray's own
    functions for the same would wait for ever, and take the process with them when there is another head."""
    import ray
    from ray._private.worker import global_worker

    client = getattr(global_worker, "gcs_client", None)
    if client is None:  # left already
        raise _lost("the cluster's head")
    try:
        return getattr(client, ask)(timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        raise _lost("the cluster's head") from error


def _lost(head: str) -> HeadLost:
    return HeadLost(
        f"{head} does not answer; start it again, then run the same command again: nothing saved is lost"
    )
