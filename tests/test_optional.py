"""The advice on how to install a package that is missing."""

from __future__ import annotations

import shlex
import sys

import pytest

from protea.errors import MissingExtraError
from protea.optional import extra, install


@pytest.mark.parametrize("place", ["/usr/bin/python3", "/home/my models/.venv/bin/python"])
def test_the_command_names_this_python(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The environment of ``make demo`` contains no pip; the command's own pip installs there."""
    monkeypatch.setattr(sys, "executable", place)
    assert shlex.split(install("protea[plot]")) == ["pip", "--python", place, "install", "protea[plot]"]
    with pytest.raises(MissingExtraError) as caught, extra("plot", "--plot needs matplotlib"):
        raise ImportError
    assert str(caught.value) == f"--plot needs matplotlib: {install('protea[plot]')}"
