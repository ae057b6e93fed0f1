"""The section on how distillations went, from rows alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.report.training import trained_on, training_section
from minitron_ray.results.store import Store


def test_speed_memory_skips_and_a_rise_are_told(tmp_path: Path) -> None:
    store = Store(tmp_path, experiment="exp", run_id="run")
    figures = [(100.0, 0.2, 0, 2.0), (300.0, 0.6, 1, None), (100.0, 0.2, 0, 1.0), (100.0, 0.2, 0, 1.5)]
    rows = [
        {
            "candidate_id": "aaaa",
            "step": number,
            "tokens": 1000 * number,
            "tokens_per_second": speed,
            "mfu": share,
            "skipped": skipped,
            "peak_memory": number * 2**30,
            "val_divergence": divergence,
        }
        for number, (speed, share, skipped, divergence) in enumerate(figures, 1)
    ]
    store.append("steps", rows, writer="w", sequence=0)
    costs = [
        {"stage": stage, "memory_bytes": size * 2**30} for stage, size in (("correct", 9), ("distill", 5))
    ]
    store.append("costs", costs, writer="w", sequence=0)
    (section,) = training_section(store, {"aaaa": "4L 48H"})
    # 4 x 1000 tokens in 10 + 3.33 + 10 + 10 seconds.
    assert section.rows == (("4L 48H", "4.0K", "120", "24.0%", "4.0 GiB", "5.0 GiB", "2.0000 → 1.5000"),)
    first, second = section.notes
    assert first == "4L 48H: skipped, as loss or gradient was not finite: step 2"
    assert "rose from 1.0000 after 3.0K tokens to 1.5000 after 4.0K" in second


def test_a_run_that_distilled_nothing_has_no_section(tmp_path: Path) -> None:
    assert training_section(Store(tmp_path, experiment="exp", run_id="run"), {}) == ()


@pytest.mark.parametrize(
    ("distill", "layers", "loss", "told"),
    [
        (
            {"intermediate": "auto"},
            24,
            0.5,
            r"hidden_states \+ embedding, weight dynamic \(8 of 32 .*Table 17",
        ),
        ({"intermediate": "auto"}, 28, None, r"trained on logits \(4 of 32 layers gone, fewer than 25%"),
        (
            {"intermediate": "auto"},
            16,
            None,
            r"trained on logits \(layers of this model type .* without a norm",
        ),
        (
            {"intermediate": "auto", "loss": {"kind": "cross_entropy"}},
            16,
            None,
            r"cross_entropy takes nothing",
        ),
        (
            {"intermediate": [{"kind": "embedding"}]},
            31,
            0.5,
            r"logits \+ embedding, weight dynamic \(as the exp",
        ),
        ({}, 16, None, r"trained on logits \(no intermediate states, as the experiment says\)"),
    ],
)
def test_what_a_student_was_trained_on_is_told_with_the_rule(
    distill: dict[str, Any], layers: int, loss: float | None, told: str, tmp_path: Path
) -> None:
    store = Store(tmp_path, experiment="exp", run_id="run")
    row = {"candidate_id": "aaaa", "step": 1, "tokens": 10, "skipped": 0, "intermediate_loss": loss}
    store.append("steps", [row], writer="w", sequence=0)
    said = trained_on({"tokens": 1000, **distill}, 32, {"aaaa": layers})
    (section,) = training_section(store, {"aaaa": "shape"}, said)
    (note,) = section.notes
    assert note.startswith("shape: trained on ") and re.search(told, note)
