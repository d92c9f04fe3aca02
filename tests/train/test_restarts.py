"""Runs that ``torchrun`` starts: saved in one layout, continued in another; killed, and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from protea.checkpoints.tensors import same_bits
from protea.train import loop
from protea.train.recipe import Recipe
from protea.train.run_checkpoints import CHECKPOINTS, read_verified, run_folders
from ranks import run_command, torchrun
from trials import assert_same, make_store, metrics, recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")

PACK = 96


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


def told(store: Path, **sections: Any) -> Recipe:
    """Four packs a step."""
    return recipe(store, batch={"tokens": 4 * PACK, "pack": PACK}, **sections)


def written(made: Recipe, folder: Path) -> list[str]:
    """The command of a run."""
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(made.shown()))
    return ["pretrain", str(path), "-o", str(folder), "--accept-changes"]


# ---- layouts ----
def tensors(checkpoint: Path) -> dict[str, Any]:
    return dict(read_verified(checkpoint).tensors())


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_checkpoints_of_one_layout_serve_every_other(store: Path, tmp_path: Path, optimizer: str) -> None:
    """Each layout reads the checkpoint of the first one and writes it again, to the bit; then it trains on."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain = {"model": none, "optimizer": {"name": optimizer}}
    first, end, whole = {"steps": 2}, {"steps": 3}, optimizer == "muon"
    saved = tmp_path / "saved"
    made = told(store, **plain, run=first, validation={"every": None}, parallel={"replicate": 2 if whole else 1})
    torchrun(2, run_command, written(made, saved))
    expected = tensors(saved / CHECKPOINTS / "step-000000002")
    assert any(key.startswith("optimizer.") for key in expected)
    losses = []
    layouts: Sequence[tuple[int, dict[str, int]]] = [
        (1, {}),
        (4, {"replicate": 4} if whole else {}),
        (2, {"pipeline": 2}),
        *([] if whole else [(2, {"tensor": 2}), (4, {"pipeline": 2, "shard": 2})]),
    ]
    for number, (size, parallel) in enumerate(layouts):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(saved, folder)
        # Without a validation loss, the checkpoint counts as unfinished and is written again.
        made = told(store, **plain, run=end, validation={"every": 1, "tokens": 200}, parallel=parallel)
        if size == 1:
            train(made, folder, accept_changes=True)
        else:
            torchrun(size, run_command, written(made, folder))
        again, last = run_folders(folder)
        found = tensors(again)
        assert read_verified(again).loss is not None
        assert found.keys() == expected.keys()
        assert all(same_bits(found[key], expected[key]) for key in expected), parallel
        assert tensors(last).keys() == expected.keys()
        losses.append([line for line in metrics(folder) if line["step"] > 1])
    exact = 1e-5 if not whole else 1e-3
    for ours in losses[1:]:
        for line, other in zip(ours, losses[0], strict=True):
            assert line == pytest.approx(other, rel=exact)


# ---- kills ----
def killed(command: list[str], seed: int, kills: int, most: int) -> None:
    """A run that dies on a random process, at a random moment after at most so many steps; the last does not."""
    start, folder = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), Path(command[3])
    folder.with_name(f"start-{start}").touch()
    rng = random.Random(f"{seed} {start}")
    victim, step, delay = (
        rng.randrange(int(os.environ["WORLD_SIZE"])),
        rng.randint(most // 3, most),
        rng.uniform(0, 0.02),
    )
    if start < kills and int(os.environ["RANK"]) == victim:
        train_step, steps = loop.train_step, 0

        def doomed(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return train_step(*arguments, **options)

        loop.train_step = doomed
    run_command(command)


def kill_often(made: Recipe, folder: Path, size: int, *, kills: int, most: int) -> None:
    """Compare a run that is killed with one that is not; the random choices are those of the number of kills."""
    torchrun(size, run_command, written(made, folder / "whole"))
    torchrun(size, killed, written(made, folder / "run"), kills, kills, most, restarts=kills)
    assert len([*folder.glob("start-*")]) == kills + 1
    assert_same(folder / "run", folder / "whole")


def test_torchrun_starts_again(store: Path, tmp_path: Path) -> None:
    """After each kill, all go on from the newest checkpoint, and end with the bits of an undisturbed run."""
    made = told(store, run={"steps": 24}, save={"every": 3}, validation={"every": 12})
    kill_often(made, tmp_path, 2, kills=2, most=9)


@pytest.mark.long
@pytest.mark.parametrize("parallel", [{}, {"replicate": 2, "pipeline": 2}])
def test_twenty_kills_of_four_processes(store: Path, tmp_path: Path, parallel: dict[str, int]) -> None:
    made = told(store, run={"steps": 200}, save={"every": 4}, validation={"every": 50}, parallel=parallel)
    kill_often(made, tmp_path, 4, kills=20, most=9)
