"""What goes wrong on one process of several: a full disk, too little memory, a hang. All end, and say the same."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from protea.models.encoder import Encoder
from protea.train import loop
from protea.train.failures import late
from protea.train.objective import Validation
from protea.train.run_checkpoints import run_folders, step_of
from ranks import Runs, run_command, start_commands
from trials import assert_same, make_store, recipe

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = 1
"""The process on which things go wrong."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


def run(
    store: Path, folder: Path, how: Runs = run_command, size: int = 2, **sections: Mapping[str, Any]
) -> tuple[list[int], list[str]]:
    """The exit codes and standard errors of a command in several processes, without a traceback."""
    values = {"batch": {"tokens": 4 * 96, "pack": 96}, "validation": {"every": None}, "run": {"steps": 8}}
    told = recipe(store, **values | sections)
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(told.shown()))
    commands = start_commands(size, lambda rank: ["pretrain", path, "-o", folder], folder.with_name("errors"), how)
    ended = [command.finish() for command in commands]
    codes, errors = ([each[number] for each in ended] for number in (0, 1))
    assert not [error for error in errors if "Traceback" in error], errors
    return codes, errors


def one_message(errors: Sequence[str]) -> str:
    """The only error of all processes, which the first one says."""
    found = [(rank, line) for rank, error in enumerate(errors) for line in error.splitlines() if "error: " in line]
    assert len(found) == 1, errors
    ((rank, line),) = found
    assert rank == 0
    return line


def breaking(step: int, what: Callable[[], Any]) -> None:
    """Do something on one process when a step begins."""
    train_step = loop.train_step

    def broken(*arguments: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) == LAST and options["step"] == step:
            what()
        return train_step(*arguments, **options)

    loop.train_step = broken


# --- a full disk ---------------------------------------------------------------------------------------------------


def with_a_full_disk(command: Sequence[str]) -> None:
    """A limit on the size of files, which fails writes as a full disk does, after the first checkpoint."""
    breaking(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY)))
    run_command(command)


def test_a_full_disk(store: Path, tmp_path: Path) -> None:
    """All train on, as one process does, and fail at the end; the earlier checkpoint serves."""
    saves = {"save": {"every": 3}}
    codes, errors = run(store, tmp_path / "run", with_a_full_disk, **saves)
    assert codes == [1, 1]
    message = one_message(errors)
    assert "the checkpoint of step 8 could not be written: rank 1: File too large" in message
    assert "a checkpoint could not be written: rank 1: File too large" in errors[0]
    assert not errors[1]
    assert [step_of(folder) for folder in run_folders(tmp_path / "run")] == [3]
    assert not [*(tmp_path / "run/checkpoints").glob(".*")]
    codes, errors = run(store, tmp_path / "run", **saves)
    assert codes == [0, 0], errors
    assert "continues after step 3" in errors[0]
    run(store, tmp_path / "whole", **saves)
    assert_same(tmp_path / "run", tmp_path / "whole")


# --- too little memory ---------------------------------------------------------------------------------------------


def with_little_memory(command: Sequence[str]) -> None:
    """One process runs out of memory once, in validation."""
    validates, forward = Validation.loss, Encoder.forward
    error: Exception | None = torch.OutOfMemoryError("CUDA out of memory.")

    def scarce(self: Encoder, *arguments: Any, **options: Any) -> Any:
        nonlocal error
        found, error = error, None
        if found is not None:
            raise found
        return forward(self, *arguments, **options)

    def loss(*arguments: Any, **options: Any) -> float | None:
        if int(os.environ["RANK"]) == LAST:
            Encoder.forward = scarce  # type: ignore[method-assign]
        return validates(*arguments, **options)

    Validation.loss = loss  # type: ignore[method-assign]
    run_command(command)


def test_too_little_memory_in_validation(store: Path, tmp_path: Path) -> None:
    """One process would compute halves of the pack, but the others gather no weights for them."""
    validation = {"every": 4, "tokens": 400}
    codes, errors = run(store, tmp_path / "run", with_little_memory, validation=validation, save={"every": 2})
    assert codes == [1, 1]
    assert "out of main memory with packs of 96 tokens: lower batch.pack" in one_message(errors)
    assert not errors[1]
    codes, errors = run(store, tmp_path / "run", validation=validation, save={"every": 2})
    assert codes == [0, 0], errors


# --- a hang --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([{"all": 3}, {"all": 3}], []),
        ([{"all": 4}, {"all": 3}], [1]),
        ([{"all": 3, "a": 7}, {"all": 3, "a": 8}], [0]),
        # Rank 2 hangs: rank 0 waits for it, rank 1 for rank 0, and rank 3 for rank 2.
        ([{"p0": 5, "s0": 7}, {"p1": 6, "s0": 8}, {"p0": 4, "s1": 1}, {"p1": 5, "s1": 2}], [2]),
        ([{"a": 1}, {"b": 2}], []),
    ],
)
def test_who_is_late(counts: list[dict[str, int]], expected: list[int]) -> None:
    assert late(dict(enumerate(counts))) == expected


def hang(*_: object) -> None:
    time.sleep(3600)


def hanging_in_a_layer(command: Sequence[str]) -> None:
    """In the middle of a forward pass, where no process tells that it makes progress."""

    def later() -> None:
        forward = Encoder.forward

        def stuck(self: Encoder, *arguments: Any, **options: Any) -> Any:
            [*self.layers][-1].register_forward_pre_hook(hang)
            return forward(self, *arguments, **options)

        Encoder.forward = stuck  # type: ignore[method-assign]

    breaking(3, later)
    run_command(command)


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "parallel"),
    [(2, {"shard": 2}), (2, {"pipeline": 2}), (4, {"pipeline": 2, "shard": 2}), (2, {"tensor": 2})],
)
def test_a_hang_within_a_pass(store: Path, tmp_path: Path, size: int, parallel: dict[str, int]) -> None:
    model = {"num_hidden_layers": 4, "num_attention_heads": 4}
    model |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    waits = parallel | {"timeout": 10}
    codes, errors = run(store, tmp_path / "run", hanging_in_a_layer, size, model=model, parallel=waits)
    assert codes == [1] * size
    assert f"rank 1 of {size} hangs at step 3, and the others wait for it" in one_message(errors)
