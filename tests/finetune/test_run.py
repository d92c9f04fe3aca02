"""``protea finetune`` and ``protea predict`` as a user meets them: folders, numbers, reruns, kills and mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import protea
from conftest import Run, fails
from messages import check_message
from protea.finetune import frozen, likeness
from protea.finetune.finetuning import _joined_notes
from protea.finetune.members import best_member
from protea.finetune.predictor import read_predictor
from protea.output import sha256

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
PARTS = ["train"] * 60 + ["validation"] * 40 + ["test"] * 30
TABLES = ("metrics.tsv", "comparison.tsv", "by_identity.tsv", "predictions.parquet", "calibration.tsv")
NO_TIME = ("--no-baselines",)
SHORT = ("--epochs", 2, *NO_TIME)  # of heads that are trained


def sequences(count: int = len(PARTS), seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), rng.integers(20, 40))) for _ in range(count)]


def write_values(path: Path) -> None:
    """A value that a mean over residues predicts: the share of two amino acids, with noise."""
    rng = np.random.default_rng(1)
    rows = ["id,sequence,target,set"]
    for number, (text, part) in enumerate(zip(sequences(), PARTS, strict=True)):
        value = 20 * (text.count("A") + text.count("W")) / len(text) + rng.normal() * 0.1
        rows.append(f"p{number},{text},{value:.4f},{part}")
    path.write_text("\n".join(rows) + "\n")


def write_classes(path: Path) -> None:
    rows = ["id,sequence,label,stage"]
    for number, (text, part) in enumerate(zip(sequences(), PARTS, strict=True)):
        rows.append(f"p{number},{text},{'many' if text.count('A') + text.count('W') > 2 else '<few>'},{part}")
    path.write_text("\n".join(rows) + "\n")


def write_labels(path: Path) -> None:
    rows = ["id,sequence,label,set"]
    for number, (text, part) in enumerate(zip(sequences(), PARTS, strict=True)):
        labels = [letter for letter in "AWK" if text.count(letter) > 1]
        rows.append(f"p{number},{text},{';'.join(labels) or 'none'},{part}")
    path.write_text("\n".join(rows) + "\n")


def write_residues(path: Path) -> None:
    """FASTA as biotrainer writes it: the class of a residue is whether it, or the one before, is A or W."""
    blocks = []
    for number, (text, part) in enumerate(zip(sequences(), PARTS, strict=True)):
        labels = "".join(
            "H" if letter in "AW" or text[i - 1 : i] in ("A", "W") else "C" for i, letter in enumerate(text)
        )
        blocks.append(f">p{number} TARGET={labels} SET={part}\n{text}\n")
    path.write_text("".join(blocks))


def write_pairs(path: Path) -> None:
    rows = ["id,sequence,sequence_2,target,set"]
    for number, (text, other, part) in enumerate(zip(sequences(), sequences(seed=5), PARTS, strict=True)):
        rows.append(f"p{number},{text},{other},{'yes' if 'A' in text and 'A' in other else 'no'},{part}")
    path.write_text("\n".join(rows) + "\n")


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "sequence-value": (write_values, "data.csv"),
    "sequence-class": (write_classes, "data.csv"),
    "multilabel": (write_labels, "data.csv"),
    "residue-class": (write_residues, "data.fasta"),
    "pair-class": (write_pairs, "data.csv"),
}


@pytest.fixture
def data(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setattr(likeness, "_PROGRAM", "no-mmseqs")  # which starts a dozen processes for each search

    def make(task: str) -> Path:
        write, name = WRITERS[task]
        write(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def model(model_folders: dict[str, Path]) -> Path:
    return model_folders["esm2"]


def numbers(folder: str, method: str = "predictor", part: str = "test") -> dict[str, float]:
    table = pd.read_csv(Path(folder) / "metrics.tsv", sep="\t", keep_default_na=True)
    chosen = table[(table.method == method) & (table.part == part)]
    return dict(zip(chosen.number, chosen.value, strict=True))


@pytest.mark.parametrize("task", WRITERS)
def test_every_task_with_all_baselines(run: Run, data: Callable[[str], Path], model: Path, task: str) -> None:
    given = data(task)
    result = run("finetune", given, "-m", model, "-o", "out", *SHORT[: 2 * (task == "residue-class")])
    assert result.code == 0, result
    assert f"task: {task}" in result.err
    folder = Path("out")
    assert {path.name for path in folder.iterdir()} >= {*TABLES, "predictor.json", "head.safetensors", "run.yaml"}
    methods = pd.read_csv(folder / "metrics.tsv", sep="\t").method.unique().tolist()
    assert methods == ["predictor", "constant", "composition", "one-hot", "nearest", "random weights"]
    assert all(method in result.out for method in methods)
    stored = pq.read_table(folder / "predictions.parquet")
    assert set(stored["part"].to_pylist()) == {"validation", "test"}
    assert not Path(".out.partial").exists()
    predictor = read_predictor(folder)
    assert predictor.task.name == task
    assert yaml.safe_load((folder / "run.yaml").read_text())["settings"]["model"] == str(model)


def test_a_task_that_the_model_can_learn_beats_the_constant(run: Run, data: Callable[[str], Path], model: Path) -> None:
    assert run("finetune", data("sequence-value"), "-m", model, "-o", "out", "--layer", "0").code == 0
    ours, constant = numbers("out"), numbers("out", "constant")
    assert ours["rmse"] < 0.5 * constant["rmse"]
    assert ours["spearman"] > 0.8
    table = pd.read_csv("out/comparison.tsv", sep="\t")
    row = table[(table["minus"] == "constant") & (table.number == "rmse")].iloc[0]
    assert row.high < 0
    assert row.difference == pytest.approx(ours["rmse"] - constant["rmse"])
    calibration = pd.read_csv("out/calibration.tsv", sep="\t", index_col="number").value
    assert calibration["stated_coverage"] == 0.9
    assert 0.6 < calibration["coverage"] <= 1


def test_baselines_with_a_model_are_predictors(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """``protea predict`` gives the numbers of random weights in the folder, without what was not calibrated."""
    given = data("sequence-value")
    assert run("finetune", given, "-m", model, "-o", "out", "--seed", 3).code == 0
    result = run("predict", "out/baselines/random-weights", given, "-o", "p.csv")
    assert result.code == 0, result
    truth, found = pd.read_csv(given).set_index("id"), pd.read_csv("p.csv").set_index("id")
    assert found.columns.tolist() == ["predicted", "truncated_from"]
    errors = (truth["target"] - found["predicted"])[truth["set"] == "test"]
    assert (errors**2).mean() == pytest.approx(numbers("out", "random weights")["mse"], rel=1e-4)
    assert numbers("out")["mse"] != pytest.approx(numbers("out", "random weights")["mse"], rel=1e-2)


def test_predictions_are_those_of_training(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """Predicting the test part again gives the numbers in the folder, whatever the format."""
    for task in ("sequence-class", "residue-class", "multilabel"):
        given = data(task)
        assert run("finetune", given, "-m", model, "-o", f"out-{task}", *NO_TIME).code == 0
        first = run("predict", f"out-{task}", given, "-o", f"{task}.parquet")
        assert first.code == 0, first
        stored = pq.read_table(f"out-{task}/predictions.parquet").to_pandas()
        again = pq.read_table(f"{task}.parquet").to_pandas()
        keys = ["id", "position"] if task == "residue-class" else ["id"]
        joined = stored.merge(again, on=keys, suffixes=("", "_again"))
        assert len(joined) == len(stored)
        for name in [name for name in stored.columns if name.startswith("probability_")]:
            np.testing.assert_allclose(joined[name], joined[f"{name}_again"], atol=1e-5)
        assert {"distance", "far", "truncated_from"} <= set(again.columns)
        if task == "residue-class":
            letters = dict(zip((f"p{i}" for i in range(len(PARTS))), sequences(), strict=True))
            assert "".join(again[again.id == "p3"].residue) == letters["p3"]
        if task == "sequence-class":
            assert set(again["predicted"]) <= {"<few>", "many"}
            assert set(again["set"]) <= {"", "<few>", "many", "<few>;many"}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "h5"])
def test_formats_of_predictions(run: Run, data: Callable[[str], Path], model: Path, suffix: str) -> None:
    given = data("sequence-value")
    assert run("finetune", given, "-m", model, "-o", "out", *NO_TIME).code == 0
    assert run("predict", "out", given, "-o", "p.parquet").code == 0
    assert run("predict", "out", given, "-o", f"p.{suffix}").code == 0
    expected = pq.read_table("p.parquet").to_pandas()
    if suffix == "h5":
        with h5py.File("p.h5") as file:
            found: Any = {name: file[name][()] for name in file}
        found["id"] = [name.decode() for name in found["id"]]
        assert list(found) == list(expected.columns)
    else:
        found = pd.read_csv(f"p.{suffix}", sep="," if suffix == "csv" else "\t")
        assert list(found.columns) == list(expected.columns)
    assert list(found["id"]) == expected["id"].tolist()
    np.testing.assert_array_equal(found["predicted"], expected["predicted"])
    again = run("predict", "out", given, "-o", f"p.{suffix}")
    assert again.code == 0
    assert "nothing to do" in again.err


def test_predictions_are_those_of_python(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-class")
    assert run("finetune", given, "-m", model, "-o", "out", "--layer", 1, *NO_TIME).code == 0
    assert run("predict", "out", given, "-o", "p.csv").code == 0
    predictor = read_predictor(Path("out"))
    vectors = protea.load(model, device="cpu").embed(sequences(), pool="mean", layers=1)
    with torch.no_grad():
        expected = predictor.head.outcome(predictor.head(torch.from_numpy(vectors), torch.ones(len(vectors))))
    np.testing.assert_allclose(pd.read_csv("p.csv")["probability_many"], expected[:, 1], atol=1e-5)


def test_the_same_command_again(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-value")
    command = ("finetune", given, "-m", model, "-o", "out", *NO_TIME)
    assert run(*command).code == 0
    before = sha256(Path("out/head.safetensors"))
    again = run(*command)
    assert again.code == 0
    assert "out: complete, nothing to do" in again.err
    fails(run(*command, "--head", "mlp"), 1, "out: exists already, of another run", "head")
    given.write_text(given.read_text().replace(",test", ",train"))
    fails(run(*command), 1, "out: exists already, of another run", "input")
    assert sha256(Path("out/head.safetensors")) == before
    assert run(*command, "--overwrite").code == 0
    assert sha256(Path("out/head.safetensors")) != before
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("text")
    fails(run("finetune", given, "-m", model, "-o", "mine", *NO_TIME), 1, "mine", "not written by this command")


def test_a_data_set_on_the_hub_with_other_contents(
    run: Run, data: Callable[[str], Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared by its rows, also beside a file, however they are divided into chunks."""
    given = data("sequence-value")
    lines = given.read_text().splitlines()
    given.write_text("\n".join([lines[0], *lines[100:]]) + "\n")
    Path("hub.csv").write_text("\n".join(lines[:100]) + "\n")
    rows = pa.Table.from_pandas(pd.read_csv("hub.csv"))
    hub = {"table": rows}

    class Split:
        features: dict[str, Any] = {}  # noqa: RUF012

        def with_format(self, kind: str) -> Split:
            return self

        def __getitem__(self, chosen: slice) -> pa.Table:
            return hub["table"]

    datasets = SimpleNamespace(load_dataset=lambda name, configuration: {"train": Split()})
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    command = ("finetune", given, "hf:owner/name", "-m", model, "-o", "out", *NO_TIME)
    assert run(*command).code == 0
    hub["table"] = pa.concat_tables([rows[:10], rows[10:]])
    assert "nothing to do" in run(*command).err
    values = rows["target"].to_pylist()
    changed = pa.array([values[0] + 1, *values[1:]])
    hub["table"] = rows.set_column(rows.column_names.index("target"), "target", changed)
    fails(run(*command), 1, "out: exists already, of another run", "input")


def test_a_saved_data_set_with_other_contents(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """A folder of files is compared by what it holds, as a file is."""
    table = pa.Table.from_pandas(pd.read_csv(data("sequence-value")))
    folder = Path("saved")
    folder.mkdir()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "dataset_info.json").write_text(json.dumps({"features": {name: {} for name in table.column_names}}))

    def write(table: pa.Table) -> None:
        with pa.OSFile("saved/data.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)

    write(table)
    command = ("finetune", folder, "-m", model, "-o", "out", *NO_TIME)
    assert run(*command).code == 0
    assert "complete, nothing to do" in run(*command).err
    values = [-value for value in table["target"].to_pylist()]
    write(table.set_column(table.column_names.index("target"), "target", pa.array(values)))
    fails(run(*command), 1, "out: exists already, of another run", "input")


def test_seeds_folds_and_layers(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-class")
    assert run("finetune", given, "-m", model, "-o", "seeds", "--head", "mlp", "--seeds", 2, *SHORT).code == 0
    assert pd.read_csv("seeds/seeds.tsv", sep="\t").seed.unique().tolist() == [0, 1]
    assert {"step", "validation_loss"} <= set(pd.read_csv("seeds/curve.tsv", sep="\t"))
    result = run("finetune", given, "-m", model, "-o", "folds", "--split", "kfold:3", *NO_TIME)
    assert result.code == 0, result
    assert "lowest and highest of 3 folds" in result.out
    assert "protea predict folds/fold-1`" in result.out
    assert sorted(path.name for path in Path("folds").glob("fold-*")) == ["fold-1", "fold-2", "fold-3"]
    assert pd.read_csv("folds/metrics.tsv", sep="\t").fold.unique().tolist() == [1, 2, 3]
    tested = [
        set(pq.read_table(f"folds/fold-{n}/predictions.parquet", filters=[("part", "=", "test")])["id"].to_pylist())
        for n in (1, 2, 3)
    ]
    assert set.union(*tested) == {f"p{i}" for i in range(len(PARTS))}
    assert sum(map(len, tested)) == len(PARTS)
    assert run("predict", "folds/fold-2", given, "-o", "p.csv").code == 0
    fails(run("predict", "folds", given, "-o", "q.csv"), 1, "folds/fold-1")
    result = run("finetune", given, "-m", model, "-o", "layers", "--layer", "auto", *NO_TIME)
    assert result.code == 0
    losses = pd.read_csv("layers/layers.tsv", sep="\t")
    assert losses.layer.tolist() == [0, 1, 2, 3]
    assert read_predictor(Path("layers")).layer == losses.layer[losses.validation_loss.idxmin()]


def test_folds_that_choose_other_layers_have_baselines(
    run: Run, data: Callable[[str], Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model with random weights is read at the layer of each fold."""
    given, layers = data("sequence-value"), iter([1, 3])

    def scores(*_: Any, **__: Any) -> np.ndarray:
        found = np.ones((4, 1, 2))
        found[next(layers)] = 0
        return found

    monkeypatch.setattr(frozen, "_scores", scores)
    monkeypatch.setattr("protea.finetune.measuring.baselines.BASELINES", {})
    result = run("finetune", given, "-m", model, "-o", "out", "--split", "kfold:2", "--layer", "auto")
    assert result.code == 0, result
    assert [read_predictor(Path(f"out/fold-{fold}")).layer for fold in (1, 2)] == [1, 3]
    assert numbers("out", "random weights")


@pytest.mark.parametrize("task", ["sequence-value", "residue-class"])
def test_killed_runs_end_with_the_same_bits(
    run: Run, data: Callable[[str], Path], model: Path, tmp_path: Path, task: str
) -> None:
    given = data(task)
    lengths = SHORT[: 2 * (task == "residue-class")]
    command = ("finetune", given, "-m", model, "--no-baselines", "--token-budget", 64, *lengths)
    assert run(*command, "-o", "whole").code == 0
    arguments = [sys.executable, "-m", "protea", *map(str, command), "-o", "killed"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not Path(".killed.partial/frozen").exists():
        time.sleep(0.01)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    result = run(*command, "-o", "killed")
    assert result.code == 0, result
    for name in ("head.safetensors", "metrics.tsv", "predictor.json"):
        assert sha256(Path("killed") / name) == sha256(Path("whole") / name), name


def test_an_unfinished_run_of_other_settings(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-value")
    command = ("finetune", given, "-m", model, "-o", "out", *NO_TIME)
    assert run(*command).code == 0
    identity = yaml.safe_load(Path("out/run.yaml").read_text())["identity"]
    Path(".out.partial").mkdir()
    Path(".out.partial/journal.json").write_text(json.dumps({"identity": {**identity, "seed": 7}}))
    shutil.rmtree("out")
    fails(run(*command), 1, "unfinished run has other settings (seed 7 -> 0)", "--overwrite")
    assert run(*command, "--overwrite").code == 0


def test_a_predictor_and_its_base(run: Run, data: Callable[[str], Path], model_folders: dict[str, Path]) -> None:
    given, model = data("sequence-value"), Path("base")
    shutil.copytree(model_folders["esm2"], model)
    assert run("finetune", given, "-m", model, "-o", "out", *NO_TIME).code == 0
    model.rename("moved")
    fails(run("predict", "out", given, "-o", "p.csv"), 2, "out: its base model cannot be loaded", "-m if it moved")
    assert run("predict", "out", given, "-o", "p.csv", "-m", "moved").code == 0
    other = model_folders["esm2nv"]
    fails(run("predict", "out", given, "-o", "q.csv", "-m", other), 1, "out", "other weights", "-m")
    fails(run("predict", "moved", given, "-o", "q.csv"), 1, "moved", "predictor.json")
    head = Path("out/head.safetensors")
    content = head.read_bytes()
    head.write_bytes(content[:40])
    fails(run("predict", "out", given, "-o", "q.csv", "-m", "moved"), 1, "head.safetensors", "cannot be read")
    head.write_bytes(content)
    text = Path("out/predictor.json").read_text()
    Path("out/predictor.json").write_text(text.replace('"width": 40', '"width": 41'))
    fails(run("predict", "out", given, "-o", "q.csv", "-m", "moved"), 1, "out", "damaged")
    for old, new in (
        ('"far": ', '"far": "x", "old": '),
        ('"long": "', '"long": "x'),
        ('"classes": [', '"classes": ["a"'),
    ):
        Path("out/predictor.json").write_text(text.replace(old, new))
        fails(run("predict", "out", given, "-o", "q.csv", "-m", "moved"), 1, "out", "damaged")
    Path("out/predictor.json").write_text(text.replace('"format": 1', '"format": 2'))
    fails(run("predict", "out", given, "-o", "q.csv", "-m", "moved"), 1, "format 2", "newer version")
    assert not list(Path().glob("q.csv*"))


def test_a_run_that_is_not_there(run: Run, tmp_path: Path) -> None:
    """A folder that is missing, and one whose training was interrupted."""
    Path("in.fasta").write_text(">a\nMK\n")
    fails(run("predict", "no-run", "in.fasta", "-o", "p.csv"), 1, "no-run: there is no such folder")
    Path(".no-run.partial").mkdir()
    fails(run("predict", "no-run", "in.fasta", "-o", "p.csv"), 1, "no-run: its training is unfinished", "finetune")


def test_layers_that_are_no_numbers(run: Run, data: Callable[[str], Path], model: Path) -> None:
    result = run("finetune", data("sequence-value"), "-m", model, "-o", "out", "--layer", "atuo")
    fails(result, 2, "layer", "atuo", "use auto or a number")


def test_what_is_known_is_told_before_training(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """Nothing is told twice, and ``run.yaml`` has all notes; classes are counted, and odd ones named."""
    given = data("sequence-class")
    lines = given.read_text().replace("p0,", "odd,", 1).splitlines()
    lines[2] = ",".join([*lines[2].split(",")[:2], "MANY", "train"])
    given.write_text("\n".join(lines) + "\n")
    result = run("finetune", given, "-m", model, "-o", "out", *NO_TIME)
    assert result.code == 0, result
    notes = yaml.safe_load(Path("out/run.yaml").read_text())["notes"]
    told = [line.removeprefix("protea: note: ") for line in result.err.splitlines()]
    assert [told.count(note) for note in notes] == [1] * len(notes)
    classes = [note for note in notes if note.startswith("classes")]
    assert ["MANY" in note for note in classes] == [True, True, True]
    frame = pd.read_csv("out/classes.tsv", sep="\t").set_index("class")
    data_frame = pd.read_csv(given)
    for name in frame.index:
        assert frame.loc[name, ["train", "test"]].tolist() == [
            ((data_frame.label == name) & (data_frame.stage == part)).sum() for part in ("train", "test")
        ]


def test_mistaken_options(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-value")
    for arguments, parts in (
        (("--head", "cnn"), ("--head cnn", "linear, mlp")),
        (("--head", "crf"), ("crf", "light-attention")),
        (("--task", "structure"), ("structure", "residue-class")),
        (("--layer", "9"), ("layer 9", "0 to 3")),
        (("--lr", "1e-4"), ("--lr", "--head-lr")),
        (("--method", "lora", "--rank", "41"), ("--rank 41", "width, 40")),
        (("--method", "lora", "--layer", "2"), ("--layer", "frozen")),
        (("--split", "leave-one-out"), ("leave-one-out", "kfold:5")),
        (("--coverage", "1.5"), ("coverage", "1.5")),
        (("--epochs", "0"), ("epochs", "0")),
        (("--epochs", "0.5"), ("--epochs 0.5", "whole number")),
        (("--layer-decay", "0.5"), ("--layer-decay", "full")),
        (("--recompute",), ("--recompute", "lora")),
        (("--class-weights",), ("--class-weights", "sequence-value")),
        (("--rank", "8"), ("--rank 8", "--method lora")),
        (("--method", "full", "--lora-alpha", "8"), ("--lora-alpha 8", "--method lora")),
        (("--dora",), ("--dora", "--method lora")),
        (("--precision", "float32"), ("--precision float32", "--dtype")),
        (("--method", "lora", "--layer-decay", "0.9"), ("--layer-decay 0.9", "--method full")),
        (("--hidden", "64"), ("--hidden 64", "--head linear", "mlp")),
        (("--method", "lora", "--head", "hf", "--hidden", "64"), ("--hidden 64", "--head hf")),
        (("--dropout", "0.1"), ("--dropout 0.1", "--head linear")),
        (("--head-lr", "1e-4"), ("--head-lr 0.0001", "solved", "--head mlp")),
        (("--weight-decay", "0.1"), ("--weight-decay 0.1", "solved")),
        (("--epochs", "3"), ("--epochs 3", "solved")),
        (("--batch", "3"), ("--batch 3", "solved")),
        (("--patience", "3"), ("--patience 3", "solved")),
        (("--seeds", "3"), ("--seeds 3", "solved")),
        (("--head", "light-attention", "--pool", "max"), ("--pool max", "every residue")),
        (("--task", "multilabel", "--coverage", "0.8"), ("--coverage 0.8", "multilabel")),
        (("--head", "hf", "--layer", "1"), ("--layer 1", "hf")),
        (("--method", "full", "--long", "window"), ("--long window", "frozen")),
        (("--coverage", "0.99999999999"), ("coverage",)),
        (("--method", "lora", "--lr", "0"), ("lr", "0")),
        (("--method", "full", "--lr", "1e-4,-1"), ("lr", "-1")),
        (("--method", "lora", "--weight-decay", "2"), ("weight_decay", "2")),
    ):
        fails(run("finetune", given, "-m", model, "-o", "out", *arguments), 2, *parts)
    fails(run("finetune", "-m", model, "-o", "out"), 2, "data")
    fails(run("finetune", given, "-m", model, "-o", "out", "--calibration", "0.999"), 1, "another --calibration")
    assert not Path("out").exists()
    assert not Path(".out.partial").exists()
    assert run("finetune", given, "-m", model, "-o", "out", *NO_TIME).code == 0
    fails(run("predict", "out", given, "-o", "p.xlsx"), 2, "p.xlsx", ".parquet")


def test_options_of_a_file_for_another_method(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """What a recipe sets for its own method and head is left out where the command line names another."""
    lines = [f"data: {data('sequence-value')}", f"model: {model}", "head: mlp", "hidden: 8", "batch: 16", "epochs: 2"]
    Path("mlp.yaml").write_text("\n".join([*lines, "layer: 1", "dropout: 0.25", "rank: 8"]))
    result = run("finetune", "--config", "mlp.yaml", "-o", "mlp", *NO_TIME)
    assert result.code == 0, result
    for name, options in (("linear", ("--head", "linear")), ("lora", ("--method", "lora"))):
        result = run("finetune", "--config", "mlp.yaml", "-o", name, *options, *NO_TIME)
        assert result.code == 0, result
    used = yaml.safe_load(Path("lora/run.yaml").read_text())["settings"]
    assert (used["layer"], used["hidden"], used["batch"]) == (-1, 8, 16)
    assert read_predictor(Path("linear")).layer == 1
    fails(run("finetune", "--config", "mlp.yaml", "-o", "no", "--head", "linear", "--hidden", 8), 2, "--hidden 8")
    Path("bad.yaml").write_text("\n".join([*lines, "rank: 4"]))
    fails(run("finetune", "--config", "bad.yaml", "-o", "no"), 2, "--config bad.yaml", "--rank 4", "lora")
    assert not Path("no").exists()


def test_options_that_the_data_decide_about(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """Which head is the default is known once the task is."""
    fails(run("finetune", data("residue-class"), "-m", model, "-o", "out", "--pool", "max"), 2, "--pool max")
    assert run("finetune", data("residue-class"), "-m", model, "-o", "out", "--hidden", 4, *SHORT).code == 0
    fails(run("finetune", data("multilabel"), "-m", model, "-o", "no", "--coverage", 0.8), 2, "--coverage 0.8")
    result = run("finetune", data("sequence-class"), "-m", model, "-o", "no", "--seeds", 2)
    check_message("finetune.solved-head", result.err)
    assert not Path("no").exists()


def test_notes_of_folds_name_their_fold(run: Run, data: Callable[[str], Path], model: Path) -> None:
    result = run("finetune", data("sequence-value"), "-m", model, "-o", "out", "--split", "kfold:3", *NO_TIME)
    assert result.code == 0, result
    notes = yaml.safe_load(Path("out/run.yaml").read_text())["notes"]
    assert all(note in result.err for note in notes)
    penalties = [note for note in notes if "penalty" in note]
    assert penalties == [penalties[0]] or [note[:8] for note in penalties] == ["fold 1: ", "fold 2: ", "fold 3: "]
    assert _joined_notes([["a", "b"], ["a", "c"]]) == ["a", "fold 1: b", "fold 2: c"]


def test_copies_of_a_sequence_calibrate_once(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """Eight sequences, ten times each with other labels, are eight proteins: too few for a coverage of 0.9."""
    given = data("sequence-value")
    rng, pool = np.random.default_rng(0), sequences(8, seed=9)
    copies = [f"c{n},{pool[n % 8]},{rng.normal():.3f},calibration" for n in range(80)]
    given.write_text(given.read_text() + "\n".join(copies) + "\n")
    result = run("finetune", given, "-m", model, "-o", "out", *NO_TIME)
    assert result.code == 0, result
    assert "at least 9 labelled proteins, there are 8" in result.err
    assert json.loads(Path("out/predictor.json").read_text())["calibration"]["groups"] == 8


def test_under_torchrun(run: Run, data: Callable[[str], Path], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(run("finetune", data("sequence-value"), "-m", model, "-o", "out"), 2, "one process", "torchrun")


def test_no_test_part(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-value")
    given.write_text(given.read_text().replace(",test", ",train"))
    result = run("finetune", given, "-m", model, "-o", "out", "--no-baselines")
    assert result.code == 0, result
    assert "no test part" in result.err
    assert "validation part" in result.out
    assert not Path("out/by_identity.tsv").exists()


def test_no_labels_in_the_test_part(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-value")
    given.write_text(re.sub(r"[-.\d]+,test", ",test", given.read_text()))
    result = run("finetune", given, "-m", model, "-o", "out", *NO_TIME)
    assert result.code == 0, result
    assert "the test part has no labels" in result.err
    tested = pq.read_table("out/predictions.parquet", filters=[("part", "=", "test")])
    assert tested["predicted"].null_count == 0


def test_labels_that_are_cut_off(run: Run, data: Callable[[str], Path], model_folders: dict[str, Path]) -> None:
    """A note counts them; a training part that is constant without them is refused."""
    given, model = data("residue-class"), model_folders["esm1nv"]
    text = f">long TARGET={'H' * 300}{'C' * 300} SET=test\n{'MK' * 300}\n"
    given.write_text(given.read_text() + text + text.replace("long", "again"))
    result = run("finetune", given, "-m", model, "-o", "out", *SHORT)
    assert result.code == 0, result
    assert "2 examples cut to what the model takes with 180 residue labels" in result.err
    report = pd.read_csv("out/data.report.tsv", sep="\t")
    assert report.id[report.what == "truncated"].tolist() == ["long", "again"]
    parts = ("train", "validation", "test")
    given.write_text("".join(f">{part} TARGET={'H' * 540}{'C' * 60} SET={part}\n{'MK' * 300}\n" for part in parts))
    fails(run("finetune", given, "-m", model, "-o", "no", *SHORT), 1, "cut", "'H'")
    assert not Path("no").exists()


def test_columns_that_hdf5_cannot_hold(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("sequence-class")
    given.write_text(given.read_text().replace("<few>", "many/few"))
    assert run("finetune", given, "-m", model, "-o", "out", *NO_TIME).code == 0
    fails(run("predict", "out", given, "-o", "p.h5"), 2, "p.h5", "probability_many/few", ".parquet")
    assert run("predict", "out", given, "-o", "p.parquet").code == 0
    given.write_text(given.read_text().replace(",many,", ",none,"))
    assert run("finetune", given, "-m", model, "-o", "other", *NO_TIME).code == 0
    assert run("predict", "other", given, "-o", "p.h5").code == 0
    with h5py.File("p.h5") as file:
        assert len(file["probability_many/few"]) == len(PARTS)


def test_a_number_that_is_not_defined_does_not_win() -> None:
    """Of several seeds or rates, one whose number is NaN is never the best, wherever it stands."""
    found = [SimpleNamespace(selected=selected, loss=1.0) for selected in (np.nan, 0.2, 0.7, np.nan)]
    assert best_member(found).selected == 0.7  # type: ignore[arg-type]
    losses = [SimpleNamespace(selected=np.nan, loss=loss) for loss in (3.0, 1.0)]
    assert best_member(losses).loss == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["sequence-value", "sequence-class", "multilabel"])
def test_too_few_to_calibrate(run: Run, data: Callable[[str], Path], model: Path, task: str) -> None:
    """It is said, and nothing pretends to be calibrated."""
    given = data(task)
    lines = given.read_text().splitlines()
    given.write_text("\n".join([*lines[:70], *lines[-10:], ""]))
    result = run("finetune", given, "-m", model, "-o", "out", "--no-baselines")
    assert result.code == 0, result
    assert "too few" in result.err
    result = run("predict", "out", given, "-o", "p.csv")
    assert result.code == 0
    assert result.err.count("not calibrated") == 1
    columns = pd.read_csv("p.csv").columns
    assert not [name for name in columns if name.startswith(("calibrated", "set", "low", "high"))]
    assert any(name.startswith("probability") for name in columns) == (task != "sequence-value")
    calibration = pd.read_csv("out/calibration.tsv", sep="\t")
    assert set(calibration.number) <= {"log_loss_before", "calibration_error_before"}
    assert ("after temperature" in Path("out/report.html").read_text()) is False


@pytest.mark.parametrize("arguments", [("--method", "lora"), ("--method", "lora", "--dora"), ("--method", "full")])
def test_trained_encoders(run: Run, data: Callable[[str], Path], model: Path, arguments: tuple[str, ...]) -> None:
    """Predictions of the folder are those of the run; the frozen model is among the baselines."""
    given = data("sequence-class")
    options = ("--epochs", 1, "--lr", "1e-3,1e-2", "--precision", "float32")
    result = run("finetune", given, "-m", model, "-o", "out", *arguments, *options)
    assert result.code == 0, result
    methods = pd.read_csv("out/metrics.tsv", sep="\t").method.unique().tolist()
    assert methods[-2:] == ["random weights", "frozen"]
    assert Path("out/adapter/adapter_config.json").exists() == ("lora" in arguments)
    assert Path("out/model/config.json").exists() == ("full" in arguments)
    assert run("predict", "out", given, "-o", "p.parquet").code == 0
    stored = pq.read_table("out/predictions.parquet").to_pandas()
    joined = stored.merge(pq.read_table("p.parquet").to_pandas(), on="id", suffixes=("", "_again"))
    np.testing.assert_allclose(joined["probability_many"], joined["probability_many_again"], atol=1e-5)
    if "full" in arguments:
        fails(run("predict", "out", given, "-o", "q.csv", "-m", model), 2, "out", "leave out -m")
    frozen = protea.load(model, device="cpu").embed(sequences(), pool="mean")
    predictor = read_predictor(Path("out"))
    with torch.no_grad():
        unchanged = predictor.head.outcome(predictor.head(torch.from_numpy(frozen), torch.ones(len(frozen))))[:, 1]
    by_id = dict(zip((f"p{i}" for i in range(len(frozen))), unchanged.tolist(), strict=True))
    assert np.abs(joined["probability_many"] - joined["id"].map(by_id)).max() > 1e-4  # the encoder has changed


def test_the_frozen_baseline_is_trained_as_long_as_ever(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """Epochs, batch and patience of LoRA are not those of the head beside it."""
    given = data("sequence-class")
    lengths = ("--epochs", 0.5, "--batch", 5, "--patience", 0.5, "--precision", "float32")
    assert run("finetune", given, "-m", model, "-o", "lora", "--head", "mlp", "--method", "lora", *lengths).code == 0
    assert run("finetune", given, "-m", model, "-o", "frozen", "--head", "mlp", *NO_TIME).code == 0
    assert numbers("lora", "frozen") == pytest.approx(numbers("frozen"), nan_ok=True)


def test_killed_predictions_end_with_the_same_bytes(
    run: Run, data: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    given = data("residue-class")
    assert run("finetune", given, "-m", model, "-o", "out", *SHORT).code == 0
    many = "".join(f">s{i}\n{text}\n" for i, text in enumerate(sequences(1500, seed=3)))
    Path("many.fasta").write_text(many)
    for suffix in ("parquet", "csv"):
        command = ("predict", "out", "many.fasta", "--token-budget", 256, "-o")
        assert run(*command, f"whole.{suffix}").code == 0
        program = (
            "import protea.embed.run as run, protea.cli as cli; run._COMMIT_SECONDS = 0; cli.main()",
            *map(str, command),
            f"killed.{suffix}",
        )
        process = subprocess.Popen([sys.executable, "-c", *program], cwd=tmp_path, stderr=subprocess.DEVNULL)
        work = Path(f".killed.{suffix}.partial")
        while process.poll() is None and len(list(work.glob("part-*.parquet"))) < 5:
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert run(*command, f"killed.{suffix}").code == 0
        assert not work.exists()
        assert sha256(Path(f"killed.{suffix}")) == sha256(Path(f"whole.{suffix}")) or suffix == "parquet"
        if suffix == "parquet":
            whole, killed = (pq.read_table(f"{name}.parquet") for name in ("whole", "killed"))
            assert whole.equals(killed)
            groups = [pq.ParquetFile(f"{name}.parquet").metadata.num_row_groups for name in ("whole", "killed")]
            assert groups[0] == groups[1]


def test_bad_input_of_predictions(run: Run, data: Callable[[str], Path], model_folders: dict[str, Path]) -> None:
    """Every policy of ``embed`` holds: cut, unknown and repeated records are said and reported."""
    model = model_folders["esm1nv"]
    given = data("residue-class")
    assert run("finetune", given, "-m", model, "-o", "out", *SHORT).code == 0
    Path("odd.fasta").write_text(f">long\n{'M' * 600}\n>lower\nmkt*\n>j\nMJK\n>none\n\n>a/b\nMK\n")
    result = run("predict", "out", "odd.fasta", "-o", "p.csv")
    assert result.code == 0, result
    assert "1 truncated" in result.err
    table = pd.read_csv("p.csv")
    assert len(table[table.id == "long"]) == 510
    assert set(table[table.id == "long"].truncated_from) == {600}
    assert table[table.id == "j"].residue.tolist() == ["M", "X", "K"]
    report = pd.read_csv("p.csv.report.tsv", sep="\t")
    assert {("long", "truncated"), ("j", "altered"), ("none", "skipped")} <= set(
        zip(report.id, report.what, strict=True)
    )
    fails(run("predict", "out", "odd.fasta", "-o", "q.csv", "--unknown", "error"), 1, "j", "J")
    fails(run("predict", "out", "odd.fasta", "-o", "q.csv", "--long", "error"), 1, "600 residues")
    whole = run("predict", "out", "odd.fasta", "-o", "w.csv", "--long", "window")
    assert whole.code == 0
    assert (pd.read_csv("w.csv").id == "long").sum() == 600
    Path("twice.fasta").write_text(">a\nMK\n>a\nMKK\n")
    fails(run("predict", "out", "twice.fasta", "-o", "q.csv"), 1, "a", "--duplicates")
    Path("empty.fasta").write_text("")
    fails(run("predict", "out", "empty.fasta", "-o", "q.csv"), 1, "empty.fasta")


def test_pairs_are_predicted(run: Run, data: Callable[[str], Path], model: Path) -> None:
    """From a table without labels; the same numbers as in the folder, in either order of the pair."""
    given = data("pair-class")
    assert run("finetune", given, "-m", model, "-o", "out", *NO_TIME).code == 0
    frame = pd.read_csv(given).drop(columns=["target", "set"])
    frame.to_csv("pairs.csv", index=False)
    frame.rename(columns={"sequence": "sequence_2", "sequence_2": "sequence"}).to_csv("turned.csv", index=False)
    stored = pq.read_table("out/predictions.parquet").to_pandas()
    for name in ("pairs", "turned"):
        result = run("predict", "out", f"{name}.csv", "-o", f"{name}.parquet")
        assert result.code == 0, result
        joined = stored.merge(pq.read_table(f"{name}.parquet").to_pandas(), on="id", suffixes=("", "_again"))
        assert len(joined) == len(stored)
        np.testing.assert_allclose(joined["probability_yes"], joined["probability_yes_again"], atol=1e-5)
    again = run("predict", "out", "pairs.csv", "-o", "pairs.parquet")
    assert again.code == 0
    assert "nothing to do" in again.err
    frame.to_csv("more.csv", index=False)
    fails(run("predict", "out", "turned.csv", "-o", "pairs.parquet"), 1, "pairs.parquet", "the input has changed")
    frame.drop(columns="sequence_2").to_csv("single.csv", index=False)
    fails(run("predict", "out", "single.csv", "-o", "q.csv"), 1, "row 1", "sequence_2")
    Path("in.fasta").write_text(">a\nMK\n")
    fails(run("predict", "out", "in.fasta", "-o", "q.csv"), 1, "in.fasta", "table")
    assert not list(Path().glob("q.csv*"))


def test_predictions_take_the_policies_of_training(run: Run, data: Callable[[str], Path], model: Path) -> None:
    given = data("residue-class")
    assert run("finetune", given, "-m", model, "-o", "out", "--gaps", "drop", "--unknown", "skip", *SHORT).code == 0
    Path("odd.fasta").write_text(">gapped\nMK--TAY\n>odd\nMKJ\n")
    result = run("predict", "out", "odd.fasta", "-o", "p.csv")
    assert result.code == 0, result
    assert "".join(pd.read_csv("p.csv").residue) == "MKTAY"
    assert run("predict", "out", "odd.fasta", "-o", "q.csv", "--gaps", "keep", "--unknown", "x").code == 0
    assert "".join(pd.read_csv("q.csv").residue) == "MK--TAYMKX"


@pytest.mark.parametrize(
    ("task", "suffix"),
    [
        ("sequence-class", "parquet"),
        ("residue-class", "h5"),
        ("sequence-value", "csv"),
        ("multilabel", "tsv"),
        ("pair-class", "parquet"),
    ],
)
def test_shards_of_predictions(run: Run, data: Callable[[str], Path], model: Path, task: str, suffix: str) -> None:
    """Joined, they are what one process writes, to the byte."""
    given = data(task)
    assert run("finetune", given, "-m", model, "-o", "out", *NO_TIME).code == 0
    if suffix == "csv":
        given.write_text(given.read_text().replace("A", "j", 3))  # altered residues, for the report
    output = f"p.{suffix}"
    written = [Path(f"{output}{end}") for end in (".report.tsv", ".run.yaml", "")]
    command = ("predict", "out", given, "--token-budget", 100, "-o", output)
    assert run(*command).code == 0
    whole = [path.read_bytes() for path in written]
    for path in written:
        path.unlink()
    fails(run(*command, "--shard", "0/2"), 2, "--shard '0/2'", "i/N")
    fails(run(*command, "--ray", "auto", "--shard", "1/2"), 2, "--ray", "--shard")
    for number in (3, 1, 2):
        result = run(*command, "--shard", f"{number}/3")
        assert result.code == 0, result
        assert f"p.shard-{number}-of-3.{suffix}: " in result.out
        again = run(*command, "--shard", f"{number}/3")
        assert (again.code, "nothing to do" in again.err) == (0, True)
    merged = run("merge", output)
    assert merged.code == 0, merged
    assert [path.read_bytes() for path in written] == whole
    again = run("merge", output)
    assert (again.code, "nothing to do" in again.err) == (0, True)
    Path(f"p.shard-2-of-3.{suffix}").write_bytes(b"\0")
    fails(run("merge", output, "--overwrite"), 1, f"p.shard-2-of-3.{suffix}", "run that shard again")
