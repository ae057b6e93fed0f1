"""What stages take, by arithmetic done again here, and by torch's own counters on a running network."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.cli.planning import plan_files
from minitron_ray.core.hardware import Hardware
from minitron_ray.plan import Layout, Plan, StageCost
from minitron_ray.plan.tokens import cohorts_of, rung_tokens, trials_at_rungs, validations_of
from minitron_ray.plan.training_memory import TrainingMemory

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

# Per token at 4096, computed by hand (GF): the teacher's forward pass with and without its LM head.
TEACHER, TEACHER_HEAD = 29.72e9, 3.146e9


def planned(name: str, *overrides: str) -> Plan:
    [(_, plan)] = plan_files([EXPERIMENTS / f"{name}.yaml"], Path("no-results"), overrides)
    return plan


def stage(plan: Plan, name: str, **layout: Any) -> StageCost:
    return next(cost for cost in plan.costs(**layout) if cost.stage == name)


HALVED = ("smollm2_135m_to_90m", "search.trials=12", "search.retrain.tokens=16384")
ONE_TRIAL = (*HALVED, "search.trials=1", "search.halving=null")
ONE = [  # one shape, whose training is 48.17 GF a token: Minitron 8B
    "budget.parameters=8.26B..8.28B",
    "search.trials=1",
    "search.signal={kind: final_hidden}",
]


def test_the_search_is_trials_times_tokens_and_the_teachers_head() -> None:
    plan = planned("15b_to_8b", *ONE, "search.retrain.rungs=1")
    assert [row.candidate.mlp for row in plan.feasible] == [16384]
    tokens, validation = 382 * 1152 * 4096, 512 * 4096
    student = 48.17e9
    cost = stage(plan, "search")
    assert cost.tokens == tokens
    trained = tokens * (student + TEACHER_HEAD)
    measured = 2 * validation * (student / 3 + TEACHER_HEAD)  # the cut, and the end
    assert cost.flops == pytest.approx(trained + measured, rel=1e-3)


def test_a_trial_is_measured_before_its_first_step() -> None:
    """12, 6 and 3 trials come to the three rungs of this file, and all 12 are measured as they were cut. Where
    the teacher's stored head takes part, at both ends, is told apart below."""
    fewer, more = (planned(*HALVED, f"data.validation={count}") for count in (8, 24))
    assert len({row.candidate.id for row in fewer.feasible}) > 12
    of_one = [planned(*ONE_TRIAL, f"data.validation={count}") for count in (8, 24)]
    added, once = (stage(b, "search").flops - stage(a, "search").flops for a, b in ((fewer, more), of_one))
    # Of one trial: as it was cut, and at three rungs. The others are no costlier.
    assert 0.9 * (12 + 12 + 6 + 3) < added / (once / 4) <= 12 + 12 + 6 + 3
    plans = [planned("15b_to_8b", *ONE, "search.retrain.rungs=1", f"data.validation={n}") for n in (8, 24)]
    difference = stage(plans[1], "search").flops - stage(plans[0], "search").flops
    assert difference == pytest.approx(2 * 16 * 4096 * (48.17e9 / 3 + TEACHER_HEAD), rel=1e-3)


@pytest.mark.parametrize(("signal", "beside"), [("final_hidden", TEACHER_HEAD), ("online", TEACHER)])
def test_the_teacher_is_compared_with_at_both_ends_of_a_trial(signal: str, beside: float) -> None:
    """And not at the first two of its three rungs, which leave that column of `trials` empty."""
    one = ("15b_to_8b", *ONE[:2], f"search.signal.kind={signal}", "search.retrain.rungs=3")
    plans = [planned(*one, f"data.validation={count}") for count in (8, 24)]
    difference = stage(plans[1], "search").flops - stage(plans[0], "search").flops
    assert difference == pytest.approx(16 * 4096 * (4 * 48.17e9 / 3 + 2 * beside), rel=1e-3)


def test_the_teacher_measured_by_its_signal_takes_one_pass_of_its_head() -> None:
    plan = planned("15b_to_8b", *ONE, "distill=null")
    assert stage(plan, "evaluate").flops == pytest.approx(512 * 4096 * TEACHER_HEAD, rel=1e-3)


def test_the_search_says_how_much_of_it_is_measuring() -> None:
    """A measured token is a third of a trained one, and the teacher's head."""
    override = ("search.retrain.rungs=1", "search.signal={kind: sampled}", "data.validation=51200")
    plan = planned("15b_to_8b", *ONE[:2], *override)
    trained, measured = 382 * 1152 * 48.17e9, 2 * 51200 * (48.17e9 / 3 + TEACHER_HEAD)
    share = measured / (trained + measured)
    assert f"; {share:.0%} of this is measuring them" in stage(plan, "search").what


@pytest.mark.parametrize(
    ("signal", "once", "each"),
    [
        ("{kind: final_hidden}", TEACHER - TEACHER_HEAD, TEACHER_HEAD),
        ("{kind: sampled}", TEACHER, 0.0),
        ("{kind: online}", 0.0, TEACHER),
    ],
)
def test_the_teacher_runs_once_or_in_every_trial(signal: str, once: float, each: float) -> None:
    plan = planned("15b_to_8b", *ONE[:2], f"search.signal={signal}", "data.validation=1")
    tokens = 382 * 1152 * 4096
    assert stage(plan, "teacher").flops == pytest.approx(1.8e9 * once, rel=1e-3)
    assert stage(plan, "search").flops == pytest.approx(tokens * (48.17e9 + each), rel=2e-3)


def test_a_wider_search_costs_the_sum_of_its_shapes() -> None:
    whole = planned("15b_to_8b", "data.validation=1", "search.signal={kind: sampled}")
    tokens = 382 * 1152 * 4096
    by_hand = 0.0
    for row in whole.feasible:
        shape = row.candidate
        layer = (
            2 * shape.heads * 128 * shape.hidden + 2 * 8 * 128 * shape.hidden + 2 * shape.hidden * shape.mlp
        )
        scores = shape.layers * 2 * shape.heads * 128 * 4097
        by_hand += 3 * (2 * (shape.layers * layer + 256_000 * shape.hidden) + scores)
    assert stage(whole, "search").flops == pytest.approx(tokens * by_hand, rel=1e-3)


def test_halving_trains_fewer_tokens() -> None:
    """Twelve trials in cohorts of four, 4096 tokens to the first of three rungs: half go on past each."""
    plan = planned(*HALVED)
    assert rung_tokens(plan.experiment) == (4096, 8192, 16384)
    assert cohorts_of(plan.experiment, 12) == (4, 4, 4)
    assert trials_at_rungs(plan.experiment, 12) == (12, 6, 3)
    assert stage(plan, "search").tokens == 12 * 4096 + 6 * 4096 + 3 * 8192
    unhalved = planned(*HALVED, "search.halving=null")
    assert stage(unhalved, "search").tokens == 12 * 16384
    # A cohort's weights and moments wait at a rung, and beside them the next are being written; without
    # halving none waits for others, so that only trials in training have some.
    largest = max(row.parameters for row in plan.feasible)
    assert stage(plan, "search").disk_bytes == 4 * 2 * 12 * largest
    assert stage(unhalved, "search").disk_bytes == 4 * 2 * 12 * largest
    at_once = Layout(trials_at_once=3)
    assert stage(plan, "search", layout=at_once).disk_bytes == (4 + 3) * 12 * largest
    assert stage(unhalved, "search", layout=at_once).disk_bytes == 3 * 2 * 12 * largest
    # Where ties are trained on, what was stopped stays, see `test_checkpoints.py`.
    ties = stage(planned(*HALVED, "search.keep=ties"), "search")
    assert ties.disk_bytes == 9 * 2 * 12 * largest


def test_ties_may_add_what_halving_saves() -> None:
    """Where none of the twelve can be told from the best, all see all tokens, and are distilled and measured."""
    kept = (*HALVED, "search.baselines=[random]", "distill.tokens=32768", "data.validation=24")
    one, tied = planned(*kept), planned(*kept, "search.keep=ties")
    assert all(cost.tie_tokens == 0 for cost in one.costs())
    search, every = stage(tied, "search"), planned(*kept, "search.halving=null")
    assert search.tokens == stage(one, "search").tokens
    assert search.tokens + search.tie_tokens == stage(every, "search").tokens == 12 * 16384
    begins = (
        "12 trials of 16.4K tokens, of which 3 go to the end, the first halving after 8 optimizer steps; "
    )
    assert search.what.startswith(begins)
    assert search.what.endswith(" of this is measuring them; up to 98.3K tokens more where trials tie")
    all_kept = planned(*kept, "search.keep=12", "search.halving=null")
    for name in ("baselines", "distill", "evaluate"):
        cost = stage(tied, name)
        assert cost.tokens == stage(one, name).tokens
        assert cost.tokens + cost.tie_tokens == stage(all_kept, name).tokens, name


@pytest.mark.parametrize(("halving", "at_once", "held"), [("null", 2, 2 * 3), ("{reduction: 2}", 2, 8 + 2)])
def test_a_group_keeps_two_checkpoints(halving: str, at_once: int, held: int) -> None:
    """Of cohorts of four: each has its last two, where it waits or trains, and those in training one more."""
    plan, layout = (
        planned(*HALVED, f"search.halving={halving}"),
        Layout(trial_workers=2, trials_at_once=at_once),
    )
    largest = max(row.parameters for row in plan.feasible)
    assert stage(plan, "search", layout=layout).disk_bytes == held * 12 * largest


def test_a_shape_that_one_device_holds_is_not_shared() -> None:
    plan = planned(*HALVED)
    one = Layout(accelerator=True)
    training = TrainingMemory.of(plan.experiment, plan.family, plan.teacher, one)
    sizes = sorted(
        (training.trial(row.candidate.architecture(plan.start)), row.candidate.id) for row in plan.feasible
    )
    place = len(sizes) // 2
    assert sizes[place - 1][0] < sizes[place][0]
    shared = replace(one, trial_workers=2, memory=math.ceil(sizes[place - 1][0] / 0.8))
    assert plan.alone(shared) == {name for _, name in sizes[:place]}
    search = stage(plan, "search", layout=shared)
    assert f", one process each for {place} of {len(sizes)} shapes, 2 each for the others" in search.what
    # A process of the largest pair takes less than the largest that is alone, or it would not be shared.
    assert search.memory_bytes is not None and sizes[place - 1][0] <= search.memory_bytes < sizes[-1][0]
    for unknown in ({"memory": None}, {"accelerator": False}):
        layout = replace(shared, **unknown)
        assert not plan.alone(layout)
        assert ", 2 processes each" in stage(plan, "search", layout=layout).what
    assert plan.alone(one) == {name for _, name in sizes}


def test_distillation_counts_its_validations() -> None:
    overrides = (*ONE, "distill.tokens=47185920", "distill.checkpoint_every=null")
    with_four = planned("15b_to_8b", *overrides, "distill.validate_every=null")
    distill = with_four.experiment.distill
    assert distill is not None and validations_of(distill, 4096) == 5  # 10 steps, every 2
    once = planned("15b_to_8b", *overrides, "distill.validate_every=47185920")
    difference = stage(with_four, "distill").flops - stage(once, "distill").flops
    # Each runs the student forward, and the teacher beside it for the divergence.
    assert difference == pytest.approx(4 * 512 * 4096 * (48.17e9 / 3 + 29.72e9), rel=1e-3)
    assert stage(once, "distill").tokens == 47185920


def test_device_time_is_operations_over_speed() -> None:
    plan = planned("15b_to_8b")
    h100s = Hardware(name="h100", count=8, flops=400e12, memory=80 * 2**30, source="40%")
    for timed, plain in zip(plan.costs(h100s), plan.costs(), strict=True):
        assert plain.device_seconds is None
        assert timed.device_seconds == pytest.approx(plain.flops / 400e12)


def test_what_is_written_is_counted() -> None:
    plan = planned("15b_to_8b", *ONE, "search.retrain.tokens=4718592")
    parameters = 8_271_699_968
    assert stage(plan, "export").disk_bytes == 2 * parameters
    # Three checkpoints of weights and moments, and the finished student, in float32.
    assert stage(plan, "distill").disk_bytes == 3 * 12 * parameters + 4 * parameters
    # bfloat16 states of 6144 channels for the trained and the validation tokens.
    assert stage(plan, "teacher").disk_bytes == 2 * 6144 * (4718592 + 512 * 4096)


def test_a_chain_runs_its_teacher_once() -> None:
    """The 4B learns from the same teacher, on the same text, as the 8B did."""
    first, second = planned("15b_to_8b"), planned("8b_to_4b")
    alone, after = stage(second, "teacher"), stage(second, "teacher", before=[first])
    assert alone.flops == stage(first, "teacher").flops > 5e19 and alone.disk_bytes > 100 * 2**30
    assert (after.tokens, after.flops, after.disk_bytes) == (0, 0.0, 0)
    assert after.what == "sampled 50 of search and validation, which 15b_to_8b has stored by then"
    others = {cost.stage: cost for cost in second.costs()} | {"teacher": after}
    assert {cost.stage: cost for cost in second.costs(before=[first])} == others


@pytest.mark.parametrize(
    ("override", "shares"),
    [
        ("seed=7", False),
        ("data.validation=256", False),
        ("precision=float32", False),
        ("search.signal={kind: sampled, draws: 20}", False),
        ("search.retrain.tokens=2B", False),
        ("search.retrain.tokens=1B", True),
        ("search.retrain.loss={kind: cross_entropy}", True),  # its trials see nothing of the teacher
        ("search.signal={kind: online}", False),
    ],
)
def test_what_a_chain_shares(override: str, shares: bool) -> None:
    first, second = planned("15b_to_8b", "seed=1"), planned("8b_to_4b", "seed=1", override)
    found, alone = stage(second, "teacher", before=[first]), stage(second, "teacher")
    assert (found != alone) == shares
    assert not shares or found.flops == 0


def test_zero_shot_and_baselines() -> None:
    plan = planned(
        *HALVED,
        "search.baselines=[random, scratch]",
        "search.zero_shot={shapes: 5, sequences: 2}",
    )
    assert stage(plan, "zero_shot").tokens == 5 * 2 * 256
    held = [stage(plan, "zero_shot", layout=Layout(trial_workers=count)).memory_bytes for count in (1, 2, 4)]
    weights = 4 * max(row.parameters for row in plan.feasible)
    saved = held[1] - held[2]  # of what goes around, embeddings and two layers are whole on each
    assert saved == pytest.approx(weights / 4, abs=1) and held[0] > held[1]
    spent = stage(plan, "search").tokens
    trained = -(-spent // 16384) + 1
    assert stage(plan, "baselines").tokens == trained * 16384
    # Each has a state of weights and moments, and beside it the next is being written.
    largest = max(row.parameters for row in plan.feasible)
    assert stage(plan, "baselines").disk_bytes == 2 * trained * 12 * largest


@pytest.mark.parametrize("signal", ["sampled", "online"])
def test_a_group_shares_the_teacher_and_who_is_evaluated(signal: str) -> None:
    """Of what is shared a rank's part goes from an eighth to a sixteenth; what comes back for a pass stays."""
    plan = planned("15b_to_8b", f"search.signal={{kind: {signal}}}")
    teacher, largest = 15_628_775_424, max(row.parameters for row in plan.feasible)

    def bytes_of(name: str, **layout: Any) -> int:
        return stage(plan, name, layout=Layout(accelerator=True, **layout)).memory_bytes or 0

    shared = {"teacher": 2 * teacher, "evaluate": 4 * largest}
    if signal == "online":
        shared = {"evaluate": 4 * largest + 2 * teacher}
    for name, size in shared.items():
        for one, two in (
            ({"teacher": "sharded", "workers": 8}, {"teacher": "sharded", "workers": 16}),
            ({"trial_workers": 8, "memory": 2**36}, {"trial_workers": 16, "memory": 2**36}),
            ({"teacher": "sharded", "trial_workers": 8}, {"teacher": "sharded", "trial_workers": 16}),
        ):
            saved = bytes_of(name, **one) - bytes_of(name, **two)
            assert saved == pytest.approx(size / 16, abs=2), (name, one)
        assert bytes_of(name, workers=8) == bytes_of(name) > bytes_of(name, teacher="sharded", workers=8)
    whole = bytes_of("evaluate", teacher="whole", trial_workers=8)
    assert whole - bytes_of("evaluate", teacher="whole", trial_workers=16) == pytest.approx(
        4 * largest / 16, abs=2
    )


def test_thousands_of_shapes_are_costed_at_once() -> None:
    plan = planned(
        "smollm2_135m_to_90m",
        "budget={parameters: 60M..130M}",
        "search.space.mlp=512..1536 by 2",
        "search.trials=50",
    )
    assert len(plan.feasible) > 3000
    started = time.perf_counter()
    plan.costs()
    assert time.perf_counter() - started < 5
