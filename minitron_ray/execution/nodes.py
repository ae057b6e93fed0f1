"""`check_nodes`: before a run spreads over a cluster, every node has its files and its versions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from minitron_ray.core.errors import EnvironmentFailure

_PACKAGES: Final = ("minitron-ray", "torch", "transformers")
_RESULTS: Final = "--results must name a folder on a file system that all nodes share, at the same path"
_MODEL: Final = (
    "a model must be at the same path on every node: name one in a folder that all share, or set HF_HOME to such a "
    "folder where it comes from a hub"
)
_PATIENCE_S = 60.0
"""For a node's first process. One that takes longer, or is lost meanwhile, is not checked."""


def check_nodes(folders: Sequence[Path]) -> None:
    """Asks every node with CPUs, but the one of this process, whether it sees `folders`, results first and then
    models, and for its versions; Ray must be connected.

    Raises EnvironmentFailure that names the nodes on which a folder is missing or a version differs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = ray.get_runtime_context().get_node_id()
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0 and node["NodeID"] != own
    ]
    if not nodes:
        return
    names = [str(folder) for folder in folders]
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            names
        ): node["NodeManagerAddress"]
        for node in nodes
    }
    seen: dict[str, dict[str, Any]] = {}
    for answered in ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_S)[0]:
        try:
            seen[asked[answered]] = ray.get(answered)
        except ray.exceptions.RayError:
            continue
    judge(names, _look(names), seen)


def judge(folders: Sequence[str], here: dict[str, Any], there: dict[str, dict[str, Any]]) -> None:
    """Compares what the nodes `there`, by address, see with what this process does. Raises EnvironmentFailure."""
    for number, folder in enumerate(folders):
        if not here["folders"][number]:
            continue
        if blind := sorted(address for address, found in there.items() if not found["folders"][number]):
            remedy = _MODEL if number else _RESULTS
            raise EnvironmentFailure(f"{folder}: not there on {_listed(blind)}; {remedy}")
    for package, version in here["versions"].items():
        others = {address: found["versions"].get(package) for address, found in there.items()}
        if different := sorted(address for address, other in others.items() if other != version):
            other = others[different[0]] or "not installed"
            raise EnvironmentFailure(
                f"{package} is {version or 'not installed'} where the run is driven, but {other} on "
                f"{_listed(different)}; install the same versions on every node"
            )


def _look(folders: Sequence[str]) -> dict[str, Any]:
    """What a node sees: whether there are such folders, and the packages' versions, None if not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    seen = [os.path.isdir(folder) for folder in folders]  # noqa: PTH112 - Path's raises where it may not look
    return {"folders": seen, "versions": versions}


def _listed(addresses: list[str]) -> str:
    more = f" and {len(addresses) - 3} more" if len(addresses) > 3 else ""
    return f"node {', '.join(addresses[:3])}{more}"
