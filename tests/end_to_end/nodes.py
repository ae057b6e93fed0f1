"""Nodes of Ray on this machine, each started with `ray start` as cluster/README.md says."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

RAY = str(Path(sys.executable).with_name("ray"))
ALIVE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]))
"""
PATIENCE_S = 240.0


def free_ports(count: int) -> list[int]:
    """Below 10002, where Ray's worker ports begin, and seldom another process's that looks at the same time."""
    first = 7000 + 10 * (os.getpid() % 250)
    return [port for port in range(first, 10000) if not listening(port)][:count]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Nodes:
    """A context: a head and the nodes that join it, each begun when those before are alive to a driver. On a busy
    machine a node, or a driver, gives up on a head that only listens. All end with the block."""

    def __init__(self) -> None:
        self.address = self.dashboard = ""
        self._ports: list[int] = []
        # Short, since Ray puts sockets below it, whose names may have 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
        self._nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for node in reversed(self._nodes):
            _end(node)
        shutil.rmtree(self._folder, ignore_errors=True)

    def head(self, *options: str, cpus: int = 1, made: int = 0) -> None:
        """With Ray's autoscaler it makes up to `made` nodes of one CPU, when they are asked for. Called again, it is
        another head at the same address."""
        # All named: of Ray's own choice the dashboard's is any other Ray's on this machine, and a head waits a
        # minute for a dashboard that finds its port taken, after which it ends as a whole.
        self._ports = self._ports or free_ports(5)
        port, dashboard, client, agent, grpc = self._ports
        self.address, self.dashboard = f"127.0.0.1:{port}", f"127.0.0.1:{dashboard}"
        self._start(
            "--head",
            f"--port={port}",
            f"--num-cpus={cpus}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={grpc}",
            f"--temp-dir={self._folder}",
            "--disable-usage-stats",
            *([f"--autoscaling-config={self._makes(made)}"] if made else []),
            *options,
        )

    def _makes(self, most: int) -> Path:
        """Of the launcher's configuration what Ray's provider of nodes on this machine needs."""
        types = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "made": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most},
        }
        provider = {
            "type": "fake_multinode",
            "gcs_address": self.address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        }
        lists = (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
        config = {
            "cluster_name": "made",
            "max_workers": most,
            "idle_timeout_minutes": 5,
            "upscaling_speed": 1.0,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": "ray.head.default",
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{name}_commands": [] for name in lists},
        }
        file = self._folder / "autoscaler.yaml"
        file.write_text(json.dumps(config))
        return file

    def join(self, cpus: int = 1) -> None:
        self._start(f"--address={self.address}", f"--num-cpus={cpus}")

    def lose(self) -> None:
        """All nodes at once, as by a power cut."""
        for node in self._nodes:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        self._nodes.clear()

    def _start(self, *arguments: str) -> None:
        log = self._folder / "nodes.log"
        with log.open("ab") as output:
            node = subprocess.Popen(
                [RAY, "start", "--block", "--node-ip-address=127.0.0.1", *arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
            )
        self._nodes.append(node)
        look = [sys.executable, "-c", ALIVE, self.address, str(len(self._nodes))]
        deadline = time.monotonic() + PATIENCE_S
        while (
            found := subprocess.run(look, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
        ).returncode:
            said = f"{log.read_text()}\n{found.stderr}"
            assert all(node.poll() is None for node in self._nodes), f"a node ended\n{said}"
            assert time.monotonic() < deadline, f"node {len(self._nodes)} did not join\n{said}"
        assert node.poll() is None, f"another process has taken its port\n{log.read_text()}"


def _end(node: subprocess.Popen[bytes]) -> None:
    """Ends a node and every process it started; they are a session of their own."""
    node.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()
