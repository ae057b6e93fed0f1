"""Events as lines: what is written is read, whatever else stands around it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from minitron_ray.core.events import Event
from minitron_ray.results.events import EventFile, event_of, line_of


def started(run: str) -> Event:
    return Event(kind="run_started", fields={"experiment": "e", "run_id": run, "folder": "f"}, at=1.0)


def note(text: str) -> Event:
    return Event(kind="note", fields={"text": text}, at=2.0)


@pytest.mark.parametrize("event", [started("a"), note('a "quoted"\nline'), note("größer")])
def test_a_line_gives_its_event_back(event: Event) -> None:
    line = line_of(event)
    assert line.count("\n") == 1 and event_of(line.rstrip("\n")) == event


def test_a_figure_that_is_none_is_null() -> None:
    event = Event(kind="stage_progress", fields={"stage": "distill", "loss": math.nan}, at=1.0)
    read = event_of(line_of(event))
    assert read is not None and read.fields["loss"] is None


@pytest.mark.parametrize(
    "text", ["", "hello", '{"at": 1.0, "kind": "note"', '{"at": 1.0, "kind": "coffee"}', '{"at": 1.0}', "{}"]
)
def test_other_text_is_no_event(text: str) -> None:
    assert event_of(text) is None


def test_a_file_is_read_from_its_newest_attempt_and_then_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = EventFile(tmp_path)
    assert file.read() == []
    path.write_text("".join(map(line_of, (started("a"), note("old"), started("a"), note("new")))))
    assert file.read() == [started("a"), note("new")]
    line = line_of(note("later"))
    with path.open("a") as stream:
        stream.write(line[:10])  # as a reader sees it amid a write
    assert file.read() == []
    with path.open("a") as stream:
        stream.write(line[10:] + "torn by a kill\n" + line_of(started("a")))
    assert file.read() == [note("later"), started("a")]
