"""A model that is cut apart from its teacher: what is planned for it, and what its digest decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import (
    Inputs,
    Plan,
    StartConfig,
    check_same_model,
    experiment_fingerprint,
    largest_student,
    make_plan,
    stage_fingerprints,
)

EXPERIMENT = """
name: second
teacher: {path: ./teacher}
start: {experiment: first}
data: {source: {kind: files, path: t}, sequence_length: 32}
budget: {parameters: 45k..70k}
search: {space: {layers: 2..3, mlp: 32..64 by 16}, trials: 2, sampler: {kind: random}}
distill: {tokens: 16_384}
"""
Read = Callable[..., Experiment]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The experiment with `replaced` parts of its text."""

    def reader(*replaced: tuple[str, str], text: str = EXPERIMENT) -> Experiment:
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return load(path, Experiment, ())[0]

    return reader


@pytest.fixture
def teacher(tiny_llama: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((tiny_llama / "config.json").read_text())
    return config


@pytest.fixture
def start(teacher: dict[str, Any]) -> StartConfig:
    return StartConfig(
        config=teacher | {"num_hidden_layers": 3, "intermediate_size": 64}, source="student of first/r"
    )


def plan(read: Read, teacher: dict[str, Any], start: StartConfig) -> Plan:
    return make_plan(read(), teacher, start)


def test_students_are_cut_from_the_start_and_learn_from_the_teacher(
    read: Read, teacher: dict[str, Any], start: StartConfig
) -> None:
    found = plan(read, teacher, start)
    assert (found.teacher.layers, found.teacher.mlp) == (4, 96)
    assert (found.start.layers, found.start.mlp) == (3, 64)
    alone = make_plan(read(("start: {experiment: first}\n", "")), dict(start.config))
    assert found.rows == alone.rows  # the same space as of an experiment whose teacher the start is
    assert found.start_source == "student of first/r" and alone.start_source is None
    scoring, of_start = (
        {cost.stage: cost.flops for cost in one.costs()}["importance"] for one in (found, alone)
    )
    assert scoring == of_start
    signal, of_alone = ({cost.stage: cost.flops for cost in one.costs()}["teacher"] for one in (found, alone))
    assert signal > of_alone  # four layers run, not three


def test_the_start_decides_the_cut_and_not_the_teachers_signal(
    read: Read, teacher: dict[str, Any], start: StartConfig
) -> None:
    found = plan(read, teacher, start)
    one, other = (stage_fingerprints(found, Inputs(teacher="t", data="d", start=mark)) for mark in "ab")
    assert {stage for stage in one if one[stage] == other[stage]} == {"teacher"}
    # Scores are of the start: another teacher leaves them as they are.
    taught = stage_fingerprints(found, Inputs(teacher="u", data="d", start="a"))
    assert {stage for stage in one if one[stage] == taught[stage]} == {"importance"}


def test_a_plan_without_a_start_has_the_marks_of_one_that_cuts_its_teacher(
    read: Read, teacher: dict[str, Any]
) -> None:
    found = make_plan(read(("start: {experiment: first}\n", "")), teacher)
    own = stage_fingerprints(found, Inputs(teacher="t", data="d"))
    assert own == stage_fingerprints(found, Inputs(teacher="t", data="d", start="t"))


def test_a_description_of_the_start_is_not_part_of_the_experiment(read: Read) -> None:
    described = read(("{experiment: first}", "{experiment: first, config: {model_type: llama}}"))
    other = read(("{experiment: first}", "{experiment: third}"))
    assert (
        experiment_fingerprint(described) == experiment_fingerprint(read()) != experiment_fingerprint(other)
    )


def test_the_largest_student_is_one_of_the_plan(read: Read, teacher: dict[str, Any]) -> None:
    first = make_plan(read(("start: {experiment: first}\n", "")), teacher)
    config = largest_student(first)
    arch = first.family.read(config)
    assert first.family.parameters(arch) == max(row.parameters for row in first.feasible)
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (arch.layers, arch.mlp)


def test_an_unknown_start_says_what_to_do(read: Read, teacher: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"first has no finished run.*same command, run it first, or give"):
        make_plan(read(), teacher)
    by_path = read(("{experiment: first}", "{path: ./other}"))
    with pytest.raises(ConfigError, match=r"config.json of ./other is not on this machine"):
        make_plan(by_path, teacher)


@pytest.mark.parametrize(("rows", "changed"), [(512, set()), (252, {"teacher"})])
def test_an_embedding_of_another_size_is_planned_and_a_smaller_one_changes_the_signal(
    rows: int, changed: set[str], read: Read, teacher: dict[str, Any], start: StartConfig
) -> None:
    padded = make_plan(read(), teacher, StartConfig(config={**start.config, "vocab_size": rows}, source="s"))
    assert (padded.start.vocab, padded.teacher.vocab) == (rows, 256)
    inputs = Inputs(teacher="t", data="d", start="a")
    one, other = stage_fingerprints(plan(read, teacher, start), inputs), stage_fingerprints(padded, inputs)
    assert {stage for stage in ("importance", "teacher") if one[stage] != other[stage]} == changed


def test_another_family_is_refused(read: Read, teacher: dict[str, Any], start: StartConfig) -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    other = StartConfig(config={**start.config, **mistral}, source="s")
    with pytest.raises(ConfigError, match=r"cut is a mistral, the teacher a llama.*export\.as"):
        make_plan(read(), teacher, other)
    unknown = StartConfig(config={**start.config, "model_type": "mamba"}, source="s")
    with pytest.raises(ConfigError, match=r"start: .*mamba"):
        make_plan(read(), teacher, unknown)


@pytest.mark.parametrize("whose", ["teacher", "start"])
def test_a_context_that_is_too_short_is_said_of_its_model(
    whose: str, read: Read, teacher: dict[str, Any], start: StartConfig
) -> None:
    short = {"max_position_embeddings": 16}
    own = teacher | (short if whose == "teacher" else {})
    cut = StartConfig(config={**start.config, **(short if whose == "start" else {})}, source="s")
    with pytest.raises(ConfigError, match=rf"32 is longer than the {whose}'s context of 16; set it to 16"):
        make_plan(read(), own, cut)


def test_a_config_of_another_start_is_named_by_its_section(teacher: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"start\.config describes .* correct start\.config"):
        check_same_model(teacher | {"hidden_size": 96}, teacher, "start")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{experiment: second}", "second cannot start from its own student"),
        ("{experiment: first, path: ./m}", "by experiment or by path, one of the two"),
        ("{config: x.json}", "by experiment or by path, one of the two"),
        ("{experiment: first, sha256: " + "a" * 64 + "}", "belong to a path"),
        ("{path: someone/model}", "hub id, which needs a revision"),
        ("{path: ./m, revision: " + "a" * 40 + "}", "a hub id only"),
    ],
)
def test_what_a_start_may_not_say(read: Read, written: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(("{experiment: first}", written))
