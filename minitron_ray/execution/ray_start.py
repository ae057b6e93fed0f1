"""Start Ray on this machine or join a cluster: quietly, authenticated, without a dashboard of its own."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    private_token()
    if address is not None:
        check_reachable(address)
    import ray

    quieten_ray()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL", "configure_logging": True}
    local: dict[str, Any] = {
        "include_dashboard": False,  # nobody asks it, and its dozen processes take seconds of a core to start
        "_node_ip_address": "127.0.0.1",
    }
    try:
        with warnings.catch_warnings(), _signals_kept():
            warnings.simplefilter("ignore")
            context = ray.init(address=address or "local", **quiet, **({} if address else local))
        if address is None:  # it reads all logs for ever, for a driver that asked for none of them
            ray._private.worker._global_node.kill_log_monitor(check_alive=False)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "see `minitron-ray doctor`"
        if address:
            remedy = "this machine must be one of its nodes, with the same Ray and the same token (~/.ray/auth_token)"
        raise EnvironmentFailure(f"{where} could not be reached: {reason}; {remedy}") from None
    return dict(context.address_info)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray makes a SIGTERM end the process that joins a cluster; here it is `StopSignal`'s."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def quieten_ray() -> None:
    """Ray's loggers of this process say nothing: what matters is raised."""
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


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


def private_token() -> None:
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
    if address == "auto":
        return
    if "://" in address:
        raise EnvironmentFailure(
            f"Ray address {address!r}: a run joins a cluster from one of its nodes, at host:port; from elsewhere "
            "hand it over with `minitron-ray submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise EnvironmentFailure(f"Ray address {address!r} is not host:port, for example 127.0.0.1:6379")
    check_listening(
        host,
        int(port),
        f"the Ray cluster at {address}",
        "start it with `ray start --head`, or leave the address out to run on this machine",
    )


def check_listening(host: str, port: int, what: str, remedy: str) -> None:
    """Raises EnvironmentFailure, which says `what` and `remedy`, where nobody answers within five seconds."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or "no answer within 5 s"
        raise EnvironmentFailure(f"{what} does not answer ({reason}); {remedy}") from None
