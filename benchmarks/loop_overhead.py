"""What the distillation loop costs beside the arithmetic that it is for, and what Ray and checkpoints add.

loop: our step with the running teacher over that of a bare PyTorch loop that does the same arithmetic, head
and loss by the same function; and, to compare, of one that makes both models' logits whole. One process,
one step each in turn; losses must agree.
ray: the same training by a group of one worker under Ray Train, which reports each step, over that of a plain
process, whole trainings in turn; start-up is told by itself.
checkpoint: steps while a checkpoint is written in the background, one every 20 steps and waited for at the
end of the 20, over steps without any. One process, 20 steps each in turn.
workers: two plain processes over one, at the same global batch; there is no goal.

Printed are the medians of the paired rounds' ratios, by processor and by wall time.

    python benchmarks/loop_overhead.py --scale tiny
    python benchmarks/loop_overhead.py --only loop checkpoint          # 88M
    python benchmarks/loop_overhead.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from loop_job import Job, Training, bare, fused, join, logits, on_worker
from peers import SCALES

from minitron_ray.core.events import EventBus
from minitron_ray.distillation.checkpoints import Checkpoints
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings, Resources
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.train_group import run_group

PARTS: Final = ("loop", "ray", "checkpoint", "workers")
LIMITS: Final = {"loop": 1.03, "ray": 1.05, "checkpoint": 1.05}
"""What the ratios are to stay below."""
CHILD: Final = Path(__file__).parent / "loop_job.py"
MIB: Final = 2**20

Round = Mapping[str, Mapping[str, float]]
"""Of each variant `wall` and `processor` seconds, and `loss`."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ.update({"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for part in options.only:
            print(f"part {part}", file=sys.stderr, flush=True)
            began, load = time.perf_counter(), os.getloadavg()[0]
            result = MEASURES[part](options, Path(folder))
            result |= {"minutes": (time.perf_counter() - began) / 60, "load": [load, os.getloadavg()[0]]}
            found[part] = result
            if options.device == "cuda":
                torch.cuda.empty_cache()  # other processes have their turn on the same device
            _tell(part, result, options)
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    print("\n" + json.dumps({"benchmark": "loop_overhead", "machine": platform.machine(), **shown, **found}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=tuple(SCALES), default="88m")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure, of all")
    parser.add_argument("--rounds", type=int, default=15, help="steps of `loop`")
    parser.add_argument("--steps", type=int, default=200, help="timed, of the other parts' trainings")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each kind, of `ray`, `workers`")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--micro-batch", type=int, help="sequences a pass; else the whole batch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written meanwhile")
    return parser.parse_args()


def _job(options: argparse.Namespace, steps: int) -> Job:
    return Job(
        scale=options.scale,
        steps=steps,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        micro_batch=options.micro_batch or SCALES[options.scale]["batch"],
    )


def measure_loop(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job = _job(options, options.rounds + 1)
    join(job, 0, 1, dist.HashStore())
    teacher = job.teacher()
    ours, same, whole = (
        Training(job, teacher=teacher).steps(),
        bare(job, teacher, fused),
        bare(job, teacher, logits),
    )
    jobs: dict[str, Callable[[], float]] = {
        "ours": lambda: next(ours).loss,
        "bare": lambda: next(same),
        "bare, whole logits": lambda: next(whole),
    }
    rounds = _in_turn(jobs, options.rounds)
    dist.destroy_process_group()
    return {"rounds": rounds, "over": "bare"}


def measure_ray(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job = _job(options, options.steps + 1)
    each = Resources(cpus=options.threads, gpus=int(options.device == "cuda"))
    settings = ClusterSettings(workers=1, worker=each, trial=each)
    starts = []
    with Cluster(settings, folder / "ray-run", EventBus(), StopSignal()) as cluster:
        began = time.perf_counter()
        cluster.hub  # noqa: B018  starts Ray
        cluster_start = time.perf_counter() - began

        def under_ray() -> dict[str, float]:
            began = time.perf_counter()
            found: dict[str, float] = run_group(cluster, on_worker, job)
            starts.append(time.perf_counter() - began - found["wall"])
            return found

        kinds = {"Ray Train": under_ray, "plain process": lambda: _processes(job, 1, folder)}
        rounds = [_turned(kinds, number) for number in range(options.repeats)]
    return {
        "rounds": rounds,
        "over": "plain process",
        "seconds to start Ray": cluster_start,
        "seconds of a group's start, first step and end": statistics.median(starts),
    }


def measure_checkpoint(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    every = options.every
    count = max(1, options.steps // every)
    job = _job(options, (count + 1) * every)
    join(job, 0, 1, dist.HashStore())
    teacher = job.teacher()
    saved, other = (Training(job, teacher=teacher) for _ in range(2))
    place = folder / "checkpoints"
    device = (
        torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    )
    checkpoints, waits = Checkpoints(place, 0, device, asynchronous=True), []
    steps, others = saved.steps(checkpoints.failed), other.steps()

    def saving() -> float:
        loss = next(steps)
        began = time.perf_counter()
        checkpoints.save(loss.step, saved.student, saved.optimizer)
        copied = time.perf_counter() - began
        for _ in range(every - 1):
            loss = next(steps)
        began = time.perf_counter()
        checkpoints.finish()
        waits.append((copied, time.perf_counter() - began))
        return loss.loss

    def plain() -> float:
        return [next(others).loss for _ in range(every)][-1]

    rounds = _in_turn({"checkpoints": saving, "none": plain}, count)
    checkpoints.close()
    size = sum(file.stat().st_size for file in next(place.glob("step-*")).rglob("*") if file.is_file())
    dist.destroy_process_group()
    return {
        "rounds": rounds,
        "over": "none",
        "seconds to copy a state": statistics.median(copied for copied, _ in waits[1:]),
        "seconds waited at the end": statistics.median(waited for _, waited in waits[1:]),
        "MiB of a checkpoint": size / MIB,
    }


def measure_workers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        return {"rounds": [], "why": "one GPU: two processes would share it"}
    micro_batch = min(
        options.micro_batch or SCALES[options.scale]["batch"] // 2, SCALES[options.scale]["batch"]
    )
    options = argparse.Namespace(**{**vars(options), "micro_batch": micro_batch})
    job = _job(options, options.steps + 1)
    kinds = {
        "two": lambda: _processes(job, 2, folder),
        "one": lambda: _processes(job, 1, folder),
    }
    return {"rounds": [_turned(kinds, number) for number in range(options.repeats)], "over": "one"}


def _processes(job: Job, world: int, folder: Path) -> dict[str, float]:
    """A training by so many plain processes: wall seconds of the first, processor seconds of all."""
    told = json.dumps(asdict(job))
    children: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            for rank in range(world):
                command = [sys.executable, "-W", "ignore::FutureWarning", str(CHILD)]
                more = [told, str(rank), str(world), f"{place}/store"]
                children.append(subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True))
            outputs = [child.communicate()[0] for child in children]
        finally:
            for child in children:
                child.kill()  # nothing where it has ended
    if any(child.returncode for child in children):
        sys.exit("a training process failed; its error is above")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {**found[0], "processor": sum(one["processor"] for one in found)}


def _in_turn(jobs: Mapping[str, Callable[[], float]], rounds: int) -> list[Round]:
    """`rounds` calls of each in this process, after one that is not counted."""
    for job in jobs.values():
        job()
    kinds = {name: _clocked(job) for name, job in jobs.items()}
    return [_turned(kinds, number) for number in range(rounds)]


def _turned(kinds: Mapping[str, Callable[[], Mapping[str, float]]], number: int) -> Round:
    """One of each, in an order that turns."""
    names = list(kinds)
    turned = names[number % len(names) :] + names[: number % len(names)]
    found = {name: kinds[name]() for name in turned}
    print(f"round {number + 1}", file=sys.stderr, flush=True)
    return found


def _clocked(job: Callable[[], float]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        _settle()
        processor, wall = time.process_time(), time.perf_counter()
        loss = job()
        _settle()
        return {
            "processor": time.process_time() - processor,
            "wall": time.perf_counter() - wall,
            "loss": loss,
        }

    return run


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tell(part: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    rounds, load = result["rounds"], max(result["load"])
    print(f"\n{part}: {len(rounds)} rounds, {result['minutes']:.1f} minutes, load {load:.1f}"
          f"{': not a quiet machine' if load > 1.5 + options.threads else ''}")  # fmt: skip
    if not rounds:
        print(f"  left out: {result['why']}")
        return
    over, result["ratios"] = result["over"], {}
    for name in sorted(rounds[0], key=lambda name: name == over):
        line, ratios = f"  {name:<20}", {}
        for clock in ("processor", "wall"):
            each = [found[name][clock] / found[over][clock] for found in rounds]
            ratios[clock] = statistics.median(each)
            seconds = statistics.median(found[name][clock] for found in rounds)
            line += f"{clock:>11} {seconds:9.4f} s {ratios[clock]:6.3f} ({min(each):.3f} to {max(each):.3f})"
        result["ratios"][name] = ratios
        goal = part in LIMITS and name == next(iter(rounds[0]))
        print(line + (f"  (at most {LIMITS[part]})" if goal else ""))
    off = max(abs(one["loss"] / found[over]["loss"] - 1) for found in rounds for one in found.values())
    print(f"  losses differ by at most {off:.1e}")
    result["losses differ"] = off
    for name, value in result.items():
        if name.startswith(("seconds", "MiB")):
            print(f"  {name}: {value:.2f}")


MEASURES: Final = {
    "loop": measure_loop,
    "ray": measure_ray,
    "checkpoint": measure_checkpoint,
    "workers": measure_workers,
}

if __name__ == "__main__":
    main()
