"""Which signal is taken, and what each would cost, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_ray.core.loading import load
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.signals.online import Online
from minitron_ray.distillation.signals.sampled import Sampled
from minitron_ray.distillation.signals.top_k import TopK
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Inputs, make_plan, stage_fingerprints
from minitron_ray.plan.plan import Plan
from minitron_ray.plan.saving import search_saving
from minitron_ray.plan.signal import LARGEST_SIGNAL, SignalCost, choose_signal, signal_costs
from minitron_ray.weights.fetch import given_config

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def plan(*overrides: str) -> Plan:
    """The paper's search: 1.8 billion tokens a trial, from a teacher of 6,144 values a token and 256,000 words."""
    given = ("search.retrain.tokens=1.8B", "precision=bfloat16", *overrides)
    experiment, _ = load(EXPERIMENTS / "15b_to_8b.yaml", Experiment, given)
    config = given_config(experiment.teacher.config, EXPERIMENTS)
    assert config is not None
    return make_plan(experiment, config)


def costs(found: Plan) -> dict[str, SignalCost]:
    return {cost.signal.label: cost for cost in signal_costs(found.experiment, found.family, found.teacher)}


def test_the_papers_search_stores_draws() -> None:
    """Final hidden states would take 22 TB, their rounded form half of that, 50 draws 86 GB."""
    found = plan()
    assert choose_signal(found.experiment, found.teacher) == Sampled()
    tokens, validation = 1.8e9, found.experiment.data.validation * found.experiment.data.sequence_length
    exact = validation * 6144 * 2
    rows = costs(found)
    assert rows["final_hidden"].bytes == pytest.approx(tokens * 12_288 + exact)
    assert rows["final_hidden int8"].bytes == pytest.approx(tokens * 6_148 + exact)
    assert rows["sampled 50"].bytes == pytest.approx(tokens * 48 + exact)
    assert rows["top_k 64"].bytes == pytest.approx(tokens * (64 * 5 + 4) + exact)
    assert rows["online"].bytes == 0
    assert [label for label, row in rows.items() if row.chosen] == ["sampled 50"]
    assert "larger than" in str(rows["final_hidden"].refused) and rows["sampled 50"].refused is None


def test_operations_are_the_teachers_alone() -> None:
    """29.7 GFLOP a token, of them 3.15 in the LM head (2 x 6144 x 256,000)."""
    rows, tokens, head = costs(plan()), 1.8e9, 2 * 6144 * 256_000
    assert rows["online"].each == pytest.approx(tokens * 29.72e9, rel=0.01) and rows["online"].once == 0
    assert rows["final_hidden"].each == rows["final_hidden int8"].each == pytest.approx(tokens * head)
    assert rows["final_hidden"].once == pytest.approx(tokens * (29.72e9 - head), rel=0.01)
    assert rows["sampled 50"].each == rows["top_k 64"].each == 0
    assert rows["sampled 50"].once == pytest.approx(tokens * 29.72e9, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("search.retrain.tokens=1M",), FinalHidden()),
        (("search.retrain.tokens=20M",), FinalHidden(dtype="int8")),
        (("search.retrain.loss.kind=jsd",), Online()),
        (("search.retrain.tokens=1M", "search.retrain.loss.kind=jsd"), FinalHidden()),
        (("search.retrain.tokens=100B",), Online()),
        (("search.signal.kind=online",), Online()),
        (("search.signal={kind: top_k, k: 8}",), TopK(k=8)),
        (("search.signal={kind: final_hidden}",), FinalHidden()),
    ],
)
def test_the_rule(overrides: tuple[str, ...], expected: object) -> None:
    """The most exact that fits and that the loss takes, unless the experiment names one."""
    found = plan(*overrides)
    assert choose_signal(found.experiment, found.teacher) == expected
    chosen = [cost for cost in costs(found).values() if cost.chosen]
    assert [cost.signal for cost in chosen] == [expected] and chosen[0].refused is None
    if isinstance(expected, FinalHidden) and len(overrides) == 1 and "signal" not in overrides[0]:
        assert chosen[0].bytes <= LARGEST_SIGNAL


@pytest.mark.parametrize("tokens", ["9M", "12M", "15M", "20M", "30M", "40M"])
def test_the_plan_and_the_run_choose_alike(tokens: str) -> None:
    """A run settles `auto` by its device before it chooses."""
    precisions = ("auto", "bfloat16", "float32")
    plans = [plan(f"search.retrain.tokens={tokens}", f"precision={one}") for one in precisions]
    assert len({choose_signal(one.experiment, one.teacher) for one in plans}) == 1


def test_a_loss_that_takes_no_sparse_signal_says_so() -> None:
    assert costs(plan("search.retrain.loss.kind=jsd"))["sampled 50"].refused == (
        "the loss jsd compares whole distributions"
    )


def test_trials_of_labels_alone_need_the_teacher_for_validation_only() -> None:
    """Cross entropy takes nothing of it: 29.7 GFLOP a token less the head's 3.15, of the validation tokens."""
    labels = "search.retrain.loss.kind=cross_entropy"
    found = plan(labels)
    validation = found.experiment.data.validation * found.experiment.data.sequence_length
    assert choose_signal(found.experiment, found.teacher) == FinalHidden()
    [chosen] = [cost for cost in costs(found).values() if cost.chosen]
    assert chosen.bytes == validation * 6144 * 2 and chosen.each == 0
    assert chosen.once == pytest.approx(validation * (29.72e9 - 2 * 6144 * 256_000), rel=0.01)
    stages = {cost.stage: cost for cost in found.costs()}
    assert stages["teacher"].tokens == validation and "of validation" in stages["teacher"].what
    saving = search_saving(found, 20)
    assert saving.stored == saving.online
    assert saving.online < search_saving(plan(), 20).online
    inputs = Inputs(teacher="t", data="d")
    one, other = (
        stage_fingerprints(plan(labels, more), inputs) for more in ("seed=0", "search.retrain.tokens=2M")
    )
    assert one["teacher"] == other["teacher"] and one["search"] != other["search"]
    assert costs(plan("search.retrain.loss.kind=mixture"))["sampled 50"].chosen


def test_another_signal_is_another_stage_and_another_search() -> None:
    inputs = Inputs(teacher="t", data="d")
    marks = [stage_fingerprints(plan(f"search.signal.kind={kind}"), inputs) for kind in ("sampled", "top_k")]
    assert marks[0]["importance"] == marks[1]["importance"]
    assert marks[0]["teacher"] != marks[1]["teacher"] and marks[0]["search"] != marks[1]["search"]
