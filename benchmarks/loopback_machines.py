"""The machines of a small Ray cluster, all of them on this one: each can be killed, cut off and started again.

Where the kernel allows it (`isolate`), a program and all it starts live in namespaces of their own, and
each machine has a network of its own there, joined to the others by a bridge: its cable can be pulled.
They vanish with the program, however it ends. Elsewhere all machines share the loopback address, and one
that is cut off is stopped (SIGSTOP) instead. A part of `fault_drill.py`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

_INSIDE: Final = "MINITRON_RAY_DRILL_INSIDE"
_BRIDGE: Final = "drill0"
_SUBNET: Final = "10.77.0"
_PORT: Final = 6379
_RAY: Final = str(Path(sys.executable).with_name("ray"))
_STARTED: Final = "Ray runtime started"
_TRAINS: Final = b"RayTrainWorker"
"""In the title of a process that trains."""


def isolate() -> bool:
    """Starts this program again inside namespaces of its own; True there, False where that is not possible.

    Mounts, networks and processes made inside are nobody else's, and end with it.
    """
    if _INSIDE in os.environ:
        _lay_cables()
        return True
    unshare, needed = shutil.which("unshare"), ("ip", "nsenter", "mount")
    if unshare is None or not all(map(shutil.which, needed)):
        return False
    own = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [unshare, *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), *own]
    links = f"ip link add {_BRIDGE} type bridge && ip link add veth1 type veth peer name veth2"
    trial = f"{links} && mount -t tmpfs none /mnt"
    done = subprocess.run([*command, "sh", "-c", trial], capture_output=True, check=False)
    if done.returncode:
        return False
    sys.stdout.flush()
    os.execve(unshare, [*command, sys.executable, *sys.argv], os.environ | {_INSIDE: "1"})  # noqa: S606


def _lay_cables() -> None:
    """A bridge, and a /tmp/ray in which no other Ray of this machine has left its address."""
    Path("/tmp/ray").mkdir(exist_ok=True)  # noqa: S108
    _run("mount", "-t", "tmpfs", "-o", "size=2g", "none", "/tmp/ray")  # noqa: S108
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", _BRIDGE, "type", "bridge")
    _run("ip", "address", "add", f"{_SUBNET}.254/24", "dev", _BRIDGE)
    _run("ip", "link", "set", _BRIDGE, "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Machine:
    """One machine with a Ray node of one CPU on it; number 1 is the head. Nothing runs until `start`."""

    def __init__(self, number: int, folder: Path, *, isolated: bool) -> None:
        """`folder` takes the node's output."""
        self.name = "head" if number == 1 else f"node{number}"
        self.address = f"{_SUBNET}.{number}" if isolated else "127.0.0.1"
        self.port = _port(isolated)
        self._log = folder / f"{self.name}.log"
        self._isolated, self._cable = isolated, f"cable{number}"
        self._node: subprocess.Popen[bytes] | None = None
        self._enter: list[str] = []
        if isolated:
            self._plug_in()

    def _plug_in(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])  # noqa: S607
        place, ours = Path(f"/proc/{self._holder.pid}/ns/net"), Path("/proc/self/ns/net")
        while place.readlink() == ours.readlink():
            time.sleep(0.01)
        self._enter = ["nsenter", f"--net={place}", "--"]
        holder = str(self._holder.pid)
        _run("ip", "link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", holder)
        _run("ip", "link", "set", self._cable, "master", _BRIDGE, "up")
        _run(*self._enter, "ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run(*self._enter, "ip", "link", "set", device, "up")

    def run(
        self, command: Sequence[str], output: IO[bytes], folder: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a program on this machine, in a session of its own."""
        return subprocess.Popen(
            [*self._enter, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,
        )

    def start(self, head: str | None = None) -> None:
        """Starts the node, which joins the cluster at `head` or is its head."""
        role = [f"--address={head}"] if head else ["--head", f"--port={self.port}"]
        if head is None:
            role += ["--dashboard-host=127.0.0.1", "--disable-usage-stats"]
        node = [f"--node-ip-address={self.address}", "--num-cpus=1", "--object-store-memory=100000000"]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as output:
            self._node = self.run([_RAY, "start", "--block", *role, *node], output)

    @property
    def up(self) -> bool:
        """Whether its node has started and lives."""
        return self.alive and _STARTED in self._log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self._node is not None and self._node.poll() is None

    def processes(self) -> dict[int, bytes]:
        """The command lines of the node's processes."""
        return {} if self._node is None else session(self._node.pid)

    def raylet(self) -> int | None:
        """The process that is the node for the cluster."""
        found = [
            number for number, line in self.processes().items() if b"/raylet/raylet" in line.split(b"\0")[0]
        ]
        return found[0] if found else None

    def training(self) -> list[int]:
        """Processes of a worker group on this machine."""
        return [number for number, line in self.processes().items() if _TRAINS in line]

    def kill(self) -> None:
        """As if its power were cut: every process of the node at once."""
        for number in self.processes():
            send(number, signal.SIGKILL)
        if self._node is not None:
            self._node.wait()

    def kill_raylet(self) -> None:
        """The node is lost, and what it started is left behind."""
        raylet = self.raylet()
        if raylet is not None:
            send(raylet, signal.SIGKILL)

    def terminate(self) -> None:
        """As a scheduler that takes the machine back."""
        assert self._node is not None
        self._node.terminate()

    def cut(self) -> None:
        """Pulls the network cable; without one, stops every process of the node."""
        if self._isolated:
            _run("ip", "link", "set", self._cable, "down")
        else:
            for number in self.processes():
                send(number, signal.SIGSTOP)

    def mend(self) -> None:
        """Undoes `cut`."""
        if self._isolated:
            _run("ip", "link", "set", self._cable, "up")
        else:
            for number in self.processes():
                send(number, signal.SIGCONT)


def session(leader: int) -> dict[int, bytes]:
    """Command lines of the living processes of a session, by number."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            fields = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found[int(path.name)] = (path / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
    return found


def send(process: int, number: signal.Signals) -> None:
    """A signal, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _port(isolated: bool) -> int:
    """Below 10002, where the ports of Ray's workers begin."""
    if isolated:
        return _PORT
    for port in range(7000, 7100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise SystemExit("no port from 7000 to 7099 is free")


def environment(folder: Path, *, isolated: bool) -> None:
    """What every process of the cluster finds: its own token, one thread, and how to reach one another."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_memory_monitor_refresh_ms="0",  # it counts the whole machine's memory and kills workers
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        **({"GLOO_SOCKET_IFNAME": "eth0"} if isolated else {}),
    )


def small_disk(folder: Path, size: int) -> None:
    """Gives the folder a disk of its own with so many bytes; it ends with this program. After `isolate` only."""
    folder.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder))
