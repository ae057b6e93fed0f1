"""When a worker waits for its mailbox's answer, and when not. That all arrives is shown on Ray in `test_map`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from minitron_ray.execution import hub
from minitron_ray.execution.hub import Reporter


class Ray:
    """In its place: answers are there once `answering`; counts for how many somebody waited."""

    def __init__(self) -> None:
        self.now, self.waits, self.answering, self.stop = 100.0, 0, True, False
        self.pushed: list[str] = []

    def push(self, events: list[tuple[str, dict[str, Any]]]) -> tuple[bool, None]:
        self.pushed += [kind for kind, _ in events]
        return self.stop, None

    def get(self, answer: tuple[bool, None]) -> tuple[bool, None]:
        self.waits += not self.answering
        return answer

    def wait(self, answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout == 0
        return (answers, []) if self.answering else ([], answers)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    fake = Ray()
    monkeypatch.setattr(hub, "ray", fake)
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


@pytest.fixture
def reporter(ray: Ray) -> Reporter:
    mailbox: Any = SimpleNamespace(push=SimpleNamespace(remote=ray.push))
    return Reporter(mailbox)


def test_a_loop_waits_for_no_answer_and_hears_of_a_stop(ray: Ray, reporter: Reporter) -> None:
    assert not reporter.stop_requested()
    ray.answering, ray.stop = False, True
    for _ in range(15):  # a step every tenth of a second
        ray.now += 0.1
        reporter("trial_progress", tokens=1)
        assert not reporter.stop_requested()
    assert ray.waits == 0 and len(ray.pushed) == 3
    ray.answering = True
    ray.now += 0.4
    assert reporter.stop_requested()


def test_who_asks_seldom_waits(ray: Ray, reporter: Reporter) -> None:
    ray.stop = True
    assert reporter.stop_requested()  # at the first question
    ray.stop, ray.answering = False, False
    ray.now += 30
    assert not reporter.stop_requested() and ray.waits == 1


def test_what_is_no_progress_has_arrived_when_it_is_told(ray: Ray, reporter: Reporter) -> None:
    ray.answering = False
    for number in range(1, 4):
        reporter("note", text="")
        reporter("stage_progress", done=number)  # too soon after
        assert ray.waits == number and ray.pushed == ["note"] * number
