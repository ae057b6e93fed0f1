"""Cache entries: complete or absent, made once, cleaned up after a failure or a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.results.cache import Cache

DIGEST = "ab" * 32


def test_built_then_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.find("tokens", DIGEST) is None

    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "data").write_text("x")
        assert cache.find("tokens", DIGEST) is None

    made = cache.ensure("tokens", DIGEST, {"text": "django"}, fill)
    found = cache.find("tokens", DIGEST)
    assert found == made == tmp_path / ".cache" / "tokens" / DIGEST
    assert (found / "inner" / "data").read_text() == "x"
    assert json.loads((found / "DONE.json").read_text())["text"] == "django"
    assert cache.find("scores", DIGEST) is None and cache.find("tokens", "cd" * 32) is None


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "data").write_text("x")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        cache.ensure("tokens", DIGEST, {}, fill)
    assert cache.find("tokens", DIGEST) is None
    assert [path.name for path in (tmp_path / ".cache" / "tokens").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_while_an_entry_is_filled_is_one_line(tmp_path: Path, number: int) -> None:
    """What else a filling can't open is its own affair."""
    cache = Cache(tmp_path)

    def fill(error: int) -> Callable[[Path], None]:
        def raises(folder: Path) -> None:
            raise OSError(error, os.strerror(error), str(folder / "tokens.arrow"))

        return raises

    with pytest.raises(EnvironmentFailure, match=rf"tokens/{DIGEST}.*{os.strerror(number).lower()}"):
        cache.ensure("tokens", DIGEST, {}, fill(number))
    with pytest.raises(FileNotFoundError):
        cache.ensure("tokens", DIGEST, {}, fill(errno.ENOENT))
    assert cache.find("tokens", DIGEST) is None


def test_an_entry_is_filled_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "data").write_text("x")

    first = cache.ensure("tokens", DIGEST, {}, fill)
    assert cache.ensure("tokens", DIGEST, {}, fill) == first and len(calls) == 1


def test_who_waits_for_another_process_is_called_and_may_give_up(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    program = (
        "import sys, time, pathlib; from minitron_ray.results.cache import Cache\n"
        "def fill(folder): print('filling', flush=True); time.sleep(60)\n"
        f"Cache(pathlib.Path(sys.argv[1])).ensure('tokens', {DIGEST!r}, {{}}, fill)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    calls = []

    def waiting() -> None:
        calls.append("called")
        if len(calls) == 2:
            raise KeyboardInterrupt

    with other, other.stdout:  # type: ignore[union-attr]
        try:
            assert other.stdout.readline() == "filling\n"  # type: ignore[union-attr]
            with pytest.raises(KeyboardInterrupt):
                cache.ensure("tokens", DIGEST, {}, lambda folder: pytest.fail("two fill it"), waiting)
        finally:
            other.kill()
    assert cache.ensure("tokens", DIGEST, {}, lambda folder: None, waiting) and len(calls) == 2


def test_builds_may_nest_for_different_entries(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def write(folder: Path) -> None:
        (folder / "data").write_text("x")

    cache.ensure("tokens", DIGEST, {}, lambda folder: write(cache.ensure("packages", DIGEST, {}, write)))
    assert cache.find("tokens", DIGEST) and cache.find("packages", DIGEST)


@pytest.mark.parametrize("segment", ["../up", "", "a/b", ".hidden"])
def test_names_that_leave_the_cache_are_refused(tmp_path: Path, segment: str) -> None:
    with pytest.raises(ValueError, match="cannot name a cache entry"):
        Cache(tmp_path).find(segment, DIGEST)
    with pytest.raises(ValueError, match="cannot name a cache entry"):
        Cache(tmp_path).find("tokens", segment)


def test_no_write_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentFailure, match=r"^cannot write to .*tokens: .*--results DIR"):
        Cache(tmp_path / "results").ensure("tokens", DIGEST, {}, lambda folder: None)


BUILDER = """
import sys, time
from pathlib import Path
from minitron_ray.results.cache import Cache
def fill(folder):
    print("filling", flush=True)
    time.sleep(float(sys.argv[3]))
    (folder / "data").write_text("x")
print(Cache(Path(sys.argv[1])).ensure("tokens", sys.argv[2], {}, fill), flush=True)
"""


def start_builder(results: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(results), DIGEST, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_two_processes_fill_once(tmp_path: Path) -> None:
    outputs = [builder.communicate()[0] for builder in [start_builder(tmp_path, 0.5) for _ in range(2)]]
    assert "".join(outputs).count("filling") == 1
    assert all(output.endswith(f"{DIGEST}\n") for output in outputs)


def test_a_killed_build_is_made_again(tmp_path: Path) -> None:
    builder = start_builder(tmp_path, 60)
    assert builder.stdout is not None and builder.stdout.readline() == "filling\n"
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    cache = Cache(tmp_path)
    assert cache.find("tokens", DIGEST) is None

    def fill(folder: Path) -> None:
        assert list(folder.iterdir()) == [], "the killed build's files are still there"
        (folder / "data").write_text("y")

    assert (cache.ensure("tokens", DIGEST, {}, fill) / "data").read_text() == "y"
    assert sorted(p.name for p in (tmp_path / ".cache" / "tokens").iterdir() if p.is_dir()) == [DIGEST]
