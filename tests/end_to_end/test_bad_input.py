"""Input that cannot work: one clear line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.desk import Desk


def set_config(desk: Desk, **values: object) -> None:
    path = desk.folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(desk: Desk) -> None:
    path = desk.folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_weights(desk: Desk) -> None:
    (desk.folder / "model" / "model.safetensors").unlink()


def cut_text(desk: Desk) -> None:
    for path in sorted((desk.folder / "text").rglob("*.txt"))[1:]:
        path.unlink()
    (next((desk.folder / "text").rglob("*.txt"))).write_text("Too short.")


CASES: dict[str, tuple[Callable[[Desk], None], tuple[str, ...], str]] = {
    "family": (lambda d: set_config(d, model_type="mamba"), (), "model_type 'mamba' is not supported"),
    "attribute": (lambda d: set_config(d, logit_scale=3.0), (), "logit_scale"),
    "budget": (lambda d: None, ("--set", "budget.parameters=1k"), "the space reaches"),
    "text": (cut_text, (), "sequences of 32 tokens"),
    "weights": (drop_weights, (), "model"),
    "truncated": (truncate, (), "model.safetensors"),
    "sha256": (lambda d: None, ("--set", f"teacher.sha256={'0' * 64}"), "sha256"),
    "key": (lambda d: None, ("--set", "distill.tokns=1k"), "did you mean 'tokens'"),
    "keep": (lambda d: None, ("--set", "search.keep=9"), "9 students cannot be kept"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(desk: Desk, case: str) -> None:
    spoil, arguments, message = CASES[case]
    spoil(desk)
    _, err = desk.call("run", "tiny.yaml", *arguments, expect=2)
    assert message in err and "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith(("error:", "tiny.yaml:", "--set"))]
    assert len(errors) == 1, err
    assert not list(desk.results.glob("tiny/*")) and not list(desk.results.rglob("*.partial"))


def test_a_cluster_that_does_not_answer_is_exit_code_3(desk: Desk) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, err = desk.call("run", "tiny.yaml", "--address", f"127.0.0.1:{port}", expect=3)
    assert "does not answer" in err and "Traceback" not in err


def test_results_that_cannot_be_written_are_exit_code_3(desk: Desk) -> None:
    (desk.folder / "file").write_text("")
    _, err = desk.call("run", "tiny.yaml", "--results", str(Path("file") / "results"), expect=3)
    assert "results" in err and "Traceback" not in err


@pytest.mark.ray
@pytest.mark.slow
def test_two_drivers_of_one_run(desk: Desk) -> None:
    first = desk.start("run", "tiny.yaml")
    deadline = time.monotonic() + 60
    while not list(desk.results.glob("tiny/*/driver.json")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    _, err = desk.call("run", "tiny.yaml", expect=2)
    assert f"is already being driven by process {first.pid}" in err
