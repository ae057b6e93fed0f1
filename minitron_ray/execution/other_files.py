"""Files that start a cluster, told from those that say how a run uses one: `--cluster` takes the latter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from minitron_ray.core.errors import ConfigError

_STARTS_CLUSTERS: Final = (
    # what marks it, what it is, what it is started with
    (
        r"^(available_node_types|head_node_type|provider):",
        "a file of Ray's cluster launcher",
        "ray up {path}",
    ),
    (r"^apiVersion:", "a Kubernetes manifest", "kubectl apply -f {path}"),
    (r"^#SBATCH\b", "a Slurm script", "sbatch {path} EXPERIMENT"),
    (r"^#!", "a script", "bash {path}"),
)
_LARGEST: Final = 2**20


def refuse_cluster_starter(path: Path) -> None:
    """Raises ConfigError for a file that starts a cluster. Others, also those that do not exist, pass."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_LARGEST).decode(errors="replace")
    except OSError:
        return
    for mark, what, command in _STARTS_CLUSTERS:
        if re.search(mark, text, re.MULTILINE):
            raise ConfigError(
                f"{path}: {what}, which starts a cluster: {command.format(path=path)}; --cluster takes settings of "
                f"a run, such as cluster/remote.yaml"
            )
