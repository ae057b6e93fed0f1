"""Start Ray on this machine or join a cluster: quietly, authenticated, the dashboard on loopback only."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.settings import ClusterSettings

_CONNECT_TIMEOUT_S = 5.0
_LARGEST_LOG = 8 * 2**20


def cluster_address(settings: ClusterSettings) -> str | None:
    """The cluster to join; None to start Ray on this machine."""
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def start_ray(address: str | None) -> dict[str, Any]:
    """Connects this process to `address`, or to a Ray started here for it; returns Ray's own address info.

    Raises EnvironmentFailure when the address does not answer or the cluster refuses.
    """
    _private_token()
    if address is not None:
        check_reachable(address)
    import ray

    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL", "configure_logging": True}
    local: dict[str, Any] = {
        "include_dashboard": True,  # Train's clean-up asks it which placement groups are left
        "dashboard_host": "127.0.0.1",
        "_node_ip_address": "127.0.0.1",
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context = ray.init(address=address or "local", **quiet, **({} if address else local))
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentFailure(
            f"{where} could not be reached: {reason}; see `minitron-ray doctor`"
        ) from None
    return dict(context.address_info)


def link_logs(session: Path, logs: Path) -> None:
    """`logs/session` points to Ray's logs while it runs, and after a kill -9."""
    logs.mkdir(parents=True, exist_ok=True)
    link = logs / "session"
    link.unlink(missing_ok=True)
    link.symlink_to(session / "logs")


def keep_logs(session: Path, logs: Path) -> None:
    """Copies Ray's own logs of a session into the run folder, all but very large ones."""
    target = logs / "ray"
    (logs / "session").unlink(missing_ok=True)
    for source in sorted(session.glob("logs/**/*")):
        if source.is_file() and not source.is_symlink() and 0 < source.stat().st_size <= _LARGEST_LOG:
            copy = target / source.relative_to(session / "logs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def _private_token() -> None:
    """Ray's cluster token, readable by its owner only. Ray itself would create it readable by all."""
    if "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE") != "token":
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    try:
        if path.exists():
            if path.stat().st_uid == os.getuid():
                path.chmod(0o600)
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    except OSError as error:
        if path.is_file():
            return  # another process was faster
        raise EnvironmentFailure(
            f"{path}: cannot keep Ray's cluster token there ({error.strerror}); "
            "name another file in RAY_AUTH_TOKEN_PATH"
        ) from None


def check_reachable(address: str) -> None:
    """Raises EnvironmentFailure where nobody listens. Ray itself retries for half a minute before it says so."""
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise EnvironmentFailure(f"Ray address {address!r} is not host:port, for example 127.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or "no answer within 5 s"
        raise EnvironmentFailure(
            f"the Ray cluster at {address} does not answer ({reason}); "
            "start it with `ray start --head`, or leave the address out to run on this machine"
        ) from None
