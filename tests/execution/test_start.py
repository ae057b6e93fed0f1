"""What happens before Ray is there: stop signals, the token, addresses that do not answer."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.ray_start import keep_logs, private_token, start_ray
from minitron_ray.execution.stop import StopSignal


def test_the_first_ctrl_c_asks_and_the_second_aborts() -> None:
    said: list[str] = []
    stop = StopSignal(lambda: said.append("stopping"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop.installed():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    assert said == ["stopping"]
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_asks_however_often() -> None:
    stop = StopSignal()
    with stop.installed():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


def test_the_token_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ray" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    private_token()
    first = path.read_text()
    assert len(first) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as Ray itself leaves it
    private_token()
    assert path.read_text() == first and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_token_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file" / "token"))
    with pytest.raises(EnvironmentFailure, match="cannot keep Ray's cluster token there"):
        private_token()


def test_an_address_that_does_not_answer_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentFailure, match=rf"127\.0\.0\.1:{port} does not answer .*ray start --head"):
        start_ray(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:port", ":6379"])
def test_an_address_that_is_none_is_said(address: str) -> None:
    with pytest.raises(EnvironmentFailure, match="is not host:port"):
        start_ray(address)


def test_logs_are_kept_but_not_empty_huge_or_linked_ones(tmp_path: Path) -> None:
    logs = tmp_path / "session" / "logs"
    (logs / "events").mkdir(parents=True)
    (logs / "worker.out").write_text("said")
    (logs / "events" / "a.log").write_text("x")
    (logs / "empty.err").write_text("")
    (logs / "link.out").symlink_to(logs / "worker.out")
    with (logs / "huge.log").open("wb") as stream:
        stream.truncate(2**30)
    keep_logs(tmp_path / "session", tmp_path / "kept")
    kept = {str(p.relative_to(tmp_path / "kept")) for p in (tmp_path / "kept").rglob("*") if p.is_file()}
    assert kept == {"ray/worker.out", "ray/events/a.log"}
