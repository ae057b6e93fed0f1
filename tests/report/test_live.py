"""The run while it goes: what the model makes of events, the picture on a terminal, the lines in a pipe."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console

from minitron_ray.core.events import KINDS, Event, EventBus
from minitron_ray.report.heartbeat import Heartbeat
from minitron_ray.report.live import LiveView, draw, open_view
from minitron_ray.report.progress import ProgressModel

Say = tuple[float, str, dict[str, Any]]
A, B = {"candidate_id": "aaaaaaaaaa"}, {"candidate_id": "bbbbbbbbbb"}
WINNER = A | {"shape": "24L 576H 9h 1024m", "parameters": 98_000_000}
LOSER = B | {"shape": "26L 576H 9h 1024m", "parameters": 103_000_000}
SUMMARY = (
    "5,412 sequences of 256 tokens from 389 documents; teacher SmolLM2-135M-Instruct, 134,515,008 parameters"
)
SEARCHING: list[Say] = [
    (
        0,
        "run_started",
        {"experiment": "quickstart", "run_id": "20260101t120000-a1b2c3", "folder": "results/q/r"},
    ),
    (0, "stage_reused", {"stage": "prepare", "summary": SUMMARY}),
    (1, "stage_started", {"stage": "importance", "total": 32, "unit": "sequences"}),
    (9, "stage_finished", {"stage": "importance", "summary": "scored", "seconds": 8.0}),
    (10, "stage_started", {"stage": "search", "total": 8, "unit": "trials"}),
    (11, "trial_started", WINNER),
    (
        12,
        "trial_progress",
        {"candidate_id": "aaaaaaaaaa", "tokens": 0, "total_tokens": 16384, "val_loss": 4.25},
    ),
    (
        20,
        "trial_progress",
        {"candidate_id": "aaaaaaaaaa", "tokens": 4096, "val_loss": 3.9, "tokens_per_second": 83.0},
    ),
    (21, "trial_started", LOSER),
    (22, "trial_finished", B | {"status": "failed", "reason": "loss became\nNaN"}),
    (22, "stage_progress", {"stage": "search", "done": 1, "total": 8, "unit": "trials"}),
]
DISTILLING: list[Say] = [
    (
        90,
        "trial_finished",
        {"candidate_id": "aaaaaaaaaa", "status": "completed", "val_loss": 3.7, "tokens": 16384},
    ),
    (100, "stage_finished", {"stage": "search", "summary": "best of 2", "seconds": 90.0}),
    (100, "stage_started", {"stage": "distill", "total": 65536, "unit": "tokens"}),
    (110, "stage_progress", {"stage": "distill", "done": 16384, "loss": 3.75, "tokens_per_second": 151.0}),
    (
        120,
        "stage_progress",
        {"stage": "distill", "done": 18432, "loss": 3.7421, "note": "checkpoint at 18"},
    ),
]


def events(says: list[Say]) -> list[Event]:
    return [Event(kind=kind, fields=fields, at=1000.0 + at) for at, kind, fields in says]


def model_of(says: list[Say]) -> ProgressModel:
    model = ProgressModel()
    for event in events(says):
        model.apply(event)
    return model


def picture(says: list[Say], *, width: int, height: int = 40, now: float = 1130.0) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(draw(model_of(says), now, width, height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_every_kind_of_event_is_understood() -> None:
    assert {name[1:] for name in vars(ProgressModel) if name[1:] in KINDS} == set(KINDS)


def test_the_model_keeps_what_an_event_leaves_out() -> None:
    model = model_of(SEARCHING + DISTILLING)
    stage, trial = model.stages["distill"], model.trials["aaaaaaaaaa"]
    assert (stage.status, stage.done, stage.total, stage.loss, stage.tokens_per_second) == (
        "running", 18432, 65536, 3.7421, 151.0,
    )  # fmt: skip
    assert (trial.status, trial.cut_loss, trial.val_loss, trial.total_tokens) == (
        "completed",
        4.25,
        3.7,
        16384,
    )
    waiting = [stage.name for stage in model.stages.values() if stage.status == "waiting"]
    assert waiting == ["correct", "teacher", "zero_shot", "baselines", "evaluate", "export"]
    assert model.running_stage() is stage


def test_a_stage_that_only_the_plan_could_tell_takes_its_place() -> None:
    model = ProgressModel(("prepare", "importance", "teacher", "search", "evaluate"))
    model.apply(Event(kind="stage_started", fields={"stage": "zero_shot", "unit": "cuts"}, at=1.0))
    assert list(model.stages) == ["prepare", "importance", "teacher", "zero_shot", "search", "evaluate"]
    running = model.running_stage()
    assert running is not None and running.name == "zero_shot"


def test_time_to_go_is_the_recent_pace_and_not_what_a_resumed_stage_began_with() -> None:
    stage = model_of(SEARCHING + DISTILLING).stages["distill"]
    assert stage.remaining(1120.0) == pytest.approx((65536 - 18432) / 204.8)
    assert stage.remaining(1130.0) == pytest.approx((65536 - 18432) / 204.8 - 10)
    assert stage.remaining(9999.0) is None, "overdue"
    assert model_of(SEARCHING).stages["search"].remaining(1022.0) is None, "one point is no pace"


def test_the_pace_of_one_kind_of_work_says_nothing_of_the_next() -> None:
    says: list[Say] = [(0, "stage_started", {"stage": "baselines", "unit": "tokens"})]
    for at, done, total, unit in (
        (60, 9, 10, "cuts"),
        (90, 10, 10, "cuts"),
        (100, 512, 9_216, "tokens"),
        (110, 1_536, 9_216, "tokens"),
    ):
        says.append(
            (at, "stage_progress", {"stage": "baselines", "done": done, "total": total, "unit": unit})
        )
    stage = model_of(says).stages["baselines"]
    assert stage.remaining(1110.0) == pytest.approx((9_216 - 1_536) / 102.4)


def test_old_progress_is_forgotten() -> None:
    says: list[Say] = [(0, "stage_started", {"stage": "distill", "total": 10_000, "unit": "tokens"})]
    says += [(at, "stage_progress", {"stage": "distill", "done": at}) for at in range(10, 200, 10)]
    says += [
        (at, "stage_progress", {"stage": "distill", "done": 190 + 10 * (at - 190)})
        for at in range(200, 400, 10)
    ]
    stage = model_of(says).stages["distill"]
    assert stage.remaining(1390.0) == pytest.approx((10_000 - stage.done) / 10)


@pytest.mark.parametrize("width", [80, 120])
def test_the_picture_of_a_search(width: int) -> None:
    lines = picture(SEARCHING, width=width, now=1023.0)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert " ".join(SUMMARY.split()) in " ".join(text.split()), "a summary is folded, not cut"
    assert "> search" in text and "12%  1 of 8 trials" in text
    row = next(line for line in lines if line.startswith("24L 576H 9h 1024m"))
    assert row.split()[4:9][:2] == ["98.0M", "running"]
    assert "4.2500" in row and "3.9000" in row and ("aaaaaaaaaa" in row) == (width == 120)
    assert "last failure 26L 576H 9h 1024m: loss became NaN" in text
    assert lines[-1] == "Ctrl-C stops at the next safe point"
    assert "…" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_picture_of_a_distillation(width: int) -> None:
    lines = picture(SEARCHING + DISTILLING, width=width, now=1120.0)
    assert "> distill    ━━━━━━━━━━━━━━━━━━━━  28%  18,432 of 65,536 tokens" in lines
    assert "             loss 3.7421 · 151 tokens/s · 3:50 to go · checkpoint at 18" in lines
    assert "✓ search     1:30 · best of 2" in lines
    assert not any("candidate" in line or line.startswith("24L") for line in lines), "the trials are history"


def test_baselines_are_shown_beside_the_trials_while_they_run() -> None:
    subject = {"candidate_id": "scratch:aaaaaaaaaa", "shape": "scratch 24L 576H 9h 1024m"}
    training: list[Say] = [
        *DISTILLING[:2],
        (100, "stage_started", {"stage": "baselines", "total": None, "unit": "tokens"}),
        (101, "trial_started", subject),
        (102, "stage_progress", {"stage": "baselines", "done": 64, "total": 256, "note": "scratch 24L"}),
    ]
    text = "\n".join(picture(SEARCHING + training, width=120, now=1103.0))
    assert "scratch 24L 576H 9h 1024m" in text and "64 of 256 tokens" in text and "3.7000" in text
    ended = (*training, (110, "stage_finished", {"stage": "baselines", "summary": "x", "seconds": 9.0}))
    assert "scratch 24L" not in "\n".join(picture([*SEARCHING, *ended], width=120, now=1111.0))


def test_many_trials_leave_room_for_the_rest() -> None:
    says = list(SEARCHING)
    for n in range(40):
        name = {"candidate_id": f"c{n}", "shape": f"shape{n}"}
        says += [(30, "trial_started", name)]
        status = (
            {"status": "failed", "reason": "why"}
            if n % 4 == 0
            else {"status": "completed", "val_loss": 5 - n / 50}
        )
        says += [(31, "trial_finished", name | status)]
    lines = picture(says, width=80, height=24)
    assert len(lines) <= 24 and lines[-1].startswith("Ctrl-C")
    shapes = [line.split()[0] for line in lines if line.startswith(("24L", "shape"))]
    assert shapes[:3] == ["24L", "shape39", "shape38"], "the running one, then the best"
    hidden = 42 - len(shapes)
    assert f"and {hidden} more, 11 failed" in lines


def test_a_note_about_ctrl_c_replaces_the_hint() -> None:
    lines = picture([*SEARCHING, (30, "note", {"text": "stopping; Ctrl-C again aborts"})], width=80)
    assert lines[-1] == "stopping; Ctrl-C again aborts"


def test_the_clock_stands_still_when_the_run_has_ended() -> None:
    ended: list[Say] = [*SEARCHING, (65, "run_finished", {"status": "failed", "seconds": 65.0})]
    lines = picture(ended, width=80, now=5000.0)
    assert lines[0] == "quickstart  20260101t120000-a1b2c3  1:05"
    assert not any("Ctrl-C" in line for line in lines)


def test_heartbeat_lines() -> None:
    stream = io.StringIO()
    heartbeat = Heartbeat(stream)
    for event in events(SEARCHING + DISTILLING):
        heartbeat(event)
    heartbeat(Event(kind="stage_failed", fields={"stage": "distill", "error": "worker 1\ndied"}, at=4721.0))
    heartbeat(Event(kind="run_finished", fields={"status": "failed", "seconds": 3721.0}, at=4721.0))
    assert stream.getvalue().splitlines() == [
        "[0:00:00] run 20260101t120000-a1b2c3 of quickstart in results/q/r",
        f"[0:00:00] prepare: reused, {SUMMARY}",
        "[0:00:01] importance: started, 32 sequences",
        "[0:00:09] importance: finished in 8.0s, scored",
        "[0:00:10] search: started, 8 trials",
        "[0:00:22] trial 26L 576H 9h 1024m: failed: loss became NaN",
        "[0:01:30] trial 24L 576H 9h 1024m: completed at 16,384 tokens, loss 3.7000 (cut 4.2500)",
        "[0:01:40] search: finished in 1:30, best of 2",
        "[0:01:40] distill: started, 65,536 tokens",
        "[1:02:01] distill: failed: worker 1 died",
        "[1:02:01] run failed after 1:02:01",
    ]


def test_heartbeat_tells_progress_every_thirty_seconds() -> None:
    stream = io.StringIO()
    heartbeat = Heartbeat(stream)
    heartbeat(
        Event(kind="stage_started", fields={"stage": "distill", "total": 100, "unit": "tokens"}, at=0.0)
    )
    for at in range(1, 96):
        fields = {"stage": "distill", "done": at, "loss": 4.0, "tokens_per_second": 1.0}
        heartbeat(Event(kind="stage_progress", fields=fields, at=float(at)))
    assert stream.getvalue().splitlines()[1:] == [
        "[0:00:30] distill: 30 of 100 tokens, loss 4.0000, 1 tokens/s, 1:10 to go",
        "[0:01:00] distill: 60 of 100 tokens, loss 4.0000, 1 tokens/s, 40s to go",
        "[0:01:30] distill: 90 of 100 tokens, loss 4.0000, 1 tokens/s, 10s to go",
    ]


def test_heartbeat_says_nothing_of_a_stage_that_has_ended() -> None:
    """A worker's last word may come after the driver's."""
    stream = io.StringIO()
    heartbeat = Heartbeat(stream)
    heartbeat(Event(kind="stage_started", fields={"stage": "teacher", "unit": "sequences"}, at=0.0))
    heartbeat(Event(kind="stage_finished", fields={"stage": "teacher", "seconds": 40.0}, at=40.0))
    late = {"stage": "teacher", "done": 7, "total": 8, "unit": "sequences"}
    heartbeat(Event(kind="stage_progress", fields=late, at=41.0))
    assert [line.split("] ")[1] for line in stream.getvalue().splitlines()] == [
        "teacher: started",
        "teacher: finished in 40s,",
    ]


def slow_trials(seconds: int, names: str) -> list[str]:
    """What is said of trials that make a step of ten tokens a second, one after the other."""
    stream = io.StringIO()
    heartbeat = Heartbeat(stream)

    def tell(kind: str, at: float, **fields: Any) -> None:
        heartbeat(Event(kind=kind, fields=fields, at=at))

    tell("stage_started", 0.0, stage="search", total=8, unit="trials")
    for name in names:
        tell("trial_started", 0.0, candidate_id=name, shape=f"{name}L")
    for at in range(1, seconds):
        name = names[at % len(names)]
        progress = {"tokens": 10 * at, "total_tokens": 9000, "train_loss": 4.0, "tokens_per_second": 10.0}
        tell("trial_progress", float(at), candidate_id=name, **progress)
        if at == 100:
            tell("note", 100.0, text="something else")
    return stream.getvalue().splitlines()[1:]


def test_slow_trials_are_told_of_after_a_minute_of_silence() -> None:
    assert slow_trials(240, "a") == [
        "[0:01:00] search: aL at 600 of 9,000 tokens, loss 4.0000, 10 tokens/s",
        "[0:01:40] something else",
        "[0:02:40] search: aL at 1,600 of 9,000 tokens, loss 4.0000, 10 tokens/s",
        "[0:03:40] search: aL at 2,200 of 9,000 tokens, loss 4.0000, 10 tokens/s",
    ]


def test_many_slow_trials_are_one_line() -> None:
    [line] = slow_trials(61, "abcde")
    assert line.count(" tokens, loss 4.0000") == 3 and line.endswith("; and 2 more")
    assert "bL at 560 of 9,000" in line or "bL at 510 of 9,000" in line


def test_a_trial_that_has_ended_or_stands_still_is_not_at_work() -> None:
    stream = io.StringIO()
    heartbeat = Heartbeat(stream)
    says: list[Say] = [
        (0, "stage_started", {"stage": "search"}),
        (1, "trial_progress", A | {"tokens": 1}),
        (2, "trial_progress", B | {"tokens": 2}),
        (3, "trial_finished", B | {"status": "stopped", "tokens": 2}),
        (70, "trial_progress", A | {"tokens": 7}),
        (140, "trial_progress", {"candidate_id": "c", "tokens": 5}),
    ]
    for event in events(says):
        heartbeat(event)
    assert [line.partition("] ")[2] for line in stream.getvalue().splitlines()[2:]] == [
        "search: aaaaaaaaaa at 7 tokens",
        "search: c at 5 tokens",
    ]


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    heartbeat = Heartbeat(ClosedPipe())
    for event in events(SEARCHING):
        heartbeat(event)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_lines_and_a_terminal_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        with open_view(stream) as view:
            for event in events(SEARCHING):
                view(event)
    assert "[0:00:10] search: started, 8 trials\n" in pipe.getvalue() and "\x1b" not in pipe.getvalue()
    assert "\x1b[?25l" in terminal.getvalue() and "1 of 8 trials" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is back"
    monkeypatch.setenv("TERM", "dumb")
    dumb = Terminal()
    with open_view(dumb) as view:
        view(events(SEARCHING)[0])
    assert dumb.getvalue().startswith("[0:00:00] run")


def test_quiet_says_only_what_matters() -> None:
    stream = io.StringIO()
    with open_view(stream, quiet=True) as view:
        for event in events(
            [*SEARCHING, (40, "stage_failed", {"stage": "search", "error": "no trial worked"})]
        ):
            view(event)
    assert stream.getvalue() == "[0:00:00] search: failed: no trial worked\n"


def test_the_cursor_comes_back_when_the_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with pytest.raises(RuntimeError, match="boom"), open_view(terminal):
        raise RuntimeError("boom")
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")


def test_events_from_many_threads_while_the_screen_is_drawn() -> None:
    view = LiveView(Console(file=io.StringIO(), width=80, height=24, force_terminal=True))
    bus = EventBus(view)
    failures = []

    def work(worker: int) -> None:
        for n in range(100):
            name = f"{worker}-{n}"
            bus.emit("trial_started", candidate_id=name, shape=name, parameters=n)
            bus.emit("trial_finished", candidate_id=name, status="completed", val_loss=float(n), tokens=n)

    def redraw() -> None:
        try:
            while any(thread.is_alive() for thread in threads):
                Console(file=io.StringIO(), width=80).print(view.picture())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    drawer = threading.Thread(target=redraw)
    for thread in (*threads, drawer):
        thread.start()
    for thread in (*threads, drawer):
        thread.join()
    assert failures == []
    console = Console(file=io.StringIO(), width=80)
    console.print(view.picture())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(line.startswith("and ") and " more" in line for line in lines)
