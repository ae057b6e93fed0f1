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

ALIVE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]))
"""

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """Below 10002, where Ray's worker ports begin."""
    return next(port for port in range(7000, 7100) if not listening(port))


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


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
    folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    joining = f"127.0.0.1:{port}"
    head = (
        "--head",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    )
    nodes: list[subprocess.Popen[bytes]] = []
    log = folder / "nodes.log"
    try:
        # One after the other: on a busy machine a node gives up on a head that is not ready yet.
        for count, arguments in enumerate((head, (f"--address={joining}",)), start=1):
            nodes.append(start(log, *arguments))
            wait_for(joining, nodes, count, log)
        yield joining
    finally:
        for node in reversed(nodes):
            end(node)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(joining: str, nodes: list[subprocess.Popen[bytes]], count: int, log: Path) -> None:
    """Returns when `count` nodes are alive; a failure says what the nodes and the last look at them printed."""
    deadline = time.monotonic() + 240
    answer = None
    while answer is None or answer.returncode != 0:
        said = "" if answer is None else answer.stderr
        assert time.monotonic() < deadline, f"node {count} did not join\n{log.read_text()}\n{said}"
        for node in nodes:
            assert node.poll() is None, f"a node ended\n{log.read_text()}"
        look = [sys.executable, "-c", ALIVE, joining, str(count)]
        answer = subprocess.run(look, check=False, stderr=subprocess.PIPE, text=True, timeout=240)


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
