"""`CutTensors`: the teacher's weights with only the kept units, one tensor at a time.

Rows are taken before columns, so that of a memory-mapped tensor only the kept rows are read. A
tensor with no rows or columns to lose is copied as it is: cutting to the full shape gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family, Product, Row
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


class Term(NamedTuple):
    """One summand of a dimension's units: which of the teacher's, and with what weights."""

    positions: NDArray
    """int64, one a unit of the student."""
    weights: NDArray | None
    """float64, one a unit; None for ones."""


Selection = list[Term] | None
"""What a dimension of the student is made of, the sum of its terms; None for the teacher's as it is."""


class CutTensors(Mapping[str, "torch.Tensor"]):
    """The student's weights by name, each cut when it is asked for and again the next time: contiguous, in memory of
    its own, in `dtype` (the source's where None). No more is held than the caller holds.

    Layers and experts are numbered anew. Merged heads and KV heads are summed in float32. Raises
    ValueError where `kept` is no selection of `teacher`'s units, or a tensor of `source` has another
    shape than the table says.
    """

    def __init__(
        self,
        source: Checkpoint | Tensors,
        family: Family,
        teacher: Architecture,
        kept: Kept,
        *,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        self._take = source.tensor if isinstance(source, Checkpoint) else source.__getitem__
        self._family, self._teacher, self._kept = family, teacher, kept
        self._student = kept.architecture(teacher)
        self._dtype = None if dtype is None else torch_dtype(dtype)
        self._rows = {row.name: row for row in family.rows(self._student)}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        """Layer by layer."""
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows  # without cutting it

    def __getitem__(self, name: str) -> torch.Tensor:
        row = self._rows[name]
        origin = origin_name(row, self._kept)
        tensor = self._take(origin)
        expected = self._family.shape(row.tensor, self._teacher)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{origin} has shape {tuple(tensor.shape)}, expected {expected}")
        out = select(tensor, selections(row, self._teacher, self._kept))
        if row.tensor.rescaled is not None:
            out = row.tensor.rescaled(out, self._teacher, self._student)
        out = out.detach().to(self._dtype or tensor.dtype).contiguous()
        return out.clone() if out.data_ptr() == tensor.data_ptr() else out


def cut(
    source: Checkpoint | Tensors,
    family: Family,
    teacher: Architecture,
    kept: Kept,
    *,
    dtype: torch.dtype | str | None = None,
) -> dict[str, torch.Tensor]:
    """The student's weights, as `CutTensors` gives them, all in memory."""
    return dict(CutTensors(source, family, teacher, kept, dtype=dtype))


def cut_tensors(
    source: Checkpoint | Tensors,
    family: Family,
    teacher: Architecture,
    kept: Kept,
    *,
    dtype: torch.dtype | str | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each of the student's weights, as `CutTensors` gives them, in its order. Peak memory is
    that of the largest tensor."""
    yield from CutTensors(source, family, teacher, kept, dtype=dtype).items()


def origin_name(row: Row, kept: Kept) -> str:
    """The name of the teacher's tensor that a row of the student is cut out of."""
    if row.layer is None:
        return row.name
    expert = row.expert
    if expert is not None and kept.experts:
        expert = kept.experts[row.layer][expert]
    return row.tensor.name.format(layer=kept.layers[row.layer], expert=expert)


def selections(row: Row, teacher: Architecture, kept: Kept) -> list[Selection]:
    """Of each dimension of a student's tensor, what is taken of the teacher's."""
    return [_dimension(blocks, row, teacher, kept) for blocks in row.tensor.blocks]


def _dimension(blocks: tuple[Product, ...], row: Row, teacher: Architecture, kept: Kept) -> Selection:
    parts, start, whole = [], 0, True
    for block in blocks:
        sizes = [int(factor) if factor.isdigit() else getattr(teacher, factor) for factor in block]
        terms: list[Term] | None = None
        for factor, size in zip(block, sizes, strict=True):
            chosen = None if factor.isdigit() else _of_axis(factor, row, teacher, kept)
            whole &= chosen is None or _is_whole(chosen, size)
            terms = _inside(terms, chosen or [Term(np.arange(size), None)], size)
        assert terms is not None
        parts.append([Term(positions + start, weights) for positions, weights in terms])
        start += int(np.prod(sizes))
    return None if whole else _joined(parts)


def _is_whole(terms: Sequence[Term], size: int) -> bool:
    return len(terms) == 1 and terms[0].weights is None and len(terms[0].positions) == size


def _inside(outer: Sequence[Term] | None, inner: Sequence[Term], size: int) -> list[Term]:
    """Units of one factor inside each unit of the factors before it."""
    if outer is None:
        return list(inner)
    found = []
    for left in outer:
        for right in inner:
            positions = (left.positions[:, None] * size + right.positions).reshape(-1)
            weights = None
            if left.weights is not None or right.weights is not None:
                weights = np.outer(_weights(left), _weights(right)).reshape(-1)
            found.append(Term(positions, weights))
    return found


def _joined(parts: Sequence[Sequence[Term]]) -> list[Term]:
    """Blocks one after the other; a block with fewer terms than another gets terms of weight 0."""
    count = max(len(terms) for terms in parts)
    joined = []
    for number in range(count):
        terms = [
            part[number] if number < len(part) else Term(part[0].positions, np.zeros(len(part[0].positions)))
            for part in parts
        ]
        plain = all(term.weights is None for term in terms)
        weights = None if plain else np.concatenate([_weights(term) for term in terms])
        joined.append(Term(np.concatenate([term.positions for term in terms]), weights))
    return joined


def _weights(term: Term) -> NDArray:
    return np.ones(len(term.positions)) if term.weights is None else term.weights


def _of_axis(axis: str, row: Row, teacher: Architecture, kept: Kept) -> list[Term] | None:
    """Units kept on one axis; None for all, as on axes never cut."""
    if axis == "hidden":
        return _plain(kept.hidden)
    if axis not in ("heads", "kv_heads", "mlp", "experts", "expert_mlp"):
        return None
    if row.layer is None:
        raise ValueError(f"{axis} is an axis of layers only")
    layer = row.layer
    merged = bool(kept.merged_heads) and row.tensor.makes_heads
    match axis:
        case "heads":
            return _blended(kept.merged_heads[layer]) if merged else _plain(kept.heads[layer])
        case "kv_heads" if merged and teacher.heads_per_group == 1:
            return _blended(kept.merged_heads[layer])
        case "kv_heads":
            groups = kept.groups(teacher, layer)
            return _blended([tuple((unit, 1 / len(group)) for unit in group) for group in groups])
        case "mlp":
            return _plain(kept.mlp[layer]) if kept.mlp else None
        case "experts":
            return _plain(kept.experts[layer]) if kept.experts else None
        case _:
            assert row.expert is not None
            return _plain(kept.expert_mlp[layer][row.expert]) if kept.expert_mlp else None


def _plain(units: Sequence[int]) -> list[Term]:
    return [Term(np.asarray(units, dtype=np.int64), None)]


def _blended(blends: Sequence[Sequence[tuple[int, float]]]) -> list[Term]:
    """Sums of units as terms; a sum of fewer than the longest is filled up with weight 0."""
    count = max(len(blend) for blend in blends)
    filled = [[*blend, *[(blend[0][0], 0.0)] * (count - len(blend))] for blend in blends]
    terms = []
    for number in range(count):
        weights = np.asarray([blend[number][1] for blend in filled])
        positions = np.asarray([blend[number][0] for blend in filled], dtype=np.int64)
        terms.append(Term(positions, None if (weights == 1).all() else weights))
    return terms


def select(tensor: torch.Tensor, chosen: Sequence[Selection]) -> torch.Tensor:
    """What `chosen` takes of each dimension; sums of units in float32, anything else in the tensor's type."""
    out = tensor
    for dimension, terms in enumerate(chosen):
        if terms is None:
            continue
        if len(terms) == 1 and terms[0].weights is None:
            out = _taken(out, dimension, terms[0].positions)
        else:
            out = _summed(out, dimension, terms)
    return out


def _summed(tensor: torch.Tensor, dimension: int, terms: Sequence[Term]) -> torch.Tensor:
    """In the order of `terms`, so that a slice has the same bits as the whole."""
    total = _weighted(tensor, dimension, terms[0])
    for term in terms[1:]:
        total += _weighted(tensor, dimension, term)
    return total


def _taken(tensor: torch.Tensor, dimension: int, positions: NDArray) -> torch.Tensor:
    import torch

    index = torch.from_numpy(positions).to(tensor.device)
    if dimension == 0 or tensor.ndim != 2 or tensor.device.type != "cpu":
        return tensor.index_select(dimension, index)
    # Columns by numpy, which moves bits five times as fast as torch does bfloat16.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    out = torch.empty((len(tensor), len(positions)), dtype=tensor.dtype)
    np.take(tensor.detach().view(bits).numpy(), positions, axis=1, out=out.view(bits).numpy(), mode="clip")
    return out


def _weighted(tensor: torch.Tensor, dimension: int, term: Term) -> torch.Tensor:
    import torch

    part = tensor.index_select(dimension, torch.from_numpy(term.positions)).float()
    if term.weights is None:
        return part
    shape = [-1 if d == dimension else 1 for d in range(part.ndim)]
    return part.mul_(torch.from_numpy(term.weights).float().reshape(shape))
