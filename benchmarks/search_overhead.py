"""What a search costs beside the training that it is for: wall time, start-up of trials, memory.

The model (random weights, or --model) is searched by the command `minitron-ray run`, Ray and all, with
importance taken over from a run before and the teacher's signal not in the cache. Then the same students
are trained as long by the bare loop of `distillation/loop.py`, from the same stored signal, in as many
processes of as many threads. The search's time is that from the start of the command to the end of the
stage `search`: imports, Ray, the signal, trials, validation, checkpoints and decisions. Losses of
undistilled cuts are left out unless asked for (--zero-shot), as is what a run does after its search.

Start-up of a trial is what passes before its first optimizer step, the validation of its cut left out:
in a new process (Ray's worker, imports, cut, data), and in one that is used again. A halved search trains
half of its students' tokens or less, so that the one pass of the teacher weighs twice as much beside them as
with --no-halving: by count of operations about a tenth. Memory is the
proportional set size (PSS) of the trials' processes, of two trials one after the other and side by side.

    python benchmarks/search_overhead.py                                  # some 1M parameters, minutes
    python benchmarks/search_overhead.py --scale smollm2 --tokens 16384   # 135M, about an hour on 2 cores
    python benchmarks/search_overhead.py --model ./a-checkpoint --tokens 16384
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from process_memory import Memory, watch
from small_models import TEXT, llama, write_model, write_tokenizer

from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.data.sources.pypi import Pypi
from minitron_ray.distillation.loop import make_optimizer, train
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.importance.scores import Scores
from minitron_ray.models.families import family_of
from minitron_ray.results.cache import Cache
from minitron_ray.results.runs import resolve_run
from minitron_ray.results.store import Store
from minitron_ray.search.space import Candidate
from minitron_ray.stages.prepare import prepare
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.teacher import KIND, LISTS

SMOLLM2: Final = Path(__file__).parents[1] / "experiments" / "models" / "smollm2-135m.json"
TOKENS: Final = {"tiny": 196_608, "smollm2": 8_192}
WALL, STARTUP = 1.15, 3.0
"""Goals: ratio and seconds at most."""
PARTS: Final = {"start": "imports, reading", "teacher": "Ray, teacher's signal", "search": "trials"}
MICRO_BATCH: Final = 4
MIB: Final = 2**20


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(options.folder or temporary) / (options.scale if options.model is None else "given")
        bench = Bench(place.resolve(), options)
        bench.warm()
        timings = [bench.timed() for _ in range(options.rounds)]
        memory = {} if options.no_memory else bench.memory()
    _report(timings, memory, options)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one search, in seconds."""

    parts: Mapping[str, float]
    """Of the wall time."""
    bare: float
    """Of the students' training loops, added up."""
    steps: int
    starts: Mapping[str, list[float]]
    """Start-ups of trials by the kind of process."""

    @property
    def wall(self) -> float:
        return sum(self.parts.values())


class Bench:
    """Experiments on one model, in a folder of their own."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._results, self._model = folder / "results", options.model
        if self._model is None:
            self._model = folder / "model"
        if not (self._model / "config.json").is_file():
            config = json.loads(SMOLLM2.read_text()) if options.scale == "smollm2" else _tiny()
            vocabulary = min(8192, config["vocab_size"])
            write_tokenizer(self._model, Cache(self._results), Pypi(path=options.text), vocabulary)
            write_model(self._model, config)
        self._config = json.loads((self._model / "config.json").read_text())

    def warm(self) -> None:
        """Leaves text, tokens and importance for the runs to come."""
        print("a first run, for tokens and importance", file=sys.stderr, flush=True)
        self._run("warm", trials=1, at_once=1, tokens=1, halving=None)

    def timed(self) -> Timing:
        for name in (KIND, LISTS):
            shutil.rmtree(Cache(self._results).folder / name, ignore_errors=True)
        options = self._options
        print("the search", file=sys.stderr, flush=True)
        halving = {"reduction": 2} if options.halving else None
        started = self._run("timed", options.trials, options.at_once, options.tokens, halving)
        print("the bare loops", file=sys.stderr, flush=True)
        run = resolve_run(self._results, "timed").folder
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        trials = _trained(Store(run, "timed", run.name))
        if len(trials) != options.trials:
            sys.exit(f"only {len(trials)} shapes are in the budget; lower --trials")
        bare = self._bare(run, {name: row["tokens"] for name, row in trials.items()})
        return Timing(
            parts=_parts(events, started),
            bare=sum(seconds for seconds, _ in bare),
            steps=sum(steps for _, steps in bare),
            starts=_starts(events, {name: row["cut_seconds"] for name, row in trials.items()}),
        )

    def memory(self) -> dict[int, Memory]:
        """The peak of two trials of equal length, one at a time and two."""
        found = {}
        for at_once in (1, 2):
            print(f"memory, {at_once} trial(s) at a time", file=sys.stderr, flush=True)
            tokens = min(self._options.tokens, self._options.memory_tokens)
            with watch("ray::ImplicitFunc", self._model, self._results) as memory:
                self._run("memory", 2, at_once, tokens, None, threads=1)
            found[at_once] = memory
        return found

    def _run(
        self,
        name: str,
        trials: int,
        at_once: int,
        tokens: int,
        halving: dict[str, Any] | None,
        threads: int | None = None,
    ) -> float:
        """Runs the command anew, and returns when it was started (Unix time)."""
        if name != "warm":
            shutil.rmtree(self._results / name, ignore_errors=True)
        arch = family_of(self._config).read(self._config)
        whole = family_of(self._config).parameters(arch)
        zero_shot = {"shapes": self._options.zero_shot} if self._options.zero_shot else None
        experiment = {
            "name": name,
            "precision": "float32",
            "teacher": {"path": str(self._model.resolve())},
            "data": {
                "source": {"kind": "pypi", "path": self._options.text},
                "sequence_length": self._options.length,
            },
            "budget": {"parameters": round(0.75 * whole), "tolerance": "12%"},
            "search": {
                "space": {
                    "layers": f"{math.ceil(0.6 * arch.layers)}..{arch.layers}",
                    "mlp": [arch.mlp * part // 16 for part in range(6, 17)],
                },
                "trials": trials,
                "zero_shot": zero_shot,
                "halving": halving,
                "retrain": {"tokens": tokens, "rungs": 3 if halving else 1},
                "signal": {"kind": "final_hidden"},
            },
        }
        file, cluster = self._folder / f"{name}.yaml", self._folder / "cluster.yaml"
        file.write_text(json.dumps(experiment))
        cluster.write_text(
            json.dumps(
                {
                    "trial": {"cpus": threads or self._options.threads},
                    "worker": {"cpus": self._options.threads},
                    "workers": self._options.at_once,
                    "concurrent_trials": at_once,
                    "micro_batch": MICRO_BATCH,
                }
            )
        )
        command = [sys.executable, "-m", "minitron_ray", "run", str(file), "--quiet"]
        started = time.time()
        subprocess.run(
            [*command, "--results", str(self._results), "--cluster", str(cluster)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return started

    def _bare(self, run: Path, trained: Mapping[str, int]) -> list[tuple[float, int]]:
        """Seconds and steps of each student's loop, in processes like those of the search."""
        options = self._options
        experiment, _ = load(self._folder / "timed.yaml", Experiment)
        ready = prepare(experiment, self._folder, Cache(self._results), EventBus(), StopSignal(), MICRO_BATCH)
        section = experiment.importance
        table = Store(run, "timed", run.name).read("importance")
        scores = Scores.from_table(table, section.width_label, section.depth.label)
        signal = Path(json.loads((run / "stages" / "teacher.json").read_text())["output"]["folder"])
        rows = Store(run, "timed", run.name).read("candidates").to_pylist()
        shapes = {row["candidate_id"]: _candidate(row) for row in rows}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.at_once, context, torch.set_num_threads, (options.threads,)) as pool:
            jobs = [
                pool.submit(bare_loop, ready.setting, scores, shapes[name], signal, tokens)
                for name, tokens in trained.items()
            ]
            return [job.result() for job in jobs]


def bare_loop(
    setting: Setting, scores: Scores, candidate: Candidate, signal: Path, tokens: int
) -> tuple[float, int]:
    """Trains a student for so many tokens: seconds of the loop alone, and its steps."""
    share, retraining = setting.share(), setting.experiment.searched.retrain
    student = setting.student(candidate, scores, share.device)
    teacher = setting.stored_teacher(signal, share)
    recipe = setting.recipe(retraining, retraining.tokens, retraining.loss)
    data = setting.training_data(retraining.batch)
    optimizer, count = make_optimizer(student, recipe), 0
    started = time.perf_counter()
    for step in train(student, optimizer, teacher, data, recipe, share):
        count += 1
        if step.tokens >= tokens:
            break
    return time.perf_counter() - started, count


def _tiny() -> dict[str, Any]:
    return llama(layers=6, hidden=128, heads=8, mlp=384, vocabulary=512, length=1024)


def _candidate(row: Mapping[str, Any]) -> Candidate:
    return Candidate(**{field.name: row[field.name] for field in fields(Candidate) if field.name in row})


def _trained(store: Store) -> dict[str, dict[str, Any]]:
    """By candidate: the tokens that its trial took, and the seconds that its cut's validation took."""
    found: dict[str, dict[str, Any]] = {}
    for row in store.read("trials").to_pylist():
        known = found.setdefault(row["candidate_id"], {"tokens": 0})
        known["tokens"] = max(known["tokens"], row["tokens"])
        if row["tokens"] == 0:
            known["cut_seconds"] = row["seconds"]
    return found


def _parts(events: list[dict[str, Any]], started: float) -> dict[str, float]:
    """Of the time till the search is finished: each stage, and what is before the first."""
    parts, last = {}, started
    for event in events:
        kind = event["kind"]
        if kind in ("stage_finished", "stage_reused"):
            parts[event["stage"]] = event["at"] - last
            last = event["at"]
            if event["stage"] == "search":
                return parts
        if kind == "run_started":
            parts["start"], last = event["at"] - started, event["at"]
    raise ValueError("the run has no finished search")


def _starts(events: list[dict[str, Any]], cut_seconds: Mapping[str, float]) -> dict[str, list[float]]:
    """Seconds from the end of a trial (or the search's start) to the next one's first step, by kind.

    Of trials side by side the one before is not known: only those of a search of one at a time count.
    """
    reports: list[tuple[float, str, int]] = []
    begun = next(e["at"] for e in events if e["kind"] == "stage_started" and e["stage"] == "search")
    for event in events:
        if event["kind"] == "trial_progress" and "val_loss" in event:
            reports.append((event["at"], event["candidate_id"], event["tokens"]))
    first = reports[0]
    found: dict[str, list[float]] = {"new process": [first[0] - begun - cut_seconds[first[1]]]}
    before = first
    for report in reports[1:]:
        at, name, tokens = report
        if name != before[1] and tokens == 0:
            known = sum(other == name and when < at for when, other, _ in reports)
            seconds = at - before[0]
            if not known:
                found.setdefault("process used again", []).append(seconds - cut_seconds[name])
            else:
                found.setdefault("taken up again", []).append(seconds)
        before = report
    return found


def _report(timings: list[Timing], memory: Mapping[int, Memory], options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    if load > 1.5 + options.at_once * options.threads:
        print(f"load average {load:.1f}: not a quiet machine", file=sys.stderr)
    middle = sorted(timings, key=lambda timing: timing.wall / timing.bare)[len(timings) // 2]
    length = "up to " if options.halving else ""
    print(f"{options.trials} trials of {length}{options.tokens:,} tokens, {options.at_once} at a time with "
          f"{options.threads} thread(s); {len(timings)} round(s)")  # fmt: skip
    for name, seconds in middle.parts.items():
        print(f"  {PARTS.get(name, name):<24}{seconds:8.1f} s")
    ratios = [timing.wall / timing.bare for timing in timings]
    processes = [ratio * options.at_once for ratio in ratios]
    print(f"  {'all of it':<24}{middle.wall:8.1f} s")
    print(f"  {'bare loops':<24}{middle.bare:8.1f} s added up ({middle.steps:,} steps)")
    print(f"  wall over bare loops: {statistics.median(ratios):.3f} (at most {WALL}); by process time "
          f"{statistics.median(processes):.3f}; rounds {', '.join(f'{ratio:.3f}' for ratio in ratios)}")  # fmt: skip
    if options.at_once == 1:
        for kind in middle.starts:
            starts = [value for timing in timings for value in timing.starts.get(kind, ())]
            print(f"  start-up of a trial, {kind + ':':<21} {statistics.median(starts):5.2f} s, "
                  f"{min(starts):.2f} to {max(starts):.2f} ({len(starts)}; at most {STARTUP})")  # fmt: skip
    if memory:
        _print_memory(memory)
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    result = {
        "benchmark": "search_overhead",
        "load": load,
        **shown,
        "ratios": ratios,
        "parts": dict(middle.parts),
        "bare": middle.bare,
        "starts": dict(middle.starts),
        "memory": {str(at_once): found.peak for at_once, found in memory.items()},
    }
    print("\n" + json.dumps(result))


def _print_memory(memory: Mapping[int, Memory]) -> None:
    one, two = memory[1].peak, memory[2].peak
    print("\nmemory of the trials' processes at their peak, MiB")
    counts = f"({memory[1].processes}, {memory[2].processes} processes)"
    print(f"{'':<40}{'one trial':>11}{'two':>9}{'two less one':>14}  {counts}")
    for name, told in Memory.KINDS.items():
        first, both = one[name] / MIB, two[name] / MIB
        print(f"  {told:<38}{first:>11.1f}{both:>9.1f}{both - first:>14.1f}")
    print(
        "PSS counts a page that n processes have mapped as 1/n in each. What is private is each trial's own:\n"
        "its student (16 bytes a parameter: weights, gradients, two moments), activations and its Python.\n"
        "The teacher's weights and its signal are mapped from files: their pages are the same for all trials,\n"
        "and the kernel can drop them. Resident size counts them, and libraries, once a process."
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cores = os.cpu_count() or 1
    parser.add_argument("--scale", choices=tuple(TOKENS), default="tiny", help="of the random Llama")
    parser.add_argument("--model", type=Path, help="a folder with a model and its tokenizer, instead")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="of a trial to its end (tiny 196608, smollm2 8192)")
    parser.add_argument("--memory-tokens", type=int, default=32_768, help="of a trial whose memory is taken")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=1, help="trials at a time")
    parser.add_argument("--threads", type=int, default=cores, help="of a trial")
    parser.add_argument("--zero-shot", type=int, default=0, help="undistilled cuts to be scored")
    parser.add_argument(
        "--no-halving", dest="halving", action="store_false", help="every trial goes to its end"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps text, model and runs")
    options = parser.parse_args()
    options.tokens = options.tokens or TOKENS[options.scale]
    return options


if __name__ == "__main__":
    main()
