"""A mixture from the experiment file to the rows of the table, the plan's line and the report's section."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minitron_ray.core.errors import ConfigError, Interrupted
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.tokenizing import tokenizing
from minitron_ray.experiment import Experiment
from minitron_ray.plan import make_plan
from minitron_ray.report.plan_text import as_json, render
from minitron_ray.report.text_sources import read_sources, sources_section
from minitron_ray.results.cache import Cache
from minitron_ray.results.schemas import TABLES
from minitron_ray.results.store import Store
from minitron_ray.stages.prepare import Prepared, prepare
from tests.data.object_store import served

LENGTH, CALIBRATION, VALIDATION = 16, 6, 10


@pytest.fixture
def prepared(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., tuple[Experiment, Prepared]]:
    """Of a mixture of rows of token 7 (60 % of the weight) and text, where 7 is rare."""
    np.save(tmp_path / "seven.npy", np.full((90, LENGTH), 7))

    def made(*overrides: str, text: str = str(tiny_text)) -> tuple[Experiment, Prepared]:
        (tmp_path / "x.yaml").write_text(
            f"""
name: mixed
teacher: {{path: {tiny_llama}}}
data:
  source:
    kind: mixture
    parts:
      - weight: 3
        source: {{kind: tokens, path: seven.npy}}
      - weight: 2
        source: {{kind: files, path: "{text}"}}
  sequence_length: {LENGTH}
  calibration: {CALIBRATION}
  validation: {VALIDATION}
shape: {{mlp: 64}}
distill: {{tokens: 1024, batch: 4}}
"""
        )
        experiment, _ = load(tmp_path / "x.yaml", Experiment, overrides)
        cache = Cache(tmp_path / "results")
        ready = prepare(experiment, tmp_path, cache, EventBus(), StopSignal(), micro_batch=2)
        return experiment, ready

    return made


def test_the_rows_say_what_is_in_the_splits(prepared: Callable[..., tuple[Experiment, Prepared]]) -> None:
    _, ready = prepared()
    tokens, splits = ready.setting.tokens(), ready.setting.splits
    is_seven = (tokens.sequences(range(len(tokens))) == 7).all(axis=1)
    for row, mine in zip(ready.sources, (is_seven, ~is_seven), strict=True):
        assert set(row) == set(TABLES["sources"].names)
        assert row["sequences"] == mine.sum() and row["tokens"] == mine.sum() * LENGTH
        for split in ("calibration", "validation", "train"):
            assert row[split] == mine[list(getattr(splits, split))].sum(), split
    assert [row["ended"] for row in ready.sources] == [True, False]
    assert [row["validation"] for row in ready.sources] == [6, 4]  # as asked: 60 % and 40 %


def test_more_training_leaves_calibration_and_validation_as_they_are(
    prepared: Callable[..., tuple[Experiment, Prepared]], tiny_text: Path
) -> None:
    held_out = CALIBRATION + VALIDATION
    some = prepared(text=tiny_text.as_uri())[1]  # an address is read as far as needed
    more = prepared("distill.tokens=2048", text=tiny_text.as_uri())[1]
    assert len(some.setting.tokens()) == held_out + 1024 // LENGTH < len(more.setting.tokens())
    for ready in (some, more):
        assert ready.setting.splits.validation == range(CALIBRATION, held_out)
    assert np.array_equal(
        some.setting.tokens().sequences(range(held_out)), more.setting.tokens().sequences(range(held_out))
    )


def test_the_plan_and_the_report_tell_it(
    prepared: Callable[..., tuple[Experiment, Prepared]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    experiment, ready = prepared()
    plan = make_plan(experiment, ready.config)
    planned = as_json(plan)["sources"]
    needed = (CALIBRATION + VALIDATION) * LENGTH + 1024
    assert sum(part["tokens"] for part in planned) == needed
    assert planned[0]["tokens"] == pytest.approx(0.6 * needed, abs=2 * LENGTH)
    render(plan, Console(width=200))
    assert "text        60% seven.npy" in capsys.readouterr().out
    store = Store(tmp_path / "run", "mixed", "0")
    store.append("sources", list(ready.sources), writer="prepare", sequence=0)
    rows = read_sources(store)
    assert rows == ready.sources
    (section,) = sources_section(rows)
    assert section.rows[0][:4] == ("seven.npy", "tokens", "60.0%", "60.0%")
    assert section.notes == ("the text ends where seven.npy had no more: nothing is read twice",)
    assert sources_section(rows[:1]) == ()


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ('[{source: {kind: files, path: "a"}}]', r"data\.source\.parts"),
        (
            '[{source: {kind: mixture, parts: []}}, {source: {kind: files, path: "a"}}]',
            r"data\.source\.parts\[0\]\.source\.kind: .*mixture",
        ),
        (
            '[{weight: 0, source: {kind: files, path: "a"}}, {source: {kind: files, path: "a"}}]',
            r"data\.source\.parts\[0\]\.weight",
        ),
        (
            '[{source: {kind: files, path: "ftp://x/y"}}, {source: {kind: files, path: "a"}}]',
            r"data\.source\.parts\[0\]\.source\.path: .*begins with ftp://",
        ),
    ],
)
def test_mistakes_in_a_mixture_are_placed(tmp_path: Path, parts: str, problem: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\nteacher: {path: ./model}\nshape: {mlp: 8}\n"
        f"data:\n  source:\n    kind: mixture\n    parts: {parts}\n"
    )
    with pytest.raises(ConfigError, match=problem):
        load(path, Experiment)


def test_a_stop_while_text_is_packed(
    prepared: Callable[..., tuple[Experiment, Prepared]], tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    experiment, _ = prepared("data.sequence_length=16")
    stop = StopSignal()
    stop.request()
    with pytest.raises(Interrupted):
        prepare(experiment, tmp_path, Cache(tmp_path / "fresh"), EventBus(), stop, micro_batch=2)


def test_who_tokenises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The setting, or what there is; nothing is started before it is needed."""
    for cpus, address, tokenizers, tasks in (
        (4, None, None, True),
        (4, None, 1, False),
        (1, None, None, False),
        (1, "127.0.0.1:6379", None, True),
        (1, "127.0.0.1:6379", 1, False),
    ):
        monkeypatch.setattr("os.cpu_count", lambda cpus=cpus: cpus)
        settings = ClusterSettings(address=address, tokenizers=tokenizers)
        with tokenizing(settings, tmp_path, EventBus(), StopSignal()) as spread:
            assert (spread is not None) == tasks
            # Of the other nodes only the results folder is asked for, not a temporary one of this machine.
            assert spread is None or (spread.shared == (tmp_path,) and spread.folder != tmp_path)


def test_a_bucket_in_a_mixture(
    prepared: Callable[..., tuple[Experiment, Prepared]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "store" / "texts").mkdir(parents=True)
    rows = (json.dumps({"body": f"row {n} of the bucket"}) for n in range(500))
    (tmp_path / "store" / "texts" / "a.jsonl").write_text("\n".join(rows))
    with served(tmp_path / "store") as bucket:
        address = f"s3://texts/*.jsonl?{bucket.options}"
        _, ready = prepared("data.source.parts.1.source.column=body", text=address)
    assert ready.sources[1]["title"] == "s3://texts/*.jsonl" and ready.sources[1]["tokens"] > 0
