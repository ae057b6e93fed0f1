"""Stage `evaluate`: teacher and distilled students on the same tokens by the same code.

The undistilled cuts were measured by that code too, at rung 0 of their trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.evaluation.measure import Measurement
from minitron_ray.plan import distilled_tokens
from minitron_ray.stages.context import Context
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

VERSION = 1


def run(
    context: Context, setting: Setting, folders: dict[str, str], signal: str | None
) -> tuple[dict[str, Any], str]:
    """Writes `evaluations` and `sequence_losses`; returns each subject's perplexity."""
    store, tokens = context.run.store, distilled_tokens(context.experiment)
    paths = {candidate_id: (context.run.folder / path).resolve() for candidate_id, path in folders.items()}
    measured: dict[str, Measurement] = context.cluster.call(measure_all, setting, paths, signal)
    predictions = len(setting.splits.validation) * (setting.experiment.data.sequence_length - 1)
    perplexities = {}
    for subject, measurement in measured.items():
        phase = "teacher" if subject == "teacher" else "distilled"
        seen = 0 if subject == "teacher" else tokens
        rows = _rows(subject, phase, measurement, predictions, seen)
        if subject != "teacher":
            cut = _cut_measurement(context, subject)
            rows += _rows(subject, "cut", cut, predictions, 0)
        store.append("evaluations", rows, writer=f"evaluate-{subject}", sequence=0)
        losses = [
            {"subject": subject, "phase": phase, "tokens": seen, "sequence": sequence, "loss": float(loss)}
            for sequence, loss in zip(setting.splits.validation, measurement.losses, strict=True)
        ]
        store.append("sequence_losses", losses, writer=f"evaluate-{subject}", sequence=0)
        perplexities[subject] = measurement.perplexity
    told = ", ".join(f"{subject} {value:.2f}" for subject, value in perplexities.items())
    return {"perplexity": perplexities}, f"perplexity: {told}"


def measure_all(
    setting: Setting, folders: dict[str, Path], signal: str | None, report: Callable[..., None]
) -> dict[str, Measurement]:
    """In a worker: measure the teacher, then every student against it."""
    share = setting.share()
    sequences = setting.splits.validation
    teacher: TeacherSignal = (
        setting.stored_teacher(Path(signal), share) if signal else setting.online_teacher(share)
    )
    total = len(sequences) * (1 + len(folders))
    measured: dict[str, Measurement] = {}

    def one(subject: Headless) -> Measurement:
        done = len(sequences) * len(measured)
        return setting.measure(
            subject,
            share,
            teacher,
            progress=lambda n: report(
                "stage_progress", stage="evaluate", done=done + n, total=total, unit="sequences"
            ),
        )

    measured["teacher"] = one(setting.teacher(share))
    for candidate_id, folder in folders.items():
        checkpoint = Checkpoint(folder)
        # float32, as in training: products are cast by autocast.
        model = build(
            checkpoint.config, checkpoint, dtype=torch.float32, device=share.device, trainable=False
        )
        measured[candidate_id] = one(Headless(model))
    return measured


def _cut_measurement(context: Context, candidate_id: str) -> Measurement:
    """What the candidate's trial measured before it was distilled."""
    losses = [
        (row["sequence"], row["loss"])
        for row in context.run.store.read("sequence_losses").to_pylist()
        if row["subject"] == candidate_id and row["phase"] == "cut"
    ]
    divergence = next(
        row["val_divergence"]
        for row in context.run.store.read("trials").to_pylist()
        if row["candidate_id"] == candidate_id and row["rung"] == 0
    )
    return Measurement(
        losses=np.asarray([loss for _, loss in sorted(losses)]),
        divergences=np.asarray([divergence]),
    )


def _rows(
    subject: str, phase: str, measurement: Measurement, predictions: int, distill_tokens: int
) -> list[dict[str, Any]]:
    figures = [
        ("val_loss", measurement.loss, measurement.stderr),
        # The error of exp(x) to first order.
        ("perplexity", measurement.perplexity, measurement.perplexity * measurement.stderr),
    ]
    if measurement.divergence is not None:
        error = measurement.divergence_stderr
        figures.append(("val_divergence", measurement.divergence, math.nan if error is None else error))
    return [
        {
            "subject": subject,
            "phase": phase,
            "metric": metric,
            "value": value,
            "stderr": None if math.isnan(error) else error,
            "sequences": len(measurement.losses),
            "tokens": predictions,
            "distill_tokens": distill_tokens,
        }
        for metric, value, error in figures
    ]
