"""One peer's own trainer on the job of peers.py, run by that script in the peer's own environment.

The peers are used as their documentation says, with the arguments that make it the same job: forward KL
of the whole vocabulary at temperature 1, the same sequences in the same order, AdamW and clipping alike,
a constant rate. Arguments: the peer's name, the job's file, two file descriptors (see turns.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from turns import Turn


class Told(TrainerCallback):
    """Hands each finished step over, and waits for the next turn."""

    def __init__(self, turn: Turn) -> None:
        self._turn, self.losses = turn, []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._turn.stepped(float(sum(self.losses)))
        self.losses.clear()


def in_order(trainer: type[Trainer]) -> type[Trainer]:
    """The trainer, with sequences in the order of the file and the loss of each part kept for the check."""

    class InOrder(trainer):
        told: Told

        def _get_train_sampler(self, *arguments: Any, **more: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **more)
            self.told.losses.append(loss.detach())
            return loss

    return InOrder


class Forward(Trainer):
    """What anybody writes first: both models' logits, and `F.kl_div`."""

    def __init__(self, *arguments: Any, teacher: torch.nn.Module, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.teacher, self.model_accepts_loss_kwargs = teacher, False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        ids = inputs["input_ids"]
        with torch.no_grad():
            theirs = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        outputs = model(input_ids=ids, use_cache=False)
        own = F.log_softmax(outputs.logits[:, :-1].float().flatten(0, 1), dim=-1)
        theirs = F.log_softmax(theirs.float().flatten(0, 1), dim=-1)
        loss = F.kl_div(own, theirs, log_target=True, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


def arguments(job: dict[str, Any], kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> Any:
    return kind(
        output_dir=str(Path(job["folder"]) / "trainer"),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["batch"] // job["micro_batch"],
        max_steps=job["steps"],
        learning_rate=job["rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=job["dtype"] == "bfloat16",
        use_cpu=job["device"] == "cpu",
        dataloader_pin_memory=job["device"] != "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        logging_steps=10,
        remove_unused_columns=False,
        **more,
    )


def huggingface(job: dict[str, Any], common: dict[str, Any], teacher: Any) -> Trainer:
    return in_order(Forward)(args=arguments(job), teacher=teacher, **common)


def trl(job: dict[str, Any], common: dict[str, Any], teacher: Any) -> Trainer:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    given = arguments(job, GKDConfig, lmbda=0.0, beta=0.0, temperature=1.0, max_length=job["length"])
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    return in_order(GKDTrainer)(args=given, teacher_model=teacher, processing_class=tokenizer, **common)


def modelopt(job: dict[str, Any], common: dict[str, Any], teacher: Any) -> Trainer:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    distill = {"distill": True, "teacher_model": teacher, "temperature": 1.0}
    return in_order(KDTrainer)(args=arguments(job), distill_args=distill, **common)


def distillkit(job: dict[str, Any], common: dict[str, Any], teacher: Any) -> Trainer:
    from distillkit.configuration import DistillationRunConfig
    from distillkit.signals import OnlineSignalSource
    from distillkit.trainer import DistillationTrainer
    from trl import SFTConfig

    config = DistillationRunConfig.model_validate(
        {
            "model": job["student"],
            "dataset": {"train_dataset": {"disk_path": job["folder"]}, "prepacked": True},
            "teacher": {"kind": "hf", "path": job["teacher"]},
            "sequence_length": job["length"],
            "output_path": job["folder"],
            "use_flash_attention": False,
            "loss_functions": [{"function": "kl", "weight": 1.0, "temperature": 1.0}],
        }
    )
    vocabulary = teacher.config.vocab_size
    given = arguments(job, SFTConfig, max_length=job["length"], dataset_kwargs={"skip_prepare_dataset": True})
    return in_order(DistillationTrainer)(
        config=config,
        signal_source=OnlineSignalSource(teacher, vocabulary),
        true_vocab_size=vocabulary,
        args=given,
        processing_class=AutoTokenizer.from_pretrained(job["student"]),
        **common,
    )


PEERS: dict[str, Callable[[dict[str, Any], dict[str, Any], Any], Trainer]] = {
    "huggingface": huggingface,
    "trl": trl,
    "modelopt": modelopt,
    "distillkit": distillkit,
}


def _versions(name: str) -> str:
    from importlib.metadata import version

    package = {"huggingface": "accelerate", "modelopt": "nvidia-modelopt"}.get(name, name)
    return ", ".join(f"{each} {version(each)}" for each in (package, "transformers", "torch"))


def main() -> None:
    name, file, reads, writes = sys.argv[1:]
    job = json.loads(Path(file).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    importers = {"trl": "trl.experimental.gkd", "modelopt": "modelopt.torch.distill.plugins.huggingface"}
    __import__(importers.get(name, "distillkit.trainer" if name == "distillkit" else "accelerate"))
    turn = Turn(int(reads), int(writes))
    kind = torch.float32 if job["dtype"] == "float32" else torch.bfloat16
    student = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=kind).eval().requires_grad_(False)
    student, teacher = student.to(job["device"]), teacher.to(job["device"])
    rows = np.load(job["tokens"])
    columns = {"input_ids": rows, "labels": rows, "attention_mask": np.ones_like(rows)}
    dataset = Dataset.from_dict({key: value.tolist() for key, value in columns.items()})
    told = Told(turn)
    common = {
        "model": student,
        "train_dataset": dataset,
        "data_collator": default_data_collator,
        "callbacks": [told],
    }
    trainer = PEERS[name](job, common, teacher)
    trainer.told = told
    both = (parameter for model in (student, teacher) for parameter in model.parameters())
    turn.loaded(sum(parameter.nbytes for parameter in both), versions=_versions(name))
    trainer.train()


if __name__ == "__main__":
    main()
