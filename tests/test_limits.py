"""CPUs and memory that a process may use: affinity, both versions of control groups, threads, and forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import Run, fails
from messages import check_message
from protea import limits
from protea.errors import ArgumentError
from protea.limits import CPUs, available_memory, cpus, memory_limit

ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with the control groups of a process."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        # Of the group and those around it the smallest counts.
        (
            "0::/pod/job\n",
            {"sys/fs/cgroup/pod/job/cpu.max": "max 100000\n", "sys/fs/cgroup/pod/cpu.max": "50000 100000\n"},
            0.5,
        ),
        # Inside a container the path is that of the host.
        ("0::/docker/3f\n", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/../a path: with words\n", {"sys/fs/cgroup/a path: with words/cpu.max": "max 100000\n"}, None),
        # Version 1, alone or beside version 2.
        (
            "5:cpu,cpuacct:/docker/3f\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/unified/cgroup.procs": "",
            },
            2.0,
        ),
        (
            "1:cpu:/a\n",
            {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("2:cpuset:/\n", {"sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1\n"}, None),
        # Nonsense counts as no limit.
        ("", {}, None),
        ("0\n\nwords\n::\n", {"sys/fs/cgroup/cpu.max": "0 0\n"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "much\n"}, None),
    ],
)
def test_quotas(groups: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpus(system(tmp_path, groups, files)) == CPUs(os.cpu_count() or 1, ALL, quota)


@pytest.mark.parametrize(
    ("found", "usable"),
    [
        (CPUs(8, 8, None), 8),
        (CPUs(8, 3, None), 3),
        (CPUs(8, 8, 2.0), 2),
        (CPUs(8, 8, 1.5), 2),  # one thread would leave half a CPU unused
        (CPUs(8, 8, 0.1), 1),
        (CPUs(2, 2, 64.0), 2),
    ],
)
def test_usable(found: CPUs, usable: int) -> None:
    assert found.usable == usable


def test_memory(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    files = {"sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/memory.max": "4096\n"}
    assert memory_limit(system(tmp_path / "2", "0::/a\n", files)) == 4096
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert memory_limit(system(tmp_path / "1", "4:memory:/\n", files)) is None
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "8192\n"}
    assert memory_limit(system(tmp_path / "1", "4:memory:/a/b\n", files)) == 8192


def test_available_memory_is_the_least_of_machine_and_containers(tmp_path: Path) -> None:
    """Without cached files; 8 GB where the system tells nothing."""
    assert available_memory(tmp_path) == 8 << 30
    machine = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 6000 kB\n"}
    assert available_memory(system(tmp_path / "0", "0::/a\n", machine)) == 6000 * 1024
    group = {"memory.max": "500000\n", "memory.current": "300000\n", "memory.stat": "anon 5\ninactive_file 100000\n"}
    files = machine | {f"sys/fs/cgroup/a/{name}": text for name, text in group.items()}
    assert available_memory(system(tmp_path / "2", "0::/a\n", files)) == 300_000
    files |= {"sys/fs/cgroup/memory.max": "2000\n", "sys/fs/cgroup/memory.current": "3000\n"}
    assert available_memory(system(tmp_path / "full", "0::/a\n", files)) == 0
    group = {"limit_in_bytes": "8192\n", "usage_in_bytes": "4096\n", "stat": "total_inactive_file 1000\n"}
    files = machine | {f"sys/fs/cgroup/memory/memory.{name}": text for name, text in group.items()}
    assert available_memory(system(tmp_path / "1", "4:memory:/\n", files)) == 5096


def test_the_option(run: Run, fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    monkeypatch.setattr(limits, "cpus", lambda: CPUs(8, 8, 2.5))
    try:
        assert run("embed", fasta, "-o", "three.csv", "--threads", 3).code == 0
        assert torch.get_num_threads() == 3
        assert "\nthreads: 3\n" in Path("three.csv.run.yaml").read_text().replace("  ", "")
        assert os.environ["OMP_NUM_THREADS"] == "3"
        for count in (0, -1, 4):
            fails(run("perplexity", fasta, "--threads", count), 2, f"--threads {count}", "3 cores")
        fails(run("finetune", fasta, "-o", "out", "--threads", "many"), 2, "--threads")
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ArgumentError) as caught:
        limits.use_threads(4)
    check_message("limits.threads", caught.value)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has not loaded PyTorch yet; it may hang."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


COUNT = "import protea, torch; protea.load(device='cpu'); print(torch.get_num_threads())"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity() -> None:
    """As under ``taskset -c 0``."""
    first = min(os.sched_getaffinity(0))
    done = python(f"import os; os.sched_setaffinity(0, [{first}]); {COUNT}")
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_more_threads_than_cores() -> None:
    code = "import torch; torch.set_num_threads(64)\n" + COUNT  # as where PyTorch obeys the variable
    done = python(code, OMP_NUM_THREADS="64")
    assert done.stdout == f"{ALL}\n"
    note = done.stderr.strip().splitlines()[0].partition("ProteaWarning: ")[2]
    words = {1: ("1 core;", "1 thread")}.get(ALL, (f"{ALL} cores;", f"{ALL} threads"))
    assert note == f"OMP_NUM_THREADS=64: this process may use {words[0]} computing with {words[1]}"
    assert python(code).stderr == "", "a note about what nobody asked for"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere forks are not safe with any threads")
def test_a_fork_after_use() -> None:
    """The threads of the parent do not exist in the child, where PyTorch alone would wait for them for ever."""
    code = """
import os, protea, torch
torch.set_num_threads(2)
model = protea.load(device="cpu")
torch.set_num_threads(2)
proteins = ["MKTAYIAKQR" * 40] * 4
expected = model.embed(proteins, pool="mean")
child = os.fork()
if child == 0:
    again = model.embed(proteins, pool="mean")
    os._exit(0 if abs(again - expected).max() < 1e-5 and torch.get_num_threads() == 1 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.get_num_threads())
"""
    assert python(code).stdout == "0 2\n"
