"""`watched`: one of Ray's own long calls in a thread, while the main thread stays awake."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from minitron_ray.execution.cluster import Cluster

_LOOK_S = 0.2


def watched(
    cluster: Cluster | None,
    call: Callable[[], Any],
    *,
    ends: Callable[[], bool] = lambda: False,
    look: Callable[[], None] = lambda: None,
) -> Any:
    """What `call` returns. On the main thread Ray Train would replace the handler of SIGINT for good, and nobody
    would see that the cluster's head is gone.

    Hands a wish to stop on to the workers of `cluster`, the user's or once it `ends`; calls `look` until then.
    Raises what `call` raised, and HeadLost.
    """
    thread = _Thread(call)
    thread.start()
    asked = False
    while thread.is_alive():
        thread.join(timeout=_LOOK_S)
        if cluster is not None:
            cluster.check_head()
            if not asked and (cluster.stop.requested or ends()):
                cluster.hub.request_stop()
                asked = True
        if not asked:
            look()
    if thread.error is not None:
        raise thread.error
    return thread.value


class _Thread(threading.Thread):
    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="ray-call", daemon=True)
        self._call = call
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self._call()
        except BaseException as error:  # handed to the thread that waits
            self.error = error
