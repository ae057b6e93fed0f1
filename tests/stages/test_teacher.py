"""The stage `teacher`: what is stored is a function of the experiment, and another one adds to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.distillation.engine import Engine
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.signals.sampled import Sampled
from minitron_ray.distillation.signals.top_k import TopK
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.distillation.teacher import StoredTeacher, write_signal
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings, Resources
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.train_group import Worker
from minitron_ray.experiment import Experiment
from minitron_ray.results.cache import Cache
from minitron_ray.stages.prepare import prepare
from minitron_ray.stages.reuse import outputs_exist
from minitron_ray.stages.teacher import (
    KIND,
    LISTS,
    Hand,
    Library,
    check_room,
    compute,
    compute_in_group,
    dealt,
)
from minitron_ray.stages.trial import retrain
from tests.processes import begin_group

Open = Callable[..., Library]
CROSS_ENTROPY = "search.retrain.loss.kind=cross_entropy"


@pytest.fixture
def library(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> Open:
    """`library(results, *overrides)`: of a small experiment, on a results folder of that name."""
    (tmp_path / "x.yaml").write_text(
        f"""
name: tiny
teacher: {{path: {tiny_llama}}}
data:
  source: {{kind: files, path: "{os.path.relpath(tiny_text, tmp_path)}/**/*.txt"}}
  sequence_length: 16
  calibration: 4
  validation: 5
budget: {{parameters: 75k, tolerance: 30%}}
search:
  space: {{layers: 3..4, mlp: [64, 96]}}
  retrain: {{tokens: 6400, batch: 4}}
"""
    )

    def made(results: str, *overrides: str) -> Library:
        experiment, _ = load(tmp_path / "x.yaml", Experiment, overrides)
        cache = Cache(tmp_path / results)
        ready = prepare(experiment, tmp_path, cache, EventBus(), StopSignal(), micro_batch=3)
        return Library(setting=ready.setting, inputs=ready.inputs, cache=cache)

    return made


def files(cache: Cache) -> dict[str, bytes]:
    """All bytes of all blocks, by block and file; when they were made apart."""
    return {
        str(path.relative_to(cache.folder)): path.read_bytes()
        for path in sorted((cache.folder / KIND).rglob("*"))
        if path.is_file() and path.name not in ("DONE.json",) and path.suffix != ".lock"
    }


def fill(library: Library, workers: int) -> list[int]:
    """As the stage does, by workers one after the other; returns how many sequences each did."""
    blocks = library.blocks(library.setting.experiment.searched.signal)
    missing = library.missing(blocks)
    hands, total = dealt(missing, workers), sum(len(block.sequences) for block in missing)
    done = []
    for hand in hands:
        told: list[int] = []
        compute(hand, library, total, lambda kind, told=told, **fields: told.append(fields["done"]))
        done.append(told[-1])
        assert told == sorted(told)
    assert not library.missing(blocks)
    return done


@pytest.mark.parametrize("kind", ["final_hidden", "sampled", "top_k"])
def test_one_worker_and_two_store_identical_bytes(kind: str, library: Open) -> None:
    alone, pair = (library(name, f"search.signal.kind={kind}") for name in ("alone", "pair"))
    [whole] = fill(alone, 1)
    first, second = fill(pair, 2)
    assert first + second == whole == 5 + 400 and abs(first - second) < 0.3 * whole
    assert files(alone.cache) == files(pair.cache) and len(files(alone.cache)) >= 4


@pytest.mark.ray
def test_a_group_of_ray_workers_stores_the_same(library: Open, tmp_path: Path) -> None:
    alone, group = (library(name, "search.signal.kind=sampled") for name in ("alone", "group"))
    fill(alone, 1)
    settings = ClusterSettings(workers=2, worker=Resources(cpus=1))
    with Cluster(settings, tmp_path / "run", EventBus(), StopSignal()) as cluster:
        missing = group.missing(group.blocks(Sampled()))
        cluster.map(compute, dealt(missing, cluster.mappers()), group, 405)
    assert files(alone.cache) == files(group.cache)


@pytest.mark.parametrize(("kind", "slack"), [("final_hidden", 0.0), ("top_k", 0.15)])
def test_a_signal_that_does_not_fit_the_disk_is_refused_before_anything_is_computed(
    kind: str, slack: float, library: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the bytes that are then stored, of a sparse kind about them: what is there already needs no room."""
    stored = library("measured", f"search.signal.kind={kind}")
    fill(stored, 1)
    size = sum(len(data) for name, data in files(stored.cache).items() if name.endswith(".bin"))
    room = SimpleNamespace(free=round(size * (1 + slack)))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room)
    made = library("results", f"search.signal.kind={kind}")
    check_room(made)
    room.free = round(size * (1 - slack)) - 1
    with pytest.raises(
        EnvironmentFailure, match=r"takes .* more, and .* are free there; set search.signal to"
    ):
        check_room(made)
    room.free = 0
    check_room(stored)
    check_room(library("online", "search.signal={kind: online}"))


def _rank(rank: int, world: int, library: Library, out: Path) -> None:
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    device, told = torch.device("cpu"), list[int]()
    setting = library.setting
    teacher = setting.online_teacher(setting.share(rank, world, device)).model
    halved = [one for one in teacher.model.base_model.layers.parameters() if isinstance(one, DTensor)]
    assert halved and len(halved) == len(list(teacher.model.base_model.layers.parameters()))
    for one in halved:
        assert one.to_local().numel() * world == one.numel()
    worker = Worker(
        rank=rank,
        world=world,
        device=device,
        report=lambda kind, **fields: told.append(fields["done"]),
        stop_requested=lambda: False,
    )
    blocks = library.blocks(setting.experiment.searched.signal)
    compute_in_group(Hand(blocks=blocks, library=library, total=405), worker)
    assert told == sorted(told) and told[-1] == 405
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["final_hidden", "sampled", "top_k"])
def test_two_ranks_that_share_the_teacher_store_identical_bytes(
    kind: str, library: Open, tmp_path: Path
) -> None:
    """Of a block that another process has made they make nothing; blocks of one batch and of an odd number."""
    alone, shared = (library(name, f"search.signal.kind={kind}") for name in ("alone", "shared"))
    fill(alone, 1)
    blocks = shared.blocks(shared.setting.experiment.searched.signal)
    compute(blocks[1:2], shared, 405, lambda kind, **fields: None)
    made = (blocks[1].folder / "DONE.json").stat().st_mtime_ns
    setting = replace(shared.setting, engine=Engine(teacher="sharded"))
    begin_group(_rank, 2, replace(shared, setting=setting), tmp_path)
    assert len({-(-len(block.sequences) // 3) % 2 for block in blocks}) == 2
    assert not shared.missing(blocks) and (blocks[1].folder / "DONE.json").stat().st_mtime_ns == made
    assert files(alone.cache) == files(shared.cache)


def test_another_budget_adds_to_what_is_there(library: Open) -> None:
    short = library("results", "search.signal.kind=final_hidden", "search.retrain.tokens=1600")
    assert sum(fill(short, 1)) == 5 + 100
    before = files(short.cache)
    longer = library("results", "search.signal.kind=final_hidden", "search.retrain.batch=8")
    assert sum(fill(longer, 2)) == 400 - 100  # only what is new
    after = files(longer.cache)
    assert {name: after[name] for name in before} == before
    shorter = library("results", "search.signal.kind=final_hidden", "search.retrain.tokens=3200")
    assert fill(shorter, 2) == []


def test_another_kind_shares_the_exact_states_of_validation(library: Open) -> None:
    fill(library("results", "search.signal.kind=final_hidden"), 1)
    other = library("results", "search.signal.kind=sampled")
    assert sum(fill(other, 1)) == 400
    reseeded = library("results", "search.signal.kind=sampled", "seed=1")
    assert sum(fill(reseeded, 1)) == 400  # other sequences come first, and draws are others


def test_blocks_are_named_by_the_type_that_is_computed_in(library: Open) -> None:
    """`auto` is one type here and another there, and one results folder may serve both."""
    found = {
        name: library("results", f"precision={name}").blocks(FinalHidden())
        for name in ("float32", "bfloat16", "auto")
    }
    folders = {name: {block.folder for block in blocks} for name, blocks in found.items()}
    assert not folders["float32"] & folders["bfloat16"]
    assert folders["auto"] in (folders["float32"], folders["bfloat16"])


def test_trials_of_labels_alone_store_nothing_to_learn_from(library: Open, tmp_path: Path) -> None:
    named = "search.signal.kind=final_hidden"
    made = library("results", CROSS_ENTROPY, named)
    assert fill(made, 1) == [5]
    (tmp_path / "list").mkdir()
    write_signal(tmp_path / "list", made.blocks(FinalHidden()))
    setting, share = made.setting, made.setting.share()
    student = setting.teacher(share).float().train().requires_grad_()
    found = retrain(
        setting, student, setting.stored_teacher(tmp_path / "list", share), share, on_rung=lambda rung: None
    )
    assert found[-1].final and found[0].val_divergence is not None and abs(found[0].val_divergence) < 0.01
    both = "search.retrain.loss={kind: mixture}"
    assert sum(fill(library("results", both, named), 1)) == 400  # a sum that has a teacher in it needs it


def test_a_lost_block_is_missed_and_made_again(library: Open, tmp_path: Path) -> None:
    made = library("results", "search.signal.kind=sampled")
    fill(made, 1)
    blocks, before = made.blocks(Sampled()), files(made.cache)
    listed = made.cache.ensure(LISTS, "list", {}, lambda folder: write_signal(folder, blocks))
    output = {"folder": str(listed.resolve()), "signal": Sampled().identity}
    assert outputs_exist(tmp_path, output) and outputs_exist(tmp_path, {"folder": None})
    shutil.rmtree(blocks[1].folder)
    assert not outputs_exist(tmp_path, output)
    assert fill(made, 1) == [len(blocks[1].sequences)]
    assert outputs_exist(tmp_path, output) and files(made.cache) == before
    (blocks[2].folder / "DONE.json").unlink()
    assert not outputs_exist(tmp_path, output)
    shutil.rmtree(listed)
    assert not outputs_exist(tmp_path, output)


def test_trials_find_every_sequence_that_they_train_on(library: Open, tmp_path: Path) -> None:
    """Over more than one epoch, against the running teacher."""
    overrides = ("search.signal={kind: top_k, k: 256}", "search.retrain.tokens=100k")
    made = library("results", *overrides, "data.sequence_length=128")
    fill(made, 1)
    setting, blocks = made.setting, made.blocks(TopK(k=256))
    assert sum(len(block.sequences) for block in blocks) == 5 + len(setting.splits.train)
    (tmp_path / "list").mkdir()
    write_signal(tmp_path / "list", blocks)
    share = setting.share()
    stored, online = setting.stored_teacher(tmp_path / "list", share), setting.online_teacher(share)
    assert isinstance(stored, StoredTeacher)
    last = len(setting.splits.train) // 4
    for step in (1, last, last + 1, last + 20):
        numbers = setting.training_indices(step, 4)
        ids = torch.from_numpy(setting.tokens().sequences(numbers))
        found, hidden = stored.targets(numbers.tolist(), ids), online.hidden(numbers.tolist(), ids)
        assert isinstance(found, SparseTargets)
        p = (hidden.float() @ online.head.float().T).softmax(-1)[:, :-1]
        dense = torch.zeros_like(p).scatter_(-1, found.ids, found.probabilities)
        # bfloat16, where the machine computes in it, by batches of another size
        torch.testing.assert_close(dense, p, atol=2e-3, rtol=2e-2)
    numbers = np.asarray(setting.splits.validation)
    ids = torch.from_numpy(setting.tokens().sequences(numbers))
    exact = stored.hidden(numbers.tolist(), ids)
    torch.testing.assert_close(exact, online.hidden(numbers.tolist(), ids), atol=0.05, rtol=0.02)


def test_a_worker_that_is_called_again_keeps_what_it_had_finished(library: Open) -> None:
    made = library("results", "search.signal.kind=final_hidden")
    blocks = made.missing(made.blocks(FinalHidden()))
    seen: list[int] = []

    class Killed(Exception):
        pass

    def report(kind: str, **fields: int) -> None:
        seen.append(fields["done"])
        if fields["done"] > 300:
            raise Killed

    with pytest.raises(Killed):
        compute(blocks, made, 405, report)
    left = sum(len(block.sequences) for block in made.missing(blocks))
    assert 0 < left < 405 and not list((made.cache.folder / KIND).glob("*.partial"))
    times = {path: path.stat().st_mtime_ns for path in (made.cache.folder / KIND).glob("*/DONE.json")}
    compute(blocks, made, 405, lambda kind, **fields: None)
    assert not made.missing(blocks) and all(path.stat().st_mtime_ns == t for path, t in times.items())


def test_a_loss_that_cannot_take_the_signal_is_refused_when_the_file_is_read(library: Open) -> None:
    with pytest.raises(
        ConfigError, match=r"search\.signal: sampled keeps a few .* the loss jsd compares whole"
    ):
        library("results", "search.signal.kind=sampled", "search.retrain.loss.kind=jsd")
    with pytest.raises(ConfigError, match=r"search\.signal: top_k keeps .* forward_kl has temperature 2"):
        library(
            "results", "search.signal.kind=top_k", "search.retrain.loss={kind: forward_kl, temperature: 2}"
        )
    library("results", "search.signal.kind=final_hidden", "search.retrain.loss.kind=jsd")
