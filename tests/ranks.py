"""Functions run by several processes that share a ``World``, as ``torchrun`` would start them."""

from __future__ import annotations

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from protea.train.world import Ranks


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 600) -> list[Any]:
    """Call ``function(world, *arguments)`` in ``size`` processes; returns what each returned.

    The function is one of a test's module, found by its name. All errors of all ranks are shown, and processes that
    take more than ``seconds`` are killed.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = [
            context.Process(target=_member, args=(folder, rank, size, seconds, function, arguments))
            for rank in range(size)
        ]
        for member in members:
            member.start()
        end = time.monotonic() + seconds
        for member in members:
            member.join(max(0.1, end - time.monotonic()))
        late = [rank for rank, member in enumerate(members) if member.is_alive()]
        for member in members:
            member.kill()
            member.join()
        errors = [f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("*.txt")) if path.stat().st_size]
        codes = [member.exitcode for member in members]
        if late or errors or any(codes):
            pytest.fail(f"exit codes {codes}, too late {late}\n" + "\n".join(errors), pytrace=False)
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(size)]


def _member(
    folder: Path, rank: int, size: int, seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # The stacks of a process that is about to be killed.
    late = (folder / f"late-{rank}.txt").open("w")
    faulthandler.dump_traceback_later(seconds / 2, file=late)
    world = Ranks(dist.FileStore(str(folder / "store"), size), rank, size, seconds)
    with world.together():
        try:
            world.connect(torch.device("cpu"), seconds)
            torch.save(function(world, *arguments), folder / f"result-{rank}")
        except BaseException:
            (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
            raise
    faulthandler.cancel_dump_traceback_later()
