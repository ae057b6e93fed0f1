"""One trial: cut a candidate out of the teacher, distill it briefly, and measure it at every rung."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_ray.distillation.loop import make_optimizer, train
from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import steps
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What Ray Tune calls in each trial's process."""

    setting: Setting
    scores: Scores
    candidates: dict[str, Candidate]
    signal: Path | None
    """Folder of the teacher's stored signal; None runs the teacher in the trial."""

    def __call__(
        self, candidate_id: str, report_rung: Callable[[dict[str, Any]], None], reporter: Any
    ) -> None:
        """Reports at rung 0 (the undistilled cut) and at every rung of tokens; ends early when asked to stop."""
        started = time.monotonic()
        torch.manual_seed(self.setting.experiment.seed)  # a reused process keeps the last trial's state
        share = self.setting.share()
        candidate = self.candidates[candidate_id]
        parameters = self.setting.family.parameters(candidate.architecture(self.setting.architecture))
        reporter(
            "trial_started", candidate_id=candidate_id, shape=candidate.shape_text(), parameters=parameters
        )
        setting, retrain = self.setting, self.setting.experiment.searched.retrain
        student = setting.student(candidate, self.scores, share.device)
        teacher: TeacherSignal = (
            setting.stored_teacher(self.signal, share) if self.signal else setting.online_teacher(share)
        )
        recipe = setting.recipe(retrain, retrain.tokens, retrain.loss)
        rungs = rung_steps(setting)
        total = recipe.steps * recipe.batch * recipe.sequence_length

        def rung(tokens: int, train_loss: float | None, final: bool) -> None:
            measured = setting.measure(student, share, teacher)
            report_rung(
                {
                    "tokens": tokens,
                    "val_loss": measured.loss,
                    "val_divergence": measured.divergence,
                    "train_loss": train_loss,
                    "losses": measured.losses.tolist(),
                    "seconds": time.monotonic() - started,
                    "final": final,
                }
            )

        rung(0, None, final=False)
        losses: list[float] = []
        optimizer = make_optimizer(student, recipe)
        data = setting.training_data(retrain.batch)
        for step in train(student, optimizer, teacher, data, recipe, share):
            losses.append(step.loss)
            reporter(
                "trial_progress",
                candidate_id=candidate_id,
                tokens=step.tokens,
                total_tokens=total,
                train_loss=step.loss,
                tokens_per_second=step.tokens_per_second,
            )
            if step.step in rungs:
                rung(step.tokens, sum(losses) / len(losses), final=step.step == recipe.steps)
                losses.clear()
            if reporter.stop_requested():
                return


def rung_steps(setting: Setting) -> tuple[int, ...]:
    """Optimizer steps after which a trial reports: at tokens, tokens/reduction, tokens/reduction^2, ..."""
    search, length = setting.experiment.searched, setting.experiment.data.sequence_length
    retrain = search.retrain
    reduction = search.halving.reduction if search.halving else 2.0
    found = {
        steps(math.ceil(retrain.tokens / reduction**k), retrain.batch, length) for k in range(retrain.rungs)
    }
    return tuple(sorted(found))
