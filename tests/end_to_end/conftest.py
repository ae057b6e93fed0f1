"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.desk import Desk


@pytest.fixture
def desk(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> Iterator[Desk]:
    """A fresh one."""
    desk = Desk.lay(tmp_path, tiny_llama, tiny_text)
    yield desk
    desk.clear()
