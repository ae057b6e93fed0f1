"""What fits on the nodes that a cluster has."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_ray.execution.settings import Resources


def nodes() -> list[dict[str, float]]:
    """What each node has in all, in use or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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
