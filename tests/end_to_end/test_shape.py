"""Experiments without a search, or without a distillation, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_ray.results.store import Store
from tests.end_to_end.desk import EXPERIMENT, HEAD, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEARCH = EXPERIMENT[: EXPERIMENT.index("distill:")]
SHAPE = "shape: {layers: 3, heads: 3, mlp: 64}\nexport: {dtype: float32}\n"
LAYERS, HEADS, MLP = 3, 3, 64


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> Desk:
    """A finished run of a fixed shape that is not trained."""
    desk = Desk.lay(tmp_path_factory.mktemp("shaped"), tiny_llama, tiny_text)
    (desk.folder / "tiny.yaml").write_text(HEAD + SHAPE)
    desk.run()
    return desk


def cut_by_hand(desk: Desk) -> torch.nn.Module:
    """The student, cut out of the stock teacher by indexing its modules' weights along the scores."""
    from transformers import AutoModelForCausalLM

    scores: dict[tuple[str, int], dict[int, float]] = {}
    for row in desk.rows("importance"):
        scores.setdefault((row["axis"], row["layer"]), {})[row["unit"]] = row["score"]
    layers = {row["unit"]: row["score"] for row in desk.rows("importance") if row["axis"] == "layers"}

    def best(values: dict[int, float], count: int) -> list[int]:
        return sorted(sorted(values, key=lambda unit: -values[unit])[:count])

    teacher = AutoModelForCausalLM.from_pretrained(desk.folder / "model", dtype=torch.float32).eval()
    config = teacher.config
    group, size = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    kept = best(layers, LAYERS)
    model = teacher.model
    model.layers = torch.nn.ModuleList(model.layers[layer] for layer in kept)
    for place, layer in enumerate(kept):
        block, of_heads = model.layers[place], scores["heads", layer]
        block.self_attn.layer_idx = place
        share = HEADS // config.num_key_value_heads
        heads = [
            head
            for first in range(0, config.num_attention_heads, group)
            for head in best({h: of_heads[h] for h in range(first, first + group)}, share)
        ]
        rows = [head * size + i for head in heads for i in range(size)]
        neurons = best(scores["mlp", layer], MLP)
        attention, mlp = block.self_attn, block.mlp
        attention.num_key_value_groups = share
        attention.q_proj.weight.data = attention.q_proj.weight.data[rows]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows]
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[neurons]
        mlp.up_proj.weight.data = mlp.up_proj.weight.data[neurons]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, neurons]
    config.num_hidden_layers = LAYERS
    return teacher


@torch.no_grad()
def losses(model: torch.nn.Module, sequences: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(sequences)
    logits = model(ids, use_cache=False).logits[:, :-1].double()
    return np.asarray(
        [
            torch.nn.functional.cross_entropy(row, labels[1:]).item()
            for row, labels in zip(logits, ids, strict=True)
        ]
    )


def validation(desk: Desk) -> np.ndarray:
    """The sequences after the 8 of calibration."""
    from minitron_ray.data.tokens import TokenStore

    (folder,) = (path.parent for path in desk.results.glob(".cache/tokens/*/DONE.json"))
    return TokenStore(folder).sequences(np.arange(8, 16))


def test_the_export_is_the_cut_that_the_scores_name(shaped: Desk) -> None:
    from transformers import AutoModelForCausalLM

    (row,) = shaped.rows("exports")
    exported = AutoModelForCausalLM.from_pretrained(shaped.run_folder() / row["path"], dtype=torch.float32)
    by_hand, ids = cut_by_hand(shaped), torch.from_numpy(validation(shaped))
    with torch.no_grad():
        found, expected = exported(ids).logits, by_hand(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    card = (shaped.run_folder() / row["path"] / "README.md").read_text()
    assert "not trained since" in card and "(as cut)" in card and "None" not in card
    assert "distillation" not in card


def test_the_cut_and_the_teacher_are_measured_as_stock_models(shaped: Desk) -> None:
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(shaped.folder / "model", dtype=torch.float32).eval()
    (name,) = {row["candidate_id"] for row in shaped.rows("candidates")}
    for subject, phase, model in (("teacher", "teacher", teacher), (name, "cut", cut_by_hand(shaped))):
        rows = sorted(
            (r["sequence"], r["loss"]) for r in shaped.rows("sequence_losses") if r["subject"] == subject
        )
        assert [sequence for sequence, _ in rows] == list(range(8, 16))
        expected = losses(model, validation(shaped))
        np.testing.assert_allclose([loss for _, loss in rows], expected, rtol=1e-5)
        (value,) = (
            r["value"]
            for r in shaped.rows("evaluations")
            if (r["subject"], r["phase"], r["metric"]) == (subject, phase, "val_loss")
        )
        assert value == pytest.approx(expected.mean(), rel=1e-5)
    divergence = {r["subject"]: r for r in shaped.rows("evaluations") if r["metric"] == "val_divergence"}
    assert divergence["teacher"]["value"] == 0.0 and divergence[name]["value"] > 0.01
    assert divergence[name]["stderr"] > 0


def test_nothing_is_told_about_stages_that_the_run_does_not_have(shaped: Desk) -> None:
    names = {path.stem for path in (shaped.run_folder() / "stages").glob("*.json")}
    assert names == {"prepare", "importance", "teacher", "evaluate", "export"}
    assert shaped.rows("trials") == [] and shaped.rows("steps") == []
    out, _ = shaped.call("report")
    assert "as cut" in out and "exported: 3L" in out
    students, costs = out.split("Plan against actual")
    for word in ("search", "budget", "None", "not yet", "distill"):
        assert word not in students and word not in costs
    assert "tokens" not in students, "nothing was trained"
    assert " 5/5 " in shaped.call("runs", COLUMNS="120")[0]


def test_a_distillation_under_another_name_reuses_the_scores(shaped: Desk) -> None:
    path = shaped.folder / "trained.yaml"
    path.write_text((HEAD + SHAPE).replace("name: tiny", "name: trained") + "distill: {tokens: 2048}\n")
    (plan,) = json.loads(shaped.call("plan", "trained.yaml", "--json")[0])
    whole = f"tiny/{shaped.run_folder().name}"
    assert plan["finished"] == {"importance": whole, "teacher": whole}
    _, err = shaped.call("run", "trained.yaml")
    assert "importance: reused" in err and "(from another run)" in err and "(from the cache)" in err
    (folder,) = (path.parent for path in shaped.results.glob("trained/*/run.json"))
    store = Store(folder, "trained", folder.name)
    rows = store.read("evaluations").to_pylist()
    assert {row["phase"]: row["distill_tokens"] for row in rows} == {
        "teacher": 0,
        "cut": 0,
        "distilled": 2048,
    }
    cut = {row["metric"]: row["value"] for row in rows if row["phase"] == "cut"}
    alone = {r["metric"]: r["value"] for r in shaped.rows("evaluations") if r["phase"] == "cut"}
    assert cut == alone
    assert {row["tokens"] for row in store.read("steps").to_pylist()} >= {2048}
    assert len(store.read("exports")) == 1


def test_the_teacher_taken_as_another_model_type(shaped: Desk) -> None:
    path = shaped.folder / "other.yaml"
    path.write_text(
        HEAD.replace("name: tiny", "name: other") + "shape: {hidden: 40}\nexport: {as: mistral}\n"
    )
    _, err = shaped.call("run", "other.yaml")
    assert "importance: reused" in err
    (config,) = shaped.results.glob("other/*/exports/*/config.json")
    written = json.loads(config.read_text())
    assert (written["model_type"], written["hidden_size"]) == ("mistral", 40)
    assert written["architectures"] == ["MistralForCausalLM"]


def test_a_search_alone_ends_with_its_ranking(desk: Desk) -> None:
    (desk.folder / "tiny.yaml").write_text(SEARCH.replace("trials: 7", "trials: 2"))
    out, err = desk.run()
    assert "nothing is exported: trials keep no weights" in out and "Traceback" not in err
    assert "after its trial against" in out and "final" not in out
    assert not list(desk.results.glob("tiny/*/exports/*"))
    best = min((r for r in desk.rows("trials") if r["final"]), key=lambda r: r["val_loss"])["candidate_id"]
    measured = {(r["subject"], r["phase"]) for r in desk.rows("evaluations")}
    assert measured == {("teacher", "teacher"), (best, "cut")}
    assert desk.rows("runs")[-1]["status"] == "succeeded"
    assert "reused" in desk.run()[1]
