"""From experiment files here to a job there: what is copied, and the command that runs on the copy."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.units import format_bytes
from minitron_ray.execution.jobs import Jobs
from minitron_ray.experiment import Experiment
from minitron_ray.plan import stages_of

LARGEST: Final = 100 * 2**20
"""Bytes that are copied to the cluster at most: models and texts belong on storage that its nodes see."""
_SETTINGS: Final = "minitron-ray-cluster.yaml"
_NEVER: Final = {"__pycache__", "results"}


def hand_over(
    jobs: Jobs,
    paths: Sequence[Path],
    experiments: Sequence[Experiment],
    *,
    python: str,
    cluster_file: Path | None,
    results: str,
    overrides: Sequence[str],
    working_dir: Path | None,
    rehearse: bool = False,
) -> tuple[str, str]:
    """Submits the experiments as one job, run or rehearsed by the interpreter `python` there: the job's name, and
    what was copied in words.

    Raises ConfigError for a results folder that is not absolute, a working folder that does not hold the
    experiments or is too large; EnvironmentFailure where the job server refuses.
    """
    if not PurePosixPath(results).is_absolute():
        raise ConfigError(
            f"--results {results}: not an absolute path; a job runs in a folder of its own, so name the folder "
            f"as the cluster's nodes see it, for example /shared/results"
        )
    folder, names = _relative(paths, working_dir)
    files = list(_files(folder))
    size = sum(path.stat().st_size for path in files)
    if size > LARGEST:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise ConfigError(
            f"{folder}: {format_bytes(size)} would be copied to the cluster, more than {format_bytes(LARGEST)} "
            f"(largest: {largest.relative_to(folder)}); put models and texts on storage that the nodes see and "
            f"name them by absolute path, or choose another --working-dir"
        )
    job = f"job-{experiments[0].name}-{secrets.token_hex(3)}"
    stages = dict.fromkeys(stage for experiment in experiments for stage in stages_of(experiment))
    with tempfile.TemporaryDirectory(prefix="minitron-ray-") as copy:
        for path in files:
            target = Path(copy, path.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        command = [python, "-m", "minitron_ray", "run", *names, "--events", "--results", results]
        if cluster_file is not None:
            shutil.copyfile(cluster_file, Path(copy, _SETTINGS))
            command += ["--cluster", _SETTINGS]
        if rehearse:
            command.append("--rehearse")
        for override in overrides:
            command += ["--set", override]
        metadata = {"stages": ",".join(stages), "results": results}
        jobs.submit(command, Path(copy), job=job, metadata=metadata)
    return job, f"{len(files)} files, {format_bytes(size)}, of {folder}"


def _relative(paths: Sequence[Path], working_dir: Path | None) -> tuple[Path, list[str]]:
    """The folder to copy, and the experiments' paths in it."""
    resolved = [path.resolve() for path in paths]
    folder = (working_dir or Path(os.path.commonpath([path.parent for path in resolved]))).resolve()
    for given, path in zip(paths, resolved, strict=True):
        if not path.is_relative_to(folder):
            raise ConfigError(f"{given}: not in --working-dir {working_dir}; only what is in it is copied")
    return folder, [path.relative_to(folder).as_posix() for path in resolved]


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder but hidden ones, results and compiled Python, in the order of their names."""
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root).resolve()
        folders[:] = sorted(
            name
            for name in folders
            if not (name in _NEVER or name.startswith("."))
            and not here.is_relative_to(Path(root, name).resolve())  # a link that leads back up
        )
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path
