"""The end of a search, from tables written by hand: who goes on, and what the conclusions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_ray.core.errors import MinitronError
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan, make_plan
from minitron_ray.results.store import Store
from minitron_ray.search.choice import paired_bootstrap
from minitron_ray.stages.choice import choose, conclude
from minitron_ray.stages.objectives import Cost

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
HARDNESS = np.random.default_rng(0).normal(0, 1, 16)
LAST = 200


def plan_of(config: dict[str, Any] = CONFIG, **search: Any) -> Plan:
    """Shapes of 2 to 4 layers by MLPs of 48 to 96, all inside the budget."""
    return make_plan(
        Experiment.model_validate(
            {
                "name": "small",
                "seed": 5,
                "teacher": {"path": "./teacher"},
                "data": {"source": {"kind": "files", "path": "x"}, "sequence_length": 16},
                "budget": {"parameters": "10k..200k"},
                "search": {
                    "space": {"layers": "2..4", "mlp": "48..96 by 16"},
                    "trials": 8,
                    "retrain": {"tokens": LAST, "rungs": 2},
                    **search,
                },
            }
        ),
        config,
    )


class Table:
    """Writes what a search would have."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.store = plan, Store(folder, "small", "run")
        self.ids = [row.candidate.id for row in plan.feasible]

    def trial(
        self,
        at: int,
        *losses: float,
        status: str = "completed",
        origin: str | None = None,
        noise: float = 0.01,
    ) -> str:
        """The candidate of that place in the space, with mean losses as cut, after 100 and 200 tokens."""
        name = self.ids[at]
        subject = name if origin is None else f"{origin}:{name}"
        shape = self.plan.candidate(name)
        draw = np.random.default_rng([at, len(origin or "")])
        for rung, loss in enumerate(losses):
            values = HARDNESS + draw.normal(0, noise, 16)
            values = values - values.mean() + loss
            final = rung == len(losses) - 1
            row = {
                "candidate_id": name,
                "rung": rung,
                "tokens": 100 * rung,
                "val_loss": loss,
                "final": final,
                "status": status if final else "running",
                "reason": "it broke" if final and status == "failed" else None,
                "origin": origin or "search",
                "layers": shape.layers,
                "parameters": self.plan.feasible[at].parameters,
            }
            self.store.append("trials", [row], writer=f"trial-{subject.replace(':', '-')}", sequence=rung)
            phase = "baseline" if origin else "search" if rung else "cut"
            self.store.append(
                "sequence_losses",
                [
                    {
                        "subject": subject,
                        "phase": phase,
                        "tokens": 100 * rung,
                        "sequence": 40 + i,
                        "loss": value,
                    }
                    for i, value in enumerate(values)
                ],
                writer=f"trial-{subject.replace(':', '-')}",
                sequence=rung,
            )
        return name

    def chosen(self) -> tuple[list[str], str]:
        output, summary = choose(self.plan, self.store, Cost(self.plan))
        return output["chosen"], summary

    def rows(self, table: str, **wanted: Any) -> list[dict[str, Any]]:
        rows = self.store.read(table).to_pylist()
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def searched(folder: Path, **search: Any) -> tuple[Table, list[str]]:
    """Best first: 3.000, 3.001 (tied), 3.2; one stopped at 3.9, one failed."""
    table = Table(plan_of(**search), folder)
    best = table.trial(0, 6.0, 4.0, 3.0)
    tied = table.trial(1, 5.9, 4.1, 3.001)
    third = table.trial(2, 5.8, 4.2, 3.2)
    stopped = table.trial(3, 6.1, 4.3, status="stopped")
    failed = table.trial(4, 6.2, 4.4, status="failed")
    return table, [best, tied, third, stopped, failed]


def test_keep_takes_the_best_that_were_completed(tmp_path: Path) -> None:
    for keep, expected in ((1, 1), (2, 2), (3, 3)):
        table, names = searched(tmp_path / str(keep), keep=keep)
        chosen, summary = table.chosen()
        assert chosen == names[:expected]
        assert summary.startswith("3 completed, 1 stopped, 1 failed; best ")
        assert summary.endswith("loss 3.000") and names[0] in summary


def test_keep_ties_takes_those_that_the_sequences_do_not_tell_apart(tmp_path: Path) -> None:
    table, names = searched(tmp_path, keep="ties")
    chosen, summary = table.chosen()
    assert chosen == names[:2]
    assert "(2 tied, all are kept)" in summary


def test_more_than_were_completed_is_said(tmp_path: Path) -> None:
    table, names = searched(tmp_path, keep=5)
    chosen, summary = table.chosen()
    assert chosen == names[:3]
    assert "(keep asks for 5; only completed trials can be kept)" in summary


def test_baselines_are_never_chosen(tmp_path: Path) -> None:
    table, names = searched(tmp_path)
    table.trial(6, 5.0, 3.0, 2.0, origin="random")
    assert table.chosen()[0] == names[:1]


def test_a_search_without_a_completed_trial_says_why(tmp_path: Path) -> None:
    table = Table(plan_of(), tmp_path)
    table.trial(0, 6.0, status="failed")
    table.trial(1, 6.0, 4.0, status="stopped")
    with pytest.raises(MinitronError, match="none of 2 trials was completed: it broke; see logs/"):
        table.chosen()


def test_a_completed_trial_without_a_finite_loss_is_not_chosen(tmp_path: Path) -> None:
    table, names = searched(tmp_path, keep=3)
    table.trial(7, 6.0, 4.0, float("nan"))
    assert table.chosen()[0] == names[:3]
    conclude(table.plan, table.store)
    assert not table.rows("comparisons", subject=table.ids[7])


def test_comparisons_are_with_the_winner_at_the_last_common_rung(tmp_path: Path) -> None:
    table, (best, tied, third, stopped, failed) = searched(tmp_path)
    conclude(table.plan, table.store)
    found = {row["subject"]: row for row in table.rows("comparisons", against="best", phase="search")}
    assert set(found) == {tied, third, stopped} and failed not in found
    assert {row["other"] for row in found.values()} == {best}
    assert {name: row["tied"] for name, row in found.items()} == {tied: True, third: False, stopped: False}
    assert [found[name]["tokens"] for name in (tied, third, stopped)] == [LAST, LAST, 100]
    assert found[third]["difference"] == pytest.approx(0.2)
    assert found[stopped]["difference"] == pytest.approx(0.3)
    losses = {
        name: [row["loss"] for row in table.rows("sequence_losses", subject=name, tokens=LAST)]
        for name in (best, third)
    }
    alone = paired_bootstrap(losses[third], losses[best], seed=5)
    assert (found[third]["low"], found[third]["high"]) == pytest.approx((alone.low, alone.high))
    following = table.rows("comparisons", against="next")
    assert [(row["subject"], row["other"]) for row in following] == [(tied, best), (third, tied)]


def test_baselines_are_compared_with_the_winner(tmp_path: Path) -> None:
    table, (best, *_) = searched(tmp_path)
    other = table.trial(6, 6.0, 4.5, 3.4, origin="random")
    table.trial(0, 9.0, 7.0, 5.0, origin="scratch")
    conclude(table.plan, table.store)
    found = {row["subject"]: row for row in table.rows("comparisons", phase="baseline", tokens=LAST)}
    assert set(found) == {f"random:{other}", f"scratch:{best}"}
    assert found[f"random:{other}"]["difference"] == pytest.approx(0.4)
    assert found[f"scratch:{best}"]["other"] == best and not found[f"scratch:{best}"]["tied"]
    assert not table.rows("comparisons", phase="search", subject=other)


def test_conclusions_are_written_anew_and_not_doubled(tmp_path: Path) -> None:
    table, _ = searched(tmp_path)
    conclude(table.plan, table.store)
    names = ("comparisons", "rank_correlations", "lessons")
    before = [table.rows(name) for name in names]
    conclude(table.plan, table.store)
    assert [table.rows(name) for name in names] == before and all(before)


def test_ranks_count_zero_shot_losses_and_no_baselines_of_other_weights(tmp_path: Path) -> None:
    table, (best, tied, third, *_) = searched(tmp_path)
    table.trial(6, 1.0, 9.0, 9.5, origin="scratch")
    table.trial(7, 1.0, 9.0, 9.5, origin="random", status="failed")
    guesses = [
        {"candidate_id": name, "val_loss": loss} for name, loss in ((best, 8.0), (tied, 7.0), (third, 6.0))
    ]
    table.store.append("zero_shot", guesses, writer="zero_shot", sequence=0)
    conclude(table.plan, table.store)
    found = {
        (row["comparing"], row["from_tokens"], row["to_tokens"]): (row["tau"], row["candidates"])
        for row in table.rows("rank_correlations")
    }
    assert {row["over"] for row in table.rows("rank_correlations")} == {"search"}
    assert found["zero_shot", 0, LAST] == (-1.0, 3)
    assert found["rung", 100, LAST] == (1.0, 3)
    assert found["last", 0, LAST] == (-1.0, 3)  # the cuts' order was the reverse
    assert found["rung", 0, 100] == (pytest.approx((3 - 3) / 6), 4)


def test_ranks_are_compared_over_the_shapes_drawn_by_lot_too(tmp_path: Path) -> None:
    """One drawn shape was stopped as a trial, one is the winner's copy, two are new. Counted by hand."""
    table, (_, tied, third, stopped, _) = searched(tmp_path)  # 3.0, 3.001, 3.2; at 100: 4.0 to 4.3
    table.trial(0, 6.0, 4.0, 3.0, origin="random")
    table.trial(3, 6.1, 4.3, 2.9, origin="random")  # would have won
    table.trial(5, 5.0, 4.5, 3.5, origin="random")
    table.trial(6, 5.1, 4.4, 3.6, origin="random")
    conclude(table.plan, table.store)
    found = {
        row["over"]: (row["tau"], row["candidates"])
        for row in table.rows("rank_correlations", comparing="last", from_tokens=100)
    }
    assert found == {
        "search": (1.0, 3),
        # Orders at 100: best tied third stopped 6 5; at 200: stopped best tied third 5 6. 3 + 1 pairs turn.
        "search and random": (pytest.approx((11 - 4) / 15), 6),
        # best stopped 6 5, then stopped best 5 6: two pairs turn.
        "random": (pytest.approx((4 - 2) / 6), 4),
    }
    assert {row["subject"] for row in table.rows("comparisons", phase="search")} == {tied, third, stopped}
    assert sum(row["trials"] for row in table.rows("lessons", kind="size", axis="mlp", tokens=LAST)) == 3


def test_lessons_tell_sizes_and_flips(tmp_path: Path) -> None:
    table, (best, tied, third, *_) = searched(tmp_path)
    conclude(table.plan, table.store)
    sizes = {
        (row["size"], row["tokens"]): row["trials"] for row in table.rows("lessons", kind="size", axis="mlp")
    }
    assert sizes[48, 100] == 1 and sum(count for (_, tokens), count in sizes.items() if tokens == LAST) == 3
    flips = {(row["winner"], row["loser"]) for row in table.rows("lessons", kind="flip", from_tokens=0)}
    assert {(best, third), (best, tied), (tied, third)} == flips


def test_axes_that_follow_others_are_no_lessons(tmp_path: Path) -> None:
    """Where each head has keys and values of its own, KV groups are the heads once more."""
    alone = {**CONFIG, "num_key_value_heads": CONFIG["num_attention_heads"]}
    plan = plan_of(alone, space={"layers": "2..4", "heads": [2, 4, 6]})
    assert {row.candidate.kv_heads for row in plan.feasible} == {2, 4, 6}
    table = Table(plan, tmp_path)
    for at in range(8):
        table.trial(at, 6.0 + at, 4.0 + at, 3.0 + at)
    conclude(plan, table.store)
    assert {row["axis"] for row in table.rows("lessons", kind="size")} == {"layers", "heads"}
    shares = {row["axis"]: row["importance"] for row in table.rows("lessons", kind="importance", tokens=LAST)}
    assert shares.keys() == {"layers", "heads"} and sum(shares.values()) == pytest.approx(1)


def test_a_ratio_stays_a_ratio(tmp_path: Path) -> None:
    plan = plan_of(space={"layers": "2..4", "mlp": {"ratio": [1, 1.5, 2]}})
    table = Table(plan, tmp_path)
    for at in range(3):
        table.trial(at, 6.0, 4.0 + at, 3.0 + at)
    conclude(plan, table.store)
    assert {row["size"] for row in table.rows("lessons", kind="size", axis="mlp_ratio")} == {1.0, 1.5, 2.0}
    assert not table.rows("lessons", axis="mlp")


def test_a_front_keeps_what_no_other_beats_in_both(tmp_path: Path) -> None:
    """Sizes grow with the place: a larger one is on the front only where its loss is less."""
    table = Table(plan_of(sampler={"kind": "nsga2", "against": "parameters"}, keep=3), tmp_path)
    small, middle, large = (table.trial(at, 6.0, 4.0, loss) for at, loss in ((0, 3.4), (1, 3.6), (3, 3.1)))
    chosen, summary = table.chosen()
    assert chosen == [large, small] and middle not in chosen
    assert "only trials on the front can be kept" in summary
    assert "2 on the front of loss and parameters" in summary
    conclude(table.plan, table.store)
    front = table.rows("lessons", kind="front")
    assert [(row["candidate_id"], row["cost"]) for row in front] == [
        (name, table.plan.feasible[table.ids.index(name)].parameters) for name in (large, small)
    ]


def test_a_latency_is_the_first_that_was_measured(tmp_path: Path) -> None:
    """A trial that is taken up at a rung measures anew; what halving went by stays."""
    table = Table(plan_of(sampler={"kind": "nsga2", "against": "latency"}, keep=2), tmp_path)
    slow, fast = table.trial(0, 6.0, 4.0, 3.1), table.trial(1, 6.0, 4.0, 3.4)
    for name, latencies in ((slow, (0.02, 0.02, 0.02)), (fast, (0.01, 0.03, 0.03))):
        for writer, rung, rows in list(table.store.fragments("trials", f"trial-{name}")):
            timed = [row | {"latency": latencies[rung]} for row in rows]
            table.store.append("trials", timed, writer=writer, sequence=rung)
    assert table.chosen()[0] == [slow, fast], "by its last latency the fast one would be off the front"
    conclude(table.plan, table.store)
    assert [row["cost"] for row in table.rows("lessons", kind="front")] == [0.02, 0.01]


def test_an_experiment_without_a_search_has_no_conclusions(tmp_path: Path) -> None:
    plan = make_plan(
        Experiment.model_validate(
            {
                "name": "fixed",
                "teacher": {"path": "./teacher"},
                "data": {"source": {"kind": "files", "path": "x"}, "sequence_length": 16},
                "shape": {"layers": 2},
            }
        ),
        CONFIG,
    )
    conclude(plan, Store(tmp_path, "fixed", "run"))
    assert not (tmp_path / "tables").exists()
