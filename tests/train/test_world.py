"""What the processes of a run tell each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from protea.errors import TrainingError
from protea.train.world import World, _meet, join
from ranks import run_ranks


def talk(world: World, factor: int) -> dict[str, Any]:
    world.barrier()
    return {
        "rank": world.rank,
        "sum": world.sum(torch.tensor([world.rank + 1.0, factor])).tolist(),
        "total": world.total(world.rank, 1),
        "any": (world.any(world.rank == 1), world.any(False)),
        "gather": world.gather(f"rank {world.rank}"),
        "broadcast": world.broadcast({"from": world.rank}),
        "first": world.first(lambda: ("done by", world.rank)),
    }


def test_two_processes_agree() -> None:
    results = run_ranks(2, talk, 5)
    assert [result.pop("rank") for result in results] == [0, 1]
    for result in results:
        assert result == {
            "sum": [3.0, 10.0],
            "total": [1, 2],
            "any": (True, False),
            "gather": ["rank 0", "rank 1"],
            "broadcast": {"from": 0},
            "first": ("done by", 0),
        }


def test_one_process_is_a_world_without_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        world = join()
        assert type(world) is World
        assert not torch.distributed.is_initialized()
        assert talk(world, 5) == {
            "rank": 0,
            "sum": [1.0, 5.0],
            "total": [0, 1],
            "any": (False, False),
            "gather": ["rank 0"],
            "broadcast": {"from": 0},
            "first": ("done by", 0),
        }


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TrainingError, match="RANK"):
        join()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "two"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "-2"),
        ("RANK", "2"),
        ("RANK", "-1"),
        ("RANK", "first"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "70000"),
    ],
)
def test_a_wrong_environment_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for key, number in (right | {name: value}).items():
        monkeypatch.setenv(key, number)
    with pytest.raises(TrainingError, match=f"{name} is '{value}'"):
        join()


def start_in_a_used_store(world: World, folder: Path) -> str:
    """As after a restart: the store has what earlier processes wrote."""
    store = dist.FileStore(str(folder / "store"), world.size)
    names = [_meet(store, world.rank, world.size, 60) for _ in range(3)]
    assert len(set(names)) == 3
    assert world.gather(names) == [names] * world.size
    return names[-1]


def test_processes_that_start_again_meet(tmp_path: Path) -> None:
    assert len(set(run_ranks(2, start_in_a_used_store, tmp_path))) == 1


def test_a_process_that_does_not_start(tmp_path: Path) -> None:
    for rank, missing in ((0, "rank 1, 2 of 3"), (1, "rank 0 of 3")):
        store = dist.FileStore(str(tmp_path / str(rank)), 3)
        with pytest.raises(TrainingError, match=missing):
            _meet(store, rank, 3, 0.2)
