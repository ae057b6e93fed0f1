"""What `doctor` looks at, one function a question."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minitron_ray.core.errors import EnvironmentFailure, NoRoom
from minitron_ray.core.units import format_bytes

if TYPE_CHECKING:
    from minitron_ray.execution.settings import ClusterSettings

_PACKAGES = ("torch", "transformers", "ray", "optuna", "pyarrow", "duckdb", "pydantic")
_LITTLE_DISK = 10 * 2**30
_LITTLE_MEMORY = 7.5 * 2**30  # of 8 GiB the kernel keeps some


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the examination; `hint` says what to do, where there is something to do."""

    name: str
    status: Literal["ok", "warning", "failure"]
    value: str
    hint: str = ""


def examine(results: Path, settings: ClusterSettings | None = None) -> list[Finding]:
    """All findings, in the order they are shown; with `settings` the cluster that they name is joined."""
    return [
        *_versions(),
        _processors(),
        _memory(),
        _gpus(),
        _results_folder(results),
        _disk(results),
        _pip(),
        _hub(),
        _ray_token(),
        _ray_address() if settings is None else _cluster(settings, results),
    ]


def _cluster(settings: ClusterSettings, results: Path) -> Finding:
    """Joins the cluster that a run with these settings would, asks its nodes, and leaves it. Starts no Ray, and has
    no nodes made."""
    from minitron_ray.core.events import EventBus
    from minitron_ray.execution.cluster import Cluster
    from minitron_ray.execution.ray_start import cluster_address
    from minitron_ray.execution.room import nodes
    from minitron_ray.execution.stop import StopSignal

    name, address = "cluster", cluster_address(settings)
    if address is None:
        return Finding(name=name, status="ok", value="no address: a run starts Ray on this machine")
    asked, folder = settings.model_copy(update={"autoscale": False}), results.expanduser().resolve()
    with tempfile.TemporaryDirectory() as place:
        try:
            with Cluster(asked, Path(place), EventBus(), StopSignal(), [folder]) as cluster:
                workers, there = cluster.workers(), len(nodes())
                room = f"{there} nodes, {cluster.cpus} CPUs, {cluster.gpus} GPUs; room for {workers} workers"
        except EnvironmentFailure as error:
            if settings.autoscale and isinstance(error, NoRoom):
                hint = "a run asks for more nodes (autoscale)"
                return Finding(name=name, status="warning", value=error.message, hint=hint)
            return Finding(name=name, status="failure", value=error.message)
    seen = (
        "which see the results folder" if folder.is_dir() else f"not asked for {folder}, which is to be made"
    )
    return Finding(name=name, status="ok", value=f"{address}: {room}; the same versions on the nodes, {seen}")


def _versions() -> Iterator[Finding]:
    ours = metadata_version("minitron-ray") or "not installed, run from its folder"
    yield Finding(name="minitron-ray", status="ok", value=ours)
    yield Finding(name="python", status="ok", value=f"{platform.python_version()} ({sys.executable})")
    for package in _PACKAGES:
        version = metadata_version(package)
        if version is None:
            yield Finding(
                name=package, status="failure", value="not installed", hint=f"pip install {package}"
            )
        else:
            yield Finding(name=package, status="ok", value=version)


def metadata_version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processors() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding(name="cpu", status="ok", value=f"{usable} of {os.cpu_count()} cores, {platform.machine()}")


def _memory() -> Finding:
    try:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Finding(name="memory", status="warning", value="unknown on this system")
    little = page * pages < _LITTLE_MEMORY
    return Finding(
        name="memory",
        status="warning" if little else "ok",
        value=format_bytes(page * pages),
        hint="the quickstart needs about 8 GiB" if little else "",
    )


def _gpus() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(name="gpu", status="warning", value="unknown without torch")
    import torch

    if not torch.cuda.is_available():
        return Finding(name="gpu", status="ok", value="none; runs use the CPU")
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding(
        name="gpu", status="ok", value=", ".join(f"{p.name} ({format_bytes(p.total_memory)})" for p in names)
    )


def _results_folder(results: Path) -> Finding:
    existing = _existing(results)
    if not existing.is_dir():
        return Finding(
            name="results",
            status="failure",
            value=f"{existing} is a file",
            hint="name a folder with --results",
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            state = "writable" if existing == results.absolute() else "will be made"
    except OSError as error:
        return Finding(
            name="results",
            status="failure",
            value=f"{existing} is not writable: {error.strerror}",
            hint="name another folder with --results",
        )
    return Finding(name="results", status="ok", value=f"{results} ({state})")


def _existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _disk(results: Path) -> Finding:
    free = shutil.disk_usage(_existing(results)).free
    little = free < _LITTLE_DISK
    return Finding(
        name="disk",
        status="warning" if little else "ok",
        value=f"{format_bytes(free)} free for results",
        hint="the quickstart needs about 10 GiB" if little else "",
    )


def _pip() -> Finding:
    # Asked of the installed distributions: looking for the module makes setuptools give up its distutils in
    # this process, without which torch cannot compile.
    if any(metadata.distributions(name="pip")):
        return Finding(name="pip", status="ok", value="there; pypi:// paths can be fetched")
    return Finding(
        name="pip",
        status="warning",
        value="missing; pypi:// paths can't be fetched",
        hint="python -m ensurepip",
    )


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    value = "offline (HF_HUB_OFFLINE); only what is cached" if offline else "online"
    return Finding(name="model hub", status="ok", value=value)


def _ray_address() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    value = f"{address} (RAY_ADDRESS)" if address else "none; runs start Ray on this machine"
    return Finding(name="ray cluster", status="ok", value=value)


def _ray_token() -> Finding:
    """Whether whoever reaches Ray's ports must know a secret, and whether it is one."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")  # what a run sets if nothing is set
    if mode != "token":
        return Finding(
            name="ray token",
            status="warning",
            value=f"RAY_AUTH_MODE={mode}: anyone who reaches the cluster's ports can run code",
            hint="unset RAY_AUTH_MODE",
        )
    if "RAY_AUTH_TOKEN" in os.environ:
        return Finding(name="ray token", status="ok", value="token mode, RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not path.exists():
        return Finding(name="ray token", status="ok", value=f"token mode; {path} will be made")
    access = stat.S_IMODE(path.stat().st_mode)
    if access & 0o077:
        return Finding(
            name="ray token",
            status="warning",
            value=f"token mode, but others may read {path} (mode {access:04o})",
            hint=f"chmod 600 {path}",
        )
    return Finding(name="ray token", status="ok", value=f"token mode, {path} is private")
