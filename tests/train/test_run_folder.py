"""Whose folder a run's is, and what may change before it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from protea.errors import FinishedError, OutputError, ResumeError
from protea.train import model
from protea.train.loop import Outcome, pretrain
from protea.train.recipe import Recipe
from protea.train.run_checkpoints import choose
from protea.train.run_folder import open_run_folder
from trials import TINY, Witness, assert_same, make_store, metrics, recipe, reseal, train, write_fasta

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


@pytest.fixture
def stopped(store: Path, tmp_path: Path) -> tuple[Recipe, Path]:
    """A run that was stopped after step 2."""
    told = recipe(store)
    assert pretrain(told, tmp_path / "run", Witness(9)) == Outcome(2, finished=False)
    return told, tmp_path / "run"


def test_other_packs_begin_the_block_again(stopped: tuple[Recipe, Path], store: Path) -> None:
    _, run = stopped
    assert choose(run, "newest").values["position"][2] > 0
    changed, witness = recipe(store, batch={"tokens": 288, "pack": 48}), Witness(1)
    assert pretrain(changed, run, witness, accept_changes=True).step == 2
    assert any("block" in note for note in witness.notes)
    witness = Witness()
    pretrain(recipe(store, batch={"tokens": 288, "pack": 48}, run={"steps": 3}), run, witness, accept_changes=True)
    assert not any("block" in note for note in witness.notes)


@pytest.mark.parametrize(
    ("native", "chosen", "instead"), [(True, "bf16-mixed", "float32"), (False, "float32", "bf16-mixed")]
)
def test_a_run_keeps_the_precision_that_auto_chose(
    native: bool, chosen: str, instead: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine where it would choose another; a run that is begun there does."""
    told, run = recipe(store, run={"precision": "auto"}), tmp_path / "run"
    monkeypatch.setattr(model, "native_bfloat16", lambda device: native)
    witness = Witness(9)
    assert not pretrain(told, run, witness).finished
    assert any(f"run.precision=auto: computes in {chosen}, " in note for note in witness.notes)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["precision"] == chosen
    assert choose(run, "newest").values["recipe"]["run"]["precision"] == chosen

    monkeypatch.setattr(model, "native_bfloat16", lambda device: not native)
    with pytest.raises(ResumeError, match=f"run.precision {chosen} -> {instead}"):
        train(recipe(store, run={"precision": instead}), run)
    witness = Witness()
    assert pretrain(told, run, witness).finished
    (note,) = [note for note in witness.notes if note.startswith("run.precision=auto")]
    assert note.startswith(f"run.precision=auto: continues in {chosen}, as the run began")
    assert f"would choose {instead}" in note
    assert choose(run, "newest").values["recipe"]["run"]["precision"] == chosen
    train(told, tmp_path / "other")
    assert choose(tmp_path / "other", "newest").values["recipe"]["run"]["precision"] == instead


def test_a_run_of_a_version_with_fewer_keys_continues(stopped: tuple[Recipe, Path]) -> None:
    told, run = stopped
    recorded = yaml.safe_load((run / "recipe.yaml").read_text())
    del recorded["data"]["cluster"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recorded))
    assert train(told, run).finished


def test_a_changed_recipe_is_refused(stopped: tuple[Recipe, Path], store: Path) -> None:
    told, run = stopped
    changed = recipe(store, run={"steps": 6}, optimizer={"lr": 1e-3, "betas": [0.9, 0.99]}, save={"keep_every": 2})
    before = (run / "recipe.yaml").read_text()
    with pytest.raises(ResumeError) as caught:
        train(changed, run)
    message = str(caught.value)
    assert message.startswith(f"{run}: ")
    for part in (
        "run.steps 4 -> 6",
        "optimizer.lr 0.01 -> 0.001",
        "optimizer.betas 0.9,0.98 -> 0.9,0.99",
        "save.keep_every nothing -> 2",
        "--accept-changes",
    ):
        assert part in message
    assert message.count(" -> ") == 4
    assert (run / "recipe.yaml").read_text() == before
    witness = Witness()
    assert pretrain(changed, run, witness, accept_changes=True) == Outcome(6, finished=True)
    assert any("run.steps 4 -> 6" in note for note in witness.notes)
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == changed.shown()
    assert choose(run, "newest").values["recipe"] == changed.shown()
    with pytest.raises(FinishedError):
        train(changed, run)
    with pytest.raises(ResumeError, match=r"run\.steps 6 -> 4"):
        train(told, run)


def test_a_change_that_does_not_come_about_is_not_noted(stopped: tuple[Recipe, Path], tmp_path: Path) -> None:
    """After an accepted change that cannot be gone on with, the first recipe still is the run's."""
    told, run = stopped
    other = make_store(tmp_path / "other", seed=1)
    with pytest.raises(ResumeError, match=r"step-000000002: .* other data"):
        train(recipe(other), run, accept_changes=True)
    with pytest.raises(ResumeError, match=r"run: has 2 steps .* run\.steps 1"):
        train(recipe(Path(told.shown()["data"]["store"]), run={"steps": 1}), run, accept_changes=True)
    assert train(told, run).finished


def test_steps_may_be_as_many_as_done(stopped: tuple[Recipe, Path], store: Path) -> None:
    run = stopped[1]
    assert train(recipe(store, run={"steps": 2}), run, accept_changes=True) == Outcome(2, finished=True)


def test_other_data_at_the_same_place(stopped: tuple[Recipe, Path], tmp_path: Path, store: Path) -> None:
    _, run = stopped
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    moved = recipe(copy)
    with pytest.raises(ResumeError, match=r"data\.store "):
        train(moved, run)
    assert pretrain(moved, run, Witness(4), accept_changes=True).step == 2
    shutil.rmtree(copy)
    make_store(tmp_path / "other", seed=1).rename(copy)
    with pytest.raises(ResumeError, match="other data"):
        train(moved, run)


def test_before_the_first_checkpoint_anything_may_change(store: Path, tmp_path: Path) -> None:
    told = recipe(store)
    assert pretrain(recipe(store, run={"seed": 5}), tmp_path / "run", Witness(2)).step == 0
    # What a kill while the first was written leaves behind.
    (tmp_path / "run/checkpoints/.step-000000002").mkdir(parents=True)
    train(told, tmp_path / "run")
    train(told, tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_moved_run_goes_on(stopped: tuple[Recipe, Path], tmp_path: Path) -> None:
    told, run = stopped
    (tmp_path / "elsewhere").mkdir()
    moved = run.rename(tmp_path / "elsewhere" / "renamed")
    assert train(told, moved).finished
    train(told, tmp_path / "whole")
    assert_same(moved, tmp_path / "whole")


def test_other_surroundings_are_noted(stopped: tuple[Recipe, Path]) -> None:
    told, run = stopped
    saved = choose(run, "newest")
    known = saved.values["surroundings"]
    assert known["threads"] == "1"
    reseal(saved.folder, surroundings=known | {"threads": "3", "PyTorch": "1.0"})
    witness = Witness()
    assert pretrain(told, run, witness).finished
    assert witness.notes == [
        "threads was 3, is now 1: results will not be the same to the last bit",
        f"PyTorch was 1.0, is now {known['PyTorch']}: results will not be the same to the last bit",
        "continues after step 2",
    ]
    assert choose(run, "newest").values["surroundings"] == known


def test_one_process_at_a_time(stopped: tuple[Recipe, Path], store: Path) -> None:
    told, run = stopped
    with open_run_folder(run, told, torch.device("cpu")):
        for changed in (told, recipe(store, run={"steps": 9})):
            with pytest.raises(ResumeError, match=r"run: another process"):
                train(changed, run, accept_changes=True)
    assert train(told, run).finished


def test_folders_of_something_else(store: Path, tmp_path: Path) -> None:
    told = recipe(store)
    file = write_fasta(tmp_path / "in.fasta")
    for folder, message in (
        (file, r"in\.fasta: is a file"),
        (file / "run", r"in\.fasta/run: .*Not a directory"),
        (store, r"store: .*\((manifest\.json|report\.tsv|train|valid)\)"),
        (Path("/proc/run"), r"/proc/run: .*No such file"),
    ):
        with pytest.raises(OutputError, match=message):
            train(told, folder)
    assert not (store / ".lock").exists()


def test_a_damaged_recipe(stopped: tuple[Recipe, Path]) -> None:
    told, run = stopped
    for content in (b"", b"\xff", b"{", b"- 1", b"a: &b [*b]: c"):
        (run / "recipe.yaml").write_bytes(content)
        with pytest.raises(ResumeError, match=r"run/recipe\.yaml: "):
            train(told, run)


def test_a_finished_run_stays_as_it_is(store: Path, tmp_path: Path) -> None:
    told = recipe(store)
    train(told, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(FinishedError, match="run: complete, nothing to do"):
        train(told, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed: apt-get install mmseqs2")
def test_fasta(tmp_path: Path) -> None:
    """A store is made in the run's folder, once, and again when the files have changed."""
    fasta = write_fasta(tmp_path / "in.fasta")
    told = recipe(None, data={"fasta": fasta}, validation={"every": None})
    witness = Witness(8)
    assert pretrain(told, tmp_path / "run", witness).step == 2
    assert "read sequences" in witness.tasks
    made = (tmp_path / "run/store/manifest.json").stat()
    witness = Witness(2)
    assert pretrain(told, tmp_path / "run", witness).step == 2
    assert witness.notes == ["continues after step 2"]
    kept = fasta.read_text()
    fasta.unlink()  # the store is what counts
    assert pretrain(told, tmp_path / "run", Witness(2)).step == 2
    write_fasta(fasta, seed=1)
    witness = Witness()
    with pytest.raises(ResumeError, match="other data"):
        pretrain(told, tmp_path / "run", witness)
    assert "FASTA files changed" in witness.notes[0]
    fasta.write_text(kept)
    witness = Witness(2)
    assert pretrain(told, tmp_path / "run", witness).step == 2
    (tmp_path / "run/store/train/sequences.arrow").unlink()
    witness = Witness()
    assert pretrain(told, tmp_path / "run", witness).finished
    assert "sequences.arrow: is missing" in witness.notes[0]
    assert (tmp_path / "run/store/manifest.json").stat().st_mtime_ns > made.st_mtime_ns
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed: apt-get install mmseqs2")
def test_fasta_of_another_alphabet(tmp_path: Path) -> None:
    """Before the first checkpoint the model may change, and the store with it."""
    fasta = write_fasta(tmp_path / "in.fasta")
    values: dict[str, Any] = {"data": {"fasta": fasta}, "validation": {"every": None}}
    assert pretrain(recipe(None, **values), tmp_path / "run", Witness(1)).step == 0
    shape = {**TINY, "architecture": "esm1nv"}
    assert pretrain(recipe(None, model=shape, **values), tmp_path / "run", Witness(4)).step == 1


def test_a_recipe_of_the_users_own_is_left_alone(store: Path, tmp_path: Path) -> None:
    """``protea pretrain recipe.yaml -o .``"""
    (tmp_path / "recipe.yaml").write_text("# mine\n")
    with pytest.raises(OutputError, match=r"\(recipe\.yaml\)"):
        train(recipe(store), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "# mine\n"


def test_a_run_copied_without_its_lock_goes_on(stopped: tuple[Recipe, Path]) -> None:
    told, run = stopped
    (run / ".lock").unlink()
    assert train(told, run).finished
