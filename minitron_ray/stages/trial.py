"""One trial: cut a candidate out of the teacher, distill it briefly, and measure it at every rung.

`retrain` is the distillation and the measuring, for any student; `Objective` is what Ray Tune calls.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_ray.core.errors import EnvironmentFailure, MinitronError
from minitron_ray.distillation.loop import MOST_SKIPPED, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.execution.cluster import GroupSize
from minitron_ray.importance.scores import Scores
from minitron_ray.plan.tokens import rung_tokens as planned_rungs
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial_state import FileState, TrialState
from minitron_ray.weights.device import local_device, memory_shortage
from minitron_ray.weights.headless import Headless

_PASSES: Final = 9
"""Forward passes of which a latency is the median; the first of all is not counted."""
_PARTS: Final = 10
"""Of a trial's steps: between two of them its state may be saved."""
_SAVE_AFTER_S: Final = 60.0
"""Seconds since the last save before the state is saved between two rungs, so that short trials write none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RungResult:
    """A student on the validation sequences after so many tokens. Losses are nats per token."""

    tokens: int
    """0 for the student as it was given."""
    val_loss: float
    val_divergence: float | None
    """KL(teacher || student), of the student as it was given and at the last rung; None between."""
    train_loss: float | None
    """Mean distillation loss since the rung before; None at the first."""
    losses: tuple[float, ...]
    """Of each validation sequence, in order."""
    seconds: float
    """Of training and measuring so far, over all attempts."""
    final: bool


def retrain(
    setting: Setting,
    student: Headless,
    teacher: TeacherSignal,
    share: Share,
    *,
    on_rung: Callable[[RungResult], None],
    on_step: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
    resume: TrialState | None = None,
    one_rung: bool = False,
) -> list[RungResult]:
    """Train `student` in place by `search.retrain`, and give the rungs it passed; the last one is `final`
    unless `stop` asked to end early, or `one_rung` to end at the next rung after rung 0.

    `on_rung` hears of rung 0 and of every rung, `on_step` of every optimizer step. With `resume`, the
    state is kept at every rung but the last, before `on_rung` hears of it, at a stop, and between rungs
    where these are minutes apart; where one is kept already, training goes on from it, after `on_rung`
    heard of the rungs that it passed. With several ranks in `share`, all must call. Raises MinitronError
    when a loss or gradient is not finite.
    """
    training = _Retraining(setting, student, teacher, share, on_rung, resume)
    training.run(on_step, stop, one_rung)
    return training.rungs


def rung_steps(setting: Setting) -> tuple[int, ...]:
    """Optimizer steps after which a trial reports: at tokens, tokens/reduction, tokens/reduction^2, ..."""
    step = setting.experiment.searched.retrain.batch * setting.experiment.data.sequence_length
    return tuple(tokens // step for tokens in rung_tokens(setting))


def rung_tokens(setting: Setting) -> tuple[int, ...]:
    """The same in tokens: what the rungs' results are keyed by."""
    return planned_rungs(setting.experiment)


class _Retraining:
    """The student, its optimizer, and the rungs so far."""

    def __init__(
        self,
        setting: Setting,
        student: Headless,
        teacher: TeacherSignal,
        share: Share,
        on_rung: Callable[[RungResult], None],
        state: TrialState | None,
    ) -> None:
        retrain = setting.experiment.searched.retrain
        self._setting, self._student, self._teacher, self._share = setting, student, teacher, share
        layers = len(list(student.model.get_submodule(setting.family.decoder_layers).children()))
        self._recipe: Recipe = replace(
            setting.recipe(retrain, retrain.tokens, retrain.loss),
            intermediate=setting.intermediate(retrain, layers),
        )
        self._batch = retrain.batch
        self._optimizer = make_optimizer(student, self._recipe)
        self._on_rung, self._state = on_rung, state
        self.rungs: list[RungResult] = []
        self._losses: list[float] = []
        self._skipped = 0
        self._before = 0.0
        self._started = self._saved = time.monotonic()

    def run(self, on_step: Callable[[Step], None], stop: Callable[[], bool], one_rung: bool) -> None:
        done = self._load()
        for known in self.rungs:
            self._on_rung(known)
        if not self.rungs:
            self._rung(0, final=False)
        rungs, last = rung_steps(self._setting), self._recipe.steps
        data = self._setting.training_data(self._batch)
        for step in train(
            self._student,
            self._optimizer,
            self._teacher,
            data,
            self._recipe,
            self._share,
            first_step=done + 1,
            stop_requested=stop,
            skipped=self._skipped,
        ):
            self._skipped = step.skipped
            if step.skipped > MOST_SKIPPED:
                continue  # `train` is about to raise
            if not step.skipped:
                self._losses.append(step.loss)
            on_step(step)
            if step.step in rungs:
                self._rung(step.step, final=step.step == last)
            elif self._state is not None and (step.stop_requested or self._due(step.step)):
                self._save(step.step)
            if step.stop_requested or (one_rung and step.step in rungs):
                return

    def _rung(self, step: int, final: bool) -> None:
        # Between the cut and the end halving goes by the loss; nothing reads the divergence, which takes
        # another projection and softmax, or a pass of the teacher.
        teacher = self._teacher if final or not step else None
        measured = self._setting.measure(self._student, self._share, teacher)
        if not math.isfinite(measured.loss):
            if step == 0:  # nothing has been learnt: no rate is to blame
                raise MinitronError(
                    f"validation loss {measured.loss} of the undistilled student is not finite; its teacher's weights "
                    f"are, so products overflow: set `precision: float32`, or cut less"
                )
            raise MinitronError(
                f"validation loss {measured.loss} after {step} steps is not finite; lower learning_rate "
                f"(now {self._recipe.schedule.peak}) or raise warmup"
            )
        result = RungResult(
            tokens=step * self._recipe.batch * self._recipe.sequence_length,
            val_loss=measured.loss,
            val_divergence=measured.divergence,
            train_loss=sum(self._losses) / len(self._losses) if self._losses else None,
            losses=tuple(measured.losses.tolist()),
            seconds=self._seconds(),
            final=final,
        )
        self._losses.clear()
        self.rungs.append(result)
        if self._state is not None and step and not final:
            self._save(step)
        self._on_rung(result)

    def _seconds(self) -> float:
        """Of all attempts so far."""
        return self._before + time.monotonic() - self._started

    def _due(self, step: int) -> bool:
        """Whether the state is to be saved behind this step, between two rungs. By rank 0's clock: all ranks
        save together, and clocks differ."""
        if step % max(1, self._recipe.steps // _PARTS):
            return False
        due = time.monotonic() - self._saved >= _SAVE_AFTER_S
        if self._share.world == 1:
            return due
        told = torch.tensor([float(due)], device=self._share.device)
        dist.broadcast(told, src=0)
        return bool(told.item())

    def _save(self, step: int) -> None:
        assert self._state is not None
        note = {
            "step": step,
            "skipped": self._skipped,
            "recipe": repr(self._recipe),
            "rungs": [asdict(rung) for rung in self.rungs],
            "losses": self._losses,  # one by one: a sum of sums has other last digits
            "seconds": self._seconds(),
        }
        self._state.save(self._student, self._optimizer, note)
        self._saved = time.monotonic()

    def _load(self) -> int:
        """The step that the state stands at; 0 where there is nothing to go on from."""
        if self._state is None:
            return 0
        note = self._state.load(self._student, self._optimizer, repr(self._recipe))
        if note is None:
            return 0
        self.rungs = [RungResult(**{**rung, "losses": tuple(rung["losses"])}) for rung in note["rungs"]]
        # Until states were saved between rungs, too, a note had no losses and no seconds of its own.
        self._losses = list(note.get("losses", ()))
        self._before = note.get("seconds", self.rungs[-1].seconds)
        self._skipped = note.get("skipped", 0)
        step: int = note["step"]
        return step


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What Ray Tune calls in each trial's process."""

    setting: Setting
    scores: Scores
    candidates: dict[str, Candidate]
    signal: Path | None
    """Folder of the teacher's stored signal; None runs the teacher in the trial."""
    checkpoints: Path | None
    """Holds a folder a candidate, with the state that it goes on from; None where none is to be kept."""
    latency: bool = False
    """Whether the time of a forward pass is to be measured, too."""
    group: GroupSize | None = None
    """The processes that share a student; None where the trial's own trains each."""
    alone: frozenset[str] = frozenset()
    """Candidates that the trial's own process trains even so."""

    def __call__(
        self, candidate_id: str, report_rung: Callable[[dict[str, Any]], None], reporter: Any
    ) -> None:
        """Reports at rung 0 (the undistilled cut) and at every rung of tokens; ends early when asked to stop.

        Called again for a candidate, it goes on from its checkpoint, and first reports the rungs passed.
        """
        setting, candidate = self.setting, self.candidates[candidate_id]
        parameters = setting.family.parameters(candidate.architecture(setting.architecture))
        reporter(
            "trial_started", candidate_id=candidate_id, shape=candidate.shape_text(), parameters=parameters
        )
        # Alone because it was thought to fit: in a group it does.
        share = "set devices with less memory" if candidate_id in self.alone else "raise trial_workers"
        group = None if candidate_id in self.alone else self.group
        with told_of_memory(setting, candidate.shape_text(), group, share):
            if group is not None:
                self._in_group(group, candidate, report_rung, reporter)
            else:
                self._alone(candidate, report_rung, reporter)

    def _alone(
        self, candidate: Candidate, report_rung: Callable[[dict[str, Any]], None], reporter: Any
    ) -> None:
        setting, share = self.setting, self.setting.share()
        measured = {}
        if self.latency:  # before the student takes its memory
            measured["latency"] = latency(setting.undistilled(candidate, self.scores, share), share, setting)
        student = setting.student(candidate, self.scores, share.device)
        setting.lift(student, setting.experiment.searched.retrain, candidate, self.scores)
        teacher: TeacherSignal = (
            setting.stored_teacher(self.signal, share) if self.signal else setting.online_teacher(share)
        )

        def on_step(step: Step) -> None:
            reporter("trial_progress", **progress_fields(setting, candidate, step))

        retrain(
            setting,
            student,
            teacher,
            share,
            on_rung=lambda rung: report_rung({**asdict(rung), "losses": list(rung.losses), **measured}),
            on_step=on_step,
            stop=reporter.stop_requested,
            resume=FileState(self.checkpoints / candidate.id / "rung.pt") if self.checkpoints else None,
        )

    def _in_group(
        self,
        group: GroupSize,
        candidate: Candidate,
        report_rung: Callable[[dict[str, Any]], None],
        reporter: Any,
    ) -> None:
        """A group for each rung, each going on from what the one before left."""
        from minitron_ray.execution.train_group import run_group_in_trial
        from minitron_ray.stages.trial_group import GroupTrial, to_next_rung

        assert self.checkpoints is not None
        trial = GroupTrial(
            setting=self.setting,
            scores=self.scores,
            candidate=candidate,
            signal=self.signal,
            folder=self.checkpoints / candidate.id,
        )
        reported = 0
        while True:
            rungs = run_group_in_trial(group, to_next_rung, trial, reporter)
            for rung in rungs[reported:]:
                report_rung({**asdict(rung), "losses": list(rung.losses)})
            reported = len(rungs)
            if rungs[-1].final or reporter.stop_requested():
                return


@contextmanager
def told_of_memory(
    setting: Setting, student: str, group: GroupSize | None, share: str = "raise trial_workers"
) -> Iterator[None]:
    """Within it, memory that cannot be had is told as a shortage for training `student`, by `group` or by this
    process, and what would do: among others to `share` it.

    Raises EnvironmentFailure for it, and any other error as it is.
    """
    try:
        yield
    except Exception as error:
        shortage = memory_shortage(error)
        if shortage is None:
            raise
        lower = ["micro_batch"] if setting.micro_batch > 1 else []
        on_gpu = local_device().type == "cuda" if group is None else group.each.gpus > 0
        lower += [] if on_gpu else ["concurrent_trials"]  # they share the memory
        remedies = [f"lower {' or '.join(lower)}"] if lower else []
        remedies += [] if setting.engine.recompute else ["set activation_checkpointing: true"]
        raise EnvironmentFailure(
            f"{student} at micro_batch {setting.micro_batch} needs more memory than there is for a trial: {shortage}; "
            f"{', '.join(remedies)}{' or ' if remedies else ''}{share} in the cluster file, then run the same "
            "command again"
        ) from error


def progress_fields(setting: Setting, candidate: Candidate, step: Step) -> dict[str, Any]:
    """What the event `trial_progress` says of a step."""
    return {
        "candidate_id": candidate.id,
        "tokens": step.tokens,
        "total_tokens": rung_tokens(setting)[-1],
        "train_loss": step.loss,
        "tokens_per_second": step.tokens_per_second,
    }


def _last_logits(hidden: Tensor, head: Tensor) -> Tensor:
    return F.linear(hidden[:, -1], head)


@torch.no_grad()
def latency(student: Headless, share: Share, setting: Setting) -> float:
    """Seconds of a forward pass of one sequence to the logits of its last token, as a prompt is served: the median
    of several. `student` has the precision that it is served in."""
    tokens = setting.tokens().sequences(setting.training_indices(1, 1)[:1])
    ids = torch.from_numpy(tokens).to(share.device)
    found = []
    for _ in range(_PASSES + 1):
        started = time.perf_counter()
        student(ids, _last_logits)
        if share.device.type == "cuda":
            torch.cuda.synchronize(share.device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])
