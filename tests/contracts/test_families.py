"""What every family's table must hold true of the stock transformers model, for tiny random networks.

A new family needs two lines in `networks.CONFIGS`; every test below then runs over it.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_ray.models.families import rewritten, supported
from minitron_ray.models.family import Row
from minitron_ray.models.kept import Blend, Kept
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.model import build, initialized, skeleton
from minitron_ray.weights.surgery import cut
from minitron_ray.weights.writing import write_checkpoint
from tests.contracts.networks import CONFIGS, IDS, Case, is_consumer, projections, random_kept, some

LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case.of(request.param)


def test_every_family_is_under_contract() -> None:
    model_types = [config["model_type"] for config in CONFIGS.values()]
    assert set(model_types) == set(supported())
    assert min(model_types.count(name) for name in supported()) >= 2


def test_a_checkpoint_that_stock_transformers_writes_is_the_table(case: Case, tmp_path: Path) -> None:
    """Its config is understood, its tensors are the table's, and we build the same function from it."""
    attributes = {name: value for name, value in case.config.items() if name != "model_type"}
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.config["model_type"], **attributes))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.3)
    stock.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert case.family.read(checkpoint.config) == case.arch
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == case.family.shapes(case.arch)
    model = build(checkpoint.config, checkpoint)
    assert type(model).__name__ == case.family.causal_lm
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock.eval()(IDS).logits)


@pytest.mark.parametrize("seed", range(3))
def test_count_is_the_stock_models(case: Case, seed: int) -> None:
    kept = random_kept(case.family, case.arch, seed)
    arch = kept.architecture(case.arch)
    model = skeleton(case.student_config(kept))
    assert sum(parameter.numel() for parameter in model.parameters()) == case.family.parameters(arch)
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    core = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in ends)
    assert core == case.family.non_embedding_parameters(arch)
    assert case.family.read(case.student_config(kept)) == arch


def test_dropout_is_off_in_training_and_stays_in_the_config(case: Case) -> None:
    """Of the teacher, and of a student that is started from random weights."""
    kind = case.config["model_type"]
    rates = {name: 0.5 for name in AutoConfig.for_model(kind).to_dict() if "drop" in name}
    config = case.config | rates
    assert rates
    stock = AutoConfig.for_model(kind, **{name: config[name] for name in config if name != "model_type"})
    drops = AutoModelForCausalLM.from_config(stock).train()
    kept = Kept.whole(case.arch)
    student = case.family.student_config(config, case.arch, kept)
    assert rates.items() <= student.items()
    with torch.no_grad():
        assert not torch.equal(drops(IDS).logits, drops(IDS).logits), "stock transformers does drop"
        for model in (build(student, case.weights, trainable=True), initialized(student, seed=0)):
            assert model.training
            first = model(input_ids=IDS, labels=IDS)
            again = model(input_ids=IDS, labels=IDS)
            assert torch.equal(first.loss, again.loss) and torch.equal(first.logits, again.logits)
            assert torch.equal(first.logits, model.eval()(input_ids=IDS).logits)


def test_places_and_taps_exist(case: Case) -> None:
    family, arch, model = case.family, case.arch, build(case.config, case.weights)
    for path in (family.backbone, family.decoder_layers, family.final_norm, family.embedding, family.lm_head):
        assert model.get_submodule(path) is not None
    assert model.get_submodule(family.backbone) is model.base_model
    assert len(model.get_submodule(family.decoder_layers)) == arch.layers
    sizes = {"mlp": arch.mlp, "heads": arch.heads * arch.head_dim, "hidden": arch.hidden}
    sizes |= {"experts": arch.hidden}
    absent = "mlp" if arch.experts else "experts"
    assert set(family.taps) == set(sizes) - {absent}
    heard: dict[str, list[int]] = {axis: [] for axis in sizes}
    for axis, taps in family.taps.items():
        for module in (model.get_submodule(tap.at(layer)) for tap in taps for layer in range(arch.layers)):
            module.register_forward_hook(
                lambda _, args, out, axis=axis, side=taps[0].side: heard[axis].append(
                    (args[0] if side == "input" else out).shape[-1]
                )
            )
    model(input_ids=torch.arange(8)[None])
    for axis, taps in family.taps.items():
        assert heard[axis] == [sizes[axis]] * (len(taps) * arch.layers)


def test_full_shape_cut_is_bit_identical_and_owns_its_memory(case: Case) -> None:
    whole = cut(case.weights, case.family, case.arch, Kept.whole(case.arch))
    assert list(whole) == list(case.weights)
    for name, tensor in whole.items():
        assert torch.equal(tensor, case.weights[name])
        assert tensor.data_ptr() != case.weights[name].data_ptr()
    assert torch.equal(
        case.cut_logits(Kept.whole(case.arch), case.weights), case.logits(case.config, case.weights)
    )


def test_cutting_silent_units_changes_no_logit(case: Case) -> None:
    """Different neurons, heads, KV groups and experts in every layer, and a whole layer, made silent and
    then cut; every layer that is left keeps its own type of attention."""
    kept = _some_units(case)
    silent = _silenced(case, kept)
    expected = case.logits(case.config, silent)
    assert_close(case.cut_logits(kept, silent), expected, rtol=1e-4, atol=1e-4)
    # The same cut of weights that are not silent does change them: the test can tell.
    assert not torch.allclose(
        case.cut_logits(kept, case.weights), case.logits(case.config, case.weights), atol=1e-2
    )


def test_cutting_channels_that_repeat_others_changes_no_logit(case: Case) -> None:
    """Half of the hidden channels are copies that nothing reads: norms have the same statistics without
    them. Where head_dim is hidden / heads, half of the heads go too. Gemma's factor is made up for."""
    arch, source = case.arch, random.Random(5)
    hidden = some(source, arch.hidden, arch.hidden // 2)
    whole = Kept.whole(arch)
    heads = tuple(some(source, arch.heads, 3) for _ in range(arch.layers))
    kept = replace(whole, hidden=hidden, heads=heads if case.family.square_heads else whole.heads)
    weights = _repeated(case, _silenced(case, kept), kept.hidden)
    expected = case.logits(case.config, weights)
    assert_close(case.cut_logits(kept, weights), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        case.cut_logits(kept, case.weights), case.logits(case.config, case.weights), atol=1e-2
    )


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("gemma")])
def test_a_gemma_with_fewer_channels_keeps_its_teachers_normaliser(name: str) -> None:
    """The reference: the same selection without correction, its embeddings times sqrt(teacher's hidden)."""
    case = Case.of(name)
    kept = replace(Kept.whole(case.arch), hidden=some(random.Random(1), 48, 30))
    plain = tuple(replace(tensor, rescaled=None) for tensor in case.family.tensors)
    weights = cut(case.weights, replace(case.family, tensors=plain), case.arch, kept)
    reference = build(case.student_config(kept), weights)
    uncorrected = reference(input_ids=IDS).logits
    reference.get_input_embeddings().embed_scale.fill_(case.arch.hidden**0.5)
    expected = reference(input_ids=IDS).logits
    assert_close(case.cut_logits(kept, case.weights), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(uncorrected, expected, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("olmo2")])
def test_heads_under_one_norm_are_cut_with_their_gains(name: str) -> None:
    """Without the queries and keys that were zero the norm's mean is over fewer: its gain makes up for it."""
    case = Case.of(name)
    heads, groups = ((0, 1), ((0,),)) if not case.per_head else ((1, 4), ((1,), (4,)))
    kept = replace(Kept.whole(case.arch), heads=(heads,) * 4, kv_heads=() if case.per_head else (groups,) * 4)
    silent, size = _silenced(case, kept), case.arch.head_dim
    for layer in range(4):
        for part, units in (("q", heads), ("k", [unit for group in groups for unit in group])):
            for ending in ("weight", "bias"):
                tensor = silent.get(f"model.layers.{layer}.self_attn.{part}_proj.{ending}")
                if tensor is not None:
                    gone = [u for u in range(len(tensor) // size) if u not in units]
                    tensor.view(-1, size, *tensor.shape[1:])[gone] = 0
    student = cut(silent, case.family, case.arch, kept)
    for tensor_name, tensor in student.items():
        if tensor_name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor *= (len(silent[tensor_name]) / len(tensor)) ** 0.5
    actual = case.logits(case.student_config(kept), student)
    assert_close(actual, case.logits(case.config, silent), rtol=1e-4, atol=1e-4)


def test_two_cuts_equal_one(case: Case) -> None:
    outer = random_kept(case.family, case.arch, 1)
    between = outer.architecture(case.arch)
    inner = random_kept(case.family, between, 2)
    twice = cut(cut(case.weights, case.family, case.arch, outer), case.family, between, inner)
    once = cut(case.weights, case.family, case.arch, outer.then(inner, case.arch))
    assert list(twice) == list(once)
    rescaled = {row.name for row in case.family.rows(case.arch) if row.tensor.rescaled is not None}
    for name in once:
        if name in rescaled:
            assert_close(twice[name], once[name])
        else:
            assert torch.equal(twice[name], once[name])


def test_stock_transformers_reloads_the_student(case: Case, tmp_path: Path) -> None:
    kept = random_kept(case.family, case.arch, 4)
    arch, config = kept.architecture(case.arch), case.student_config(kept)
    student = cut(case.weights, case.family, case.arch, kept)
    write_checkpoint(tmp_path, student.items(), config, dtype="float32")
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert stock.num_parameters() == case.family.parameters(arch)
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, build(config, student)(IDS).logits)


def test_merged_heads_are_sums_of_plain_matrices(case: Case) -> None:
    """In queries, and in keys and values where every head has its own; elsewhere heads are selected."""
    arch, heads = case.arch, (0, 2, 3, 5)
    blends: tuple[Blend, ...] = (((0, 1.5), (1, -0.5)), ((2, 1.0),), ((3, 0.25), (4, 0.75)), ((5, 1.0),))
    hidden = some(random.Random(0), arch.hidden, len(heads) * arch.head_dim)
    kept = Kept(layers=(1, 3), hidden=hidden, heads=(heads,) * 2, merged_heads=(blends,) * 2)
    student = cut(case.weights, case.family, arch, kept)
    mixing = torch.zeros(4, 6)
    for row, blend in enumerate(blends):
        for head, weight in blend:
            mixing[row, head] = weight
    _check_projections(case, kept, student, mixing, mixing if case.per_head else torch.eye(2))
    for name, dim in case.output("heads"):
        rows = torch.tensor([head * arch.head_dim + i for head in heads for i in range(arch.head_dim)])
        for new, old in enumerate(kept.layers):
            expected = case.weights[name.format(layer=old)].index_select(dim, rows)
            expected = expected.index_select(1 - dim, torch.tensor(hidden))
            assert torch.equal(student[name.format(layer=new)], expected)
    assert torch.isfinite(case.logits(case.student_config(kept), student)).all()


@pytest.mark.parametrize("name", [name for name in CONFIGS if not Case.of(name).per_head])
def test_kv_groups_are_dropped_or_averaged(name: str) -> None:
    case = Case.of(name)
    heads = (0, 1, 4, 5)
    averaged = replace(Kept.whole(case.arch), heads=(heads,) * 4, kv_heads=(((0, 1),),) * 4)
    student = cut(case.weights, case.family, case.arch, averaged)
    _check_projections(case, averaged, student, torch.eye(6)[list(heads)], torch.full((1, 2), 0.5))
    assert averaged.architecture(case.arch).kv_heads == 1
    assert torch.isfinite(case.logits(case.student_config(averaged), student)).all()
    dropped = replace(Kept.whole(case.arch), heads=((3, 5),) * 4, kv_heads=(((1,),),) * 4)
    student = cut(case.weights, case.family, case.arch, dropped)
    _check_projections(case, dropped, student, torch.eye(6)[[3, 5]], torch.eye(2)[[1]])


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, {}) for name in CONFIGS if "-" not in name]
    + [("phi3", {"hidden_size": 48, "rope_scaling": LONG_ROPE, "max_position_embeddings": 128})],
    ids=str,
)
def test_problems_are_what_stock_transformers_refuses(name: str, change: dict[str, Any]) -> None:
    case = Case.of(name, **change)
    for hidden in (32, 36, 46):
        for heads in (2, 3, 4, 6):
            for kv_heads in (heads,) if case.per_head else (1, 2, 3):
                arch = case.arch.with_sizes(hidden=hidden, heads=heads, kv_heads=kv_heads)
                assert bool(case.family.problems(arch)) != _runs(case, arch), arch.shape_text()
    if case.arch.experts:
        for experts, expert_mlp in ((1, 8), (2, 8), (3, 8), (3, 12), (3, 14), (6, 16)):
            arch = case.arch.with_sizes(experts=experts, expert_mlp=expert_mlp)
            assert bool(case.family.problems(arch)) != _runs(case, arch), arch.shape_text()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-one-group-a-head"])
def test_a_llama_written_as_mistral_is_the_same_function(name: str, tmp_path: Path) -> None:
    case = Case.of(name)
    config = rewritten(case.config, "mistral")
    assert config["model_type"] == "mistral"
    assert torch.equal(case.logits(config, case.weights), case.logits(case.config, case.weights))
    # And it takes a hidden size that Llama refuses.
    kept = replace(Kept.whole(case.arch), hidden=tuple(range(46)))
    arch = kept.architecture(case.arch)
    assert any("multiple of heads" in problem for problem in case.family.problems(arch))
    mistral = Case(config, Case.of("mistral").family, replace(case.arch, family="mistral"), case.weights)
    student = cut(case.weights, mistral.family, mistral.arch, kept)
    write_checkpoint(tmp_path, student.items(), mistral.student_config(kept), dtype="float32")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, mistral.cut_logits(kept, case.weights))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_published_names_and_masks_are_understood(name: str, tmp_path: Path) -> None:
    """GPT-2's first checkpoints lack the prefix, GPT-NeoX's call the LM head embed_out; both hold masks."""
    from safetensors.torch import save_file

    case = Case.of(name)
    old = {
        key.removeprefix("transformer.").replace("lm_head.", "embed_out."): tensor
        for key, tensor in case.weights.items()
    }
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    for layer in range(4):
        if name == "gpt2":
            old[f"h.{layer}.attn.bias"], old[f"h.{layer}.attn.masked_bias"] = mask, torch.tensor(-1e4)
        else:
            place = f"gpt_neox.layers.{layer}.attention"
            old[f"{place}.bias"], old[f"{place}.masked_bias"] = mask.clone(), torch.tensor(-1e9)
            old[f"{place}.rotary_emb.inv_freq"] = torch.ones(4)
    save_file({key: tensor.clone() for key, tensor in old.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(case.family, case.arch)
    expected = case.logits(case.config, case.weights)
    assert torch.equal(build(case.config, checkpoint)(input_ids=IDS).logits, expected)


def _runs(case: Case, arch: object) -> bool:
    """Whether stock transformers builds exactly these tensors and computes logits with them."""
    family = case.family
    config = family.attributes.write(case.config, arch, family.causal_lm)  # type: ignore[arg-type]
    attributes = {name: value for name, value in config.items() if name != "model_type"}
    try:
        stock = AutoConfig.for_model(config["model_type"], **attributes)
        model = AutoModelForCausalLM.from_config(stock, dtype=torch.bfloat16)
        with torch.no_grad():
            model(IDS)
    except Exception:
        return False
    return model.num_parameters() == family.parameters(arch)  # type: ignore[arg-type]


def _some_units(case: Case) -> Kept:
    """All hidden channels; of the rest some, without the second layer."""
    arch, layers, source = case.arch, (0, 2, 3), random.Random(3)
    kept = replace(random_kept(case.family, arch, 3), layers=layers, hidden=tuple(range(arch.hidden)))
    whole = Kept.whole(arch)
    if case.family.square_heads or case.family.norm_over_heads:
        kept = replace(kept, heads=whole.heads[:3], kv_heads=())
    elif case.per_head:
        kept = replace(kept, heads=tuple(some(source, 6, 2) for _ in layers), kv_heads=())
    else:
        # The second of two KV groups, with two of its three heads.
        kept = replace(kept, heads=((3, 4), (4, 5), (3, 5)), kv_heads=(((1,),),) * 3)
    if arch.mlp:
        return replace(kept, mlp=tuple(some(source, arch.mlp, arch.mlp // 2) for _ in layers))
    neurons = tuple(tuple(some(source, arch.expert_mlp, 8) for _ in range(4)) for _ in layers)
    return replace(kept, experts=tuple(some(source, arch.experts, 4) for _ in layers), expert_mlp=neurons)


def _silenced(case: Case, kept: Kept) -> dict[str, torch.Tensor]:
    """Weights with the outputs of all units outside `kept` at zero, and no token sent to experts outside."""
    arch = case.arch
    silent = {name: tensor.clone() for name, tensor in case.weights.items()}
    for layer in range(arch.layers):
        place = kept.layers.index(layer) if layer in kept.layers else None
        for axis, rows, unit in (("heads", kept.heads, arch.head_dim), ("mlp", kept.mlp, 1)):
            for name, dim in case.output(axis):
                units = () if place is None else rows[place]
                _zero(silent[name.format(layer=layer)], dim, units, unit)
                bias = silent.get(name.format(layer=layer).replace(".weight", ".bias"))
                if place is None and bias is not None:
                    bias.zero_()
        if arch.experts:
            _silence_experts(case, silent, kept, layer, place)
    return silent


def _zero(tensor: torch.Tensor, dim: int, kept: tuple[int, ...], unit: int) -> None:
    columns = tensor.unflatten(dim, (-1, unit)).movedim(dim, 0)
    columns[[index for index in range(len(columns)) if index not in kept]] = 0


def _silence_experts(
    case: Case, silent: dict[str, torch.Tensor], kept: Kept, layer: int, place: int | None
) -> None:
    """Channel 0 is made positive before every router, whose rows for other experts then say: never."""
    arch, path = case.arch, f"model.layers.{layer}"
    silent["model.embed_tokens.weight"][:, 0] = 3.0
    silent[f"{path}.post_attention_layernorm.weight"][0] = 1.0
    for name in (f"{path}.self_attn.o_proj.weight", f"{path}.self_attn.o_proj.bias"):
        if name in silent:
            silent[name][0] = 0
    for expert in range(arch.experts):
        down = silent[f"{path}.mlp.experts.{expert}.down_proj.weight"]
        down[0] = 0
        if place is None:
            down.zero_()
        elif kept.experts and expert not in kept.experts[place]:
            silent[f"{path}.mlp.gate.weight"][expert] = 0
            silent[f"{path}.mlp.gate.weight"][expert, 0] = -300.0
        elif kept.expert_mlp:
            row = kept.experts[place].index(expert)
            _zero(down, 1, kept.expert_mlp[place][row], 1)


def _repeated(
    case: Case, weights: dict[str, torch.Tensor], hidden: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Weights whose hidden channels outside `hidden` equal those inside, and are read by nothing."""
    chosen = torch.tensor(hidden)
    others = torch.tensor([channel for channel in range(case.arch.hidden) if channel not in hidden])
    rows: list[Row] = list(case.family.rows(case.arch))
    for row in rows:
        tensor = weights[row.name]
        for dim, axis in enumerate(row.tensor.dims):
            if axis != "hidden":
                continue
            channels = tensor.movedim(dim, 0)
            if is_consumer(case, row.tensor) or row.name.startswith(case.family.lm_head):
                channels[others] = 0
            elif row.name.startswith(case.family.final_norm):
                stores_less_one = case.family.model_type in ("nemotron", "gemma2", "gemma3_text")
                is_gain = row.name.endswith("weight")
                channels[others] = -1.0 if stores_less_one and is_gain else 0.0
            else:
                channels[others] = channels[chosen]
    return weights


def _check_projections(
    case: Case, kept: Kept, student: dict[str, torch.Tensor], queries: torch.Tensor, groups: torch.Tensor
) -> None:
    """The student's heads are `queries` (heads, teacher's heads) and `groups` times the teacher's."""
    hidden = torch.tensor(kept.hidden)
    for new, old in enumerate(kept.layers):
        before, after = projections(case, case.weights, old), projections(case, student, new)
        assert after.keys() == {"q", "k", "v"}
        for name, mixing in (("q", queries), ("k", groups), ("v", groups)):
            inputs = torch.cat([hidden, torch.arange(case.arch.hidden, before[name].shape[-1])])
            expected = torch.einsum("sh,hdi->sdi", mixing, before[name])[..., inputs]
            assert_close(after[name], expected, rtol=1e-6, atol=1e-6)
