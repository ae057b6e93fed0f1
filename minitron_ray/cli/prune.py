"""`minitron-ray prune`: cut a checkpoint to a given shape."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitron_ray.cli.options import json_option, quiet_option, results_option
from minitron_ray.core.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console

    from minitron_ray.pruning.job import Pruned
    from minitron_ray.weights.resuming import Report

_DTYPES = ("float32", "bfloat16", "float16")
_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


_HOW_OPTIONS = (
    click.option("--revision", metavar="COMMIT", help="Of a TEACHER on the hub: 40 hex digits."),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --importance random."
    ),
    click.option(
        "--dtype", type=click.Choice(_DTYPES), help="Of the student's weights (default: the teacher's)."
    ),
    click.option(
        "--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Of a weight file, at most."
    ),
    click.option(
        "--merge-heads",
        type=click.Choice(["none", "paper", "laco", "mean"]),
        default="none",
        show_default=True,
        help="What heads that go leave in those that stay.",
    ),
    click.option(
        "--kv-groups",
        type=click.Choice(["drop", "mean"]),
        default="drop",
        show_default=True,
        help="Fewer KV groups: drop the worst, or average neighbours.",
    ),
    click.option(
        "--as", "as_type", metavar="TYPE", help="Write the same function as another model type: mistral."
    ),
)


def _how_options(command: Callable[..., None]) -> Callable[..., None]:
    """What is written and how units are combined: options passed on as `PruneRequest` has them."""
    for option in reversed(_HOW_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("teacher")
@click.option(
    "--to",
    "sizes",
    metavar="AXIS=SIZE,...",
    required=True,
    help="layers, hidden, heads, kv_heads, mlp, experts, expert_mlp; others keep the teacher's size.",
)
@click.option(
    "--importance",
    metavar="RUN|magnitude|random",
    required=True,
    help="Which units stay: as a run scored them, by weight magnitude, or at random.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="The student's folder.",
)
@_how_options
@click.option("--force", is_flag=True, help="Replace the files in a DIR that is not empty.")
@results_option
@quiet_option
@json_option
def prune(
    teacher: str,
    sizes: str,
    importance: str,
    out: Path,
    shard_size: str,
    merge_heads: Any,
    kv_groups: Any,
    force: bool,
    results: Path,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Cut TEACHER to a given shape: no search, no distillation, no Ray.

    TEACHER is a folder, a pypi:// location or a hub id. Tensors go from file to file, a few rows at a
    time, so a model larger than memory can be cut. Stopped or killed, the same command goes on from
    the last finished file. Prints the student's folder.

    \b
    minitron-ray prune ./nemotron-4-15b --to layers=32,hidden=4096,heads=48,mlp=16384 \\
        --importance magnitude --out ./minitron-8b
    """
    from minitron_ray.pruning.shape import read_sizes

    axes, shard_bytes = read_sizes(sizes), _bytes(shard_size)

    from minitron_ray.pruning.job import PruneRequest
    from minitron_ray.pruning.job import prune as cut
    from minitron_ray.search.selection import CutRules

    request = PruneRequest(
        teacher=f"./{teacher}" if _is_local(teacher) else teacher,
        sizes=axes,
        importance=importance,
        shard_bytes=shard_bytes,
        rules=CutRules(merge_heads=merge_heads, kv_groups=kv_groups),
        **given,
    )
    try:
        with _shown(quiet) as report:
            done = cut(request, out, results, force=force, report=report)
    except Interrupted as error:
        again = shlex.join(["minitron-ray", *sys.argv[1:]])
        raise Interrupted(f"{error.message}; to go on, run it again: {again}") from None
    if not quiet:
        _summarise(done)
    click.echo(_as_json(done) if as_json else str(done.folder))


def _is_local(teacher: str) -> bool:
    """A folder or file here, named without the `./` that would tell it from a hub id."""
    from minitron_ray.data.location import is_hub_id

    return is_hub_id(teacher) and Path(teacher).exists()


def _bytes(size: str) -> int:
    digits = size.rstrip("BKMGbkmgiI ")
    unit = size[len(digits) :].strip().upper()
    try:
        count = round(float(digits) * _BYTES[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"--shard-size: expected a size like 5GB or 500MiB, found {size!r}") from None
    if count < 1:
        raise ConfigError(f"--shard-size: must be above 0, found {size!r}")
    return count


@contextmanager
def _shown(quiet: bool) -> Iterator[Report]:
    """How far the writing is, on stderr: a bar on a terminal, elsewhere a line for every tenth."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda done, total: None
    elif not console.is_terminal:
        yield _Tenths(console).report
    else:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (
            TextColumn("cutting"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("cutting", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


class _Tenths:
    """Says each tenth once."""

    def __init__(self, console: Console) -> None:
        self.console, self.said = console, 0

    def report(self, done: int, total: int) -> None:
        from minitron_ray.core.units import format_bytes

        if (tenth := done * 10 // max(1, total)) > self.said:
            self.said = tenth
            self.console.print(f"cutting: {format_bytes(done)} of {format_bytes(total)} written")


def _summarise(done: Pruned) -> None:
    from rich.console import Console

    from minitron_ray.core.units import format_bytes, format_count, format_seconds

    layers = ", ".join(map(str, done.dropped_layers)) or "none"
    files = f"{done.files} file{'s' if done.files > 1 else ''}"
    reused = f", {done.reused} of them from before" if done.reused else ""
    share = done.parameters / done.teacher_parameters
    lines = (
        f"teacher  {done.teacher.shape_text()}  {format_count(done.teacher_parameters)} parameters",
        f"student  {done.student.shape_text()}  {format_count(done.parameters)} parameters ({share:.1%})",
        f"layers that went: {layers}",
        f"{format_bytes(done.bytes)} in {files}{reused}, {format_seconds(done.seconds)}",
    )
    console = Console(stderr=True, highlight=False)
    for line in lines:
        console.print(line, soft_wrap=True)


def _as_json(done: Pruned) -> str:
    import json

    from minitron_ray.pruning.record import sizes

    value = {
        "folder": str(done.folder),
        "teacher": {"parameters": done.teacher_parameters, **sizes(done.teacher)},
        "student": {"parameters": done.parameters, **sizes(done.student)},
        "dropped_layers": list(done.dropped_layers),
        "bytes": done.bytes,
        "files": done.files,
        "reused_files": done.reused,
        "seconds": round(done.seconds, 3),
        "fingerprint": done.fingerprint,
    }
    return json.dumps(value, indent=2)
