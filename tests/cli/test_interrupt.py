"""Signals that arrive where an exception cannot get out, or does harm."""

from __future__ import annotations

import subprocess
import sys

import pytest

SWALLOWED = """
import signal, time
from protea.cli.interrupt import interruptible

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)

try:
    with interruptible():
        Dying()
        time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""
BROKEN = """
import signal
from protea.cli.interrupt import interruptible

try:
    with interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise RuntimeError("a lock in neither state")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("program", [SWALLOWED, BROKEN])
def test_interrupts_get_through(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_other_errors_stay_what_they_are() -> None:
    program = "from protea.cli.interrupt import interruptible\nwith interruptible(): raise ValueError('mine')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ValueError: mine" in done.stderr
