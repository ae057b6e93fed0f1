"""`submit` and `watch`: what is wrong is said before anything leaves this machine, and a real cluster does it."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from minitron_ray.cli import main
from minitron_ray.cli.attached import end_as, watch_command
from minitron_ray.cli.handover import hand_over
from minitron_ray.core.errors import ConfigError, EnvironmentFailure, Interrupted, MinitronError
from minitron_ray.core.loading import load
from minitron_ray.execution.jobs import Jobs, JobState, job_server
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.experiment import Experiment
from minitron_ray.results.run import Run
from tests.end_to_end.desk import Desk
from tests.end_to_end.nodes import Nodes, listening


@pytest.fixture
def desk(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> Iterator[Desk]:
    laid = Desk.lay(tmp_path / "desk", tiny_llama, tiny_text)
    yield laid
    laid.clear()


class Server:
    """The end of the line of `hand_over`: keeps what a job server would be given."""

    def submit(self, command: list[str], folder: Path, *, job: str, metadata: dict[str, str]) -> None:
        self.command, self.job, self.metadata = command, job, metadata
        self.files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def given(desk: Desk, server: Any, **options: Any) -> tuple[str, str]:
    path = desk.folder / "tiny.yaml"
    defaults: dict[str, Any] = {
        "python": "python",
        "cluster_file": None,
        "results": "/shared/results",
        "overrides": (),
        "working_dir": None,
    }
    return hand_over(server, [path], [load(path, Experiment)[0]], **(defaults | options))


def test_the_experiments_folder_is_handed_over_without_results(desk: Desk) -> None:
    (desk.folder / "results" / "tiny").mkdir(parents=True)
    (desk.folder / "results" / "tiny" / "big").write_text("x")
    (desk.folder / ".secret").write_text("x")
    (desk.folder / "text" / "up").symlink_to(desk.folder)  # walked into, it would never end
    settings = desk.folder.parent / "where.yaml"
    settings.write_text("workers: 2\n")
    server = Server()
    job, copied = given(desk, server, cluster_file=settings, overrides=("distill.tokens=1M",), python="py")
    assert {"tiny.yaml", "model/config.json", "text/intro.txt", "minitron-ray-cluster.yaml"} <= server.files
    assert not any("results" in name or "secret" in name or "up/" in name for name in server.files)
    assert job == server.job and job.startswith("job-tiny-") and f"{len(server.files) - 1} files" in copied
    assert (
        server.command
        == (
            "py -m minitron_ray run tiny.yaml --events --results /shared/results "
            "--cluster minitron-ray-cluster.yaml --set distill.tokens=1M"
        ).split()
    )
    assert server.metadata["stages"].split(",")[0] == "prepare"
    given(desk, server, rehearse=True)
    assert server.command[-1] == "--rehearse"


def test_results_need_an_absolute_path(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="--results results: not an absolute path"):
        given(desk, Server(), results="results")


def test_a_folder_too_large_to_copy_is_refused(desk: Desk) -> None:
    with (desk.folder / "model" / "more.safetensors").open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(ConfigError, match=r"would be copied .*largest: model/more\.safetensors"):
        given(desk, Server())


def test_an_experiment_outside_the_working_folder_is_refused(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.yaml: not in --working-dir"):
        given(desk, Server(), working_dir=desk.folder / "text")


def test_the_job_servers_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    settings = ClusterSettings(jobs="http://one:1")
    assert job_server(ClusterSettings(), None) == "http://127.0.0.1:8265"
    assert job_server(settings, None) == "http://one:1"
    assert job_server(settings, "https://two:2/") == "https://two:2"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://three:3")
    assert job_server(ClusterSettings(), None) == "http://three:3"
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1:6379' is not http://host:port"):
        job_server(settings, "127.0.0.1:6379")


def test_the_command_that_follows_again() -> None:
    def command(server: str) -> str:
        return watch_command(SimpleNamespace(server=server), "job-a-1")  # type: ignore[arg-type]

    assert command("http://127.0.0.1:8265") == "minitron-ray watch job-a-1"
    assert command("http://h:1") == "minitron-ray watch job-a-1 --address http://h:1"


@pytest.mark.parametrize(
    ("status", "code", "message", "kind", "words", "exit_code"),
    [
        ("STOPPED", None, "", Interrupted, "submit the same files again", 130),
        ("FAILED", 143, "", Interrupted, "submit the same files again", 130),
        ("FAILED", 2, "x.yaml:3:1: bad", MinitronError, "failed with exit code 2", 2),
        ("FAILED", -9, "", MinitronError, "failed with exit code -9", 1),
        ("FAILED", None, "no node has room\nmore", EnvironmentFailure, "could not run: no node has room", 3),
        ("FAILED", 1, "python: No module named minitron_ray", EnvironmentFailure, "as `python` in", 3),
        ("FAILED", 127, "bash: exec: python: not found", EnvironmentFailure, "as `python` in", 3),
    ],
)
def test_a_command_ends_as_its_job(
    status: str, code: int | None, message: str, kind: type[MinitronError], words: str, exit_code: int
) -> None:
    with pytest.raises(kind, match=words) as caught:
        end_as(JobState(status=status, message=message, exit_code=code, metadata={}), "job-1")
    assert caught.value.exit_code == exit_code
    end_as(JobState(status="SUCCEEDED", message=message, exit_code=0, metadata={}), "job-1")


def test_a_job_server_that_does_not_answer_is_said() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        EnvironmentFailure, match=rf"job server at {server} does not answer .*open the tunnel"
    ):
        Jobs(server)


def test_options_of_a_job_are_refused_for_a_run_here(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["watch", "tiny", "--stop", "--results", str(tmp_path)])
    assert done.exit_code == 2 and "--stop is for a submitted run" in done.output
    done = CliRunner().invoke(main, ["watch", "tiny", "--results", str(tmp_path)])
    assert done.exit_code == 4 and "no runs in" in done.output


def test_a_run_that_is_named_like_a_job_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its full name, and unless an option of jobs is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free.getsockname()[1]}")
    run = Run.open(tmp_path, "job-a", "0" * 64, b"name: job-a\n", {}, {"versions": {}})
    run.set_status("interrupted")

    def watched(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["watch", *arguments, "--results", str(tmp_path)])
        return done.exit_code, done.output

    for name in ("job-a", f"job-a/{run.run_id}", run.run_id):
        code, output = watched(name)
        assert code == 130 and f"run {run.run_id}" in output, output
    for arguments in (("job-a", "--stop"), ("job-a-123456",), ("job-",)):
        code, output = watched(*arguments)
        assert code == 3 and "the job server at http://127.0.0.1:" in output, output


# --- A real head ----------------------------------------------------------------------------------------


@pytest.fixture
def head() -> Iterator[str]:
    """The job server of a head with two CPUs, on loopback, that asks for the tests' token."""
    with Nodes() as nodes:
        nodes.head(cpus=2)
        deadline = time.monotonic() + 60
        while not listening(int(nodes.dashboard.rpartition(":")[2])):
            assert time.monotonic() < deadline, "the job server did not start"
            time.sleep(0.2)
        yield f"http://{nodes.dashboard}"


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_run_goes_on_alone_and_can_be_followed_and_stopped(desk: Desk, head: str) -> None:
    _, err = desk.call("watch", "job-x", "--address", head, expect=3, RAY_AUTH_TOKEN="0" * 64)
    assert "refuses this machine's token" in err

    (desk.folder / "cluster.yaml").write_text(f"jobs: {head}\npython: {sys.executable}\nworkers: 1\n")
    where = ("--cluster", "cluster.yaml", "--results", str(desk.results))
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    _, err = desk.call(
        "submit", "tiny.yaml", *where, "--set", "search.space.mlp=[80]", "--detach", PYTHONPATH=path
    )
    job = re.search(r"job-tiny-\w+", err)
    assert job, err
    _, err = desk.call("watch", "job-x", "--cluster", "cluster.yaml", expect=4)
    assert f"it knows {job[0]}" in err

    following = desk.start("watch", job[0], "--cluster", "cluster.yaml")
    deadline = time.monotonic() + 200
    while not any((path / "tables" / "steps").exists() for path in desk.results.glob("tiny/*")):
        assert following.poll() is None, following.communicate()
        assert time.monotonic() < deadline, "the distillation never began"
        time.sleep(0.2)
    following.kill()  # as a closed laptop does
    following.communicate()
    _, err = desk.call("watch", job[0], "--cluster", "cluster.yaml", "--stop", expect=130)
    assert (
        "distill: started" in err and "run interrupted after" in err and "submit the same files again" in err
    )
    assert [row["status"] for row in desk.rows("runs")][-1] == "interrupted"
