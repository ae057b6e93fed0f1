"""A fresh cache, and an index that holds only what a test puts there."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_ray.results.cache import Cache
from tests.data.packages import isolated_index


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "results")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolated_index(tmp_path / "index", monkeypatch)
