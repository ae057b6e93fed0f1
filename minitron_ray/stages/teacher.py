"""Stage `teacher`: run the teacher once over the sequences that every candidate is judged on, and those
that a search trains on.

Workers write what the signal keeps of it to the cache, block by block, each named by all that decides its
bytes; where one device may not hold the teacher, groups of them do, each block by one group. Another
budget, another space or another experiment with the same teacher and text finds the blocks that it needs,
and adds those that are missing. Where nothing is stored (`online`) the teacher runs in each trial.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.core.fingerprint import digest
from minitron_ray.core.units import format_bytes
from minitron_ray.data.batches import batch_indices
from minitron_ray.distillation.blocks import block_bytes, cover
from minitron_ray.distillation.checkpoints import PATIENCE
from minitron_ray.distillation.signal import StoredSignal
from minitron_ray.distillation.teacher import EXACT, SignalBlock, compute_block, write_signal
from minitron_ray.execution.cluster import Cluster, in_group
from minitron_ray.plan import Inputs, steps
from minitron_ray.plan.signal import choose_signal, signal_tokens
from minitron_ray.results.cache import DONE, Cache
from minitron_ray.stages.context import Context
from minitron_ray.stages.same_function import prove_same_function
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.headless import Headless

if TYPE_CHECKING:
    from minitron_ray.execution.train_group import Worker

SIGNAL_VERSION = 2
"""Of the files in the cache."""
KIND, LISTS = "teacher_signal", "teacher_signal_lists"
"""Of cache entries: blocks, and lists of the blocks of one signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """The blocks of one teacher on one text. Small, and picklable: workers fill it side by side, in the type of
    products that the setting names."""

    setting: Setting
    inputs: Inputs
    cache: Cache

    def blocks(self, signal: StoredSignal) -> list[SignalBlock]:
        """The blocks that the experiment needs, whether they exist or not: what students are measured
        on exactly, what trials are trained on as `signal` keeps it, if their loss takes anything of it."""
        validation = list(self.setting.splits.validation)
        found = list(self._cover(EXACT, validation, len(validation)))
        if signal_tokens(self.setting.experiment):
            found += self._cover(signal, *self._training())
        return found

    def missing(self, blocks: Sequence[SignalBlock]) -> list[SignalBlock]:
        return [block for block in blocks if not (block.folder / DONE).is_file()]

    def key(self, signal: StoredSignal, sequences: Sequence[int]) -> str:
        """Names a block: by all that decides its bytes."""
        common = self.setting.vocabulary
        return digest(
            {
                "version": SIGNAL_VERSION,
                "teacher": self.inputs.teacher,
                "data": self.inputs.data,
                "precision": str(self.setting.dtype).removeprefix("torch."),
                "signal": signal.identity,
                "seed": self.setting.experiment.seed if signal.seeded else None,
                "sequences": list(sequences),
                # Only where the student has fewer rows: all other blocks keep their names.
                **({"vocabulary": common} if common < self.setting.teacher_architecture.vocab else {}),
            }
        )

    def fill(self, block: SignalBlock, make: Callable[[Path], None]) -> None:
        """Have `make` write a block, unless another process has."""
        describe = {"what": f"{block.signal.label} of the teacher", "sequences": len(block.sequences)}
        self.cache.ensure(KIND, block.folder.name, describe, make)

    def _training(self) -> tuple[list[int], int]:
        """All training sequences in the order in which trials first see them, and how many they see."""
        setting, retrain = self.setting, self.setting.experiment.searched.retrain
        train = setting.splits.train
        order = batch_indices(train, 0, len(train), setting.experiment.seed)
        seen = steps(retrain.tokens, retrain.batch, setting.experiment.data.sequence_length) * retrain.batch
        return order.tolist(), min(seen, len(train))

    def _cover(self, signal: StoredSignal, order: Sequence[int], count: int) -> Iterator[SignalBlock]:
        def block(places: range) -> SignalBlock:
            sequences = order[places.start : places.stop]
            folder = self.cache.folder / KIND / self.key(signal, sequences)
            return SignalBlock(folder=folder.resolve(), signal=signal, sequences=sequences)

        def exists(places: range) -> bool:
            return not self.missing([block(places)])

        length = self.setting.experiment.data.sequence_length
        yield from map(block, cover(count, length, len(order), exists))


def library_of(context: Context, setting: Setting, inputs: Inputs) -> Library:
    """In the run's cache; workers start in other folders."""
    return Library(setting=setting, inputs=inputs, cache=Cache(context.cache.folder.parent.resolve()))


def check_room(library: Library) -> None:
    """Before anything is computed: a plan takes the same signal on every machine, so what is free here is
    looked at when a run begins, and never chosen by.

    Raises EnvironmentFailure where the blocks that are missing are larger than what is free.
    """
    setting = library.setting
    signal = choose_signal(setting.experiment, setting.teacher_architecture)
    if not isinstance(signal, StoredSignal):
        return
    sizes = (setting.teacher_architecture.hidden, setting.vocabulary, setting.dtype.itemsize)
    length = setting.experiment.data.sequence_length
    needed = sum(
        round(len(block.sequences) * length * block.signal.bytes_a_token(*sizes))
        for block in library.missing(library.blocks(signal))
    )
    place = next(
        folder for folder in (library.cache.folder, *library.cache.folder.parents) if folder.is_dir()
    )
    free = shutil.disk_usage(place).free
    if needed > free:
        smaller = (
            ""
            if setting.experiment.search is None
            else (
                "set search.signal to a smaller kind ({kind: sampled}; {kind: online} stores nothing), lower "
                "search.retrain.tokens, "
            )
        )
        raise EnvironmentFailure(
            f"{library.cache.folder}: the teacher's signal ({signal.label}) takes {format_bytes(needed)} more, and "
            f"{format_bytes(free)} are free there; {smaller}make room, or choose another results folder with "
            "--results DIR"
        )


def run(context: Context, setting: Setting, inputs: Inputs) -> tuple[dict[str, Any], str]:
    """Returns the folder that lists the stored signal, or null where the teacher is to run online.

    Raises ConfigError where the teacher is to be taken as another model type and is another function then.
    """
    if setting.experiment.export.as_type is not None:
        context.cluster.call(prove_same_function, setting)
    signal = choose_signal(setting.experiment, setting.teacher_architecture)
    if not isinstance(signal, StoredSignal):
        return {"folder": None}, "online in each trial"
    library = library_of(context, setting, inputs)
    cache = library.cache
    blocks = library.blocks(signal)
    missing = library.missing(blocks)
    try:
        if missing:
            _fill(context.cluster, missing, library)
    finally:
        context.tokens = _tokens(missing, setting) - _tokens(library.missing(missing), setting)
    context.disk = sum(block_bytes(block.folder) for block in missing)
    listed = digest([block.folder.name for block in blocks])
    describe = {"what": f"list of the blocks of {signal.label}", "blocks": len(blocks)}
    folder = cache.ensure(LISTS, listed, describe, lambda folder: write_signal(folder, blocks))
    return {"folder": str(folder.resolve()), "signal": signal.identity}, _summary(
        signal, blocks, missing, setting
    )


def _fill(cluster: Cluster, missing: Sequence[SignalBlock], library: Library) -> None:
    """Has the workers of a cluster, or groups of them, write the blocks."""
    total, group = _sequences(missing), cluster.teacher_group()
    if group is None:
        cluster.map(compute, dealt(missing, cluster.mappers()), library, total)
        return
    jobs = [Hand(blocks=hand, library=library, total=total) for hand in dealt(missing, cluster.groups(group))]
    cluster.map_groups(in_group, jobs, group, compute_in_group)


def dealt(blocks: Sequence[SignalBlock], workers: int) -> list[list[SignalBlock]]:
    """The blocks in at most `workers` hands of nearly equal work, none of them empty."""
    hands: list[list[SignalBlock]] = [[] for _ in range(min(workers, len(blocks)))]
    for block in sorted(blocks, key=lambda block: -len(block.sequences)):
        min(hands, key=_sequences).append(block)
    return hands


def compute(blocks: Sequence[SignalBlock], library: Library, total: int, report: Callable[..., None]) -> None:
    """In a worker: write its blocks, of the `total` sequences that all workers do. Those that it had finished
    before it was lost are not done again."""
    setting = library.setting
    teacher, before = setting.teacher(setting.share()), 0
    for block in blocks:
        progress = partial(_tell, report, total, before)
        library.fill(block, partial(_write, block, setting, teacher, progress, None))
        before += len(block.sequences)
        progress(len(block.sequences))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hand:
    """The blocks of one group, of the `total` sequences that all groups do. Picklable."""

    blocks: Sequence[SignalBlock]
    library: Library
    total: int


def compute_in_group(hand: Hand, worker: Worker) -> None:
    """On every rank: the same, by ranks that share the teacher and each block."""
    setting, before = hand.library.setting, 0
    teacher = setting.online_teacher(setting.share(worker.rank, worker.world, worker.device)).model
    # What is stored of a token has no business on a device; a block may be another run's for hours.
    ranks = dist.new_group(backend="gloo", timeout=PATIENCE)
    for block in hand.blocks:
        progress = partial(_tell, worker.report, hand.total, before)
        _fill_together(block, hand.library, partial(_write, block, setting, teacher, progress, ranks), ranks)
        before += len(block.sequences)
        progress(len(block.sequences))


def _fill_together(
    block: SignalBlock, library: Library, write: Callable[[Path | None], None], ranks: dist.ProcessGroup
) -> None:
    """`write` on every rank, unless another process has made the block.

    Rank 0 alone looks for it and waits for its lock. Ranks that held a lock each could wait for those of another
    run, whose ranks wait for theirs.
    """
    if dist.get_rank(ranks) != 0:
        if _hear(None, ranks):
            write(None)
        return
    begun = False

    def make(folder: Path) -> None:
        nonlocal begun
        begun = _hear(True, ranks)
        write(folder)

    library.fill(block, make)
    if not begun:
        _hear(False, ranks)


def _hear(word: bool | None, ranks: dist.ProcessGroup) -> bool:
    """What rank 0 says."""
    words = [word]
    dist.broadcast_object_list(words, group=ranks, group_src=0)
    return bool(words[0])


def _tell(report: Callable[..., None], total: int, before: int, done: int) -> None:
    report("stage_progress", stage="teacher", done=before + done, total=total, unit="sequences")


def _write(
    block: SignalBlock,
    setting: Setting,
    teacher: Headless,
    progress: Callable[[int], None],
    ranks: dist.ProcessGroup | None,
    folder: Path | None,
) -> None:
    compute_block(
        block,
        folder,
        teacher,
        setting.tokens().sequences,
        dtype=setting.dtype,
        batch=setting.micro_batch,
        seed=setting.experiment.seed,
        vocabulary=setting.vocabulary,
        progress=progress,
        ranks=ranks,
    )


def _sequences(blocks: Sequence[SignalBlock]) -> int:
    return sum(len(block.sequences) for block in blocks)


def _tokens(blocks: Sequence[SignalBlock], setting: Setting) -> int:
    return _sequences(blocks) * setting.experiment.data.sequence_length


def _summary(
    signal: StoredSignal, blocks: Sequence[SignalBlock], missing: Sequence[SignalBlock], setting: Setting
) -> str:
    length, new = setting.experiment.data.sequence_length, _sequences(missing)
    stored, held = sum(block_bytes(block.folder) for block in blocks), _sequences(blocks)
    text = f"{signal.label}, {held * length:,} tokens, {format_bytes(stored)}"
    if new == 0:
        return f"{text} (from the cache)"
    return text if new == held else f"{text} ({(held - new) * length:,} tokens from the cache)"
