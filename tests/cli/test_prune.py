"""`minitron-ray prune` through the command itself: what it writes, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minitron_ray.cli import main
from minitron_ray.experiment import Experiment
from minitron_ray.importance.scores import Scores
from minitron_ray.models.families import family_of
from minitron_ray.models.kept import Kept
from minitron_ray.results.run import Run
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.model import build
from minitron_ray.weights.surgery import cut

IDS = torch.arange(3, 35).reshape(2, 16)
TO = "layers=3,hidden=36,heads=3,mlp=64"


def prune(teacher: Path, out: Path, *more: str, to: str = TO, importance: str = "random") -> Result:
    """In this process; results beside `out`."""
    command = ["prune", str(teacher), "--to", to, "--importance", importance, "--out", str(out)]
    return CliRunner().invoke(main, [*command, "--results", str(out.parent / "results"), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("importance", ["random", "magnitude"])
def test_the_folder_is_the_cut_in_memory(tiny_llama: Path, tmp_path: Path, importance: str) -> None:
    result = prune(tiny_llama, tmp_path / "out", "--shard-size", "40KB", importance=importance)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "teacher  4L 48H 6h/3 96m  95.7K parameters" in result.stderr
    assert "layers that went: " in result.stderr
    record = json.loads((tmp_path / "out/cut.json").read_text())
    source, kept = Checkpoint(tiny_llama), Kept.from_dict(record["kept"])
    family = family_of(source.config)
    teacher = family.read(source.config)
    student = kept.architecture(teacher)
    assert (student.layers, student.hidden, student.heads, student.kv_heads, student.mlp) == (3, 36, 3, 3, 64)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert stock.num_parameters() == record["student"]["parameters"] == family.parameters(student)
    tensors = cut(load_file(tiny_llama / "model.safetensors"), family, teacher, kept)
    in_memory = build(family.student_config(source.config, student, kept), tensors, dtype="float32")
    assert torch.equal(logits(stock), logits(in_memory))
    text = "the model keeps a head"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(tiny_llama)(
        text
    )


def test_a_cut_to_the_full_shape_is_the_teacher(tiny_llama: Path, tmp_path: Path) -> None:
    assert prune(tiny_llama, tmp_path / "out", to="hidden=48").exit_code == 0
    copy, teacher = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tiny_llama))
    assert copy.keys() == teacher.keys() and all(torch.equal(copy[name], teacher[name]) for name in copy)


def test_json_and_dtype(tiny_llama: Path, tmp_path: Path) -> None:
    result = prune(tiny_llama, tmp_path / "out", "--dtype", "bfloat16", "--json", "-q")
    said = json.loads(result.stdout)
    assert result.stderr == "" and said["folder"] == str(tmp_path / "out")
    assert said["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(said["dropped_layers"]) == 1 and said["student"]["layers"] == 3
    assert Checkpoint(tmp_path / "out").dtype("model.norm.weight") == "bfloat16"
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_seed_decides_and_magnitude_ignores_it(tiny_llama: Path, tmp_path: Path) -> None:
    def kept(name: str, *more: str, importance: str = "random") -> Any:
        assert prune(tiny_llama, tmp_path / name, *more, importance=importance).exit_code == 0
        return json.loads((tmp_path / name / "cut.json").read_text())["kept"]

    assert kept("a", "--seed", "1") == kept("b", "--seed", "1") != kept("c", "--seed", "2")
    assert kept("d", "--seed", "1", importance="magnitude") == kept(
        "e", "--seed", "2", importance="magnitude"
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_magnitude_keeps_the_large(tiny_llama: Path, tmp_path: Path) -> None:
    """Units made tiny on purpose are the ones that go: an oracle that no norm has to be computed for."""
    tensors = load_file(tiny_llama / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.1." in name and "norm" not in name:
            tensor *= 1e-3
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor[10:20] *= 1e-3
        if name.endswith("down_proj.weight"):
            tensor[:, 10:20] *= 1e-3
    teacher = altered(tiny_llama, tmp_path, tensors)
    assert prune(teacher, tmp_path / "out", to="layers=3,mlp=86", importance="magnitude").exit_code == 0
    kept = json.loads((tmp_path / "out/cut.json").read_text())["kept"]
    assert kept["layers"] == [0, 2, 3]
    assert kept["mlp"] == [[*range(10), *range(20, 96)]] * 3


def altered(
    tiny_llama: Path, tmp_path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """A copy of the tiny teacher with other weights or config."""
    folder = shutil.copytree(tiny_llama, tmp_path / "teacher")
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
    return folder


def scored_run(results: Path, teacher: Path | None, scores: Scores) -> Run:
    """A run folder with a table `importance`, as the pipeline leaves it."""
    experiment = Experiment.model_validate(
        {
            "name": "scored",
            "teacher": {"path": "./teacher"},
            "data": {"source": {"kind": "files", "path": "*.txt"}},
            "shape": {"layers": 3},
        }
    )
    resolved = experiment.model_dump(mode="json", by_alias=True)
    run = Run.open(results, "scored", "f" * 64, source=b"", resolved=resolved, environment={"versions": {}})
    section = experiment.importance
    rows = list(scores.rows(section.width.label, section.depth.label))
    run.store.append("importance", rows, writer="importance", sequence=0)
    run.set_status("succeeded", teacher_digest=None if teacher is None else Checkpoint(teacher).digest())
    return run


def some_scores() -> Scores:
    """The last units are the best, layer 2 the worst."""
    return Scores(
        hidden=np.arange(48.0),
        heads=np.tile(np.arange(6.0), (4, 1)),
        mlp=np.tile(np.arange(96.0), (4, 1)),
        layers=np.array([3.0, 2.0, 1.0, 4.0]),
    )


def test_by_the_scores_of_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    run = scored_run(tmp_path / "results", tiny_llama, some_scores())
    for number, name in enumerate((run.run_id, "scored", str(run.folder))):
        result = prune(tiny_llama, tmp_path / f"out{number}", importance=name)
        assert result.exit_code == 0, result.stderr
        record = json.loads((tmp_path / f"out{number}/cut.json").read_text())
        assert record["importance"]["run"] == run.run_id
        assert record["kept"]["layers"] == [0, 1, 3]
        assert record["kept"]["hidden"] == list(range(12, 48))
        assert record["kept"]["heads"] == [[1, 3, 5]] * 3
        assert record["kept"]["mlp"] == [list(range(32, 96))] * 3
    assert "layers that went: 2\n" in result.stderr


def test_a_run_that_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    result = prune(tiny_llama, tmp_path / "out", importance="nobody")
    assert result.exit_code == 4 and "no runs in" in result.stderr
    other = altered(tiny_llama, tmp_path, rms_norm_eps=1e-3)
    run = scored_run(tmp_path / "results", other, some_scores())
    result = prune(tiny_llama, tmp_path / "out", importance=run.run_id)
    assert result.exit_code == 2 and f"run {run.run_id} scored another teacher" in result.stderr
    assert not (tmp_path / "out").exists()


Alter = Callable[[dict[str, torch.Tensor]], object]
NAN, UP = float("nan"), "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("alter", "more", "message"),
    [
        (lambda t: t[UP].fill_(NAN), (), f"{UP} holds nan at"),
        (lambda t: t[UP].fill_(float("inf")), (), f"{UP} holds inf at"),
        (lambda t: t[UP][5].fill_(NAN), ("--importance", "magnitude"), f"the weights of {UP} hold NaN"),
        (
            lambda t: t[UP].fill_(7e4),
            ("--dtype", "float16"),
            f"{UP} reaches 7e+04, which does not fit float16",
        ),
        (lambda t: t.pop(UP), (), f"the weights lack {UP}"),
        (lambda t: t.update(more=torch.ones(1)), (), "unknown tensors more"),
    ],
    ids=["nan", "inf", "nan-magnitude", "overflow", "missing", "extra"],
)
def test_weights_that_are_refused(
    tiny_llama: Path, tmp_path: Path, alter: Alter, more: tuple[str, ...], message: str
) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    alter(tensors)
    teacher = altered(tiny_llama, tmp_path, tensors)
    result = prune(teacher, tmp_path / "out", *more, to="heads=3,mlp=64")
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("to", "more", "message"),
    [
        ("hidden=64", (), "hidden 64 is above the teacher's 48"),
        ("layers=5", (), "layers 5 is above the teacher's 4"),
        ("heads=4", (), "4 heads do not divide into 3 KV groups"),
        ("hiden=24", (), "unknown axis 'hiden'; did you mean 'hidden'?"),
        ("experts=4", (), "llama has no experts to cut"),
        ("hidden=24,hidden=12", (), "hidden is given twice"),
        ("hidden", (), "expected axis=size pairs"),
        ("hidden=-1", (), "hidden must be a whole number of at least 1, found '-1'"),
        ("hidden=40", (), "40 is none of 6; `--as mistral` takes it"),
        ("hidden=36", ("--as", "gpt2"), "a llama can't be written as 'gpt2'"),
        ("hidden=36", ("--shard-size", "big"), "--shard-size: expected a size like 5GB"),
        (
            "heads=3",
            ("--merge-heads", "paper", "--kv-groups", "mean", "--shard-size", "0GB"),
            "must be above 0",
        ),
    ],
)
def test_shapes_that_are_refused(
    tiny_llama: Path, tmp_path: Path, to: str, more: tuple[str, ...], message: str
) -> None:
    result = prune(tiny_llama, tmp_path / "out", *more, to=to)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_an_unknown_family(tiny_llama: Path, tmp_path: Path) -> None:
    result = prune(altered(tiny_llama, tmp_path, model_type="bloom"), tmp_path / "out")
    assert result.exit_code == 2 and "supported are" in result.stderr and "families/bloom.py" in result.stderr


def test_as_another_type(tiny_llama: Path, tmp_path: Path) -> None:
    result = prune(tiny_llama, tmp_path / "out", "--as", "mistral", to="hidden=40")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mistral"
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).isfinite().all()
    whole = prune(tiny_llama, tmp_path / "whole", "--as", "mistral", to="hidden=48")
    assert whole.exit_code == 0
    same = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "whole", tiny_llama)]
    assert torch.equal(*(logits(model) for model in same))


def test_merged_heads(tiny_llama: Path, tmp_path: Path) -> None:
    names = ("none", "mean")
    for rule in names:
        assert prune(tiny_llama, tmp_path / rule, "--merge-heads", rule, to="heads=3").exit_code == 0
    none, mean = (load_file(tmp_path / rule / "model.safetensors") for rule in names)
    kept = json.loads((tmp_path / "mean/cut.json").read_text())["kept"]["heads"][0]
    teacher = load_file(tiny_llama / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].reshape(
        3, 2, 8, 48
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(mean[name].reshape(3, 8, 48), teacher.mean(1), atol=1e-6)
    assert torch.equal(none[name].reshape(3, 8, 48), teacher.reshape(6, 8, 48)[kept])


def test_folders_that_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    teacher, out = altered(tiny_llama, tmp_path), tmp_path / "out"
    before = contents(teacher)
    result = prune(teacher, teacher, "--force")
    assert result.exit_code == 2 and "is the teacher's own folder" in result.stderr
    assert contents(teacher) == before
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    result = prune(teacher, out)
    assert result.exit_code == 2 and "holds notes.txt; --force replaces" in result.stderr
    assert contents(out) == {"notes.txt": b"mine"}
    assert prune(teacher, out, "--force").exit_code == 0
    assert not (out / "notes.txt").exists()
    result = prune(teacher, out, to="layers=2")
    assert result.exit_code == 2 and "--force" in result.stderr
    (out / "sub").mkdir()
    result = prune(teacher, out, "--force", to="layers=2")
    assert result.exit_code == 2 and "holds the folder sub" in result.stderr


def test_a_full_disk_is_noticed_before(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = prune(tiny_llama, tmp_path / "out")
    assert result.exit_code == 2
    assert "the student takes 161.4 KiB on the disk of" in result.stderr
    assert "which has 97.7 KiB free" in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_again_does_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    prune(tiny_llama, tmp_path / "out", "--shard-size", "40KB")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = prune(tiny_llama, tmp_path / "out", "--shard-size", "40KB")
    assert result.exit_code == 0 and "5 files, 5 of them from before" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.fixture(scope="module")
def larger_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 MB of random weights: enough files that one can be stopped between two of them."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    config = LlamaConfig(
        num_hidden_layers=8, hidden_size=512, num_attention_heads=8, intermediate_size=1536, vocab_size=2048
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(larger_llama: Path, tmp_path: Path, stop: signal.Signals) -> None:
    options = ("--shard-size", "1MB")
    assert prune(larger_llama, tmp_path / "whole", *options, to="layers=7,hidden=448,mlp=1280").exit_code == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "minitron_ray", "prune", str(larger_llama), "--importance", "random"]
    command += ["--to", "layers=7,hidden=448,mlp=1280", "--out", str(out), *options]
    command += ["--results", str(tmp_path / "results")]
    # As from a terminal: a shell's background jobs, and all that they start, ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while process.poll() is None and len(list(out.glob("*.safetensors"))) < 5:
        time.sleep(0.001)
    os.kill(process.pid, stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    assert not (out / "cut.json").exists()
    if stop == signal.SIGINT:
        assert "weight files" in stderr and "to go on, run it again: minitron-ray prune" in stderr
        assert not list(out.glob("*.part"))
    recorded = json.loads((out / "cut.partial.json").read_text())["whole"]
    done = {name: (out / name).stat().st_mtime_ns for name in recorded}
    assert len(done) >= 4
    refused = prune(larger_llama, out, *options, to="layers=6,hidden=448,mlp=1280")
    assert refused.exit_code == 2 and "holds an unfinished cut of another kind" in refused.stderr
    result = prune(larger_llama, out, *options, to="layers=7,hidden=448,mlp=1280")
    assert result.exit_code == 0 and f"{len(done)} of them from before" in result.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert contents(out) == contents(tmp_path / "whole")
