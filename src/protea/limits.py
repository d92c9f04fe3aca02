"""How many CPUs and how much memory this process may use: the machine's, less what affinity and containers take away.

PyTorch knows nothing of containers and starts a thread for each core of the machine. Threads that a container then
stops in turn wait for each other, which takes several times as long as fewer threads would.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from protea.errors import ArgumentError, warn
from protea.text import counted

ROOT: Final = Path("/")
_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class CPUs:
    """The CPUs of the machine, those that the scheduler gives this process, and the quota of its container, if any."""

    installed: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """The largest number of threads that can run at once."""
        quota = self.installed if self.quota is None else max(1, math.ceil(self.quota))
        return min(self.installed, self.allowed, quota)


def cpus(root: Path = ROOT) -> CPUs:
    """Count the CPUs. ``root`` holds ``proc`` and ``sys``."""
    installed = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else installed
    return CPUs(installed, allowed, min(_quotas(root), default=None))


def memory_limit(root: Path = ROOT) -> int | None:
    """The bytes of memory that a container allows its processes, if it sets a limit."""
    return min((limit for limit, _ in _memory(root)), default=None)


def available_memory(root: Path = ROOT) -> int:
    """Bytes of main memory that are free without swapping, in this container too; 8 GB if the system does not tell."""
    free = [1024 * kilobytes for kilobytes in _numbers(root / "proc/meminfo", "MemAvailable:")] or [8 << 30]
    return max(0, min([*free, *(limit - used for limit, used in _memory(root))]))


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; on a GPU this includes what PyTorch holds for reuse."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    return available_memory()


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group around this process that has one, and the bytes in use, without cached files."""
    for version, most, used, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _cgroups(root, version):
            for limit in _numbers(folder / most):
                if limit < 1 << 60:  # version 1 writes 2^63 for no limit
                    yield limit, sum(_numbers(folder / used)) - sum(_numbers(folder / "memory.stat", cached))


def _numbers(path: Path, name: str = "") -> list[int]:
    """The number of each line of a file that begins with a name."""
    rows = (line.split() for line in _text(path).splitlines())
    found = [row[1:] if name else row for row in rows if row and (not name or row[0] == name)]
    return [int(row[0]) for row in found if row and row[0].isdecimal()]


def _quotas(root: Path) -> Iterator[float]:
    """The CPUs that each control group around this process allows, in both versions of control groups."""
    for folder in _cgroups(root, ""):
        yield from _share(_text(folder / "cpu.max").split())
    for folder in _cgroups(root, "cpu"):
        both = (_text(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        yield from _share(" ".join(both).split())


def _share(words: list[str]) -> Iterator[float]:
    """Time of all CPUs per time; the time is ``max`` or -1 where there is no quota."""
    if len(words) == 2 and all(map(str.isdecimal, words)) and int(words[0]) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those around it; ``""`` is version 2.

    Inside a container the path may be the one outside, which does not exist there; the container's own is the mount.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        names, _, path = line.partition(":")[2].partition(":")
        if controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup"
        if names:
            mount = next((found for name in (names, controller) if (found := mount / name).is_dir()), mount)
        elif (mount / "unified").is_dir():
            mount /= "unified"
        below = Path(path.lstrip("/"))
        yield from (mount / folder for folder in dict.fromkeys((below, *below.parents)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def use_threads(count: int) -> None:
    """Compute with a number of threads, in this process and in those that it starts."""
    usable = cpus().usable
    if not 1 <= count <= usable:
        raise ArgumentError(f"threads={count}: this process may use {counted(usable, 'core')}; give 1 to {usable}")
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)


@cache
def limit_threads() -> None:
    """Compute with no more threads than this process has cores; called before models are loaded, and works once.

    In a forked process it lets PyTorch compute with one thread: the threads of its parent do not exist there, and
    waiting for them would never end.
    """
    usable = cpus().usable
    if torch.get_num_threads() > usable:
        for name in _VARIABLES:
            if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > usable:
                cores, threads = counted(usable, "core"), counted(usable, "thread")
                warn(f"{name}={os.environ[name]}: this process may use {cores}; computing with {threads}")
        torch.set_num_threads(usable)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
