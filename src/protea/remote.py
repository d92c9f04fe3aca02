"""Command lines of Protea as tasks of a Ray cluster, for work that is cut into shards on a disk that all share.

Ray starts each task where there is room, and starts it again elsewhere if its process or machine dies. The command
then continues from its journal, as it does on one machine. Functions that run on other machines are sent there as they
are and import nothing of Protea, so that a machine without it can say so.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import protea
from protea.errors import DeviceError, ProteaError, UsageError
from protea.optional import extra
from protea.text import counted

LOCAL: Final = "local"
_SECONDS: Final = 10.0  # to wait for an answer
_POLL_SECONDS: Final = 0.5
_AGAIN: Final = 5
"""How often Ray starts a task again whose process or machine died."""

_SHARDS_A_SLOT: Final = 4


class RemoteTask(NamedTuple):
    """A command line, its name in messages, and the file that receives what it tells."""

    name: str
    arguments: list[str]
    log: Path


class RayCluster:
    """A cluster that this process is connected to; each task takes a GPU, or ``cpus`` cores."""

    def __init__(self, ray: Any, address: str, cpus: int, *, gpu: bool) -> None:
        self._ray, self.address, self.cpus = ray, address, cpus
        resources = ray.cluster_resources()
        self._gpu = gpu and resources.get("GPU", 0) >= 1
        self.slots = int(resources.get("GPU", 0) if self._gpu else resources.get("CPU", 0) // cpus)
        if not self.slots:
            raise UsageError(
                f"--ray {address}: no machine has the {counted(cpus, 'core')} of --cpus-per-shard; lower it"
            )

    @property
    def shards(self) -> int:
        """Shards that leave nobody waiting long for the slowest."""
        return _SHARDS_A_SLOT * self.slots

    def check_machines(self, folder: Path, files: Sequence[Path]) -> None:
        """Refuse machines without this Protea, or that do not see a shared folder and the files as this one does."""
        import torch
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        token = folder.absolute() / f"seen-by-{uuid4().hex}"
        token.write_text(token.name)
        here = str(Path.cwd())
        try:
            probe = self._ray.remote(num_cpus=0, max_retries=1)(_probe)
            waiting = [
                probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    str(token), token.name, _sizes(files), here
                )
                for node in self._ray.nodes()
                if node["Alive"]
            ]
            for found in self._ray.get(waiting):
                self._check(found, folder, str(torch.__version__))
        finally:
            token.unlink(missing_ok=True)

    def _check(self, found: dict[str, Any], folder: Path, torch_version: str) -> None:
        place = f"--ray {self.address}: machine {found['host']}"
        if found["error"]:
            raise DeviceError(
                f"{place} cannot import Protea with {found['python']}: {found['error']}; install it there"
            )
        versions = {"Protea": (found["protea"], protea.__version__), "PyTorch": (found["torch"], torch_version)}
        for name, (theirs, ours) in versions.items():
            if theirs != ours:
                raise DeviceError(f"{place} has {name} {theirs}, this one has {ours}; install the same on all machines")
        if not found["shared"]:
            raise DeviceError(f"{place} does not see {folder}; name an output on a disk that all machines share")
        if found["missing"]:
            raise DeviceError(f"{place} does not see {found['missing'][0]} as this one does; put it on a shared disk")

    def run(self, tasks: Sequence[RemoteTask], watch: Callable[[], None] = lambda: None) -> None:
        """Run all tasks; ``watch`` is called from time to time. The first error ends the others."""
        ray = self._ray
        options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if self._gpu else {"num_cpus": self.cpus}
        perform = ray.remote(max_retries=_AGAIN, **options)(_perform)
        here = str(Path.cwd())
        running = {perform.remote(task.arguments, str(task.log), self.cpus, here): task for task in tasks}
        try:
            while running:
                done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS)
                for one in done:
                    task = running.pop(one)
                    try:
                        code, last = ray.get(one)
                    except ray.exceptions.RayError as error:
                        reason = str(error).strip().splitlines()[0]
                        raise DeviceError(f"{task.name}: died {_AGAIN + 1} times: {reason}; see {task.log}") from error
                    if code:
                        raise ProteaError(f"{task.name}: {last or f'exit code {code}'}")
                watch()
        finally:
            for one in running:
                with suppress(Exception):
                    ray.cancel(one, force=True)


@contextmanager
def ray_cluster(address: str, *, cpus: int = 1, gpu: bool = True) -> Iterator[RayCluster]:
    """Connect to a Ray cluster by ``auto``, ``HOST:PORT``, ``ray://HOST:PORT``, or start one here by ``local``."""
    _check_answers(address)
    with extra("ray", "--ray needs Ray"):
        import ray
    # What Ray sends as it is; other functions of a package are sent as names.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    options: dict[str, Any] = {"address": address}
    if address == LOCAL:
        options = {"include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DeviceError(f"--ray {address}: no Ray cluster answers ({reason}); start one with `ray start`") from error
    try:
        yield RayCluster(ray, address, cpus, gpu=gpu)
    except (ray.exceptions.RayError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DeviceError(f"--ray {address}: the cluster failed: {reason}; run the same command again") from error
    finally:
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes."""
    if address in (LOCAL, "auto"):
        return
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "ray":
        raise UsageError(f"--ray {address!r}: expected auto, local, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        raise DeviceError(
            f"--ray {address}: does not answer: {error.strerror or error}; check the address and that Ray runs there"
        ) from error


def _sizes(paths: Iterable[Path]) -> dict[str, int]:
    """The bytes of files, and of those in folders, by path."""
    files = (file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]))
    return {str(file): file.stat().st_size for file in files if file.is_file()}


def _probe(token: str, content: str, sizes: dict[str, int], here: str) -> dict[str, Any]:
    """What a machine is and sees, of paths from a folder. Runs there, and must not need anything of this module."""
    import platform
    import subprocess
    import sys
    from pathlib import Path

    code = "import protea, torch; print(protea.__version__, torch.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    lines = done.stderr.strip().splitlines()
    try:
        with open(token) as stream:  # noqa: PTH123
            shared = stream.read() == content
    except OSError:
        shared = False
    found = {path: Path(here, path) for path in sizes}
    return {
        "host": platform.node(),
        "python": sys.executable,
        "error": (lines[-1] if lines else "no answer") if done.returncode or len(words) < 2 else "",
        "protea": words[0] if words else "",
        "torch": words[1] if len(words) > 1 else "",
        "shared": shared,
        "missing": [name for name, path in found.items() if not path.is_file() or path.stat().st_size != sizes[name]],
    }


def _perform(arguments: list[str], log: str, cpus: int, here: str) -> tuple[int, str]:
    """Run a command line in a process that ends with this one; returns its code and the last line of its errors.

    Its folder is ``here``; if this machine lacks that folder, the command line has no paths from it.
    """
    import os
    import platform
    import subprocess
    import sys

    code = (
        "import ctypes, signal, sys\n"
        "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
        "from protea.cli import main\nmain()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(cpus)}
    last, tries = "", 0
    while True:
        with open(log, "ab") as stream:  # noqa: PTH123
            stream.write(f"started on {platform.node()} in process {os.getpid()}\n".encode())
            stream.flush()
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                cwd=here if os.path.isdir(here) else None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                env=environment,
                check=False,
            )
        with open(log, errors="replace") as text:  # noqa: PTH123
            lines = [line for line in text.read().strip().splitlines() if line]
        last = lines[-1].removeprefix("protea: error: ") if lines else ""
        tries += 1
        # The process of an earlier attempt may still be ending.
        if done.returncode and "another process is writing it" in last and tries < 10:
            time.sleep(3)
            continue
        return done.returncode, last
