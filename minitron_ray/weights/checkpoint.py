"""`Checkpoint`: a Hugging Face model folder, its tensors memory-mapped one by one.

Only safetensors are read: unpickling a `.bin` file can run code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest, file_sha256
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of, rewritten, supported
from minitron_ray.models.family import Family

if TYPE_CHECKING:
    import torch

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
CONFIG: Final = "config.json"
FLOATS: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Types of weights that can be cut and trained, as safetensors and as torch name them."""


class _Header(NamedTuple):
    file: str
    stored: str
    """The tensor's name in the file."""
    shape: tuple[int, ...]
    kind: str
    """As safetensors names it."""


class Checkpoint:
    """The weights and the config of a model folder. Cheap to make and to pickle: files are opened when
    a tensor is first asked for.

    Every method may raise ConfigError, in one line, for a folder without usable weights.
    """

    def __init__(self, folder: Path, as_type: str | None = None) -> None:
        self.folder, self._as_type = Path(folder), as_type
        self._open: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Checkpoint], tuple[Path, str | None]]:
        return type(self), (self.folder, self._as_type)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`, rewritten where another model type was asked for."""
        return self.written if self._as_type is None else rewritten(self.written, self._as_type)

    @cached_property
    def written(self) -> dict[str, Any]:
        """The content of `config.json` as it stands there."""
        config = _read_json(self.folder / CONFIG)
        if not isinstance(config, dict):
            raise ConfigError(f"{self.folder / CONFIG} is not a JSON object")
        return config

    @cached_property
    def _headers(self) -> dict[str, _Header]:
        """Tensor name to what the files' headers say, files in name order. Opening checks each file."""
        headers: dict[str, _Header] = {}
        for file in self.files:
            with _opened(self.folder / file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    part = handle.get_slice(name)
                    headers[name] = _Header(file, name, tuple(part.get_shape()), part.get_dtype())
        return self._named_in_full(headers)

    def _named_in_full(self, headers: dict[str, _Header]) -> dict[str, _Header]:
        """Checkpoints of a bare decoder, as the first ones of GPT-2, leave out its path in the model; others
        have old names."""
        if self.config.get("model_type") not in supported():
            return headers
        family = family_of(self.config)
        headers = {family.old_names.get(name, name): header for name, header in headers.items()}
        path, head = f"{family.backbone}.", f"{family.lm_head}.weight"
        if f"{path}{family.embedding.removeprefix(path)}.weight" in headers:
            return headers
        if f"{family.embedding.removeprefix(path)}.weight" not in headers:
            return headers
        return {name if name == head else f"{path}{name}": header for name, header in headers.items()}

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, sorted."""
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is not a folder with a model")
        if (self.folder / INDEX).exists():
            return _indexed(self.folder)
        if (self.folder / SINGLE).exists():
            return (SINGLE,)
        if any(self.folder.glob("*.bin")):
            raise ConfigError(
                f"{self.folder} holds only .bin weights, whose loading can run code; "
                f"convert them to safetensors"
            )
        raise ConfigError(f"{self.folder} holds no weights: neither {SINGLE} nor {INDEX}")

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the file's header."""
        return self._header(name).shape

    def dtype(self, name: str) -> str:
        """The type of one tensor as torch names it, e.g. `bfloat16`."""
        kind = self._header(name).kind
        return FLOATS.get(kind, kind)

    def stored_as(self, name: str) -> tuple[str, str]:
        """The file that holds a tensor, and the tensor's name in it."""
        header = self._header(name)
        return header.file, header.stored

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped: its pages are read when touched, shared between processes, and
        copied when written to; the file never changes."""
        header = self._header(name)
        if header.file not in self._open:
            from safetensors import safe_open

            self._open[header.file] = safe_open(self.folder / header.file, framework="pt")
        return self._open[header.file].get_tensor(header.stored)

    def check(self, family: Family, arch: Architecture) -> None:
        """Raises ConfigError unless the tensors are exactly the family's: by name, shape and type.

        A copy of the embedding under the LM head's name is allowed where the two are tied.
        """
        expected = family.shapes(arch)
        found = [name for name in self.names() if not name.endswith(family.ignored_tensors)]
        head = f"{family.lm_head}.weight"
        if arch.tied and head in found:
            self._check_tied(head, f"{family.embedding}.weight")
            found.remove(head)
        if missing := [name for name in expected if name not in self._headers]:
            raise ConfigError(
                f"{self.folder}: the weights lack {_few(missing)}, which {family.model_type} has; fetch the model "
                f"again, or put right what config.json says of it"
            )
        if extra := [name for name in found if name not in expected]:
            raise ConfigError(
                f"{self.folder}: unknown tensors {_few(extra)}, which {family.model_type} does not have; a student "
                f"would lack what they do: take them out, or choose another model"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise ConfigError(
                    f"{self.folder}: {name} has shape {self.shape(name)}, config.json implies {shape}"
                )
            if self.dtype(name) not in FLOATS.values():
                raise ConfigError(
                    f"{self.folder}: {name} is stored as {self.dtype(name)}; give plain float weights"
                )

    def digest(self, sha256: Callable[[Path], str] = file_sha256) -> str:
        """sha256 over the config and every weight file, by content and file name (64 hex digits).

        `sha256` gives that of a file, for one who reads the bytes to more than this purpose.
        """
        return digest([self.written, [[name, sha256(self.folder / name)] for name in self.files]])

    def _check_tied(self, head: str, embedding: str) -> None:
        import torch

        one, other = self.tensor(head), self.tensor(embedding)
        # By their bits, too: NaN, which is found and told of elsewhere, equals nothing.
        if not torch.equal(one, other) and not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            raise ConfigError(
                f"{self.folder}: {head} differs from the embedding, but config.json says they are tied "
                f"(tie_word_embeddings)"
            )

    def _header(self, name: str) -> _Header:
        if name not in self._headers:
            raise ConfigError(f"{self.folder}: the weights lack {name}")
        return self._headers[name]


def _indexed(folder: Path) -> tuple[str, ...]:
    """The files that the index names. Raises ConfigError where one is not there."""
    index = _read_json(folder / INDEX)
    try:
        files = tuple(sorted(set(index["weight_map"].values())))
        missing = [name for name in files if not (folder / name).exists()]
    except (TypeError, KeyError, AttributeError):
        raise ConfigError(f"{folder / INDEX} has no weight_map from tensors to files") from None
    if any(Path(name).name != name for name in files):
        raise ConfigError(f"{folder / INDEX} names files outside its folder")
    if missing:
        raise ConfigError(f"{folder} lacks {_few(missing)}, named in {INDEX}; the download is incomplete")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, header checked against the file's length; torch is not needed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as JSON: {error}") from error


def _few(names: Sequence[str]) -> str:
    """At most three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`torch.float32` for "float32", and so on. Raises ValueError for what is no float type of weights."""
    import torch

    kind: torch.dtype | None = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind is None or kind not in {getattr(torch, name) for name in FLOATS.values()}:
        raise ValueError(f"{dtype} is no type of weights; choose from {', '.join(FLOATS.values())}")
    return kind
