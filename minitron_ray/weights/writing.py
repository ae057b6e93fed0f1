"""`write_checkpoint`: weights to a Hugging Face model folder, streamed.

The config determines every tensor's name, shape and place in the files, so tensors are written as
they come and none is held: a model larger than memory can be cut from one file to another.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import CONFIG, FLOATS, INDEX, SINGLE, torch_dtype

if TYPE_CHECKING:
    import torch

SHARD_BYTES: Final = 5 * 10**9


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | str,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes `tensors`, converted to `dtype`, in safetensors of at most `shard_bytes`, then `config.json`.

    Weights already in the folder are replaced. The config is written last and every file under another
    name until it is whole, so that a folder with a config has all its weights. A tied LM head is left
    out. Returns the weight files.

    Raises RuntimeError where the tensors are not exactly those of `config`, by name and shape: a
    student that is not the one planned is never written.
    """
    family = family_of(config)
    arch = family.read(config)
    kind = torch_dtype(dtype)
    name_of_type = str(kind).removeprefix("torch.")
    shards = layout(family.shapes(arch), name_of_type, kind.itemsize, shard_bytes)
    _clear(folder)
    with ExitStack() as stack:
        places = {
            name: (file, place)
            for shard in shards
            for file in [stack.enter_context(_whole_file(folder / shard.file))]
            for name, place in shard.start(file)
        }
        for name, tensor in tensors:
            if name == f"{family.lm_head}.weight" and arch.tied:
                continue
            file, place = _claim(places, name, tuple(tensor.shape))
            file.seek(place.offset)
            file.write(_bytes(tensor, kind))
        if places:
            raise RuntimeError(
                f"tensors were not given: {', '.join(sorted(places)[:3])} ({len(places)} in all)"
            )
    if len(shards) > 1:
        write_whole_json(folder / INDEX, index_of(shards))
    write_whole_json(folder / CONFIG, typed(family.canonical(config), name_of_type))
    return [folder / shard.file for shard in shards]


@dataclass(frozen=True, slots=True)
class Place:
    offset: int
    """Bytes from the start of the file."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    file: str
    header: bytes
    places: dict[str, Place]
    size: int
    """Bytes of its tensors."""

    def start(self, file: IO[bytes]) -> Iterable[tuple[str, Place]]:
        """Writes the header; gives where each tensor goes."""
        file.write(self.header)
        return self.places.items()


def layout(shapes: Mapping[str, tuple[int, ...]], dtype: str, itemsize: int, shard_bytes: int) -> list[Shard]:
    """The files, each filled in the order of `shapes` up to `shard_bytes`."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = _size(shape, itemsize)
        if groups[-1] and used + size > shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += size
    if len(groups) == 1:
        return [_shard(SINGLE, groups[0], dtype, itemsize)]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, dtype, itemsize)
        for number, group in enumerate(groups, 1)
    ]


def _shard(file: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, itemsize: int) -> Shard:
    """One safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes."""
    kind = next(stored for stored, name in FLOATS.items() if name == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _size(shape, itemsize)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    header = struct.pack("<Q", len(header)) + header
    places = {
        name: Place(len(header) + entries[name]["data_offsets"][0], tuple(shape))
        for name, shape in shapes.items()
    }
    return Shard(file, header, places, end)


def _size(shape: tuple[int, ...], itemsize: int) -> int:
    return itemsize * math.prod(shape)


def _claim(
    places: dict[str, tuple[IO[bytes], Place]], name: str, shape: tuple[int, ...]
) -> tuple[IO[bytes], Place]:
    if name not in places:
        raise RuntimeError(f"{name} is not a tensor of the config, or was given twice")
    file, place = places.pop(name)
    if place.shape != shape:
        raise RuntimeError(f"{name} has shape {shape}, the config implies {place.shape}")
    return file, place


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    import torch

    plain = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return plain.view(torch.uint8).numpy().data


def index_of(shards: list[Shard]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.size for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in sorted(shard.places)},
    }


def typed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with the type of its weights, under the name it already uses."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: dtype}


def _clear(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in [folder / CONFIG, folder / INDEX, *folder.glob("*.safetensors"), *folder.glob("*.part")]:
        path.unlink(missing_ok=True)


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it has all its bytes, on the disk; removed on an error."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole_json(path: Path, value: Any) -> None:
    with _whole_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
