"""`Setting`: what a worker process needs to open teacher, students and data. Small, and picklable."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from minitron_ray.core.hardware import peak_of
from minitron_ray.data.batches import batch_indices
from minitron_ray.data.splits import Splits
from minitron_ray.data.tokens import TokenStore
from minitron_ray.distillation.engine import TEACHER_SHARE, Engine
from minitron_ray.distillation.loop import Data, Recipe, Share
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sections import Distillation, Optimization
from minitron_ray.distillation.sharding import FrozenSharding, Sharding, prepare_layer
from minitron_ray.distillation.state_loss import Intermediate
from minitron_ray.distillation.teacher import OnlineTeacher, StoredTeacher, TeacherSignal
from minitron_ray.evaluation.measure import Measurement, measure
from minitron_ray.experiment import Experiment, Retrain
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import BYTES, forward_flops, head_flops, training_flops
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.models.kept import Kept
from minitron_ray.plan.intermediate import resolve_intermediate
from minitron_ray.search.selection import select
from minitron_ray.search.space import Candidate
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.device import compute_dtype, free_memory, local_device
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build
from minitron_ray.weights.surgery import CutTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors: TypeAlias = Checkpoint | Mapping[str, torch.Tensor]


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
    separator: int | None = None
    """The id that ends a document, where documents are apart; None where they are joined."""
    engine: Engine = field(default_factory=Engine)

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

    @property
    def vocabulary(self) -> int:
        """Rows that both LM heads have. Models of one tokenizer may be padded to unlike sizes; what one of them
        has no row for takes no part in losses."""
        return min(self.architecture.vocab, self.teacher_architecture.vocab)

    def tokens(self) -> TokenStore:
        return TokenStore(self.tokens_folder)

    @property
    def model_folders(self) -> tuple[Path, ...]:
        """The teacher's and, where it is another, that of the model that is cut: read by every worker."""
        return tuple(folder for folder in (self.teacher_folder, self.start_folder) if folder is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products. Where `precision` says it, as in a run it does, no device is asked: the first question
        takes some of a GPU's memory, and the command itself computes nothing."""
        precision = self.experiment.precision
        return compute_dtype(precision, local_device() if precision == "auto" else torch.device("cpu"))

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
        return self.headless(model.eval())

    def headless(self, model: PreTrainedModel) -> Headless:
        """A model as it runs over packed sequences here."""
        return Headless(model, self.separator)

    def online_teacher(self, share: Share) -> OnlineTeacher:
        """The teacher as it runs beside students. Of several ranks all must call: it is spread over them
        where it would take more than a tenth of the memory that the fullest of their devices has free."""
        if not self._spreads_teacher(share):
            return OnlineTeacher(self.teacher(share), self.vocabulary)
        checkpoint = self.teacher_checkpoint
        return OnlineTeacher(self._spread(checkpoint.config, checkpoint, share, share.dtype), self.vocabulary)

    def _spread(
        self, config: Mapping[str, Any], tensors: Tensors, share: Share, dtype: torch.dtype
    ) -> Headless:
        """A model that only runs forward, over the devices of all ranks of `share`, which must all call."""
        gc.collect()  # one that was spread before and is no longer used is a cycle, on the devices until then
        sharding = FrozenSharding(share.world, share.device)
        model = self.headless(
            build(config, tensors, dtype=dtype, device=share.device, each_layer=sharding.layer)
        )
        head = model.head
        assert isinstance(head, torch.nn.Parameter)
        sharding.rest(model, head)
        return model

    def undistilled(self, candidate: Candidate, scores: Scores, share: Share) -> Headless:
        """A cut that only runs forward, in the precision of the computation: over the devices of all ranks of
        `share`, which must all call, where there are several."""
        config, tensors = self.cut(candidate, scores, share.dtype)
        if share.world > 1:
            return self._spread(config, tensors, share, share.dtype)
        return self.headless(build(config, tensors, dtype=share.dtype, device=share.device))

    def measured(self, config: Mapping[str, Any], tensors: Tensors, share: Share) -> Headless:
        """A student that is measured, float32 as in training (products are cast by autocast): over the devices of
        all ranks of `share`, which must all call, where there are several."""
        if share.world > 1:
            return self._spread(config, tensors, share, torch.float32)
        return self.headless(build(config, tensors, dtype=torch.float32, device=share.device))

    def _spreads_teacher(self, share: Share) -> bool:
        if share.world == 1 or self.engine.teacher != "auto":
            return share.world > 1 and self.engine.teacher == "sharded"
        free = torch.tensor(float(free_memory(share.device)), device=share.device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)  # all must decide alike
        value = BYTES[str(share.dtype).removeprefix("torch.")]
        return self.family.parameters(self.teacher_architecture) * value > TEACHER_SHARE * float(free)

    def stored_teacher(self, folder: Path, share: Share) -> StoredTeacher:
        """The teacher's stored signal; of the model itself only the LM head is opened."""
        checkpoint, family = self.teacher_checkpoint, self.family
        name = family.embedding if self.teacher_architecture.tied else family.lm_head
        head = checkpoint.tensor(f"{name}.weight")[: self.vocabulary].to(share.device, share.dtype)
        return StoredTeacher(folder, head, family.softcap_of(checkpoint.config))

    def student(self, candidate: Candidate, scores: Scores, device: torch.device) -> Headless:
        """The undistilled student cut from the memory-mapped checkpoint, float32."""
        config, tensors = self.cut(candidate, scores, torch.float32)
        return self.headless(
            build(
                config,
                tensors,
                dtype=torch.float32,
                device=device,
                trainable=True,
                each_layer=lambda layer: prepare_layer(layer, self._trial_engine),
            )
        )

    def sharded_student(
        self, candidate: Candidate, scores: Scores, share: Share, section: Distillation
    ) -> Headless:
        """The same for training, spread over the devices of all ranks of `share`, which must all call: each
        layer as soon as it is cut, so that no device ever holds the whole student. With the projection that
        `section` needs."""
        config, tensors = self.cut(candidate, scores, torch.float32)
        sharding = self.sharding(share, trial=isinstance(section, Retrain))
        student = self.headless(
            build(
                config,
                tensors,
                dtype=torch.float32,
                device=share.device,
                trainable=True,
                each_layer=sharding.layer,
            )
        )
        self.lift(student, section, candidate, scores)
        sharding.rest(student)
        return student

    def intermediate(self, section: Distillation, layers: int) -> Intermediate | None:
        """The hidden states that a student of so many layers is to match in `section`."""
        return resolve_intermediate(section, self.family, self.teacher_architecture.layers, layers)

    def lift(
        self, student: Headless, section: Distillation, candidate: Candidate, scores: Scores | None
    ) -> None:
        """Give a student the map to the teacher's width, where it needs one for `section`.

        For one that was cut from the teacher by `scores` it begins with every channel where that came from.
        Of any other nothing is known of that: it is drawn, from the experiment's seed alone.
        """
        width = self.teacher_architecture.hidden
        if candidate.hidden == width or self.intermediate(section, candidate.layers) is None:
            return
        initial = self._projection(candidate, scores if self.start_folder is None else None, width)
        student.lift(initial.to(student.head.device))

    def _projection(self, candidate: Candidate, scores: Scores | None, width: int) -> torch.Tensor:
        """Float32 (teacher's hidden, student's hidden)."""
        if scores is not None:
            initial = torch.zeros(width, candidate.hidden)
            initial[torch.as_tensor(self._kept(candidate, scores).hidden), torch.arange(candidate.hidden)] = (
                1.0
            )
            return initial
        generator = torch.Generator().manual_seed(self.experiment.seed)
        return torch.randn(width, candidate.hidden, generator=generator) / candidate.hidden**0.5

    def sharding(self, share: Share, *, trial: bool) -> Sharding:
        """For a student of all ranks of `share`."""
        return Sharding(share.world, share.device, share.dtype, self._trial_engine if trial else self.engine)

    @property
    def _trial_engine(self) -> Engine:
        """Compiling takes longer than a trial, and each shape would have to be."""
        return replace(self.engine, compiled=False)

    def cut(
        self, candidate: Candidate, scores: Scores, dtype: torch.dtype
    ) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
        """The `config.json` and the weights of the undistilled student, each cut whenever it is asked for: of what
        is built layer by layer, or spread over ranks, no process holds them all."""
        checkpoint, family, whole = self.checkpoint, self.family, self.architecture
        kept = self._kept(candidate, scores)
        config = family.student_config(checkpoint.config, candidate.architecture(whole), kept)
        return config, CutTensors(checkpoint, family, whole, kept, dtype=dtype)

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

    def training_flops(self, candidate: Candidate, *, teacher: Literal["online", "stored"] | None) -> int:
        """Model operations of a trained token: the student's forward and backward pass, and of the teacher its
        forward pass, the LM head alone where its final hidden states are stored, or nothing."""
        length = self.experiment.data.sequence_length
        student = candidate.architecture(self.architecture)
        own = training_flops(self.family, student, length)
        if teacher is None:
            return own
        if teacher == "stored":
            return own + head_flops(self.teacher_architecture)
        return own + forward_flops(self.family, self.teacher_architecture, length)

    def peak(self, share: Share) -> float | None:
        """Operations a second of this process's device at its peak: as the cluster file says, or by its name.
        None where that is not known, as for products in float32."""
        if self.engine.peak is not None:
            return self.engine.peak
        if share.device.type != "cuda" or share.dtype != torch.bfloat16:
            return None
        return peak_of(torch.cuda.get_device_name(share.device))

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
            vocabulary=self.vocabulary,
            separator=self.separator,
            rank=share.rank,
            world=share.world,
            progress=progress,
        )
