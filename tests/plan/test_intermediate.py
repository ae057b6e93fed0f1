"""Which students are trained on hidden states too."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from minitron_ray.core.errors import ConfigError
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.experiment import Distill, Retrain, Search
from minitron_ray.models.families import family_of
from minitron_ray.plan.intermediate import choose_intermediate, resolve_intermediate, trained_on

LLAMA, OLMO = (family_of({"model_type": name}) for name in ("llama", "olmo2"))


@pytest.mark.parametrize(
    ("layers", "label"),
    # The paper's own students: searched shapes of 29 to 32 layers, and 16 of 32.
    [
        (32, "logits"),
        (29, "logits"),
        (25, "logits"),
        (24, "logits + hidden_states + embedding"),
        (16, "logits + hidden_states + embedding"),
    ],
)
def test_a_quarter_of_the_layers_decides(layers: int, label: str) -> None:
    assert choose_intermediate(Distill(tokens=1000), LLAMA, 32, layers).label == label


def test_the_rule_adds_nothing_where_it_cannot() -> None:
    labels = Distill(tokens=1000, loss=CrossEntropy())
    assert choose_intermediate(labels, LLAMA, 32, 16).losses == () and not labels.needs_teacher
    assert "without a norm" in choose_intermediate(Distill(tokens=1000), OLMO, 32, 16).reason
    assert resolve_intermediate(Distill(tokens=1000), OLMO, 32, 16) is None


def test_what_is_named_is_taken_for_every_student() -> None:
    named = Distill.model_validate(
        {"tokens": 1000, "loss": {"kind": "cross_entropy"}, "intermediate": [{"kind": "embedding"}]}
    )
    found = resolve_intermediate(named, LLAMA, 32, 32)
    assert named.needs_teacher and found is not None
    assert [pair.teacher for pair in found.pairs] == ["model.layers.0.input_layernorm"]
    none = Distill.model_validate({"tokens": 1000, "intermediate": []})
    assert resolve_intermediate(none, LLAMA, 32, 16) is None
    with pytest.raises(ConfigError, match="layers of olmo2 take their inputs without one"):
        resolve_intermediate(named, OLMO, 32, 16)


def test_a_line_for_each_way_of_training() -> None:
    lines = trained_on(Distill(tokens=1000), LLAMA, 32, [16, 20, 30, 32])
    assert lines[0].startswith("30 to 32 layers: logits (")
    assert lines[1].startswith("16 to 20 layers: logits + hidden_states + embedding, weight dynamic (")


def test_trials_compare_hidden_states_with_a_running_teacher_only() -> None:
    assert Retrain().intermediate == ()
    asked = {"space": {"layers": [3, 4]}, "retrain": {"intermediate": "auto"}}
    with pytest.raises(ValidationError, match=r"take online, or leave search\.retrain\.intermediate out"):
        Search.model_validate(asked)
    assert Search.model_validate(asked | {"signal": {"kind": "online"}}).retrain.intermediate == "auto"


def test_mistakes_in_a_file_are_told() -> None:
    with pytest.raises(ValidationError, match="no hidden states are compared; leave it out"):
        Distill.model_validate({"tokens": 1000, "intermediate": [], "intermediate_weight": 0.5})
    with pytest.raises(ValidationError, match="Input tag 'attention'"):
        Distill.model_validate({"tokens": 1000, "intermediate": [{"kind": "attention"}]})
