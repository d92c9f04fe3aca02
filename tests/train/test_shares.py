"""Checkpoints that many processes write together: any layout reads, to the bit, what any other wrote."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from divided import LAYOUTS, divided, full, tensors, whole
from hypothesis import given
from hypothesis import strategies as st
from runs import recipe
from torch import Tensor

from protea.checkpoints.distcp import METADATA, DistributedTensors, Piece, data_file, metadata, write_pieces
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.tensors import Box, same_bits
from protea.data.loader import Position
from protea.errors import CheckpointError, OutputError, TrainingError
from protea.train import run_checkpoints
from protea.train.model import Trainable, architecture, prepare
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.recipe import SaveSettings
from protea.train.run_checkpoints import RunCheckpoints, newest_intact
from protea.train.run_export import average, export
from protea.train.run_state import TrainingState, resume, save
from protea.train.shares import Part, Parts, all_do, fill, own_share
from protea.train.world import World
from ranks import run_ranks
from trials import Witness

STEP = "step-000000001"
SECONDS = 400
"""Far more than any of this takes, on a machine that is busy with other work."""


# --- every layout ------------------------------------------------------------------------------------------------


def place(root: Path, size: int, layout: str) -> Path:
    return root / f"{size} {layout}"


def write(world: World, root: Path) -> None:
    for layout in LAYOUTS[world.size]:
        checkpoints = RunCheckpoints(place(root, world.size, layout), SaveSettings(), world)
        checkpoints.save(1, tensors(divided(world, layout, full())), {"validation_loss": None})
        checkpoints.wait()
        assert checkpoints.failure(1) is None


def read(world: World, root: Path) -> int:
    """Reads all that is there in all layouts of this number of processes; returns the number of tensors compared."""
    from torch.distributed import checkpoint as dcp

    compared, expected = 0, full()
    for layout, folder in product(LAYOUTS[world.size], sorted(root.iterdir())):
        saved = newest_intact(folder, Witness(), world)
        assert saved is not None
        stored = saved.tensors()
        toy = divided(world, layout, full(seed=1))
        models = tensors(toy)
        for name, parameter in toy.named_parameters():
            fill(parameter, stored, f"model.{name}")
        of_parameters = {
            key: toy.get_parameter(key.split(".", 1)[1].rpartition(".")[0]) for key in models if "opt" in key
        }
        found = {f"model.{name}": parameter.detach() for name, parameter in toy.named_parameters()}
        found |= Parts(stored, of_parameters)
        theirs = tensors(divided(world, layout, full(seed=2)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is distributed
            dcp.load(theirs, checkpoint_id=folder / STEP, no_dist=world.size == 1)
        for key in models:
            assert type(found[key]) is type(models[key])
            for way in (found, theirs):
                assert same_bits(whole(way[key]), expected[key]), (layout, folder, key)
            compared += 1
    return compared


def two(world: World, root: Path) -> dict[str, Any]:
    """All that two processes are needed for, since starting them takes longest."""
    layouts = root / "layouts"
    write(world, layouts)
    return {
        "compared": read(world, layouts),
        "failures": fail(world, root / "failures"),
        "trained": train(world, root),
        "resumed": resume_divided(world, root / "alone"),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder of checkpoints that one, two and four processes wrote, and what each of two found in it."""
    root = tmp_path_factory.mktemp("shares")
    write(World(), root / "layouts")
    run_ranks(4, write, root / "layouts", seconds=SECONDS)
    train(World(), root)
    return root, run_ranks(2, two, root, seconds=SECONDS)


Results = tuple[Path, list[dict[str, Any]]]


def test_every_layout_reads_every_other(results: Results) -> None:
    """What we read and what PyTorch's own reader does."""
    root, found = results
    assert all(each["compared"] for each in found)
    assert read(World(), root / "layouts") == 10 * len(full())


@pytest.mark.long
def test_four_processes_read_every_layout(results: Results) -> None:
    assert all(run_ranks(4, read, results[0] / "layouts", seconds=SECONDS))


def test_each_part_is_written_once(results: Results) -> None:
    for folder in sorted((results[0] / "layouts").iterdir()):
        ours = pickle.loads((folder / STEP / METADATA).read_bytes())
        for described in ours.state_dict_metadata.values():
            assert sum(chunk.sizes.numel() for chunk in described.chunks) == described.size.numel()
        files = {path.name: path.stat().st_size for path in (folder / STEP).glob("*.distcp")}
        assert files.keys() == {data_file(rank) for rank in range(int(folder.name[0]))}
        assert len(ours.storage_data) == sum(len(each.chunks) for each in ours.state_dict_metadata.values())
        total = sum(info.length for info in ours.storage_data.values())
        assert total <= sum(files.values()) < total + 64 * len(ours.storage_data)
        assert max(files.values()) < 2 * min(files.values()) or "pipeline" in folder.name


# --- models and their optimizers ---------------------------------------------------------------------------------


STATE_OF_RUN = TrainingState(step=3, position=Position(1, 2, 5), tokens=99)


def trainable(world: World, *, seed: int = 3, apart: bool = False) -> Trainable:
    """A model after an update; of many processes, each has a shard of every parameter, or trains some (``apart``)."""
    told = recipe(run={"seed": seed})
    model = architecture(told)
    if world.size > 1 and not apart:
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    made = prepare(model, told, torch.device("cpu"), Witness())
    parameters = parameters_to_train(model)
    if apart:
        parameters = dict(list(parameters.items())[world.rank :: world.size])
    ours = replace(made, optimizers=Optimizers(parameters, told.optimizer))
    for parameter in parameters.values():
        parameter.grad = parameter.detach() * 0.5
    ours.optimizers.step(ours.precision.scaler, 1e-2)
    return ours


def content(ours: Trainable) -> dict[str, Tensor]:
    """All weights and moments, put together."""
    found = {f"model.{name}": parameter.detach() for name, parameter in ours.model.named_parameters()}
    return {name: whole(tensor).clone() for name, tensor in {**found, **dict(ours.optimizers.state())}.items()}


def train(world: World, root: Path) -> dict[str, Tensor]:
    """Saves a run of one process, ``alone``, or of many, ``divided``; returns its tensors."""
    ours = trainable(world)
    checkpoints = RunCheckpoints(
        root / ("alone" if world.size == 1 else "divided") / "checkpoints", SaveSettings(), world
    )
    save(checkpoints, ours, STATE_OF_RUN, recipe=recipe(), data="these")
    checkpoints.wait()
    assert checkpoints.failure(3) is None
    return content(ours)


def resume_divided(world: World, run: Path) -> list[dict[str, Tensor]]:
    """The tensors of a run that goes on in shards, and as the stages of a pipeline do."""
    found = []
    for apart in (False, True):
        ours = trainable(world, seed=8, apart=apart)
        checkpoints = RunCheckpoints(run / "checkpoints", SaveSettings(), world)
        assert resume(checkpoints, ours, Witness(), data="these") == STATE_OF_RUN
        assert checkpoints.last == 3
        found.append(content(ours))
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in found.items())


def test_one_process_goes_on_from_two(results: Results) -> None:
    root, (first, second) = results
    assert_equal(first["trained"], second["trained"])
    ours = trainable(World(), seed=8)
    checkpoints = RunCheckpoints(root / "divided/checkpoints", SaveSettings())
    assert resume(checkpoints, ours, Witness(), data="these") == STATE_OF_RUN
    assert_equal(content(ours), first["trained"])


def test_two_processes_go_on_from_one(results: Results) -> None:
    root, found = results
    ours = trainable(World())
    resume(RunCheckpoints(root / "alone/checkpoints", SaveSettings()), ours, Witness(), data="these")
    expected = content(ours)
    for each in found:
        assert_equal(each["resumed"][0], expected)
    first, second = (set(each["resumed"][1]) for each in found)
    assert first | second == expected.keys()
    assert all(name.startswith("model.") for name in first & second)
    for each in found:
        stage = each["resumed"][1]
        assert_equal(stage, {name: expected[name] for name in stage})


def test_models_of_many_processes_are_exported(results: Results, tmp_path: Path) -> None:
    root, (first, _) = results
    export(root / "divided", tmp_path / "model")
    average(root / "divided", tmp_path / "mean", last=1)
    for folder in ("model", "mean"):
        with open_checkpoint(tmp_path / folder) as checkpoint:
            model = checkpoint.load(dtype=torch.float32, device=torch.device("cpu"))
        for name, parameter in model.named_parameters():
            assert same_bits(parameter.detach(), first["trained"][f"model.{name}"])
    (root / "divided/checkpoints/step-000000003" / data_file(1)).rename(tmp_path / "away")
    for write_model in (export, partial(average, last=1)):
        with pytest.raises(CheckpointError, match=f"step-000000003/{data_file(1)}: .*No such file"):
            write_model(root / "divided", tmp_path / "other")


# --- failures ----------------------------------------------------------------------------------------------------


def fail(world: World, root: Path) -> list[Any]:
    """Saves five checkpoints; the second fails on the last process, the third on the first one."""
    values, told = {"validation_loss": None}, []
    folder, model = root / "checkpoints", divided(world, "shard", full())
    checkpoints = RunCheckpoints(folder, SaveSettings(every=10, newest=9), world)
    pieces, rename = run_checkpoints.write_pieces, Path.rename

    def full_disk(*_: object) -> Any:
        time.sleep(0.3)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    for step in (10, 20, 21, 22, 30):
        with pytest.MonkeyPatch.context() as patch:
            if step == 20 and world.rank == world.size - 1:
                patch.setattr(run_checkpoints, "write_pieces", full_disk)
            if step == 21 and world.is_first:
                patch.setattr(Path, "rename", full_disk)
            assert checkpoints.due(step)
            checkpoints.save(step, tensors(model), values)
            reason, now = None, step
            while checkpoints._writing is not None:
                reason = checkpoints.failure(now)
            told.append((step, reason, checkpoints.last, checkpoints.due(step + 1)))
    assert (pieces, rename) == (run_checkpoints.write_pieces, Path.rename)
    world.barrier()
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:09d}" for step in (10, 22, 30)]
    # A file of another process is damaged, one is missing, and the earlier checkpoint serves.
    if world.is_first:
        with (folder / "step-000000030" / data_file(1)).open("r+b") as stream:
            stream.write(b"damage")
        (folder / "step-000000022" / data_file(1)).unlink()
    world.barrier()
    witness = Witness()
    saved = newest_intact(folder, witness, world)
    assert saved is not None
    with pytest.raises(OutputError if world.is_first else ZeroDivisionError):
        all_do(world, lambda: 1 // (1 - world.rank))
    return [told, witness.notes, saved.step]


def test_a_failure_of_one_is_a_failure_of_all(results: Results) -> None:
    first, second = results[1]
    assert first["failures"] == second["failures"]
    told, notes, step = first["failures"]
    full_disk = os.strerror(errno.ENOSPC)
    assert told == [
        (10, None, 10, False),
        (20, f"rank 1: {full_disk}", None, True),
        (21, full_disk, None, True),
        (22, None, 22, False),
        (30, None, 30, False),
    ]
    assert step == 10
    assert [data_file(1) in note and note.endswith("; skipped") for note in notes] == [True, True]
    assert [name in note for name, note in zip(("000030", "000022"), notes, strict=True)] == [True, True]


def die(world: World, root: Path, place: str) -> None:
    """The last process is killed while it writes the second checkpoint."""
    model = divided(world, "shard", full())
    checkpoints = RunCheckpoints(root / "checkpoints", SaveSettings(), world)
    checkpoints.save(1, tensors(model), {"validation_loss": None})
    checkpoints.wait()
    assert checkpoints.failure(1) is None
    if world.rank == world.size - 1:
        setattr(run_checkpoints, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    checkpoints.save(2, tensors(model), {"validation_loss": None})
    checkpoints.wait()
    assert checkpoints._writing is not None
    raise TrainingError(f"saved {checkpoints._writing.exception() is None}")


@pytest.mark.parametrize("place", ["write_pieces", pytest.param("sha256", marks=pytest.mark.long)])
def test_a_process_killed_while_it_saves(tmp_path: Path, place: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"exit codes \[1, -9\], too late \[\](.|\n)*saved False"):
        run_ranks(2, die, tmp_path, place, seconds=SECONDS)
    witness = Witness()
    saved = newest_intact(tmp_path / "checkpoints", witness)
    assert saved is not None
    assert (saved.step, witness.notes) == (1, [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [STEP]
    expected = full()
    assert all(same_bits(tensor, expected[key]) for key, tensor in saved.tensors().items())


# --- shares and parts --------------------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that fill it."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    cuts = [sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))}) for length in shape]
    return shape, [tuple(box) for box in product(*(pairwise(cut) for cut in cuts))]


@given(grids(), st.data())
def test_every_part_has_one_writer(grid: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = grid
    order = data.draw(st.permutations(boxes))
    copies = data.draw(st.integers(1, 3))
    parts = [Part(shape, torch.float32, box) for box in order for _ in range(copies)]
    held: list[Mapping[str, Part]] = [{"x": part, "y": part} for part in parts]
    shares = [own_share(held, rank) for rank in range(len(held))]
    for name in "xy":
        writers = [rank for rank, share in enumerate(shares) if name in share]
        assert sorted(parts[rank].box for rank in writers) == sorted(boxes)
    if copies > 1:
        assert max(map(len, shares)) == 1
    if len(boxes) > 1:
        with pytest.raises(TrainingError, match="x"):
            own_share(held[copies:], 0)
        grown: Box = tuple((0, length) for length in shape)
        with pytest.raises(TrainingError, match="x"):
            own_share([{"x": Part(shape, torch.float32, grown)}, *held[1:]], 0)
        other = Part(shape, torch.float64, order[0])
        with pytest.raises(TrainingError, match="x"):
            own_share([{"x": other}, *held[1:]], 0)


def stored(folder: Path, tensor: Tensor, boxes: list[Box], files: int) -> DistributedTensors:
    written = {}
    for number in range(files):
        pieces = [
            Piece("x", tuple(tensor.shape), box, tensor[tuple(slice(*axis) for axis in box)].clone)
            for box in boxes[number::files]
        ]
        written[data_file(number)] = write_pieces(folder / data_file(number), pieces)
    (folder / METADATA).write_bytes(metadata(written))
    return DistributedTensors(folder)


@given(grids(), st.data())
def test_any_part_of_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, grid: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = grid
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    folder = tmp_path_factory.mktemp("pieces")
    tensor = torch.randn(shape, dtype=dtype)
    read = stored(folder, tensor, data.draw(st.permutations(boxes)), data.draw(st.integers(1, 3)))
    assert same_bits(read["x"], tensor)
    box = tuple(tuple(sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2)))) for length in shape)
    part = read.part("x", box)
    assert same_bits(part, tensor[tuple(slice(*axis) for axis in box)])
    assert not part.numel() or part.data_ptr() % 16 == 0
    shutil.rmtree(folder)


def test_a_part_is_read_from_the_files_that_hold_it(tmp_path: Path) -> None:
    tensor = torch.arange(40.0).reshape(10, 4)
    stored(tmp_path, tensor, [((0, 6), (0, 4)), ((6, 10), (0, 4))], 2)
    path = tmp_path / data_file(1)
    path.write_bytes(bytes(path.stat().st_size))
    read = DistributedTensors(tmp_path)
    assert torch.equal(read.part("x", ((1, 6), (2, 3))), tensor[1:6, 2:3])
    with pytest.raises(CheckpointError, match=data_file(1)):
        read.part("x", ((1, 7), (2, 3)))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{data_file(1)} is missing"):
        DistributedTensors(tmp_path)
