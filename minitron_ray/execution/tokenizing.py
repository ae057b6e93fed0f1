"""Tasks that tokenise much text, before there is a run: on Ray, which is started when they are first needed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.ray_start import cluster_address
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal


@contextmanager
def tokenizing(
    settings: ClusterSettings, results: Path, events: EventBus, stop: StopSignal
) -> Iterator[Cluster | None]:
    """The cluster that does it, left when the block ends; None where this process is to do it: where
    `tokenizers` is 1, and on a machine of one processor without a cluster. Every node must see `results`,
    whose cache the shards go to; what Ray needs for itself is of this machine alone."""
    alone = cluster_address(settings) is None and (os.cpu_count() or 1) == 1
    if settings.tokenizers == 1 or alone:
        yield None
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minitron-ray-")))
        yield stack.enter_context(Cluster(settings, folder, events, stop, shared=[results.resolve()]))
