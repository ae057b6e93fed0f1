"""A cluster of two nodes on loopback, started with `ray start` as cluster/README.md says."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.desk import Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BOTH_JOINED = """
import sys, time, ray
while not ray.is_initialized():
    try:  # a head that listens may not know its own node yet
        ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        print(error, file=sys.stderr)
        time.sleep(0.5)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
"""

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """Below 10002, where Ray's worker ports begin."""
    return next(port for port in range(7000, 7100) if not listening(port))


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def end(node: subprocess.Popen[bytes]) -> None:
    """Ends a node and every process it started; they are a session of their own."""
    node.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@pytest.fixture
def address() -> Iterator[str]:
    """Two nodes of one CPU each; both end with the test."""
    port = free_port()
    # Short, since Ray puts sockets below it, whose names may have 107 characters.
    folder = tempfile.mkdtemp(prefix="mr", dir="/tmp")
    head = start(
        "--head",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    )
    nodes = [head]
    try:
        wait(lambda: listening(port), "the head")
        nodes.append(start(f"--address=127.0.0.1:{port}"))
        joined = [sys.executable, "-c", BOTH_JOINED, f"127.0.0.1:{port}"]
        subprocess.run(joined, check=True, timeout=120)
        yield f"127.0.0.1:{port}"
    finally:
        for node in reversed(nodes):
            end(node)
        shutil.rmtree(folder, ignore_errors=True)


def wait(ready, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not start"
        time.sleep(0.2)


def test_workers_on_both_nodes_distill_together(desk: Desk, address: str) -> None:
    (desk.folder / "cluster.yaml").write_text("workers: 2\nconcurrent_trials: 2\n")
    out, err = desk.run("--cluster", "cluster.yaml", "--address", address, "--set", "distill.tokens=4k")
    assert "exported" in out and "Traceback" not in err
    assert {row["workers"] for row in desk.rows("steps")} == {2}
    assert [row["status"] for row in desk.rows("runs")][-1] == "succeeded"


def test_a_cluster_without_room_for_the_workers_says_so(desk: Desk, address: str) -> None:
    (desk.folder / "cluster.yaml").write_text("workers: 5\n")
    _, err = desk.call("run", "tiny.yaml", "--cluster", "cluster.yaml", "--address", address, expect=3)
    assert "5 workers of 1 CPUs and 0 GPUs do not fit" in err and "lower `workers`" in err
