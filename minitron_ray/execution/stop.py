"""`StopSignal`: Ctrl-C once asks for the next safe point, twice aborts; SIGTERM asks, for schedulers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from minitron_ray.core.errors import Interrupted, Terminated


class StopSignal:
    """Asked by the stages between units of work."""

    def __init__(self, announce: Callable[[], None] = lambda: None) -> None:
        self._event = threading.Event()
        self._announce = announce
        self._terminated = False

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises Interrupted if the user asked to stop."""
        if self.requested:
            raise Interrupted("stopped by request")

    def interruption(self, message: str) -> Interrupted:
        """How the program ends: as after Ctrl-C, or as after a SIGTERM if that was what came first."""
        return Terminated(message) if self._terminated else Interrupted(message)

    def request(self) -> None:
        self._event.set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM in this (main) thread until the block ends."""

        def handle(number: int, frame: FrameType | None) -> None:
            # Nothing else: the main thread may hold any lock and be amid any write.
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._terminated |= number == signal.SIGTERM and not self.requested
            self.request()

        ended = threading.Event()

        def announce() -> None:
            while not ended.is_set():
                if self._event.wait(0.2):
                    self._announce()
                    return

        thread = threading.Thread(target=announce, name="stop-signal", daemon=True)
        thread.start()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for number, handler in before.items():
                signal.signal(number, handler)
