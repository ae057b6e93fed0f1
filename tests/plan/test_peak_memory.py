"""Memory by arithmetic, against the bytes that are alive at most while a real student learns."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minitron_ray.distillation.engine import Engine
from minitron_ray.distillation.loop import Data, Recipe, Share, make_optimizer, train
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sharding import FrozenSharding, Sharding, prepare_layer
from minitron_ray.distillation.state_loss import Intermediate, Pair
from minitron_ray.distillation.teacher import OnlineTeacher
from minitron_ray.models.cost import activation_bytes
from minitron_ray.models.families import family_of
from minitron_ray.plan import Layout, Memory
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import initialized, skeleton
from tests.processes import begin_group

CPU = torch.device("cpu")
VOCABULARY, HIDDEN, LIFTED, LAYERS, SEQUENCES = 1024, 96, 160, 6, 2
ABOVE: Final = 1.55
"""The plan is an upper bound, and no more than so many times what was measured. Furthest off are shards in
bfloat16 (1.504), whose layers keep less than those of one process do."""


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operators have seen, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._now = self.most = 0

    def see(self, found: Any) -> None:
        if not isinstance(found, torch.Tensor) or found.is_meta:
            return
        storage = (found.to_local() if isinstance(found, DTensor) else found).untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
        self._note(key, weakref.ref(storage), storage.nbytes())

    def _note(self, key: int, storage: weakref.ref[Any], size: int) -> None:
        before = self._sizes.get(key, (storage, 0))[1]
        self._sizes[key] = (storage, size)
        self._now += size - before

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)[1]

    def count(self) -> None:
        """Weights that were gathered are emptied without an operator: before a record counts, all are looked at."""
        if self._now <= self.most:
            return
        for key, (known, _) in list(self._sizes.items()):
            if (storage := known()) is not None:
                self._note(key, known, storage.nbytes())
        self.most = max(self.most, self._now)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for found in tree_iter((args, kwargs, result)):
            self.see(found)
        self.count()
        return result


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a student learns. Sequences are long, so that what is kept of layers counts, or short."""

    workers: int | None = None
    bfloat16: bool = False
    recompute: bool = False
    passes: int = 1
    pairs: int = 0
    teacher_sharded: bool = False
    length: int = 256

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bfloat16 else torch.float32


def config(hidden: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }


def planned(case: Case) -> int:
    """What the plan says, without the logits, of which it knows no fewer than a large chunk."""
    family = family_of(config(HIDDEN))
    student, teacher = (family.read(config(hidden)) for hidden in (HIDDEN, LIFTED))
    layout = Layout(
        micro_batch=SEQUENCES,
        recompute=case.recompute,
        teacher="sharded" if case.teacher_sharded else "whole",
    )
    precision = "bfloat16" if case.bfloat16 else "float32"
    memory = Memory(family=family, length=case.length, precision=precision, layout=layout)  # type: ignore[arg-type]
    size = memory.training(
        student,
        case.workers,
        case.passes,
        lifted=LIFTED if case.pairs else None,
        pairs=case.pairs,
        compared=LIFTED,
    )
    return size + memory.teaching(teacher, case.workers, student) - memory.logits


def measured(case: Case, rank: int = 0) -> dict[str, int]:
    """The most bytes alive in the second of two steps, logits aside, and those of the student's state behind it."""
    world = case.workers or 1
    model, engine = initialized(config(HIDDEN), seed=1), Engine(recompute=case.recompute)
    student = Headless(model)
    if case.pairs:
        student.lift(torch.ones(LIFTED, HIDDEN))
    if case.workers is None:
        for layer in model.model.layers:
            prepare_layer(layer, engine)
    else:
        Sharding(world, CPU, case.dtype, engine).whole(student, model.model.layers)
    teacher = Headless(initialized(config(LIFTED), seed=2).to(case.dtype).requires_grad_(False))
    if case.teacher_sharded:
        sharding, head = FrozenSharding(world, CPU), teacher.head
        for layer in teacher.model.model.layers:
            sharding.layer(layer)
        assert isinstance(head, torch.nn.Parameter)
        sharding.rest(teacher, head)
    pairs = [
        Pair(teacher=path, student=path, distance="cosine")
        for path in ("model.norm", "model.layers.2.input_layernorm")[: case.pairs]
    ]
    batch = SEQUENCES * world * case.passes
    recipe = Recipe(
        loss=ForwardKL(),
        schedule=Schedule(peak=1e-3, minimum=0.0, warmup=0.0, tokens=2 * batch * case.length),
        batch=batch,
        sequence_length=case.length,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
        intermediate=Intermediate(pairs=tuple(pairs), weight=None) if pairs else None,
    )
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (batch, case.length))
    data = Data(batch=lambda step: np.arange(batch), sequences=lambda indices: tokens[indices])
    share = Share(rank=rank, world=world, device=CPU, dtype=case.dtype, micro_batch=SEQUENCES)
    optimizer, alive = make_optimizer(student, recipe), Alive()
    with alive:
        for parameter in [*student.parameters(), *teacher.parameters()]:
            alive.see(parameter.detach())
        for step in train(student, optimizer, OnlineTeacher(teacher), data, recipe, share):
            if step.step == 1:
                alive.most = 0
    logits = 2 * SEQUENCES * (case.length - 1) * VOCABULARY * 4
    state = [*student.parameters(), *(x for s in optimizer.state.values() for x in s.values())]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in state]
    return {"most": alive.most - logits, "state": sum(x.nbytes for x in local)}


ALONE = {
    "float32": Case(),
    "bfloat16": Case(bfloat16=True),
    "recomputed": Case(recompute=True),
    "states": Case(pairs=2),
    "states in bfloat16": Case(pairs=2, bfloat16=True),
}
TOGETHER = {
    "several passes": Case(workers=2, length=16, passes=2),
    "all of it": Case(workers=2, teacher_sharded=True, recompute=True, pairs=2, bfloat16=True),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_one_process_takes(name: str) -> None:
    found = measured(ALONE[name])["most"]
    assert found < planned(ALONE[name]) < ABOVE * found


def _rank(rank: int, world: int, out: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {name: measured(case, rank) for name, case in TOGETHER.items()}
    if rank == 0:
        (out / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_a_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Of rank 0 of two real processes under gloo."""
    out = tmp_path_factory.mktemp("ranks")
    begin_group(_rank, 2, out)
    found: dict[str, dict[str, int]] = json.loads((out / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", TOGETHER)
def test_what_each_of_two_workers_takes(of_a_rank: dict[str, dict[str, int]], name: str) -> None:
    found, case = of_a_rank[name], TOGETHER[name]
    assert found["most"] < planned(case) < ABOVE * found["most"]
    # Weights and moments in float32, half of them here; a projection is learnt like all others.
    learnt = sum(one.numel() for one in skeleton(config(HIDDEN)).parameters())
    learnt += LIFTED * HIDDEN if case.pairs else 0
    assert found["state"] == pytest.approx(12 * learnt / 2, rel=0.01)


@pytest.mark.parametrize(
    ("layout", "copies"),
    [(Layout(), 1), (Layout(asynchronous=False), 0), (Layout(accelerator=True), 0)],
)
def test_a_checkpoint_that_is_written_meanwhile_is_a_copy_of_the_state(
    of_a_rank: dict[str, dict[str, int]], layout: Layout, copies: int
) -> None:
    """In the machine's memory, which is a CPU's own."""
    family = family_of(config(HIDDEN))
    memory = Memory(family=family, length=1, precision="float32", layout=layout)
    found = memory.checkpoint(family.read(config(HIDDEN)), 2)
    assert found == pytest.approx(copies * of_a_rank["several passes"]["state"], rel=0.01)


@pytest.mark.parametrize("teacher", ["auto", "sharded"])
def test_a_sharded_teacher_is_less_on_each_of_more_workers(teacher: Literal["auto", "sharded"]) -> None:
    """On an accelerator: an eighth of it, its embeddings, two layers, and its final states twice. `auto` shards
    what takes more than a tenth of the free memory, which of a device of unknown size nobody knows."""
    family = family_of(config(HIDDEN))
    student, whole = (family.read(config(hidden)) for hidden in (HIDDEN, LIFTED))
    model = skeleton(config(LIFTED))
    count = sum(one.numel() for one in model.parameters())
    layer = sum(one.numel() for one in model.model.layers[0].parameters())
    outside = 2 * VOCABULARY * LIFTED

    def bytes_of(memory: int | None, workers: int | None) -> int:
        layout = Layout(micro_batch=1, accelerator=True, teacher=teacher, memory=memory)
        return Memory(family=family, length=1, precision="bfloat16", layout=layout).teaching(
            whole, workers, student
        )

    states = 2 * 2 * LIFTED
    small, large = 8 * count, 2**36
    assert bytes_of(small, 8) == pytest.approx(2 * (count / 8 + outside + 2 * layer) + states, rel=0.001)
    assert bytes_of(small, 1) == bytes_of(small, None) == 2 * count + states
    for memory in (large, None):
        assert (bytes_of(memory, 8) == 2 * count + states) == (teacher == "auto")


def test_on_an_accelerator_a_layer_at_a_time_is_whole() -> None:
    """With workers without end what is left of a student are the parts that come back for a pass."""
    arch = family_of(config(HIDDEN)).read(config(HIDDEN))
    model = skeleton(config(HIDDEN))
    layer = sum(one.numel() for one in model.model.layers[0].parameters())

    def left(passes: int) -> int:
        layout = Layout(micro_batch=1, accelerator=True)
        memory = Memory(family=family_of(config(HIDDEN)), length=1, precision="bfloat16", layout=layout)
        return memory.training(arch, 10**9, passes) - memory.logits

    assert left(1) == left(4), "gradients are shared out after every pass"
    kept = activation_bytes(arch, "bfloat16") + 20 * HIDDEN + 4 * VOCABULARY * HIDDEN
    assert left(1) == pytest.approx(2 * (2 * VOCABULARY * HIDDEN + 2 * layer) + kept, rel=0.01)
