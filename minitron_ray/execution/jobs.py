"""`Jobs`: the job server of a Ray cluster, to which a run is handed over: it goes on there without us.

The server is part of the head's dashboard, which listens on the head's loopback only: from elsewhere it
is reached through a tunnel (SSH, `ray dashboard`, `kubectl port-forward`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from minitron_ray.core.errors import ConfigError, EnvironmentFailure, NotFound
from minitron_ray.execution.ray_start import check_listening, private_token, quieten_ray
from minitron_ray.execution.settings import ClusterSettings

DEFAULT_SERVER: Final = "http://127.0.0.1:8265"
"""Where a tunnel to the head's dashboard ends."""
_SAFE_POINT_S = 600
"""How long a job that is stopped may take to its next safe point before it is killed."""
_RETRY_S = 3.0
_STARTING_S = 60.0
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """`status` is PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; `exit_code` of the run, once it has one."""

    status: str
    message: str
    exit_code: int | None
    metadata: Mapping[str, str]

    @property
    def ended(self) -> bool:
        return self.status in _ENDED


def job_server(settings: ClusterSettings, address: str | None) -> str:
    """The job server's address: of the command line, the cluster file, RAY_API_SERVER_ADDRESS, or this
    machine's port 8265. Raises ConfigError for one that is no http address."""
    server = address or settings.jobs or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_SERVER
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"job server {server!r} is not http://host:port; submit and watch talk to the head's dashboard, "
            f"for example {DEFAULT_SERVER} at the end of a tunnel, not to the port that nodes join"
        )
    return server.rstrip("/")


class Jobs:
    """Submits, asks and follows. Every method raises EnvironmentFailure where the server refuses."""

    def __init__(self, server: str) -> None:
        """Connects. Raises EnvironmentFailure where nobody answers, or the token is not the cluster's."""
        self.server = server
        private_token()
        parts = urlsplit(server)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        check_listening(
            str(parts.hostname),
            port,
            f"the job server at {server}",
            "open the tunnel to the head's port 8265, see cluster/README.md",
        )
        from ray.dashboard.modules import dashboard_sdk
        from ray.dashboard.modules.job import sdk
        from ray.job_submission import JobSubmissionClient

        quieten_ray()
        for module in (dashboard_sdk, sdk):
            module.logger.setLevel(logging.CRITICAL)  # they set themselves to INFO
        self._client: Any = self._asked(lambda: JobSubmissionClient(server))

    def submit(self, command: Sequence[str], folder: Path, *, job: str, metadata: Mapping[str, str]) -> None:
        """Hands over a command, as an argument list, that is run in a copy of `folder` on the head node.
        It finds the cluster's address in $RAY_ADDRESS. `job` is a name no other job of the cluster has."""
        environment = {
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
            "RAY_JOB_STOP_WAIT_TIME_S": str(_SAFE_POINT_S),
        }
        # `exec`, so that the signal of a stop reaches the run and not a shell that waits for it.
        entrypoint = f'exec {shlex.join(command)} --address "$RAY_ADDRESS"'
        deadline = time.monotonic() + _STARTING_S
        while True:
            try:
                self._asked(
                    lambda: self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=job,
                        runtime_env={"working_dir": str(folder), "env_vars": environment},
                        metadata=dict(metadata),
                    )
                )
                return
            except EnvironmentFailure as error:
                # A head that was just started answers before it can take jobs.
                if "No available agent" not in error.message or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)

    def state(self, job: str) -> JobState:
        """Raises NotFound for a job that this cluster does not know, with those it does."""
        details = self._asked(lambda: self._client.get_job_info(job), job)
        return JobState(
            status=str(getattr(details.status, "value", details.status)),
            message=details.message or "",
            exit_code=details.driver_exit_code,
            metadata=details.metadata or {},
        )

    def stop(self, job: str) -> None:
        """Asks a job to stop at its next safe point; after ten minutes Ray kills it."""
        self._asked(lambda: self._client.stop_job(job), job)

    def lines(self, job: str, lost: Callable[[str], None] = lambda why: None) -> Iterator[str]:
        """What the job has printed and prints, line by line, until it has ended.

        Connects again whenever the connection is `lost`, and goes on where it was. Raises NotFound.
        """
        self.state(job)
        told = 0
        rest = ""
        while True:
            text: queue.Queue[str | None] = queue.Queue()
            tail = _Tail(self._client, job, text)
            tail.start()
            received = 0
            while (chunk := text.get()) is not None:
                fresh = chunk[max(0, told - received) :]
                received += len(chunk)
                told = max(told, received)
                *whole, rest = (rest + fresh).split("\n")
                yield from whole
            if self._over(job, lost):
                break
            if tail.failure:
                lost(tail.failure)
            time.sleep(_RETRY_S if tail.failure else 0.2)
        if rest:
            yield rest

    def _over(self, job: str, lost: Callable[[str], None]) -> bool:
        try:
            return self.state(job).ended
        except EnvironmentFailure as error:
            lost(error.message)
            time.sleep(_RETRY_S)
            return False

    def _asked(self, call: Callable[[], Any], job: str | None = None) -> Any:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return call()
        except AuthenticationError:
            raise EnvironmentFailure(
                f"the job server at {self.server} refuses this machine's token; copy the cluster's to "
                f"~/.ray/auth_token (mode 0600), or set RAY_AUTH_TOKEN"
            ) from None
        except (RuntimeError, ConnectionError, requests.RequestException, OSError) as error:
            text = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if job is not None and "404" in text:
                raise NotFound(f"no job {job!r} at {self.server}; {self._known()}") from None
            raise EnvironmentFailure(f"the job server at {self.server} does not do it: {text}") from None

    def _known(self) -> str:
        jobs = self._asked(lambda: self._client.list_jobs())
        names = [job.submission_id for job in jobs if job.submission_id]
        return f"it knows {', '.join(sorted(names)[-5:])}" if names else "it knows none"


class _Tail(threading.Thread):
    """Puts what a job prints, then None, into a queue: so that Ctrl-C finds the main thread waiting there."""

    def __init__(self, client: Any, job: str, text: queue.Queue[str | None]) -> None:
        super().__init__(name="job-output", daemon=True)
        self._client, self._job, self._text = client, job, text
        self.failure = ""

    def run(self) -> None:
        try:
            asyncio.run(self._follow())
        except Exception as error:  # of aiohttp, asyncio or Ray's client: all mean that the line is cut
            self.failure = next(iter(str(error).strip().splitlines()), type(error).__name__)
        finally:
            self._text.put(None)

    async def _follow(self) -> None:
        async with aclosing(self._client.tail_job_logs(self._job)) as chunks:
            async for chunk in chunks:
                self._text.put(chunk)
