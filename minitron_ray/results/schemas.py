"""Every table and column, in one file: the only place a column is named, typed and explained.

Every row of every table begins with `experiment` and `run_id` (added by the store). Layers and
units are 0-indexed. Losses are nats per token. Schemas only grow: a column is never renamed or
retyped.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import pyarrow as pa


def _schema(**columns: tuple[pa.DataType, str]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, metadata={"meaning": meaning}) for name, (kind, meaning) in columns.items()]
    )


_TEXT, _INT, _REAL, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_TIME = pa.timestamp("us", tz="UTC")

_SHAPE = {
    "layers": (_INT, "decoder layers"),
    "hidden": (_INT, "hidden size"),
    "heads": (_INT, "query heads a layer"),
    "kv_heads": (_INT, "KV groups a layer"),
    "mlp": (_INT, "MLP (intermediate) size"),
    "parameters": (_INT, "parameters in all, tied embeddings counted once"),
    "non_embedding_parameters": (_INT, "parameters without the embedding and the LM head"),
    "experts": (_INT, "routed experts a layer, 0 where there are none"),
    "expert_mlp": (_INT, "MLP size of each expert"),
}

TABLES: Final[Mapping[str, pa.Schema]] = MappingProxyType(
    {
        "runs": _schema(
            status=(_TEXT, "created, running, interrupted, failed or succeeded, at the time of the row"),
            fingerprint=(_TEXT, "digest of everything that decides the result"),
            teacher=(_TEXT, "the teacher as named in the experiment"),
            teacher_digest=(_TEXT, "sha256 over the teacher's weights and config"),
            data_digest=(_TEXT, "sha256 over the text, the tokenizer and the packing"),
            seed=(_INT, "the experiment's seed"),
            versions=(_TEXT, "JSON: package versions"),
            at=(_TIME, "when"),
            rehearsal=(_BOOL, "whether it is a rehearsal, with random weights; null is not"),
        ),
        "stages": _schema(
            stage=(_TEXT, "its name, see `results.runs.STAGES`"),
            fingerprint=(_TEXT, "digest of the stage's inputs"),
            status=(
                _TEXT,
                "finished, taken_over (from another run), reused, failed, interrupted, or running: in progress, "
                "or killed",
            ),
            summary=(_TEXT, "one line"),
            seconds=(_REAL, "wall time of this attempt; null of one that is running, or was killed"),
            at=(_TIME, "when it ended, or of one that did not, when it began"),
            tokens=(_INT, "that this attempt put through a network; null where the stage does not say"),
            disk_bytes=(
                _INT,
                "most bytes that the stage's states of trials were seen to take, looked at whenever a rung is "
                "passed, or that it added to the cache; null where it has neither",
            ),
        ),
        "importance": _schema(
            axis=(_TEXT, "hidden, heads, kv_heads, mlp, experts, expert_mlp or layers"),
            layer=(_INT, "-1 for the global hidden axis"),
            unit=(_INT, "channel, head, KV group, neuron, expert or layer index"),
            metric=(_TEXT, "how it was measured"),
            score=(_REAL, "the larger, the more important"),
            expert=(_INT, "the expert that the neuron is of; -1 on other axes"),
            length=(
                _INT,
                "how many layers from this one on were removed at once; 1 for units and single layers",
            ),
        ),
        "candidates": _schema(
            candidate_id=(_TEXT, "digest of the shape"),
            **_SHAPE,
            memory_bytes=(_INT, "weights and KV cache for the load budget.at"),
            flops_per_token=(_INT, "operations of a forward pass over budget.at.length tokens, a token"),
            in_budget=(_BOOL, "whether the search may propose it"),
            reason=(_TEXT, "why not, where in_budget is false"),
        ),
        "sources": _schema(
            part=(_INT, "place in the mixture, from 0; 0 where the text is of one source"),
            kind=(_TEXT, "the source's kind"),
            title=(_TEXT, "the source as named in the experiment"),
            weight=(_REAL, "the share of the sequences it was to have"),
            documents=(_INT, "its documents (rows of token ids) that were begun"),
            sequences=(_INT, "its sequences among those packed"),
            tokens=(_INT, "its tokens in them"),
            dropped=(_INT, "tokens of those documents that are in no sequence"),
            calibration=(_INT, "its sequences among those to calibrate"),
            validation=(_INT, "among those to validate"),
            train=(_INT, "among those to train"),
            ended=(_BOOL, "whether packing ended because it had no more"),
        ),
        "zero_shot": _schema(
            candidate_id=(_TEXT, "see candidates"),
            val_loss=(
                _REAL,
                "cross entropy of the undistilled cut on the first validation sequences; null if not finite",
            ),
            sequences=(_INT, "how many sequences"),
        ),
        "trials": _schema(
            candidate_id=(_TEXT, "see candidates"),
            rung=(_INT, "0 for the undistilled cut, then one a rung"),
            tokens=(_INT, "distillation tokens seen"),
            val_loss=(_REAL, "cross entropy on the validation sequences"),
            val_divergence=(
                _REAL,
                "KL(teacher || student) on the validation sequences, at rung 0 and after all tokens; null between",
            ),
            train_loss=(_REAL, "mean distillation loss since the rung before"),
            final=(_BOOL, "whether the trial ended with this rung"),
            status=(_TEXT, "running, completed, stopped (by halving, or scored only) or failed"),
            reason=(_TEXT, "why it failed"),
            seconds=(_REAL, "wall time since the trial began"),
            **_SHAPE,
            cohort=(_INT, "cohort of the search, from 0: its trials were proposed together"),
            origin=(_TEXT, "search, or the baseline: random, largest_first, magnitude or scratch"),
            latency=(
                _REAL,
                "seconds of a forward pass of one sequence to its last token's logits; null where not searched for",
            ),
            copied=(_BOOL, "whether this is an equal student's row, which was trained under another origin"),
        ),
        "sequence_losses": _schema(
            subject=(
                _TEXT,
                "teacher, candidate id, or of a baseline its origin, a colon and the candidate id",
            ),
            phase=(_TEXT, "teacher, cut, search, baseline or distilled"),
            tokens=(_INT, "distillation tokens seen"),
            sequence=(_INT, "index of the validation sequence"),
            loss=(_REAL, "cross entropy, mean over the sequence's tokens"),
        ),
        "comparisons": _schema(
            subject=(_TEXT, "candidate id; of a baseline its origin, a colon, and the candidate id"),
            other=(_TEXT, "candidate id of the one it is compared with"),
            against=(
                _TEXT,
                "best (the one of least loss of its phase, or of the search) or next (better one)",
            ),
            phase=(_TEXT, "search, baseline or distilled"),
            tokens=(_INT, "distillation tokens that both had seen"),
            difference=(_REAL, "subject's loss less the other's, mean over the validation sequences"),
            low=(_REAL, "lower end of its 95 % interval (paired bootstrap); -inf where nothing can be said"),
            high=(_REAL, "upper end"),
            tied=(_BOOL, "whether the interval holds zero"),
            sequences=(_INT, "how many sequences"),
        ),
        "rank_correlations": _schema(
            comparing=(
                _TEXT,
                "rung (with the next rung), last (with the last rung) or zero_shot (with a rung)",
            ),
            from_tokens=(_INT, "distillation tokens of the first measurement"),
            to_tokens=(_INT, "of the second"),
            tau=(_REAL, "Kendall's tau-b of the candidates' losses at both"),
            p_value=(_REAL, "two-sided, of no agreement"),
            candidates=(_INT, "how many were measured at both"),
            over=(
                _TEXT,
                "search (its trials: at late rungs those that halving let pass), random (shapes drawn by lot, all "
                "trained to the end) or search and random (each candidate once); null is search",
            ),
        ),
        "lessons": _schema(
            kind=(
                _TEXT,
                "size (how one size of an axis did), importance (of an axis), flip (of two) or front (on it)",
            ),
            tokens=(_INT, "distillation tokens of the rung; of a flip, the last that both reached"),
            axis=(
                _TEXT,
                "layers, hidden, heads, kv_heads, mlp, mlp_ratio, experts or expert_mlp; of a front what the "
                "loss is weighed against",
            ),
            size=(_REAL, "size on the axis"),
            trials=(_INT, "how many trials this is of"),
            best_loss=(_REAL, "least validation loss among them"),
            mean_loss=(_REAL, "mean of theirs"),
            dead_zone=(_BOOL, "two or more trials, all in the worse half, none tied with the rung's best"),
            importance=(_REAL, "share of the axis in what sets the best quarter apart (PED-ANOVA)"),
            winner=(_TEXT, "candidate that ended ahead"),
            loser=(_TEXT, "candidate that had led"),
            from_tokens=(_INT, "where it had led"),
            before=(_REAL, "winner's loss less loser's there"),
            after=(_REAL, "the same at `tokens`"),
            certain=(_BOOL, "whether the two were told apart (95 %) both times"),
            candidate_id=(_TEXT, "of a candidate on the front"),
            cost=(_REAL, "its parameters, FLOPs a token, or seconds of a forward pass, as `axis` says"),
        ),
        "steps": _schema(
            candidate_id=(_TEXT, "see candidates; `teacher` in its correction"),
            step=(_INT, "optimizer step, from 1"),
            tokens=(_INT, "tokens seen up to and with this step, over all workers"),
            loss=(_REAL, "training loss of this step; null where it is not finite"),
            logit_loss=(_REAL, "of it that on the logits, or the labels; null where it is not finite"),
            intermediate_loss=(
                _REAL,
                "loss of the hidden states before its weight; null where they are not compared, or it is not finite",
            ),
            gradient_norm=(_REAL, "before clipping; null where it is not finite"),
            learning_rate=(_REAL, "used for this step"),
            val_loss=(_REAL, "validation cross entropy after this step, where measured"),
            tokens_per_second=(_REAL, "over this step, all workers, validation and checkpoints aside"),
            workers=(_INT, "how many took part"),
            val_divergence=(
                _REAL,
                "KL(teacher || student) on the validation sequences after this step, where measured",
            ),
            skipped=(
                _INT,
                "0; of a step whose loss or gradient was not finite, and which changed nothing, how many such "
                "steps in a row there were with it",
            ),
            mfu=(
                _REAL,
                "model operations (teacher's forward pass included, recomputation not) over the devices' peak; "
                "null where the peak is not known",
            ),
            peak_memory=(
                _INT,
                "most bytes that a worker has held on its device so far: of tensors on an accelerator, resident "
                "on a CPU",
            ),
        ),
        "evaluations": _schema(
            subject=(_TEXT, "teacher, or candidate id"),
            phase=(_TEXT, "teacher, uncorrected (the teacher before its correction), cut, or distilled"),
            metric=(_TEXT, "val_loss, perplexity or val_divergence"),
            value=(_REAL, "the figure"),
            stderr=(_REAL, "standard error over sequences"),
            sequences=(_INT, "how many sequences"),
            tokens=(_INT, "how many predicted tokens"),
            distill_tokens=(_INT, "distillation tokens the subject had seen"),
        ),
        "costs": _schema(
            stage=(_TEXT, "a stage that computes or writes; what it was planned to take when the run began"),
            what=(_TEXT, "one line"),
            tokens=(_INT, "tokens that go through a network, at most"),
            tie_tokens=(_INT, "more of them, at most, where trials tie (search.keep: ties)"),
            flops=(_REAL, "floating-point operations, at most"),
            device_seconds=(_REAL, "of one device; null where its speed was not known"),
            devices=(_INT, "how many devices there are; null likewise"),
            memory_bytes=(_INT, "of one process; null where nothing to speak of"),
            disk_bytes=(_INT, "files of the stage where there are most of them, tables aside"),
        ),
        "exports": _schema(
            candidate_id=(_TEXT, "see candidates"),
            path=(_TEXT, "folder, relative to the run folder"),
            dtype=(_TEXT, "of the weights"),
            parameters=(_INT, "counted in the reloaded model"),
            bytes=(_INT, "size of the weight files"),
            max_logit_difference=(_REAL, "reloaded against in memory"),
            weights_digest=(_TEXT, "sha256 of the weight files"),
        ),
    }
)
"""Table name to schema, without the two columns that the store puts first."""

ENVELOPE: Final = pa.schema(
    [
        pa.field("experiment", _TEXT, metadata={"meaning": "name of the experiment"}),
        pa.field("run_id", _TEXT, metadata={"meaning": "run within the experiment"}),
    ]
)


def full_schema(table: str) -> pa.Schema:
    """The schema of a table as stored, envelope first. Raises KeyError for an unknown table."""
    return pa.schema([*ENVELOPE, *TABLES[table]])
