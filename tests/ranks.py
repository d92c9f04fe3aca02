"""Functions and commands in several processes, started quickly: each is a fork of one that has imported PyTorch."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import distributed as dist

from protea.cli import main
from protea.train.world import Ranks

_PRELOADED: Final = (
    "hypothesis.strategies",
    "protea.cli.pretrain_view",
    "protea.train.loop",
    "protea.train.pipeline",
    "protea.train.run_export",
    "protea.train.tensor_parallel",
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic.multiprocessing",
    "torch.distributed.fsdp",
    "torch.utils.checkpoint",
)
"""Slow imports, done once: processes are forks of one that has done nothing else."""


@cache
def forking() -> ForkServerContext:
    """Starts processes without importing PyTorch in each."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of lost connections
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED])
    return context


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 600) -> list[Any]:
    """Call ``function(world, *arguments)`` in ``size`` processes; returns what each returned.

    The function is one of a test's module, found by its name. All errors of all ranks are shown, and processes that
    take more than ``seconds`` are killed.
    """
    context = forking()
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


Runs = Callable[[Sequence[str]], None]
"""Runs ``protea`` with some arguments: ``run_command``, perhaps after what breaks it."""


class Command:
    """``protea`` in a process of its own, with one thread."""

    def __init__(
        self, arguments: Sequence[object], environment: Mapping[str, str], errors: Path, run: Runs | None = None
    ) -> None:
        self._errors, options = errors, [*map(str, arguments)]
        self._process = forking().Process(
            target=_command, args=(options, dict(environment), errors, run or run_command)
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit code of a process that has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def finish(self, seconds: float = 600) -> tuple[int, str]:
        """Exit code and standard error."""
        self._process.join(seconds)
        late = self._process.exitcode is None
        self._process.kill()
        self._process.join()
        assert self._process.exitcode is not None
        assert not late, self._errors.read_text()
        return self._process.exitcode, self._errors.read_text()


def start_commands(
    size: int, arguments: Callable[[int], Sequence[object]], folder: Path, run: Runs | None = None
) -> list[Command]:
    """One command in several processes, as a scheduler starts them; ``folder`` receives their standard errors."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Command(arguments(rank), world | {"RANK": str(rank)}, folder / f"errors-{rank}.txt", run)
        for rank in range(size)
    ]


def _command(arguments: list[str], environment: dict[str, str], errors: Path, run: Runs) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    for path, mode, stream in ((Path(os.devnull), "w", sys.stdout), (errors, "w", sys.stderr)):
        with path.open(mode) as file:
            os.dup2(file.fileno(), stream.fileno())
    run(arguments)


def run_command(arguments: Sequence[str]) -> None:
    """``protea`` in this process, which ends unless the exit code is 0."""
    sys.argv = ["protea", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def torchrun(size: int, function: Callable[..., None], *arguments: object, restarts: int = 0) -> None:
    """Call a function in several processes as ``torchrun`` does, which starts all again if one fails."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    forking()
    config = LaunchConfig(
        1,
        1,
        size,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=restarts,
        start_method="forkserver",
        monitor_interval=0.1,
    )
    caught = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    before = {number: signal.getsignal(number) for number in caught}
    try:
        elastic_launch(config, function)(*arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
