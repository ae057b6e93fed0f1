"""Whether halving picks the winner that training every candidate to the end picks, and what it saves.

A small Llama is trained on English text by cross entropy, and scored by the project's importance. For
each seed, shapes inside a budget are drawn by lot, cut, and all of them distilled to the end by
`retrain`, which records the loss of every validation sequence at every rung. Then the search's own
rules (`Cohorts`, `decide`) are replayed on what was recorded: training is a function of the experiment,
so a halved search sees the same losses as far as it goes. A seed moves the order of the training data
and which shapes are tried.

Printed for each seed: the winner of both, how far apart, whether the paired bootstrap tells them apart,
and the share of tokens. Beside it, what is picked by the first rung alone, and what is to be expected of
a shape picked by lot.

    python benchmarks/halving.py --folder DIR       # DIR keeps teacher and losses: goes on, or judges anew
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from small_models import llama, text_source, write_tokenizer, write_trained

from minitron_ray.core.fingerprint import digest
from minitron_ray.data.splits import split
from minitron_ray.data.tokens import build_tokens
from minitron_ray.distillation.teacher import EXACT, SignalBlock, compute_block, write_signal
from minitron_ray.experiment import Experiment
from minitron_ray.importance.capture import gather, grouped, merged
from minitron_ray.importance.evidence import Listeners
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import make_plan
from minitron_ray.results.cache import Cache
from minitron_ray.search.choice import paired_bootstrap, tied_with_best
from minitron_ray.search.cohorts import FINISHED, Cohorts
from minitron_ray.search.halving import Halving, cohort_size, in_order
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.propose import propose
from minitron_ray.search.samplers.random import Random
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import retrain, rung_tokens

VOCABULARY, LENGTH = 512, 128
SPACE: Final = {"layers": "3..6", "hidden": "112..128 by 8", "heads": [4, 8], "mlp": "64..384 by 8"}
BUDGET: Final = "700k ± 5%"
"""Of the teacher's 1.2M: 86 shapes, many of them nearly as good as one another."""
SHARE, AGREEMENT = 0.5, 0.9
"""Goals: tokens at most, seeds with the same or a tied winner at least."""

Losses = dict[str, dict[int, NDArray[np.float64]]]
"""By candidate and tokens, of each validation sequence."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.folder is not None:
        return _run(options, options.folder)
    with tempfile.TemporaryDirectory() as folder:
        _run(options, Path(folder))
    return None


def _run(options: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _make_teacher(options, folder)
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(of_seed, options, folder, seed) for seed in range(options.seeds)]
        verdicts = []
        for seed, job in enumerate(jobs):
            losses = job.result()
            verdicts.append(_verdicts(losses, seed))
            _print_seed(seed, losses, verdicts[-1], started)
    _print_all(verdicts, [_by_lot(job.result(), seed) for seed, job in enumerate(jobs)], options)


# The teacher.


def _make_teacher(options: argparse.Namespace, folder: Path) -> None:
    model, cache, source = folder / "teacher", Cache(folder), text_source()
    if (model / "config.json").is_file():
        return
    write_tokenizer(model, cache, source, VOCABULARY)
    store = build_tokens(source, model, sequence_length=LENGTH, base=folder, cache=cache)
    sequences = split(len(store), 32, 32, 8, LENGTH).train
    config = llama(layers=6, hidden=128, heads=8, mlp=384, vocabulary=VOCABULARY, length=LENGTH)
    steps = write_trained(model, config, store, sequences, tokens=options.teacher_tokens, rate=3e-3)
    losses = []
    for step in steps:
        losses.append(step.loss)
        if step.step % 50 == 0:
            note = f"teacher: {step.tokens:,} tokens, loss {np.mean(losses[-50:]):.3f}"
            print(note, file=sys.stderr, flush=True)
    counts = np.bincount(store.sequences(sequences[:2000]).ravel(), minlength=VOCABULARY) + 1
    shares = counts / counts.sum()
    words_alone = -float((shares * np.log(shares)).sum())
    print(f"teacher: loss {np.mean(losses[-20:]):.2f} nats a token after {step.tokens:,} tokens of {len(store):,} "
          f"sequences; word frequencies alone {words_alone:.2f}", flush=True)  # fmt: skip


def _setting(options: argparse.Namespace, folder: Path, seed: int) -> Setting:
    teacher = folder / "teacher"
    experiment = Experiment.model_validate(
        {
            "name": "halving",
            "seed": seed,
            "precision": "float32",
            "teacher": {"path": str(teacher)},
            "data": {"source": text_source().model_dump(), "sequence_length": LENGTH, "validation": 32},
            "budget": {"parameters": BUDGET},
            "search": {
                "space": options.space,
                "trials": options.trials,
                "retrain": {"tokens": options.tokens, "learning_rate": options.rate},
            },
        }
    )
    data = experiment.data
    store = build_tokens(data.source, teacher, sequence_length=LENGTH, base=folder, cache=Cache(folder))
    return Setting(
        experiment=experiment,
        teacher_folder=teacher,
        tokens_folder=store.folder,
        splits=split(len(store), data.calibration, data.validation, 8, LENGTH),
        micro_batch=8,
    )


def _scores(setting: Setting) -> Scores:
    """As the stage `importance` does, in this process."""
    section = setting.experiment.importance
    ears = Listeners(
        family=setting.family, architecture=setting.architecture, width=section.width, depth=section.depth
    )
    groups = grouped(setting.splits.calibration, setting.micro_batch)
    teacher = setting.teacher(setting.share())
    evidence = merged(gather(teacher, ears, groups, setting.tokens().sequences, lambda done: None))
    assert evidence.stream is not None
    return ears.unit_scores(evidence)[section.width_label].with_layers(evidence.stream.scores())


# What is recorded.


def of_seed(options: argparse.Namespace, folder: Path, seed: int) -> Losses:
    """All candidates of a seed, trained to the end, or what an earlier call recorded of them."""
    torch.set_num_threads(1)
    recipe = [options.space, BUDGET, options.trials, options.tokens, options.rate, options.teacher_tokens]
    record = folder / f"seed-{seed}-{digest(recipe)[:12]}.json"
    if not record.is_file():
        setting = _setting(options, folder, seed)
        scores, candidates = _scores(setting), _candidates(setting, options.trials)
        with tempfile.TemporaryDirectory(dir=folder) as signal:
            _write_signal(setting, Path(signal))
            found = {one.id: _train(setting, scores, one, Path(signal)) for one in candidates}
        record.write_text(json.dumps(found))
    return {
        name: {int(tokens): np.array(losses) for tokens, losses in rungs.items()}
        for name, rungs in json.loads(record.read_text()).items()
    }


def _candidates(setting: Setting, count: int) -> list[Candidate]:
    plan = make_plan(setting.experiment, setting.checkpoint.config)
    space, hidden = setting.experiment.searched.space, setting.architecture.hidden
    proposals = ShapeProposals.of(plan.rows, space, hidden)
    names = propose(proposals, Random(), setting.experiment.seed, 0, (), {}, count)
    return [plan.candidate(name) for name in names]


def _write_signal(setting: Setting, folder: Path) -> None:
    """Of the sequences that this seed's trials train on, and of those that judge them."""
    retraining = setting.experiment.searched.retrain
    last = rung_tokens(setting)[-1] // (retraining.batch * LENGTH)
    trained = [setting.training_indices(step, retraining.batch) for step in range(1, last + 1)]
    sequences = [*setting.splits.validation, *np.unique(np.concatenate(trained)).tolist()]
    block = SignalBlock(folder=folder / "block", signal=EXACT, sequences=sequences)
    block.folder.mkdir()
    teacher, read = setting.teacher(setting.share()), setting.tokens().sequences
    compute_block(block, block.folder, teacher, read, dtype=torch.float32, batch=8, seed=0)
    write_signal(folder, [block])


def _train(
    setting: Setting, scores: Scores, candidate: Candidate, signal: Path
) -> dict[int, Sequence[float]]:
    share = setting.share()
    torch.manual_seed(setting.experiment.seed)
    student = setting.student(candidate, scores, share.device)
    teacher = setting.stored_teacher(signal, share)
    rungs = retrain(setting, student, teacher, share, on_rung=lambda rung: None)
    return {rung.tokens: rung.losses for rung in rungs}


# What the search would have done.


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A halved search against all candidates trained to the end."""

    winner: str
    """Of the halved one."""
    best: str
    behind: float
    """Nats by which the winner's final loss is above the best one's."""
    same: bool
    tied: bool
    """Same, or not told apart by the validation sequences."""
    tokens: float
    """Share of those that all candidates take."""


def _verdicts(losses: Losses, seed: int) -> dict[str, Verdict]:
    """With the default cohorts of a sampler that learns (tpe), and of one that doesn't (one cohort); and for a
    search that stops everyone but the best at the first rung, whose tokens are the least that there can be."""
    rungs = sorted(next(iter(losses.values())))[1:]
    rule, trials = Halving(rungs=tuple(rungs), reduction=2.0), len(losses)
    sizes = {learns: cohort_size(trials, len(rungs), 2.0, 1, learns) for learns in (True, False)}
    first = in_order({name: float(of[rungs[0]].mean()) for name, of in losses.items()})[0]
    spent = {name: rungs[-1] if name == first else rungs[0] for name in losses}
    return {
        f"cohorts of {sizes[True]}": _against_all(losses, *replay(losses, rule, sizes[True]), seed),
        f"one cohort of {sizes[False]}": _against_all(losses, *replay(losses, rule, sizes[False]), seed),
        "by the first rung": _against_all(losses, first, spent, seed),
    }


def replay(losses: Losses, rule: Halving, size: int) -> tuple[str, dict[str, int]]:
    """The winner of a search of these trials in this order, and the tokens that each of them took."""
    names, spent = list(losses), dict.fromkeys(losses, 0)
    cohorts = Cohorts(
        trials=len(names),
        size=size,
        rule=rule,
        propose=lambda cohort, told, count: names[cohort * size :][:count],
    )
    while (name := cohorts.next(())) is not FINISHED:
        assert isinstance(name, str)
        for tokens, found in sorted(losses[name].items()):
            fate = cohorts.report(name, tokens, float(found.mean()))
            spent[name] = max(spent[name], tokens)
            if fate.state in ("waiting", "stopped") and tokens >= fate.tokens:
                break
    completed = [name for name, fate in cohorts.fates.items() if fate.state == "completed"]
    return in_order({name: float(losses[name][rule.rungs[-1]].mean()) for name in completed})[0], spent


def _against_all(losses: Losses, winner: str, spent: Mapping[str, int], seed: int) -> Verdict:
    final = _final(losses)
    best = in_order({name: float(values.mean()) for name, values in final.items()})[0]
    interval = paired_bootstrap(final[winner], final[best], seed=seed)
    last = max(next(iter(losses.values())))
    return Verdict(
        winner=winner,
        best=best,
        behind=interval.difference,
        same=winner == best,
        tied=winner == best or interval.tied,
        tokens=sum(spent.values()) / (last * len(losses)),
    )


def _by_lot(losses: Losses, seed: int) -> tuple[float, float, float]:
    """Expected of any candidate: whether it is the best, whether it ties with it, nats behind it."""
    final = _final(losses)
    means = [float(values.mean()) for values in final.values()]
    return (
        1 / len(final),
        len(tied_with_best(final, seed=seed)) / len(final),
        float(np.mean(means)) - min(means),
    )


def _final(losses: Losses) -> dict[str, NDArray[np.float64]]:
    return {name: rungs[max(rungs)] for name, rungs in losses.items()}


# What is printed.


def _print_seed(seed: int, losses: Losses, verdicts: Mapping[str, Verdict], started: float) -> None:
    means = sorted(float(values.mean()) for values in _final(losses).values())
    tied = len(tied_with_best(_final(losses), seed=seed))
    print(f"seed {seed}: {len(means)} trials, final losses {means[0]:.4f}, {means[1]:.4f} .. {means[-1]:.4f}, {tied} "
          f"tied with the best (itself counted); {time.monotonic() - started:.0f} s")  # fmt: skip
    for name, verdict in verdicts.items():
        told = "same winner" if verdict.same else "tied" if verdict.tied else "WORSE"
        print(f"  {name:<20} {verdict.winner} for {verdict.best}: {told}, {verdict.behind:.4f} nats behind, "
              f"{verdict.tokens:.2f} of the tokens", flush=True)  # fmt: skip


def _print_all(
    verdicts: Sequence[Mapping[str, Verdict]],
    by_lot: Sequence[tuple[float, float, float]],
    options: argparse.Namespace,
) -> None:
    print(f"\n{'':<22}{'same':>6}{'or tied':>9}{'behind, mean':>14}{'largest':>9}{'tokens':>8}")
    for name in verdicts[0]:
        of = [each[name] for each in verdicts]
        behind = [verdict.behind for verdict in of]
        print(f"{name:<22}{sum(v.same for v in of):>6}{sum(v.tied for v in of):>9}{np.mean(behind):>14.4f}"
              f"{max(behind):>9.4f}{max(v.tokens for v in of):>8.2f}")  # fmt: skip
    same, tied, mean = np.sum(by_lot, axis=0)
    print(f"{'by lot (expected)':<22}{same:>6.1f}{tied:>9.1f}{mean / len(by_lot):>14.4f}")
    print(
        f"of {len(verdicts)} seeds; goal: same or tied in {AGREEMENT:.0%}, for at most {SHARE} of the tokens"
    )
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    records = [{name: asdict(verdict) for name, verdict in each.items()} for each in verdicts]
    result: dict[str, Any] = {"benchmark": "halving", "load": os.getloadavg()[0], **shown, "seeds": records}
    print("\n" + json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps text, teacher and recorded losses")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=12, help="candidates a seed")
    parser.add_argument("--space", type=json.loads, default=SPACE, help="JSON, as search.space")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a trial to its end")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the trials")
    parser.add_argument("--teacher-tokens", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
