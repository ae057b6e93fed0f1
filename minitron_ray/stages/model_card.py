"""The README.md of an exported student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from minitron_ray import __version__
from minitron_ray.data.location import is_hub_id
from minitron_ray.experiment import Experiment
from minitron_ray.models.architecture import Architecture
from minitron_ray.plan import distilled_tokens
from minitron_ray.results.runs import REHEARSED

_AXES: Final = (
    ("layers", "layers"),
    ("hidden", "hidden size"),
    ("heads", "attention heads"),
    ("kv_heads", "KV groups"),
    ("head_dim", "head dimension"),
    ("mlp", "MLP (intermediate) size"),
    ("experts", "experts"),
    ("expert_mlp", "size of an expert"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """All that the card tells."""

    name: str
    experiment: Experiment
    run_id: str
    teacher: Architecture
    student: Architecture
    teacher_parameters: int
    start: Architecture | None
    """The model that was cut; None where it is the teacher."""
    start_source: str | None
    start_parameters: int
    parameters: int
    perplexity_teacher: float
    perplexity_cut: float
    perplexity: float | None
    """After distillation; None where there is none."""
    rehearsal: bool = False
    """Of a run with random weights."""


def model_card(facts: CardFacts) -> str:
    """Markdown with the front matter that hubs read. The license is the teacher's to state, not ours."""
    experiment = facts.experiment
    base = _base(experiment)
    loss = "" if experiment.distill is None else experiment.distill.loss.kind
    made = (
        f"and distilled from {_source(facts)} on {distilled_tokens(experiment):,} tokens\nwith the loss `{loss}`"
        if experiment.distill is not None
        else "and not trained since: distill it before use"
    )
    told = (
        f"{facts.perplexity_cut:.2f} (as cut)"
        if facts.perplexity is None
        else f"{facts.perplexity:.2f} (as cut {facts.perplexity_cut:.2f})"
    )
    text = "distillation text" if experiment.distill is not None else "calibration text"
    if experiment.data.documents == "apart":
        text += ", each document by itself"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags: [pruning, {"" if experiment.distill is None else "distillation, "}minitron-ray]
---

# {facts.name}
{_warning(facts)}
A student of {facts.parameters:,} parameters, cut out of {_origin(facts)} {made}.
It keeps the teacher's tokenizer; the teacher's license and its limits apply.

{_table(facts, told)}

Perplexity on {experiment.data.validation} held-out sequences of {experiment.data.sequence_length} tokens of the
{text}. Seed {experiment.seed}, run `{facts.run_id}`, minitron-ray {__version__}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
print(tokenizer.decode(model.generate(**tokenizer("The capital of France is", return_tensors="pt"))[0]))
```
"""


def _warning(facts: CardFacts) -> str:
    return f"\n**Not a model: this comes from {REHEARSED}.**\n" if facts.rehearsal else ""


def _base(experiment: Experiment) -> str:
    """The line that names the model that was cut, where hubs know it."""
    start = experiment.start
    path = experiment.teacher.path if start is None else start.path
    return f"base_model: {path}\n" if path is not None and is_hub_id(path) else ""


def _origin(facts: CardFacts) -> str:
    """The model that was cut."""
    if facts.start is None:
        return f"`{facts.experiment.teacher.path}`\n({facts.teacher_parameters:,} parameters)"
    return f"a model of {facts.start_parameters:,} parameters\n(`{facts.start_source}`)"


def _source(facts: CardFacts) -> str:
    """What the student learnt from."""
    if facts.start is None:
        return "it"
    return f"`{facts.experiment.teacher.path}` ({facts.teacher_parameters:,} parameters)"


def _table(facts: CardFacts, perplexity: str) -> str:
    """Sizes of all models in Markdown; the perplexity of the model that was cut is not measured."""
    models = [facts.teacher, *([] if facts.start is None else [facts.start]), facts.student]
    counts = [facts.teacher_parameters, *([] if facts.start is None else [facts.start_parameters])]
    middle = "" if facts.start is None else " cut from |"
    rows = [f"| | teacher |{middle} student |", "|---" * (len(models) + 1) + "|"]
    rows += [
        f"| {label} | {' | '.join(f'{getattr(model, axis):,}' for model in models)} |"
        for axis, label in _AXES
        if getattr(facts.teacher, axis)
    ]
    rows.append(f"| parameters | {' | '.join(f'{count:,}' for count in [*counts, facts.parameters])} |")
    unknown = "" if facts.start is None else " |"
    rows.append(f"| perplexity | {facts.perplexity_teacher:.2f} |{unknown} {perplexity} |")
    return "\n".join(rows)
