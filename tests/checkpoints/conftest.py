"""Fixtures of hostile and damaged checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile import originals

MEMORY_KB = 300_000
"""Above what there was; all the files of these tests together are smaller, those with holes apart."""


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One undamaged checkpoint of every format."""
    return originals(tmp_path_factory.mktemp("good"))


@pytest.fixture
def bounded() -> Iterator[None]:
    """Bounds the memory that a test takes, by Linux's own account of it."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        yield
        return
    forget.write_text("5")  # the largest size so far
    before = _peak_kb()
    yield
    assert _peak_kb() - before < MEMORY_KB


def _peak_kb() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0])
