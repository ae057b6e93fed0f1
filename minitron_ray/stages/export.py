"""Stage `export`: a Hugging Face folder of each student, proven by a stock reload.

A distilled student comes from its folder; one that is not distilled is cut again, in the type of the
export.

The folder is loaded again by `AutoModelForCausalLM` in a fresh process that imports nothing of this
package: parameter count and logits must be exactly those planned and those in memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_ray.core.errors import MinitronError
from minitron_ray.core.fingerprint import digest, file_sha256
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import Plan
from minitron_ray.search.space import Candidate
from minitron_ray.stages.context import Context
from minitron_ray.stages.importance import read_scores
from minitron_ray.stages.model_card import CardFacts, model_card
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.companions import copy_companions
from minitron_ray.weights.model import build
from minitron_ray.weights.writing import write_checkpoint

_RELOAD = """
import json, sys
import numpy, torch
from transformers import AutoModelForCausalLM
folder, dtype, ids, threads, out = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(ids))).logits.float().numpy()
numpy.save(out, logits)
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A student as cut by the scores."""

    candidate: Candidate
    scores: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What the reload found."""

    parameters: int
    bytes: int
    max_logit_difference: float
    weights_digest: str


def run(
    context: Context, plan: Plan, setting: Setting, chosen: list[str], folders: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """Writes `exports`; returns the folder of each chosen student, relative to the run's. `folders` has
    those that were distilled."""
    export, paths = context.experiment.export, {}
    for done, candidate_id in enumerate(chosen):
        context.progress(done, len(chosen), "students")
        candidate = plan.candidate(candidate_id)
        planned = plan.family.parameters(candidate.architecture(plan.start))
        card = model_card(_facts(context, plan, candidate_id))
        source: Path | Cut
        if candidate_id in folders:
            source = (context.run.folder / folders[candidate_id]).resolve()
        else:
            source = Cut(candidate=candidate, scores=read_scores(context))
        target = context.run.folder / "exports" / candidate_id
        partial = target.with_name(f"{candidate_id}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        found: Exported = context.cluster.call(
            export_student, setting, source, partial.resolve(), export.dtype, card
        )
        if found.parameters != planned:
            raise MinitronError(
                f"the exported {candidate_id} has {found.parameters:,} parameters, planned {planned:,}"
            )
        if found.max_logit_difference != 0.0:
            raise MinitronError(
                f"the exported {candidate_id}, reloaded by stock transformers, gives other logits "
                f"(largest difference {found.max_logit_difference:g}); it is left in {partial}"
            )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        paths[candidate_id] = str(target.relative_to(context.run.folder))
        row = {
            "candidate_id": candidate_id,
            "path": paths[candidate_id],
            "dtype": export.dtype,
            "parameters": found.parameters,
            "bytes": found.bytes,
            "max_logit_difference": found.max_logit_difference,
            "weights_digest": found.weights_digest,
        }
        context.run.store.append("exports", [row], writer=f"export-{candidate_id}", sequence=0)
    return {"paths": paths}, f"{', '.join(paths.values())}: reloaded by stock transformers, logits identical"


def export_student(
    setting: Setting, source: Path | Cut, target: Path, dtype: str, card: str, report: Callable[..., None]
) -> Exported:
    """In a worker: write `target`, reload it in a fresh process, compare."""
    kind = getattr(torch, dtype)
    tensors: Mapping[str, torch.Tensor]
    if isinstance(source, Cut):
        config, made = setting.cut(source.candidate, source.scores, kind)
        tensors = dict(made)  # cut once, for the folder and for the model that it is held against
    else:
        checkpoint = Checkpoint(source)
        config = checkpoint.config
        tensors = {name: checkpoint.tensor(name).to(kind) for name in checkpoint.names()}
    write_checkpoint(target, tensors.items(), config, dtype=dtype)
    copy_companions(setting.teacher_folder, target)
    (target / "README.md").write_text(card)
    weights = sorted(target.glob("*.safetensors"))
    ids = setting.tokens().sequences(np.asarray(setting.splits.validation[:2]))
    model = build(config, tensors, dtype=kind, device=torch.device("cpu"), trainable=False).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.float().numpy()
    parameters, reloaded = _reload(target, dtype, ids)
    return Exported(
        parameters=parameters,
        bytes=sum(path.stat().st_size for path in weights),
        max_logit_difference=float(np.abs(logits - reloaded).max()),
        weights_digest=digest([file_sha256(path) for path in weights]),
    )


def _reload(folder: Path, dtype: str, ids: np.ndarray) -> tuple[int, np.ndarray]:
    given, found = folder.with_name(f"{folder.name}.ids.npy"), folder.with_name(f"{folder.name}.logits.npy")
    np.save(given, ids)
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", _RELOAD, str(folder), dtype, str(given), threads, str(found)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (
                done.stderr.strip().splitlines()[-1]
                if done.stderr.strip()
                else f"exit code {done.returncode}"
            )
            raise MinitronError(f"stock transformers cannot load the export {folder}: {last}")
        return json.loads(done.stdout.strip().splitlines()[-1])["parameters"], np.load(found)
    finally:
        given.unlink(missing_ok=True)
        found.unlink(missing_ok=True)


def _facts(context: Context, plan: Plan, candidate_id: str) -> CardFacts:
    values = {
        (row["subject"], row["phase"]): row["value"]
        for row in context.run.store.read("evaluations").to_pylist()
        if row["metric"] == "perplexity"
    }
    arch = plan.candidate(candidate_id).architecture(plan.start)
    return CardFacts(
        name=f"{context.experiment.name}-{candidate_id}",
        experiment=context.experiment,
        run_id=context.run.run_id,
        rehearsal=context.run.rehearsal,
        teacher=plan.teacher,
        start=None if plan.start_source is None else plan.start,
        start_source=plan.start_source,
        start_parameters=plan.family.parameters(plan.start),
        student=arch,
        teacher_parameters=plan.family.parameters(plan.teacher),
        parameters=plan.family.parameters(arch),
        perplexity_teacher=values["teacher", "teacher"],
        perplexity_cut=values[candidate_id, "cut"],
        perplexity=values.get((candidate_id, "distilled")),
    )
