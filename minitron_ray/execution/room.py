"""What fits on the nodes that a cluster has. Raises HeadLost where its head does not answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_ray.execution.head import HeadLost, gcs
from minitron_ray.execution.settings import Resources


def nodes() -> list[dict[str, float]]:
    """What each node has in all, in use or not."""
    return [dict(node.resources_total) for node in alive().values()]


def alive() -> dict[str, Any]:
    """Ray's records of the nodes that there are, by id."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    found = gcs("get_all_node_info").values()
    return {node.node_id.hex(): node for node in found if node.state == GcsNodeInfo.ALIVE}


def knows_us() -> bool:
    """Whether the head still knows the node that this process is connected to."""
    import ray

    try:
        return ray.get_runtime_context().get_node_id() in alive()
    except HeadLost:
        return False


def free(each: Resources) -> int:
    """How many processes that reserve `each` fit beside what is in use at this moment. It lags behind by a second or
    two where something has just ended."""
    found = gcs("get_all_resource_usage").resource_usage_data.batch
    return sum(fit(node.resources_available, each) for node in found)


def smallest() -> int:
    """CPUs of the node that has the fewest."""
    return int(min((node["CPU"] for node in nodes() if node.get("CPU", 0) >= 1), default=1))


def room_for(each: Resources) -> int:
    """How many processes that reserve `each` fit, node by node."""
    return sum(fit(node, each) for node in nodes())


def fit(node: Mapping[str, float], each: Resources) -> int:
    """How many of them fit one node."""
    found = int(node.get("CPU", 0)) // each.cpus
    return min(found, int(node.get("GPU", 0)) // each.gpus) if each.gpus else found
