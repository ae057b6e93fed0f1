"""`StopSignal`: Ctrl-C once asks for the next safe point, twice aborts; SIGTERM asks, for schedulers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Asked by the stages between units of work."""

    def __init__(self, announce: Callable[[], None] = lambda: None) -> None:
        self._event = threading.Event()
        self._announce = announce

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        if not self._event.is_set():
            self._event.set()
            self._announce()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM in this (main) thread until the block ends."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.request()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
