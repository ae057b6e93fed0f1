"""Cut a checkpoint with the shape of Nemotron-4 15B to Minitron 8B's, beside `cp` of as many bytes.

    python benchmarks/cut_15b.py --folder /somewhere/with/70GB
    python benchmarks/cut_15b.py --folder /tmp --scale 0.1          a tenth, for trying out

Writes the synthetic teacher (bfloat16, 31 GB at full scale), then in each round cuts it with
`minitron-ray prune` in a process of its own, and copies with `cp`, in turn, the student's files and as
many of the teacher's as make up what the cut moved: half of the bytes it read and wrote, since a copy
reads and writes each of its bytes. Each comes after a `sync`, with what it reads taken out of the page
cache. Everything is deleted at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron_ray.core.units import format_bytes
from minitron_ray.models.families import family_of
from minitron_ray.weights.writing import layout, typed

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "experiments/models/nemotron-4-15b.json"
STUDENT = {"layers": 32, "hidden": 4096, "heads": 48, "mlp": 16384}
"""Minitron 8B (paper, Table 19)."""
SHARD_BYTES = 5 * 10**9
BUSY = 0.7
"""A load average above which another process is said to have disturbed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed process."""

    seconds: float
    anonymous: int
    """Largest RssAnon seen, bytes."""
    resident: int
    """Largest resident set with shared file pages, bytes, as the kernel counts it."""
    moved: int
    """Bytes it read from and wrote to the disk, as the kernel counts them."""
    lines: tuple[str, ...]
    """What `/usr/bin/time -v` says of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One timed `cp`."""

    size: int
    seconds: float
    synced: float
    """Seconds until its bytes were on the disk, as `prune` leaves them."""

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s ({self.synced:.1f} s with sync)"


def teacher_config(scale: float) -> dict[str, Any]:
    """The 15B's config; a smaller scale has fewer layers and words, each layer of full size."""
    config: dict[str, Any] = json.loads(CONFIG.read_text())
    for name in ("num_hidden_layers", "vocab_size"):
        config[name] = max(2, round(config[name] * scale))
    return config


def write_teacher(folder: Path, config: dict[str, Any]) -> int:
    """Writes the checkpoint, unless it is there, and gives its size in bytes."""
    family = family_of(config)
    shards = layout(family.shapes(family.read(config)), "bfloat16", 2, SHARD_BYTES)
    size = sum(len(shard.header) + shard.size for shard in shards)
    done = folder / "config.json"
    if done.exists():
        return size
    folder.mkdir(parents=True, exist_ok=True)
    # 64 MB of normal numbers in bfloat16, begun at another place for each piece: cheap, and nowhere constant.
    noise = np.random.default_rng(0).standard_normal(2**25, dtype=np.float32) * np.float32(0.02)
    pool = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    offset = 0
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            left = shard.size
            while left:
                piece = pool[offset : offset + left]
                left -= file.write(piece)
                offset = (offset + 2 * 7_368_787) % len(pool)
            os.fsync(file.fileno())
    if len(shards) > 1:
        places = {name: shard.file for shard in shards for name in shard.places}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done.write_text(json.dumps(typed(config, "bfloat16")))
    return size


def evict(folder: Path) -> None:
    """Takes a folder's files out of the page cache, so that they are read from the disk. Needs no root,
    and leaves alone what other processes have cached, Python's own libraries among it."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str]) -> Run:
    """Runs a command to its end, sampling the anonymous memory of it and its children."""
    with tempfile.NamedTemporaryFile("r") as told:
        timer = ["/usr/bin/time", "-v", "-o", told.name] if Path("/usr/bin/time").exists() else []
        started = time.perf_counter()
        process = subprocess.Popen([*timer, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        largest = moved = 0
        while process.poll() is None:
            family = list(_family(process.pid))
            largest = max(largest, sum(_anonymous(pid) for pid in family))
            moved = max(moved, sum(_moved(pid) for pid in family))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(process.stderr.read().decode())
        lines = tuple(line.strip() for line in told.read().splitlines())
    resident = [int(line.rpartition(":")[2]) * 1024 for line in lines if line.startswith("Maximum resident")]
    return Run(
        seconds=seconds,
        anonymous=largest,
        resident=max(resident, default=_waited()),
        moved=moved,
        lines=lines,
    )


def _waited() -> int:
    """Largest resident set among finished children, where `time` is missing."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child))
    except OSError:
        return


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def _moved(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("read_bytes:", "write_bytes:")))


def copy(files: list[Path], target: Path) -> Copy:
    target.mkdir()
    started = time.perf_counter()
    subprocess.run(["/bin/cp", "--reflink=never", *map(str, files), str(target)], check=True)
    copied = time.perf_counter() - started
    subprocess.run(["/bin/sync", *map(str, target.iterdir())], check=True)
    synced = time.perf_counter() - started
    size = weights(target)
    shutil.rmtree(target)
    return Copy(size=size, seconds=copied, synced=synced)


def files_of(folder: Path, size: int | None = None) -> list[Path]:
    """A folder's weight files, or as many of them as come nearest to `size` bytes."""
    files = sorted(folder.glob("*.safetensors"))
    if size is None:
        return files
    sums = [sum(path.stat().st_size for path in files[:count]) for count in range(1, len(files) + 1)]
    return files[: 1 + min(range(len(files)), key=lambda index: abs(sums[index] - size))]


def prune_command(teacher: Path, student: Path, scale: float, results: Path) -> list[str]:
    sizes = STUDENT | {"layers": max(2, round(STUDENT["layers"] * scale))}
    axes = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    return [
        *(sys.executable, "-m", "minitron_ray", "prune", str(teacher), "--to", axes),
        *("--importance", "random", "--out", str(student), "--results", str(results)),
    ]


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write; 70 GB at full scale")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of layers and vocabulary")
    parser.add_argument("--keep", action="store_true", help="keep teacher and student")
    given = parser.parse_args()
    base = given.folder / f"cut_15b_{given.scale:g}"
    base.mkdir(parents=True, exist_ok=True)
    try:
        measure(base, given)
    finally:
        if not given.keep:
            shutil.rmtree(base)


def measure(base: Path, given: argparse.Namespace) -> None:
    teacher, student, duplicate = base / "teacher", base / "student", base / "copy"
    started = time.perf_counter()
    size = write_teacher(teacher, teacher_config(given.scale))
    print(f"teacher  {format_bytes(size)} ({size:,} bytes), {time.perf_counter() - started:.0f} s to write")
    command = prune_command(teacher, student, given.scale, base / "results")
    cuts: list[Run] = []
    alike: list[Copy] = []
    as_many: list[Copy] = []
    for number in range(1, given.rounds + 1):
        shutil.rmtree(student, ignore_errors=True)
        load = os.getloadavg()[0]
        evict(teacher)
        cuts.append(timed(command))
        evict(student)
        alike.append(copy(files_of(student), duplicate))
        student_size = weights(student)
        if not given.keep:  # both need not fit beside the copy
            for path in files_of(student):
                path.unlink()
        evict(teacher)
        as_many.append(copy(files_of(teacher, cuts[-1].moved // 2), duplicate))
        busy = "" if load < BUSY * (os.cpu_count() or 1) else f"; load was {load:.1f}: disturbed by others"
        print(
            f"round {number}  cut {cuts[-1].seconds:.1f} s, cp of the student {alike[-1]}, "
            f"cp of {format_bytes(as_many[-1].size)} {as_many[-1]}{busy}",
            flush=True,
        )
    report(student_size, cuts, alike, as_many)


def report(size: int, cuts: list[Run], alike: list[Copy], as_many: list[Copy]) -> None:
    cut = statistics.median(run.seconds for run in cuts)
    moved = statistics.median(run.moved for run in cuts)
    print(f"student  {format_bytes(size)} ({size:,} bytes)")
    print(f"median   cut {cut:.1f} s; it read and wrote {format_bytes(int(moved))}")
    for what, copies in (("cp of the student", alike), ("cp of as many bytes as it moved", as_many)):
        factor = 1.0 if copies is alike else moved / 2 / copies[0].size  # whole files: a few per cent off
        alone = statistics.median(one.seconds for one in copies) * factor
        synced = statistics.median(one.synced for one in copies) * factor
        print(
            f"ratio    {cut / alone:.2f} of {what} ({alone:.1f} s), {cut / synced:.2f} with sync ({synced:.1f} s)"
        )
    print(
        f"memory   anonymous {format_bytes(max(run.anonymous for run in cuts))} at most, resident with shared"
    )
    print(f"         file pages {format_bytes(max(run.resident for run in cuts))}")
    shown = ("Command", "User time", "System time", "Percent", "Elapsed", "Maximum resident", "Major", "Exit")
    for line in cuts[-1].lines:
        if line.startswith(shown):
            print(f"         {line}")


if __name__ == "__main__":
    main()
