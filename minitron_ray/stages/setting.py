"""`Setting`: what a worker process needs to open teacher, students and data. Small, and picklable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_ray.data.batches import batch_indices
from minitron_ray.data.splits import Splits
from minitron_ray.data.tokens import TokenStore
from minitron_ray.distillation.loop import Data, Recipe, Share
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sharding import Sharding
from minitron_ray.distillation.teacher import OnlineTeacher, StoredTeacher, TeacherSignal
from minitron_ray.evaluation.measure import Measurement, measure
from minitron_ray.experiment import Experiment, Optimization
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.models.kept import Kept
from minitron_ray.search.selection import select
from minitron_ray.search.space import Candidate
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.device import compute_dtype, local_device
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build
from minitron_ray.weights.surgery import cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Paths and values only; models and token files are opened by the methods, where they are called."""

    experiment: Experiment
    teacher_folder: Path
    tokens_folder: Path
    splits: Splits
    micro_batch: int
    start_folder: Path | None = None
    """Of the model that is cut; None where that is the teacher."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that is cut, as the model type that the experiment takes it as."""
        return Checkpoint(self.start_folder or self.teacher_folder, as_type=self.experiment.export.as_type)

    @property
    def teacher_checkpoint(self) -> Checkpoint:
        """The model that is learnt from, likewise."""
        return Checkpoint(self.teacher_folder, as_type=self.experiment.export.as_type)

    @property
    def family(self) -> Family:
        """Of both."""
        return family_of(self.checkpoint.config)

    @property
    def architecture(self) -> Architecture:
        """Of the model that is cut."""
        return self.family.read(self.checkpoint.config)

    @property
    def teacher_architecture(self) -> Architecture:
        return self.family.read(self.teacher_checkpoint.config)

    def tokens(self) -> TokenStore:
        return TokenStore(self.tokens_folder)

    def share(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> Share:
        """This process's part of the work, on its own device."""
        device = device or local_device()
        dtype = compute_dtype(self.experiment.precision, device)
        return Share(rank=rank, world=world, device=device, dtype=dtype, micro_batch=self.micro_batch)

    def teacher(self, share: Share) -> Headless:
        """The whole teacher, frozen, in the precision of the computation."""
        return self._whole(self.teacher_checkpoint, share)

    def start(self, share: Share) -> Headless:
        """The whole model that is cut, likewise."""
        return self._whole(self.checkpoint, share)

    def _whole(self, checkpoint: Checkpoint, share: Share) -> Headless:
        model = build(checkpoint.config, checkpoint, dtype=share.dtype, device=share.device, trainable=False)
        return Headless(model.eval())

    def online_teacher(self, share: Share) -> OnlineTeacher:
        return OnlineTeacher(self.teacher(share))

    def stored_teacher(self, folder: Path, share: Share) -> StoredTeacher:
        """The teacher's stored signal; of the model itself only the LM head is opened."""
        checkpoint, family = self.teacher_checkpoint, self.family
        name = family.embedding if self.teacher_architecture.tied else family.lm_head
        head = checkpoint.tensor(f"{name}.weight").to(share.device, share.dtype)
        return StoredTeacher(folder, head, family.softcap_of(checkpoint.config))

    def student(
        self, candidate: Candidate, scores: Scores, device: torch.device, *, trainable: bool = True
    ) -> Headless:
        """The undistilled student cut from the memory-mapped checkpoint, float32."""
        config, tensors = self.cut(candidate, scores, torch.float32)
        return Headless(build(config, tensors, dtype=torch.float32, device=device, trainable=trainable))

    def sharded_student(
        self, candidate: Candidate, scores: Scores, world: int, device: torch.device
    ) -> Headless:
        """The same for training, spread over the devices of `world` ranks, which must all call: each
        layer as soon as it is cut, so that no device ever holds the whole student."""
        config, tensors = self.cut(candidate, scores, torch.float32)
        sharding = Sharding(world, device)
        student = Headless(
            build(
                config,
                tensors,
                dtype=torch.float32,
                device=device,
                trainable=True,
                each_layer=sharding.layer,
            )
        )
        sharding.rest(student)
        return student

    def cut(
        self, candidate: Candidate, scores: Scores, dtype: torch.dtype
    ) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
        """The `config.json` and the weights of the undistilled student."""
        checkpoint, family, whole = self.checkpoint, self.family, self.architecture
        kept = self._kept(candidate, scores)
        config = family.student_config(checkpoint.config, candidate.architecture(whole), kept)
        return config, cut(checkpoint, family, whole, kept, dtype=dtype)

    def student_config(self, candidate: Candidate, scores: Scores) -> dict[str, Any]:
        """The student's `config.json`."""
        arch, kept = candidate.architecture(self.architecture), self._kept(candidate, scores)
        return self.family.student_config(self.checkpoint.config, arch, kept)

    def _kept(self, candidate: Candidate, scores: Scores) -> Kept:
        return select(scores, candidate, self.architecture, self.experiment.cut)

    def recipe(self, optimization: Optimization, tokens: int, loss: DistillationLoss) -> Recipe:
        return Recipe(
            loss=loss,
            schedule=Schedule(
                peak=optimization.learning_rate,
                minimum=optimization.minimum_learning_rate,
                warmup=optimization.warmup,
                tokens=tokens,
            ),
            batch=optimization.batch,
            sequence_length=self.experiment.data.sequence_length,
            weight_decay=optimization.weight_decay,
            betas=optimization.betas,
            clip=optimization.clip,
        )

    def training_indices(self, step: int, batch: int) -> np.ndarray:
        """The sequences of an optimizer step (from 1): the same for every candidate and every attempt."""
        return batch_indices(self.splits.train, step - 1, batch, self.experiment.seed)

    def training_data(self, batch: int) -> Data:
        return Data(batch=lambda step: self.training_indices(step, batch), sequences=self.tokens().sequences)

    def measure(
        self,
        subject: Headless | None,
        share: Share,
        teacher: TeacherSignal | None = None,
        progress: Callable[[int], None] = lambda sequences: None,
        first: int | None = None,
    ) -> Measurement:
        """`subject`, or the teacher itself where that is None, on the validation sequences (the `first` so
        many of them), against `teacher` where one is given."""
        indices = list(self.splits.validation)[:first]
        return measure(
            subject,
            self.tokens().sequences(np.asarray(indices)),
            indices,
            dtype=share.dtype,
            device=share.device,
            batch=share.micro_batch,
            teacher_hidden=teacher.hidden if teacher else None,
            teacher_head=teacher.head if teacher else None,
            teacher_softcap=teacher.softcap if teacher else None,
            rank=share.rank,
            world=share.world,
            progress=progress,
        )
