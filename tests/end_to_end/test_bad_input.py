"""Input that cannot work: one clear line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from minitron_ray.cli import main
from tests.end_to_end.desk import HEAD, Desk


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


def set_tensors(desk: Desk, **changed: torch.Tensor | None) -> None:
    """Of the model's file; None takes one out."""
    path = desk.folder / "model" / "model.safetensors"
    tensors = {**load_file(path), **changed}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"}
    )


def break_weight(name: str, value: float) -> Callable[[Desk], None]:
    """Puts one value that is no number into a tensor; of the LM head as one that is not tied."""

    def at(desk: Desk) -> None:
        tensors = load_file(desk.folder / "model" / "model.safetensors")
        head = tensors["model.embed_tokens.weight"].clone()
        tensor = tensors.get(name, head)
        tensor[-1] = value
        set_tensors(desk, **{"lm_head.weight": head, name: tensor})
        set_config(desk, tie_word_embeddings=False)

    return at


def fix_shape(**sizes: int) -> Callable[[Desk], None]:
    """An experiment of one shape."""

    def at(desk: Desk) -> None:
        (desk.folder / "tiny.yaml").write_text(f"{HEAD}shape: {json.dumps(sizes)}\n")

    return at


CASES: dict[str, tuple[Callable[[Desk], None], tuple[str, ...], str]] = {
    "family": (
        lambda d: set_config(d, model_type="mamba"),
        (),
        "model_type 'mamba' is not supported; supported are gemma2, ",
    ),
    "attribute": (lambda d: set_config(d, logit_scale=3.0), (), "logit_scale"),
    "budget": (lambda d: None, ("--set", "budget.parameters=1k"), "the space reaches"),
    "text": (cut_text, (), "the text gives 0 sequences of 32 tokens, 20 are needed"),
    "weights": (drop_weights, (), "model"),
    "truncated": (truncate, (), "model.safetensors"),
    "sha256": (lambda d: None, ("--set", f"teacher.sha256={'0' * 64}"), "sha256"),
    "key": (lambda d: None, ("--set", "distill.tokns=1k"), "did you mean 'tokens'"),
    "nan in embedding": (
        break_weight("model.embed_tokens.weight", math.nan),
        (),
        "model.safetensors: model.embed_tokens.weight holds nan at [255, 0]",
    ),
    "nan in head": (break_weight("lm_head.weight", math.nan), (), "lm_head.weight holds nan at [255, 0]"),
    "nan in final norm": (
        break_weight("model.norm.weight", math.nan),
        (),
        "model.norm.weight holds nan at [47]",
    ),
    "infinity": (
        break_weight("model.layers.1.mlp.up_proj.weight", -math.inf),
        (),
        "model.layers.1.mlp.up_proj.weight holds -inf at [95, 0]",
    ),
    "missing": (
        lambda d: set_tensors(d, **{"model.layers.3.mlp.up_proj.weight": None}),
        (),
        "the weights lack model.layers.3.mlp.up_proj.weight, which llama has",
    ),
    "extra": (
        lambda d: set_tensors(d, **{"model.layers.3.mlp.gate.weight": torch.ones(2)}),
        (),
        "unknown tensors model.layers.3.mlp.gate.weight, which llama does not have",
    ),
    "shape": (
        fix_shape(mlp=97),
        (),
        "shape.mlp: 97 is larger than the teacher's 96; a cut only makes smaller",
    ),
    "groups": (fix_shape(heads=4), (), "4 heads do not divide into 3 KV groups; change the sizes"),
    "keep": (lambda d: None, ("--set", "search.keep=9"), "9 students cannot be kept"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(desk: Desk, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """In this process, which has loaded a tensor library once for all cases."""
    spoil, arguments, message = CASES[case]
    spoil(desk)
    monkeypatch.chdir(desk.folder)
    done = CliRunner().invoke(main, ["run", "tiny.yaml", *arguments])
    assert done.exit_code == 2, done.output
    err = done.stderr
    assert message in err and "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith(("error:", "tiny.yaml:", "--set"))]
    assert len(errors) == 1, err
    assert not list(desk.results.glob("tiny/*")) and not list(desk.results.rglob("*.partial"))


def test_so_it_is_in_a_process_of_its_own(desk: Desk) -> None:
    set_config(desk, model_type="mamba")
    _, err = desk.call("run", "tiny.yaml", expect=2)
    assert err.count("is not supported; supported are") == 1 and "Traceback" not in err


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
