"""A teacher that is corrected first: interrupted, resumed, and taken by another experiment."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron_ray.data.tokens import TokenStore
from minitron_ray.results.runs import RunInfo, find_runs
from minitron_ray.weights.checkpoint import Checkpoint
from tests.end_to_end.desk import HEAD, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKENS = 16_384
CORRECTED = (
    HEAD.replace(
        "{path: ./model}",
        f"{{path: ./model, correction: {{tokens: {TOKENS}, learning_rate: 3e-3, checkpoint_every: 1024}}}}",
    )
    + "shape: {layers: 3}\n"
)
OTHER = CORRECTED.replace("name: tiny", "name: other").replace("layers: 3", "mlp: 48")


def stock_loss(folder: Path, store: TokenStore, sequences: range) -> float:
    """Cross entropy as stock transformers computes it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(store.sequences(sequences))
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def losses(info: RunInfo) -> dict[str, float]:
    """Of the teacher, by phase."""
    rows = info.store.read("evaluations").to_pylist()
    return {r["phase"]: r["value"] for r in rows if (r["subject"], r["metric"]) == ("teacher", "val_loss")}


def output(info: RunInfo, stage: str) -> dict[str, str]:
    found: dict[str, str] = json.loads((info.folder / "stages" / f"{stage}.json").read_bytes())["output"]
    return found


def test_a_corrected_teacher_is_made_once_and_never_lost(desk: Desk) -> None:
    (desk.folder / "tiny.yaml").write_text(CORRECTED)
    (desk.folder / "other.yaml").write_text(OTHER)

    def training() -> bool:
        return any(desk.results.glob(".cache/corrected_teachers/*.work/checkpoints/step-*"))

    code, err = desk.stop_when(training, signal.SIGINT)
    assert code == 130 and "to go on, run it again" in err
    [interrupted] = find_runs(desk.results)
    kept = {row["step"] for row in interrupted.store.read("steps").to_pylist()}
    assert kept and max(kept) < TOKENS // (4 * 32) and "correct" not in interrupted.stages_done
    desk.run()
    [info] = find_runs(desk.results)
    steps = sorted((row["step"], row["candidate_id"]) for row in info.store.read("steps").to_pylist())
    assert steps == [(step, "teacher") for step in range(1, TOKENS // (4 * 32) + 1)]  # each of them once
    folder = Path(output(info, "correct")["folder"])
    assert not list(folder.parent.glob("*.work")) and not list(folder.parent.glob("*.partial"))
    [store] = (TokenStore(path.parent) for path in desk.results.glob(".cache/tokens/*/DONE.json"))
    before, after = (stock_loss(path, store, range(8, 16)) for path in (desk.folder / "model", folder))
    assert losses(info) == pytest.approx({"uncorrected": before, "teacher": after}, rel=1e-4)
    assert after < before

    out, _ = desk.call("plan", "other.yaml", "--json")
    assert "correct" in out
    _, err = desk.call("run", "other.yaml")
    other = next(info for info in find_runs(desk.results) if info.experiment == "other")
    assert output(other, "correct") == output(info, "correct") and losses(other) == losses(info)
    assert output(other, "prepare")["teacher_digest"] == Checkpoint(desk.folder / "model").digest()
    finished = [row for row in other.store.read("stages").to_pylist() if row["stage"] == "correct"]
    assert [row["status"] for row in finished] == ["taken_over"]
