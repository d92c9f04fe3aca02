"""Processes that train an encoder, killed at any moment; given again they end with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from protea.finetune.tuning import Tuned
from tunings import assert_same, examples, head, run, write_model

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

PROGRAM = """
import sys
from pathlib import Path
import torch
from pytest import MonkeyPatch
from test_tuning_killed import train
from tunings import save_every_step, tensors

torch.set_num_threads(1)
save_every_step(MonkeyPatch())
folder, work, out, method = sys.argv[1:]
tuned = train(Path(folder), Path(work), method)
torch.save({"tensors": tensors(tuned), "curve": tuned.curve}, out)
"""


def train(folder: Path, work: Path, method: Any) -> Tuned:
    """Forty steps, with dropout."""
    labelled, config = examples("residue-class"), {"steps": 40, "lora_dropout": 0.1, "validations": 2, "patience": 100}
    return run(folder, labelled, work, config=head(labelled, "cnn"), method=method, **config)


def start(folder: Path, work: Path, out: Path, method: str) -> subprocess.Popen[bytes]:
    """The program in a process of its own."""
    words = [sys.executable, "-c", PROGRAM, str(folder), str(work), str(out), method]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


def steps(work: Path) -> int:
    """The newest step that is on disk."""
    return max((int(path.name[5:]) for path in (work / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_any_moment(tmp_path: Path, method: str) -> None:
    folder = write_model(tmp_path)
    assert start(folder, tmp_path / "whole", tmp_path / "whole.pt", method).wait() == 0
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draws = random.Random(seed)
    for after in (0, 5, 20):
        process = start(folder, tmp_path / "killed", tmp_path / "killed.pt", method)
        while steps(tmp_path / "killed") <= after and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draws.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(folder, tmp_path / "killed", tmp_path / "killed.pt", method).wait() == 0
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("whole", "killed"))
    assert whole["curve"] == killed["curve"]
    assert all(torch.equal(value, killed["tensors"][name]) for name, value in whole["tensors"].items())


def test_killed_once(tmp_path: Path) -> None:
    """One process is killed; this one continues, as if nothing had happened."""
    folder = write_model(tmp_path)
    process = start(folder, tmp_path / "work", tmp_path / "out.pt", "full")
    while steps(tmp_path / "work") < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert_same(train(folder, tmp_path / "work", "full"), train(folder, tmp_path / "whole", "full"))
