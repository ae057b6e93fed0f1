"""Hidden states beside the logits: against the stock model's own `hidden_states` and plain autograd."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.batches import batch_indices
from minitron_ray.distillation.engine import Engine
from minitron_ray.distillation.intermediate.embedding import Embedding
from minitron_ray.distillation.intermediate.hidden_states import HiddenStates
from minitron_ray.distillation.intermediate.mlp_input import MLPInput
from minitron_ray.distillation.loop import Data, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.objective import Objective
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sharding import Sharding, prepare_layer
from minitron_ray.distillation.state_loss import Intermediate, intermediate_of
from minitron_ray.distillation.teacher import OnlineTeacher, StoredTeacher
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build, initialized
from tests.processes import begin_group

LENGTH, BATCH, STEPS = 16, 6, 4
TOKENS = np.random.default_rng(0).integers(0, 256, (40, LENGTH))
CPU = torch.device("cpu")
LLAMA = family_of({"model_type": "llama"})
LOSSES = (HiddenStates(layers=((2, 1),)), Embedding(), MLPInput(layers=((3, 1),), distance="mse"))
BOTH = intermediate_of(LOSSES, None, LLAMA, 4, 2)
assert BOTH is not None


def teacher_of(folder: Path) -> Headless:
    checkpoint = Checkpoint(folder)
    return Headless(build(checkpoint.config, checkpoint))


def student_of(folder: Path) -> Headless:
    """Two layers, hidden 24: a map to 48 is learnt."""
    config = Checkpoint(folder).config | {
        "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3
    }  # fmt: skip
    student = Headless(initialized(config, seed=3))
    student.lift(torch.randn(48, 24, generator=torch.Generator().manual_seed(1)) / 5)
    return student


def plain(student: Headless, teacher: Headless, ids: Tensor, weight: float | None) -> tuple[Tensor, Tensor]:
    """The formula of the paper with whole logits and the stock model's `hidden_states`: (loss, L_is)."""
    own = student.model(ids, output_hidden_states=True, use_cache=False)
    with torch.no_grad():
        other = teacher.model(ids, output_hidden_states=True, use_cache=False)

    def lifted(states: Tensor) -> Tensor:
        assert student.projection is not None
        return (states @ student.projection.weight.T)[:, :-1]

    layers, others = student.model.model.layers, teacher.model.model.layers
    pairs = [
        # Behind layer 1 of two stands the final norm, which the stock model has in its last hidden states.
        (lifted(own.hidden_states[2]), others[3].input_layernorm(other.hidden_states[3])),
        (lifted(layers[0].input_layernorm(own.hidden_states[0])), others[0].input_layernorm(other.hidden_states[0])),
    ]  # fmt: skip
    states = sum((1 - F.cosine_similarity(a, b[:, :-1], dim=-1)).sum(-1) for a, b in pairs)
    position = torch.arange(ids.shape[1])[None]

    def into_mlp(model: Headless, block: torch.nn.Module, before: Tensor) -> Tensor:
        rotary = model.model.model.rotary_emb(before, position)
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        attended, _ = block.self_attn(block.input_layernorm(before), rotary, mask)
        return block.post_attention_layernorm(before + attended)

    inner = lifted(into_mlp(student, layers[1], own.hidden_states[1]))
    outer = into_mlp(teacher, others[3], other.hidden_states[3])[:, :-1]
    states = states + ((inner - outer) ** 2).mean(-1).sum(-1)
    logits = F.kl_div(
        own.logits[:, :-1].log_softmax(-1),
        other.logits[:, :-1].log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum((-1, -2))
    alpha = (logits / states).detach() if weight is None else weight
    return (logits + alpha * states).sum(), states.sum()


@pytest.mark.parametrize("weight", [None, 0.3])
def test_value_and_gradients_are_those_of_the_formula(tiny_llama: Path, weight: float | None) -> None:
    ids, teacher = torch.from_numpy(TOKENS[:3]), teacher_of(tiny_llama)
    ours, theirs = student_of(tiny_llama), student_of(tiny_llama)
    objective = Objective(
        ours, OnlineTeacher(teacher), ForwardKL(), replace(BOTH, weight=weight), torch.float32
    )
    loss, logits, states = objective.terms([0, 1, 2], ids)
    expected, expected_states = plain(theirs, teacher, ids, weight)
    torch.testing.assert_close(states, expected_states.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    if weight is None:  # as large as the logits' loss, whatever its own value
        torch.testing.assert_close(loss, 2 * logits, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3, msg=name)


def recipe(intermediate: Intermediate | None = BOTH) -> Recipe:
    return Recipe(
        loss=ForwardKL(),
        schedule=Schedule(peak=1e-2, minimum=0.0, warmup=0.1, tokens=STEPS * BATCH * LENGTH),
        batch=BATCH,
        sequence_length=LENGTH,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
        intermediate=intermediate,
    )


DATA = Data(batch=lambda step: batch_indices(range(40), step - 1, BATCH, 0), sequences=lambda i: TOKENS[i])
SAME = Data(batch=lambda step: np.arange(BATCH), sequences=lambda i: TOKENS[i])


def steps(student: Headless, teacher: Headless, data: Data = DATA, **options: int) -> list[Step]:
    share = Share(**({"device": CPU, "dtype": torch.float32, "micro_batch": 6} | options))
    return list(
        train(student, make_optimizer(student, recipe()), OnlineTeacher(teacher), data, recipe(), share)
    )


def losses(found: list[Step]) -> list[tuple[float, float, float]]:
    return [(step.loss, step.logit_loss, step.intermediate_loss or 0.0) for step in found]


def test_both_terms_fall_and_the_map_learns(tiny_llama: Path) -> None:
    student = student_of(tiny_llama)
    assert student.projection is not None
    before = student.projection.weight.detach().clone()
    found = steps(student, teacher_of(tiny_llama), SAME)
    assert found[-1].logit_loss < found[0].logit_loss
    assert found[-1].intermediate_loss is not None and found[0].intermediate_loss is not None
    assert found[-1].intermediate_loss < 0.9 * found[0].intermediate_loss
    assert (student.projection.weight - before).abs().max() > 1e-3


def test_alpha_is_of_each_sequence_and_not_of_the_passes(tiny_llama: Path) -> None:
    teacher = teacher_of(tiny_llama)
    whole, split = (steps(student_of(tiny_llama), teacher, micro_batch=size) for size in (6, 1))
    np.testing.assert_allclose(losses(whole), losses(split), rtol=2e-4)


def test_layers_that_are_computed_again_give_the_same(tiny_llama: Path) -> None:
    """Their norms run twice, and are heard once."""
    student = student_of(tiny_llama)
    for layer in student.model.model.layers:
        prepare_layer(layer, Engine(recompute=True))
    found = steps(student, teacher_of(tiny_llama))
    assert losses(found) == losses(steps(student_of(tiny_llama), teacher_of(tiny_llama)))


@pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_are_listened_to_are_heard_where_others_are_compiled(
    tiny_llama: Path, recompute: bool
) -> None:
    """In one of two layers there is an ear; torch would give both the code of the other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    own = recipe()
    assert own.intermediate is not None
    first = tuple(pair for pair in own.intermediate.pairs if "layers.0." in pair.student)
    own = replace(own, intermediate=replace(own.intermediate, pairs=first))
    found = []
    for engine in (Engine(), Engine(recompute=recompute, compiled=True)):
        student, teacher = student_of(tiny_llama), OnlineTeacher(teacher_of(tiny_llama))
        for layer in student.model.model.layers:
            prepare_layer(layer, engine)
        share = Share(device=CPU, dtype=torch.float32, micro_batch=6)
        found.append(losses(list(train(student, make_optimizer(student, own), teacher, DATA, own, share))))
    np.testing.assert_allclose(*found, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def _rank(rank: int, world: int, folder: Path, out: Path) -> None:
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    student = student_of(folder)
    Sharding(world, CPU, torch.float32, Engine(recompute=True)).whole(student, student.model.model.layers)
    found = steps(student, teacher_of(folder), rank=rank, world=world, micro_batch=2)
    weights = {name: parameter.full_tensor().detach() for name, parameter in student.named_parameters()}
    if rank == 0:
        torch.save({"losses": losses(found), "weights": weights}, out / "found.pt")
    torch.distributed.barrier()  # a rank that leaves early may abort the other's last exchange
    torch.distributed.destroy_process_group()


def test_two_workers_train_as_one(tiny_llama: Path, tmp_path: Path) -> None:
    begin_group(_rank, 2, tiny_llama, tmp_path)
    found, student = torch.load(tmp_path / "found.pt"), student_of(tiny_llama)
    np.testing.assert_allclose(found["losses"], losses(steps(student, teacher_of(tiny_llama))), rtol=2e-4)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found["weights"][name], parameter.detach(), rtol=1e-2, atol=2e-3)
    assert "projection.weight" in found["weights"]


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tiny_llama: Path) -> None:
    same = intermediate_of((HiddenStates(), Embedding()), None, LLAMA, 4, 4)
    checkpoint = Checkpoint(tiny_llama)
    student = Headless(build(checkpoint.config, checkpoint, trainable=True))
    objective = Objective(student, OnlineTeacher(teacher_of(tiny_llama)), ForwardKL(), same, torch.float32)
    loss, _, states = objective.terms([0], torch.from_numpy(TOKENS[:1]))
    loss.backward()
    assert abs(loss.item()) < 1e-4 and abs(states.item()) < 1e-4
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_labels_and_hidden_states_go_together(tiny_llama: Path) -> None:
    """L_CLM + alpha L_is: the teacher runs for its states alone."""
    student = student_of(tiny_llama)
    objective = Objective(student, OnlineTeacher(teacher_of(tiny_llama)), CrossEntropy(), BOTH, torch.float32)
    ids = torch.from_numpy(TOKENS[:2])
    loss, logits, _ = objective.terms([0, 1], ids)
    own = student.model(ids).logits[:, :-1]
    expected = F.cross_entropy(own.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(logits, expected.detach())
    torch.testing.assert_close(loss.detach(), 2 * expected.detach())


def test_nothing_is_heard_once_training_is_over(tiny_llama: Path) -> None:
    student, teacher = student_of(tiny_llama), teacher_of(tiny_llama)
    steps(student, teacher)
    hooks = [module._forward_hooks for model in (student, teacher) for module in model.modules()]
    assert not any(hooks)


def test_a_stored_teacher_has_no_hidden_states(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "signal.json").write_text("[]")
    np.save(tmp_path / "sequences.npy", np.empty(0, np.int64))
    teacher = StoredTeacher(tmp_path, torch.zeros(256, 48))
    with pytest.raises(ValueError, match="need the running teacher"):
        Objective(student_of(tiny_llama), teacher, ForwardKL(), BOTH, torch.float32)


def test_the_map_of_layers() -> None:
    found = intermediate_of((HiddenStates(),), None, LLAMA, 32, 16)
    assert found is not None
    [pair] = found.pairs  # the output of layer 29 is what the norm of layer 30 takes
    assert (pair.teacher, pair.student) == (
        "model.layers.30.input_layernorm",
        "model.layers.14.input_layernorm",
    )
    last = intermediate_of((HiddenStates(layers=((31, 15),)),), None, LLAMA, 32, 16)
    assert last is not None and last.pairs[0].teacher == last.pairs[0].student == "model.norm"
    assert intermediate_of((), None, LLAMA, 32, 16) is None


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"hidden_states maps layer 16 of the student, which has layers 0 to 15"
    ):
        intermediate_of((HiddenStates(layers=((29, 16),)),), None, LLAMA, 32, 16)
    with pytest.raises(ConfigError, match="compared twice; name each pair once"):
        intermediate_of((Embedding(), Embedding()), None, LLAMA, 32, 16)
    with pytest.raises(ConfigError, match="layers of olmo2 take their inputs without one"):
        intermediate_of((Embedding(),), None, family_of({"model_type": "olmo2"}), 32, 16)
