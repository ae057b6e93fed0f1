"""Whether a distillation on a cluster loses anything, whatever is killed, filled up or cut off meanwhile.

A small Llama is distilled by the command `minitron-ray run` on a Ray cluster of two machines, each with
one CPU (see `loopback_machines.py`): once left alone, once while faults strike at moments drawn by lot:

    worker     kill -9 of a training process          driver      kill -9 of the command itself
    raylet     kill -9 of a node's main process       sigterm     SIGTERM to the command
    node       all processes of a machine at once     disk        no space left where checkpoints and tables are
    unplugged  no network for a while                 partition   none for so long that the node is given up
    leave      SIGTERM to a node                      preempted   SIGTERM to a training process
    head       all processes of the head, and so the cluster

Machines that are lost come back after some seconds, and a command that ended is started again: what a
supervisor does (systemd, Kubernetes, Slurm's --requeue). Nothing else is done by hand. A fault strikes when
the run trains at full strength again. Held against the calm run: every step is in the table once, losses are
the same (bit by bit on a fixed number of workers, within 1e-4 where the number changed), and no fault costs
more steps than lie between two checkpoints.

    python benchmarks/fault_drill.py --folder DIR                        # 36 faults, about an hour on 2 cores
    python benchmarks/fault_drill.py --folder DIR --workers 1..2         # goes on with fewer while a node is lost
    python benchmarks/fault_drill.py --folder DIR --short                # 4 faults, two minutes
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drill_record import Fault, Progress, as_text, judge, write
from loopback_machines import Machine, environment, isolate, send, session, small_disk
from small_models import llama, write_model, write_tokenizer

from minitron_ray.data.sources.files import Files
from minitron_ray.results.cache import Cache

LONG: Final = {"worker": 7, "driver": 6, "node": 5, "raylet": 4, "disk": 3, "sigterm": 2, "unplugged": 2,
               "preempted": 2, "partition": 2, "leave": 2, "head": 1}  # fmt: skip
SHORT: Final = ("worker", "unplugged", "disk", "driver")
PATIENCE: Final = 300.0
"""Seconds for a run to train again, before it is called lost."""
AWAY: Final = (2.0, 8.0)
"""Seconds before a lost machine comes back."""
DISK: Final = 256 * 2**20
FULL: Final = 64 * 2**10
"""Bytes left on a full disk: some rows fit, a checkpoint does not."""
BRIEFLY: Final = (1.0, 5.0)
FOR_LONG: Final = (45.0, 60.0)
"""Seconds without a network; Ray gives a node up after about half a minute."""
ON_ITS_WAY: Final = 2.0
"""Seconds in which a step may be heard of that was made before the fault."""
LINGERS: Final = ("leave",)
"""Faults that some steps may still be made after: got over is only what has begun again."""
STEPS_A_FAULT: Final = 80
"""Some are made before the next one strikes, and some while a lost machine comes back."""
SHORT_STEPS: Final = 160
VOCABULARY: Final = 512


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of model and training."""

    layers: int
    hidden: int
    mlp: int
    length: int
    batch: int
    interval: int
    """Optimizer steps between checkpoints."""

    def experiment(self, teacher: Path, steps: int) -> dict[str, object]:
        tokens = self.batch * self.length
        return {
            "name": "drill",
            "precision": "float32",
            "teacher": {"path": str(teacher)},
            "data": {
                "source": {"kind": "files", "path": "text"},
                "sequence_length": self.length,
                "calibration": 8,
                "validation": 8,
            },
            "shape": {"layers": self.layers - 1, "mlp": self.mlp // 2},
            "distill": {
                "tokens": steps * tokens,
                "batch": self.batch,
                "learning_rate": 1e-3,
                "checkpoint_every": self.interval * tokens,
            },
        }


SIZES: Final = {
    "long": Size(layers=5, hidden=128, mlp=384, length=128, batch=8, interval=20),
    "short": Size(layers=3, hidden=64, mlp=128, length=64, batch=8, interval=10),
}


class Drill:
    """Machines, the command on the head, and the run that it drives."""

    def __init__(self, folder: Path, options: argparse.Namespace, *, isolated: bool) -> None:
        self._folder, self._isolated, self._options = folder, isolated, options
        self._lot = random.Random(options.seed)
        self._size = SIZES["short" if options.short else "long"]
        self._machines = [Machine(number, folder / "logs", isolated=isolated) for number in (1, 2)]
        self._driver: subprocess.Popen[bytes] | None = None
        self._output = folder / "logs" / "driver.log"
        self._spoken = 0
        self._starts: dict[str, float] = {}
        self._progress = Progress(results=folder / "calm")
        self._fault: Fault | None = None
        self._full = int(options.workers.rpartition(".")[2])
        self._since = time.monotonic()
        self._began, self._processes = 0.0, set[int]()
        self.faults: list[Fault] = []

    # What a supervisor does.

    def calm(self) -> Progress:
        """A run that nobody disturbs."""
        self._say("the calm run")
        self._until(lambda: self._ended, 3600, "its end")
        return self._progress

    def disturbed(self, kinds: list[str]) -> Progress:
        """A run with one fault of each kind, in this order."""
        self._say(f"the run with {len(kinds)} faults")
        self._progress, self._driver = Progress(results=self._folder / "disk"), None
        if self._isolated:
            small_disk(self._progress.results, DISK)
        for number, kind in enumerate(kinds, start=1):
            if not self._strong():
                self._say(f"the run ended after {number - 1} faults; give more --steps")
                break
            self._strike(number, kind)
        self._until(lambda: self._ended, 3600, "its end")
        return self._progress

    def end(self) -> None:
        """Ends every process."""
        if self._driver is not None:
            for process in session(self._driver.pid):
                send(process, signal.SIGKILL)
        for machine in self._machines:
            machine.mend()
            machine.kill()
        if (self._folder / "disk").is_dir():  # which ends with this program
            shutil.copytree(
                self._folder / "disk", self._folder / "disturbed", ignore=shutil.ignore_patterns("filler")
            )

    def _tick(self) -> None:
        """Starts again what has ended, and takes in what is new."""
        now = time.monotonic()
        head = self._machines[0]
        for machine in self._machines:
            if machine.alive or (machine is not head and not head.up):
                continue
            again = self._starts.setdefault(
                machine.name, now + (self._lot.uniform(*AWAY) if self._fault else 0)
            )
            if now >= again:
                del self._starts[machine.name]
                for process in machine.processes():  # a raylet's children, where it died alone
                    send(process, signal.SIGKILL)
                machine.start(None if machine is head else f"{head.address}:{head.port}")
        self._tend_driver()
        self._hear()
        time.sleep(0.05)

    def _tend_driver(self) -> None:
        code = None if self._driver is None else self._driver.poll()
        if code == 0 or (self._driver is not None and code is None):
            return
        if code is not None and self._fault is None:
            raise SystemExit(f"the command ended with {code}, undisturbed: {self._last_words()}")
        if code is not None and self._fault is not None and self._fault.driver_exit is None:
            self._fault.driver_exit, self._fault.message = code, self._last_words()
        if all(machine.up for machine in self._machines):
            self._start_driver()

    def _start_driver(self) -> None:
        results, head = self._progress.results, self._machines[0]
        command = [sys.executable, "-m", "minitron_ray", "run", str(self._folder / "drill.yaml"),
                   "--results", str(results), "--cluster", str(self._folder / "cluster.yaml"),
                   "--address", f"{head.address}:{head.port}"]  # fmt: skip
        with self._output.open("ab") as output:
            self._spoken = output.tell()
            self._driver = head.run(command, output, self._folder)

    def _last_words(self) -> str:
        """An error that the command ended with, or its last line."""
        with self._output.open(errors="replace") as output:
            output.seek(self._spoken)
            lines = output.read().splitlines()
        return next((line for line in reversed(lines) if line.startswith("error:")), (lines or [""])[-1])[
            :300
        ]

    def _until(self, ready: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                tail = "\n".join(self._output.read_text(errors="replace").splitlines()[-12:])
                raise SystemExit(f"waited {seconds:.0f} s for {what}, in vain\n{tail}")
            self._tick()

    @property
    def _ended(self) -> bool:
        return self._driver is not None and self._driver.poll() == 0

    def _training(self) -> set[int]:
        return {process for machine in self._machines for process in machine.training()}

    def _say(self, what: str) -> None:
        print(f"{time.monotonic() - self._since:7.1f}  {what}", file=sys.stderr, flush=True)

    # A fault, and what comes of it.

    def _strong(self) -> bool:
        """Waits until all train and have made some steps more, drawn by lot; False if the run ended before."""
        self._until(
            lambda: (
                self._ended or (len(self._training()) == self._full and time.time() - self._progress.at < 5)
            ),
            PATIENCE,
            f"{self._full} workers to train",
        )
        moment = self._progress.step + self._lot.randint(1, 2 * self._size.interval)
        self._until(lambda: self._ended or self._progress.step >= moment, PATIENCE, f"step {moment}")
        time.sleep(self._lot.uniform(0, 0.3))
        self._hear()
        return not self._ended

    def _strike(self, number: int, kind: str) -> None:
        """One fault, until the run has made a step that it had not made before."""
        head, other = self._machines
        strikes: dict[str, tuple[Machine | None, Callable[[], None]]] = {
            "preempted": (other, lambda: self._signal_worker(other, signal.SIGTERM)),
            "worker": (
                worked := self._lot.choice(self._machines),
                lambda: self._signal_worker(worked, signal.SIGKILL),
            ),
            "driver": (None, lambda: self._signal_driver(signal.SIGKILL)),
            "sigterm": (None, lambda: self._signal_driver(signal.SIGTERM)),
            "node": (other, other.kill),
            "raylet": (other, other.kill_raylet),
            "leave": (other, other.terminate),
            "unplugged": (other, lambda: self._cut(other, *BRIEFLY)),
            "partition": (other, lambda: self._cut(other, *FOR_LONG)),
            "disk": (None, self._fill_disk),
            "head": (head, head.kill),
        }
        machine, strike = strikes[kind]
        self._processes, self._began = self._training(), time.monotonic()
        self._fault = fault = Fault(
            number=number,
            kind=kind,
            target="" if machine is None else machine.name,
            at=self._began - self._since,
            step=self._progress.step,
            workers=len(self._processes),
        )
        self.faults.append(fault)
        self._say(f"fault {number}: {kind} {fault.target} at step {fault.step}")
        strike()
        self._until(
            lambda: self._ended or fault.seconds_to_catch_up is not None, PATIENCE, "the next new step"
        )
        driver = "" if fault.driver_exit is None else f"; driver: exit {fault.driver_exit} {fault.message}"
        self._say(
            f"  trains after {fault.seconds_to_train or 0:.1f} s, {fault.steps_lost} steps lost{driver}"
        )

    def _hear(self) -> None:
        """Takes in the run's progress, and with it how the run gets over the fault."""
        fault, checkpoint = self._fault, self._progress.checkpoint
        heard = self._progress.poll()
        if fault is None or not heard or fault.seconds_to_catch_up is not None:
            return
        seconds, now = time.monotonic() - self._began, self._training()
        if fault.seconds_to_train is None:
            restarted = bool(now - self._processes)
            waits = now != self._processes or seconds < ON_ITS_WAY or fault.kind in LINGERS
            if not restarted and waits:
                fault.step = max(fault.step, heard[-1][1])
                return
            fault.restarted, fault.seconds_to_train = restarted, seconds
            if restarted:
                fault.from_step, fault.steps_lost = checkpoint, max(0, fault.step - checkpoint)
        if heard[-1][1] > fault.step:
            fault.seconds_to_catch_up = seconds

    def _signal_worker(self, machine: Machine, number: signal.Signals) -> None:
        for process in machine.training()[:1]:
            send(process, number)

    def _signal_driver(self, number: signal.Signals) -> None:
        assert self._driver is not None
        send(self._driver.pid, number)
        deadline = time.monotonic() + PATIENCE
        while self._driver.poll() is None and time.monotonic() < deadline:
            self._hear()  # it may make a step more before it ends
            time.sleep(0.05)

    def _cut(self, machine: Machine, least: float, most: float) -> None:
        machine.cut()
        mended = time.monotonic() + self._lot.uniform(least, most)
        self._until(lambda: time.monotonic() > mended, PATIENCE, "the cable")
        machine.mend()

    def _fill_disk(self) -> None:
        """Leaves no room for a checkpoint; makes room when the command has ended, or long went on without."""
        filler, limited = self._progress.results / "filler", list[int]()
        if self._isolated:
            self._until(lambda: _filled(filler), PATIENCE, "the full disk")
        else:  # no file of theirs can grow
            limited = sorted(self._processes)
            self._limit(limited, FULL)
        fault, step, since = self._fault, self._progress.highest, time.monotonic()
        assert fault is not None

        def noticed() -> bool:
            went_on = self._progress.highest > step + 2 * self._size.interval
            return self._ended or went_on or fault.driver_exit is not None or time.monotonic() > since + 60

        self._until(noticed, PATIENCE, "what comes of a full disk")
        filler.unlink(missing_ok=True)
        self._limit(limited, resource.RLIM_INFINITY)

    @staticmethod
    def _limit(processes: list[int], size: int) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                hard = resource.prlimit(process, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))


def _filled(filler: Path) -> bool:
    """Takes what is free on the disk, but for `FULL`; False where a checkpoint took it first."""
    try:
        with filler.open("wb") as stream:
            room = os.statvfs(filler.parent)
            os.posix_fallocate(stream.fileno(), 0, max(1, room.f_bavail * room.f_frsize - FULL))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else nodes would be left behind
    isolated = not options.shared_network and isolate()
    with tempfile.TemporaryDirectory(prefix="drill") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        passed = _run(folder, options, isolated=isolated)
    raise SystemExit(0 if passed else 1)


def _run(folder: Path, options: argparse.Namespace, *, isolated: bool) -> bool:
    lot = random.Random(options.seed)
    plenty = [kind for kind, count in LONG.items() for _ in range(count)]
    kinds = options.kinds.split(",") if options.kinds else list(SHORT) if options.short else []
    while not kinds or (not options.kinds and not options.short and len(kinds) < options.faults):
        kinds += lot.sample(plenty, len(plenty))
    kinds = kinds if options.kinds or options.short else kinds[: options.faults]
    steps = options.steps or (SHORT_STEPS if options.short else STEPS_A_FAULT * len(kinds))
    size = SIZES["short" if options.short else "long"]
    _lay(folder, size, steps, options.workers)
    environment(folder, isolated=isolated)
    drill = Drill(folder, options, isolated=isolated)
    try:
        calm = drill.calm()
        disturbed = drill.disturbed(kinds)
    finally:
        drill.end()
    verdict = judge(drill.faults, disturbed, calm, size.interval, len(kinds))
    network = (
        "a network namespace each" if isolated else "one network; a node that is cut off is stopped instead"
    )
    head = (f"{len(kinds)} faults, seed {options.seed}, workers {options.workers}; two machines of one CPU, {network}; "
            f"{os.cpu_count()} cores")  # fmt: skip
    report = as_text(verdict, drill.faults, head)
    print(report, end="")
    write(options.report or folder / "report", report, drill.faults)
    return verdict.passed


def _lay(folder: Path, size: Size, steps: int, workers: str) -> None:
    """The teacher, with random weights, the experiment and the cluster file; no results of an earlier drill."""
    for name in ("calm", "disk", "disturbed", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "logs").mkdir()
    teacher, text = folder / "teacher", folder / "text"
    text.mkdir(exist_ok=True)
    for module in Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"):
        shutil.copyfile(module, text / f"{module.stem}.txt")
    if not (teacher / "config.json").is_file():
        write_tokenizer(teacher, Cache(folder), Files(path=str(text)), VOCABULARY)
        config = llama(
            layers=size.layers,
            hidden=size.hidden,
            heads=8,
            mlp=size.mlp,
            vocabulary=VOCABULARY,
            length=size.length,
        )
        # Five times as wide as usual, so that what is cut off matters and there is something to learn.
        write_model(teacher, config | {"initializer_range": 0.1})
    (folder / "drill.yaml").write_text(json.dumps(size.experiment(teacher, steps)))
    elastic: object = workers if ".." in workers else int(workers)
    (folder / "cluster.yaml").write_text(json.dumps({"workers": elastic, "worker": {"cpus": 1}}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keeps models, runs and logs (default: a temporary one)")
    parser.add_argument(
        "--report", type=Path, help="where report.txt and faults.csv go (default: FOLDER/report)"
    )
    parser.add_argument("--short", action="store_true", help="four faults, a smaller model")
    parser.add_argument("--faults", type=int, default=36)
    parser.add_argument("--kinds", help="these faults in this order, with commas (default: drawn by lot)")
    parser.add_argument("--steps", type=int, help="of the distillation (default: what the faults need)")
    parser.add_argument("--workers", default="2", help="2, or 1..2 for as many as there are")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, victims and moments")
    parser.add_argument("--shared-network", action="store_true", help="no namespaces, even where possible")
    return parser.parse_args()


if __name__ == "__main__":
    main()
