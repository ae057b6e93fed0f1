"""What a distillation tells of its steps: rows of `steps`, progress, and warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from minitron_ray.distillation.divergence import rise
from minitron_ray.distillation.loop import Share, Step
from minitron_ray.evaluation.measure import Measurement
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting

Row = dict[str, Any]


class StepLog:
    """Of one student, the same on every rank; only rank 0's `report` reaches the user."""

    def __init__(
        self,
        setting: Setting,
        candidate: Candidate,
        share: Share,
        *,
        teacher: Literal["online", "stored"] | None,
        stage: str,
        total: int,
        report: Callable[..., None],
    ) -> None:
        """`total` is the number of tokens of the whole training, `stage` the one that it is of."""
        self._candidate, self._share, self._stage = candidate, share, stage
        self._total, self._report = total, report
        self._operations = setting.training_flops(candidate, teacher=teacher)
        self._peak = setting.peak(share)
        self._divergences: list[tuple[int, float]] = []
        self.rows: list[Row] = []
        """Not yet written."""

    def go_on(self, rows: Iterable[Mapping[str, Any]], last: int) -> int:
        """Takes up what earlier attempts wrote of the steps up to `last`; returns how many in a row were
        skipped right before its end."""
        own = [row for row in rows if row["candidate_id"] == self._candidate.id and row["step"] <= last]
        own.sort(key=lambda row: row["step"])
        measured = [(row["tokens"], row["val_divergence"]) for row in own]
        self._divergences = [(tokens, found) for tokens, found in measured if found is not None]
        return own[-1]["skipped"] or 0 if own and own[-1]["step"] == last else 0

    def add(self, step: Step, validation: Measurement | None) -> None:
        """A step that was made, or skipped, and what was measured after it."""
        val_loss = None if validation is None else _finite(validation.loss)
        divergence = None
        if validation is not None and validation.divergence is not None:
            divergence = _finite(validation.divergence)
        self.rows.append(
            {
                "candidate_id": self._candidate.id,
                "step": step.step,
                "tokens": step.tokens,
                "loss": _finite(step.loss),
                "logit_loss": _finite(step.logit_loss),
                "intermediate_loss": None
                if step.intermediate_loss is None
                else _finite(step.intermediate_loss),
                "gradient_norm": _finite(step.gradient_norm),
                "learning_rate": step.learning_rate,
                "val_loss": val_loss,
                "val_divergence": divergence,
                "tokens_per_second": step.tokens_per_second,
                "workers": self._share.world,
                "skipped": step.skipped,
                "mfu": self.utilization(step.tokens_per_second),
                "peak_memory": step.memory,
            }
        )
        measured = {"loss": _finite(step.loss), "val_loss": val_loss}
        self._report(
            "stage_progress",
            stage=self._stage,
            done=step.tokens,
            total=self._total,
            unit="tokens",
            step=step.step,
            tokens_per_second=step.tokens_per_second,
            **{name: value for name, value in measured.items() if value is not None},
        )
        self._warn(step, divergence)

    def utilization(self, tokens_per_second: float) -> float | None:
        """Of the devices' peak; None where that is not known."""
        if self._peak is None:
            return None
        return self._operations * tokens_per_second / (self._peak * self._share.world)

    def _warn(self, step: Step, divergence: float | None) -> None:
        name = self._candidate.shape_text()
        if step.skipped:
            text = f"{name}: step {step.step} is skipped, its loss or gradient is not finite"
            self._report("note", text=text)
        if divergence is None:
            return
        known = rise(self._divergences)
        self._divergences.append((step.tokens, divergence))
        if known is None and (risen := rise(self._divergences)) is not None:  # once
            self._report("note", text=f"{name}: {risen}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
