"""What tasks gain when much text is tokenised: tokens a second by tasks on Ray against one process.

One process is measured twice: in one go with the tokenizer's own threads, as little text is done, and with
one thread. Every way is a process of its own with an empty cache, in turn, in changing order; each must give
the same bytes. The time of the tasks has the start of Ray in it, and is given without it too.

    python benchmarks/tokenizing.py --model ./a-model --text './corpus/*.jsonl'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from minitron_ray.core.events import EventBus
from minitron_ray.data import reading, tokens
from minitron_ray.data.sources.files import Files
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.tokenizing import tokenizing
from minitron_ray.results.cache import Cache

WAYS = ("threads", "one thread", "tasks")


def main() -> None:
    options = _options()
    if options.way is not None:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turn in range(options.rounds):
        for way in WAYS if turn % 2 == 0 else reversed(WAYS):
            one = _alone(way, options)
            found[way].append(one)
            print(f"{way:<11} {one['seconds']:8.1f} s  {one['tokens'] / one['seconds']:12,.0f} tokens/s")
    assert len({one["sha256"] for ways in found.values() for one in ways}) == 1, "the stores differ"
    base = statistics.median(one["seconds"] for one in found["one thread"])
    for way, ones in found.items():
        seconds = statistics.median(one["seconds"] for one in ones)
        print(f"{way:<11} {seconds:.1f} s, {seconds / base:.2f} of one thread")
    started = statistics.median(one["seconds"] - one["start"] for one in found["tasks"])
    print(
        f"tasks without the start of Ray {started:.1f} s, {started / base:.2f} of one thread; "
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, equal bytes"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In a fresh process: builds the store one way."""
    vars(tokens)["LARGE"] = 0 if options.way == "tasks" else 1 << 60
    vars(reading)["SHARD"] = options.shard << 20
    if options.way != "tasks":
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.way == "threads" else "false"
    settings = ClusterSettings(tokenizers=options.tasks if options.way == "tasks" else 1)
    start = 0.0
    with tempfile.TemporaryDirectory(prefix="minitron-ray-") as folder:
        began = time.monotonic()
        with tokenizing(settings, Path(folder), EventBus(), StopSignal()) as spread:
            if spread is not None:
                assert spread.cpus
                start = time.monotonic() - began
            store = tokens.build_tokens(
                Files(path=options.text),
                options.model,
                sequence_length=options.length,
                base=Path.cwd(),
                cache=Cache(Path(folder)),
                spread=spread,
            )
        seconds = time.monotonic() - began
        with (store.folder / "tokens.arrow").open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"seconds": seconds, "start": start, "tokens": store.counts["tokens"], "sha256": sha256}


def _alone(way: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", str(options.model), "--text", options.text, "--way", way]
    command += ["--length", str(options.length), "--shard", str(options.shard)]
    command += ["--tasks", str(options.tasks)] if options.tasks else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--text", required=True, help="pattern of txt, jsonl or parquet")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--tasks", type=int, default=None, help="at a time; one a processor if not given")
    parser.add_argument("--shard", type=int, default=32, help="MiB; the program's is 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
