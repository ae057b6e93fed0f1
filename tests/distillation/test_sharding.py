"""A student in shards, on two real processes under gloo: the same student, never whole but for a layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minitron_ray.distillation.sharding import Sharding
from minitron_ray.models.families import family_of
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless, final_hidden
from minitron_ray.weights.model import build, initialized
from minitron_ray.weights.surgery import CutTensors
from tests.processes import begin_group
from tests.watched import Watched

CPU = torch.device("cpu")
IDS = torch.arange(24)[None] % 11


def by_layer(folder: Path, sharding: Sharding) -> Headless:
    """All of the model of a folder as it is cut, each layer in shards before the next is."""
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    arch = family.read(checkpoint.config)
    cut = CutTensors(checkpoint, family, arch, Kept.whole(arch), dtype="float32")
    weights, done = Watched(cut, family.rows(arch)), list[torch.nn.Module]()

    def each_layer(layer: torch.nn.Module) -> None:
        layers = {name.split(".")[2] for name in weights.alive if "layers." in name}
        assert layers == {str(len(done))}, layers
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(isinstance(one, DTensor) for before in done for one in before.parameters())
        sharding.layer(layer)
        done.append(layer)

    built = build(checkpoint.config, weights, trainable=True, each_layer=each_layer)
    assert done == list(built.model.layers) and len(done) == 4
    student = Headless(built)
    sharding.rest(student)
    assert weights.most == 1 and not weights.alive
    return student


def random(folder: Path, sharding: Sharding) -> Headless:
    """A random model, in shards once it is there."""
    student = Headless(initialized(Checkpoint(folder).config, seed=7))
    sharding.whole(student, student.model.model.layers)
    return student


def run(student: Headless) -> torch.Tensor:
    """The final hidden states, after a backward pass."""
    hidden = student(IDS, final_hidden)
    hidden.square().mean().backward()
    return hidden.detach()


def _rank(rank: int, world: int, folder: Path, out: Path) -> None:
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for make in (by_layer, random):
        student = make(folder, Sharding(world, CPU))
        assert isinstance(student, FSDPModule) and student.training
        hidden, found = run(student), {}
        for name, parameter in student.named_parameters():
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
            assert parameter.to_local().numel() < parameter.numel()
            found[name] = (parameter.full_tensor().detach(), parameter.grad.full_tensor())
        if rank == 0:
            torch.save({"parameters": found, "hidden": hidden}, out / f"{make.__name__}.pt")
    torch.distributed.destroy_process_group()


def test_shards_make_up_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    begin_group(_rank, 2, tiny_llama, tmp_path)
    checkpoint = Checkpoint(tiny_llama)
    plain = {
        "by_layer": build(checkpoint.config, checkpoint, trainable=True),
        "random": initialized(checkpoint.config, seed=7),
    }
    for how, model in plain.items():
        found, one = torch.load(tmp_path / f"{how}.pt"), Headless(model)
        hidden, parameters = run(one), dict(one.named_parameters())
        torch.testing.assert_close(found["hidden"], hidden)
        assert set(found["parameters"]) == set(parameters)
        for name, (weight, gradient) in found["parameters"].items():
            assert torch.equal(weight, parameters[name]), name
            torch.testing.assert_close(gradient, parameters[name].grad, msg=name)
