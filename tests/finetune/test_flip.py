"""FLIP: tiny folders in its forms, the table beside published figures, and runs that are not made again."""

from __future__ import annotations

import csv
import gzip
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import parquet
from sklearn.metrics import accuracy_score

from conftest import Run, fails
from protea import bundled
from protea.errors import DataError
from protea.finetune import evaluation, flip, flip_data
from protea.finetune.baselines import BASELINES
from protea.finetune.finetune_settings import parse
from protea.progress import Progress
from protea.train.recipe import RECIPES

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
PARTS = ["train"] * 12 + ["validation"] * 4 + ["test"] * 8
PLACES = ("Cell membrane", "Cytoplasm", "Nucleus")


def proteins(count: int, seed: int, length: int = 24) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=length)) for _ in range(count)]


def header(part: str) -> str:
    return f"SET={'train' if part == 'validation' else part} VALIDATION={part == 'validation'}"


def write(path: Path, text: str, *, packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


def values(folder: Path, name: str, seed: int, *, packed: bool = False) -> None:
    """A task with a value for each sequence, as FASTA."""
    records = enumerate(zip(proteins(len(PARTS), seed), PARTS, strict=True))
    text = "".join(f">s{i} TARGET={s.count('A') + s.count('L') + i / 50} {header(p)}\n{s}\n" for i, (s, p) in records)
    write(folder / name, text, packed=packed)


def residues(
    folder: Path, task: str, classes: str, seed: int, *, masked: bool = False, test: int = 8, longest: int = 0
) -> None:
    """A task with a class for each residue, in FLIP's two or three files; the last protein may be a long one."""
    parts = PARTS[:16] + ["test"] * test
    sequences = proteins(16, 0) + proteins(test, seed)
    sequences[-1] = (sequences[-1] * longest)[:longest] or sequences[-1]
    files = {"sequences": "", "sampled": "", "mask": ""}
    for i, (sequence, part) in enumerate(zip(sequences, parts, strict=True)):
        name = f"p{i}" if part != "test" else f"t{seed}-{i}"
        files["sequences"] += f">{name}\n{sequence}\n"
        files["sampled"] += f">{name} {header(part)}\n{''.join(classes[ord(x) % len(classes)] for x in sequence)}\n"
        files["mask"] += f">{name}\n0{'1' * (len(sequence) - 2)}0\n"
    for name, text in files.items():
        if name != "mask" or masked:
            write(folder / task / f"{name}.fasta.gz", text, packed=True)


def localisation(folder: Path) -> None:
    """DeepLoc's files; the second and third training protein must not be used, nor those of two places."""
    held = {
        name: proteins(6, 11 + i, 80) for i, name in enumerate(("deeploc_our_val_set", "deeploc_test_set", "setHARD"))
    }
    endings = {"deeploc_our_val_set": "", "deeploc_test_set": " test", "setHARD": " new_test_set "}
    names = ["Cell.membrane-M", "Cytoplasm-S", "Nucleus-U"] * 2
    for name, sequences in held.items():
        labels = ["Cytoplasm-Nucleus-U", *names[1:]] if name == "deeploc_our_val_set" else names
        records = enumerate(zip(sequences, labels, strict=True))
        text = "".join(f">{name}{i} {label}{endings[name]}\n{s}\n" for i, (s, label) in records)
        write(folder / "scl" / f"{name}.fasta.gz", text, packed=True)
    known = proteins(20, 14, 80)
    rows = [("f0", known[0]), ("deeploc_test_set1", known[1]), ("near", held["setHARD"][0][:-1] + "W")]
    rows += [(f"f{i}", known[i]) for i in range(3, 20)]
    lines = [f"{name},{s},{PLACES[i % 3]},0,Metazoa,0.0" for i, (name, s) in enumerate(rows)]
    lines.append(f"two,{proteins(1, 15, 80)[0]},Cytoplasm|Nucleus,0,Metazoa,0.0")
    for fold in range(5):
        text = "\n".join(["accession,sequence,label,partition,kingdom,membrane", *lines[fold::5], ""])
        write(folder / "scl" / f"deeploc2_fold{fold + 1}.csv.gz", text, packed=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all five tasks, in the forms of FLIP's FASTA files and of its unpacked zips."""
    folder = tmp_path_factory.mktemp("flip")
    values(folder, "gb1/two_vs_rest.fasta.gz", 1, packed=True)
    residues(folder, "secondary_structure", "HEC", 2, masked=True)
    residues(folder, "secondary_structure_2022-12", "HEC", 3, masked=True, test=5, longest=1100)
    residues(folder, "conservation", "123456789", 4)
    localisation(folder)
    records = zip(proteins(len(PARTS), 5), PARTS, strict=True)
    rows = [f"{s},{40 + s.count('A')},{'test' if p == 'test' else 'train'},{p == 'validation'}" for s, p in records]
    write(folder / "meltome/splits/mixed_split.csv", "\n".join(["sequence,target,set,validation", *rows, ""]))
    return folder


def evaluate(folder: Path, output: Path, **options: Any) -> list[dict[str, Any]]:
    given = {"model": bundled.NAME, "device": "cpu", "dtype": "float32"}
    return flip.FlipRun(folder=folder, output=output, options=given, **options)().to_pylist()


def find(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# ---- recipes and published figures ----
@pytest.mark.parametrize("task", flip.NUMBERS)
def test_recipes_are_options_of_finetune(task: str) -> None:
    values = flip_data.read_recipe(f"flip/{task}")
    assert parse(values | {"output": "out"}, task).task == values["task"]
    assert (RECIPES / "flip" / f"{task}.yaml").is_file()


def test_published_figures_are_of_numbers_that_the_table_shows() -> None:
    with flip.PUBLISHED.open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    splits = {(split.task, split.name) for split in flip.SPLITS} | {("scl", "mixed_hard")}
    for row in rows:
        assert row["number"] in flip.NUMBERS[row["task"]]
        assert (row["task"], row["split"]) in splits
        assert row["source"]
        figures = [float(row[name]) for name in flip.models_of(rows) if row[name]]
        assert figures
        assert all(0 < value < 1 or row["number"] == "mse" for value in figures)


def test_recipe_with_a_folder(run: Run, made: Path, tmp_path: Path) -> None:
    arguments = ("--config", "flip/gb1", "--epochs", "2", "--no-baselines", "--device", "cpu")
    result = run("finetune", *arguments, "--data-folder", made, "-o", tmp_path / "gb1")
    assert result.code == 0, result.err
    assert (tmp_path / "gb1" / "predictor.json").is_file()
    fails(run("finetune", *arguments, "--data-folder", tmp_path, "-o", tmp_path / "b"), 1, "gb1/two_vs_rest", "AFL-3.0")
    fails(run("finetune", "x.csv", "--data-folder", made, "-o", tmp_path / "c"), 2, "--config")
    fails(run("finetune", "--config", "flip/gb2", "-o", tmp_path / "d"), 2, "flip/gb1")


@pytest.mark.parametrize("place", ["gb1/a", "gb1/splits/a", "splits/gb1/a", "splits/gb1/splits/a"])
@pytest.mark.parametrize("ending", [".fasta", ".fasta.gz", ".csv", ".csv.gz"])
def test_files_are_found_in_every_form(tmp_path: Path, place: str, ending: str) -> None:
    write(tmp_path / f"{place}{ending}", "")
    assert flip_data.find(tmp_path, "gb1/a.fasta") == tmp_path / f"{place}{ending}"
    assert flip_data.find(tmp_path, "gb1/b.fasta") is None


# ---- the evaluation ----
@pytest.mark.long
def test_all_tasks(made: Path, tmp_path: Path) -> None:
    rows = evaluate(made, tmp_path / "out")
    assert {row["task"] for row in rows} == set(flip.NUMBERS)
    assert all(row["value"] is not None and row["baseline"] for row in rows)
    structure = find(rows, task="secondary_structure", number="accuracy_per_protein")
    assert [(row["test"], row["650M"]) for row in structure] == [(8, 0.855), (5, 0.855)]
    assert "test set of 648" in structure[0]["differs"]
    places = find(rows, task="scl", number="accuracy")
    assert {row["split"] for row in places} == {"stand-in for mixed_soft", "stand-in for mixed_hard"}
    assert all("stand-in" in row["differs"] for row in places)
    assert find(rows, split="mixed_split", number="mse")[0]["15B"] == 39.49


def test_one_task(run: Run, made: Path, tmp_path: Path) -> None:
    command = ("evaluate", "flip", made, "-o", tmp_path / "out", "--task", "gb1", "--limit", "10", "--device", "cpu")
    result = run(*command)
    assert result.code == 0, result.err
    for part in ("gb1: not in", "three_vs_rest", "--limit 10: trained on a few"):
        assert part in result.err
    table = tmp_path / "out" / flip.TABLE
    with table.open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert {(row["train"], row["validation"], row["test"]) for row in rows} == {("10", "4", "8")}
    assert all("TRAINED ON 10 of 12" in row["differs"] for row in rows)
    mse = next(row for row in rows if row["number"] == "mse")
    assert float(mse["650M"]) == 1.67
    assert "split sampled; test set of 1,745; training set of 6,289" in mse["differs"]
    predicted = tmp_path / "out" / "gb1" / "two_vs_rest" / "predictions.parquet"
    of_test = [row for row in parquet.read_table(predicted).to_pylist() if row["part"] == "test"]
    errors = [(row["target"] - row["predicted"]) ** 2 for row in of_test]
    assert float(mse["value"]) == pytest.approx(np.mean(errors))
    before, text = predicted.stat().st_mtime_ns, table.read_text()
    again = run(*command)
    assert again.code == 0
    assert "nothing to do" in again.err
    assert (predicted.stat().st_mtime_ns, table.read_text()) == (before, text)
    other = run(*command[:-4], "--limit", "11", "--device", "cpu")
    assert other.code == 1
    assert "another run (limit 10 -> 11)" in other.err
    more = run(*command[:-6], "--task", "meltome", *command[-4:])
    assert more.code == 0, more.err
    assert table.read_text().splitlines()[: len(rows) + 1] == text.splitlines()
    assert "\nmeltome\t" in table.read_text()


def test_a_further_test_set_has_the_same_predictor(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second set of secondary structure, by predictions of ``protea predict`` and scikit-learn's accuracy.

    The evaluation is broken after the training; the predictor is not trained again.
    """
    from protea.finetune.predictions import predict
    from protea.infer.loading import ModelLoader

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "resample", Broken(evaluation.resample, 2))
        with pytest.raises(KeyboardInterrupt):
            evaluate(made, tmp_path / "out", tasks=["secondary_structure"])
    trained = (tmp_path / "out/secondary_structure/sampled/head.safetensors").stat().st_mtime_ns
    rows = evaluate(made, tmp_path / "out", tasks=["secondary_structure"])
    assert (tmp_path / "out/secondary_structure/sampled/head.safetensors").stat().st_mtime_ns == trained
    later = find(rows, test=5, number="accuracy")[0]
    folder = made / "secondary_structure_2022-12"
    options = {"inputs": [str(folder / "sequences.fasta.gz")], "sequences": tmp_path / "predicted.parquet"}
    predict(tmp_path / "out/secondary_structure/sampled", options, load=ModelLoader("cpu"))
    truth, predicted = [], []
    labels = gzip.decompress((folder / "sampled.fasta.gz").read_bytes()).decode().split(">")[1:]
    states = {record.split()[0]: record.split("\n")[1] for record in labels if "SET=test" in record}
    for row in parquet.read_table(tmp_path / "predicted.parquet").to_pylist():
        if row["id"] in states and 1 < row["position"] < len(states[row["id"]]):  # the ends are masked
            truth.append(states[row["id"]][row["position"] - 1])
            predicted.append(row["predicted"])
    assert len(truth) == 4 * 22 + 1021  # the last protein is cut to 1,022 residues
    assert later["value"] == pytest.approx(accuracy_score(truth, predicted))
    assert later["low"] <= later["value"] <= later["high"]


def numbers(path: Path) -> dict[tuple[str, str], str]:
    """The numbers on the test part, by method and name, from a table of metrics."""
    with path.open() as stream:
        rows = csv.DictReader(stream, delimiter="\t")
        return {(row["method"], row["number"]): row["value"] for row in rows if row["part"] == "test"}


@pytest.mark.parametrize(
    "method", ["frozen", *(pytest.param(name, marks=pytest.mark.long) for name in ("full", "lora"))]
)
def test_a_further_test_set_has_the_methods_of_the_first(tmp_path: Path, method: str) -> None:
    """The same proteins as a further set: every method gives its numbers on the first set. Other files: measured anew.

    A run that kept no baselines with a model, as an earlier version, says so.
    """
    folder, out = tmp_path / "flip", tmp_path / "out"
    for name in ("secondary_structure", "secondary_structure_2022-12"):
        residues(folder, name, "HEC", 2, masked=True, longest=1100 if method == "lora" else 0)
    options = {"tasks": ["secondary_structure"], "options": {"model": bundled.NAME, "device": "cpu", "method": method}}
    flip.FlipRun(folder=folder, output=out, **options)()
    run = out / "secondary_structure/sampled"
    table = run / "further-secondary_structure_2022-12-sequences.tsv"
    first, further = numbers(run / "metrics.tsv"), numbers(table)
    assert further.keys() == first.keys()
    models = {"predictor", "random weights"} | ({"frozen"} if method != "frozen" else set())
    assert {name for name, _ in first} == models | set(BASELINES)
    for key, value in first.items():
        assert float(further[key]) == pytest.approx(float(value), abs=1e-4, nan_ok=True), key
    assert ("truncated" in table.with_name(f"{table.name}.report.tsv").read_text()) == (method == "lora")
    before = table.stat().st_mtime_ns
    flip.FlipRun(folder=folder, output=out, **options)()
    assert table.stat().st_mtime_ns == before
    residues(folder, "secondary_structure_2022-12", "HEC", 3, masked=True, test=5)
    shutil.rmtree(run / "baselines")
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    recorded["written"] = {key: value for key, value in recorded["written"].items() if "baselines" not in key}
    (run / "run.yaml").write_text(yaml.safe_dump(recorded))
    heard = Heard()
    rows = flip.FlipRun(folder=folder, output=out, progress=heard, **options)().to_pylist()
    assert find(rows, test=5)
    assert {name for name, _ in numbers(table)} == {"predictor", *BASELINES}
    for words in (f"{table}: is of other files", "kept no baselines with a model"):
        assert any(words in note for note in heard.notes)


def test_stand_in_leaves_out_what_is_measured(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "stand-in.csv"
    flip_data.stand_in(made, path, None, flip.SILENT)
    data = flip_data.read({"data": str(path), "task": "sequence-class"})
    assert data.classes == PLACES
    names = {part: {example.id for example in data.part(part).examples} for part in ("train", "validation", "test")}
    assert names["train"] == {f"f{i}" for i in (0, *range(3, 20))}
    assert names["validation"] == {f"deeploc_our_val_set{i}" for i in range(6)}
    first = data.part("validation").examples.index(
        next(example for example in data.part("validation").examples if example.id == "deeploc_our_val_set0")
    )
    assert data.classes[int(data.part("validation").targets[first][0])] == "Cytoplasm"
    before = path.stat().st_mtime_ns
    flip_data.stand_in(made, path, None, flip.SILENT)
    assert path.stat().st_mtime_ns == before, "made of the same files"
    flip_data.stand_in(made, path, 5, flip.SILENT)
    assert len(flip_data.read({"data": str(path), "task": "sequence-class"}).part("train").examples) == 5


@pytest.mark.parametrize("task", ["secondary_structure", "conservation", "gb1"])
def test_limited_data_keep_labels_and_masks(made: Path, tmp_path: Path, task: str) -> None:
    data = flip_data.read(flip_data.located(flip_data.read_recipe(f"flip/{task}"), made))
    few = flip_data.limited(data, 5)
    flip_data.write_labelled(tmp_path / "few.csv", few, {})
    again = flip_data.read({"data": str(tmp_path / "few.csv"), "task": data.task.name})
    whole = {example.id: target for example, target in zip(data.examples, data.targets, strict=True)}
    assert len(again.part("train").examples) == 5
    assert len(again.part("test").examples) == len(data.part("test").examples)
    for example, target in zip(again.examples, again.targets, strict=True):
        assert np.array_equal(target, whole[example.id], equal_nan=data.task.kind == "value")


def row(task: str, split: str, number: str, *counts: int) -> dict[str, Any]:
    named = dict(zip(("train", "validation", "test"), counts, strict=True))
    return {"task": task, "split": split, "number": number, **named}


@pytest.mark.parametrize(
    ("ours", "source", "differs"),
    [
        (row("gb1", "sampled", "mse", 6289, 699, 1745), "BioNeMo", "not certain"),
        (row("gb1", "two_vs_rest", "mse", 381, 43, 8309), "BioNeMo", "split sampled"),
        (row("secondary_structure", "sampled", "accuracy_per_protein", 9712, 1080, 648), "BioNeMo", "same"),
        (row("secondary_structure", "sampled", "accuracy_per_protein", 9712, 1080, 364), "BioNeMo", "test set of 648"),
        (row("conservation", "sampled", "accuracy_per_protein", 9392, 555, 519), "BioNeMo", "same"),
        (row("conservation", "sampled", "mcc", 9392, 555, 519), "biotrainer", "same"),
        (row("meltome", "clustered_task_2021", "mse", 2940, 0, 1504), "BioNeMo", "split mixed_split"),
        (row("scl", "stand-in for mixed_soft", "accuracy", 11327, 1678, 2768), "BioNeMo", "training set of 9,503"),
    ],
)
def test_what_differs(ours: Mapping[str, Any], source: str, differs: str) -> None:
    with flip.PUBLISHED.open() as stream:
        known = list(csv.DictReader(stream, delimiter="\t"))
    found = [row for row in flip._beside(dict(ours), known, []) if row["source"].startswith(source)]
    assert len(found) == 1
    assert differs in found[0]["differs"]
    assert (differs == "same") == (found[0]["differs"] == "same")


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Broken:
    """Calls a function, but raises at one of the calls as an interruption does."""

    def __init__(self, called: Callable[..., Any], stop: int) -> None:
        self.called, self.left = called, stop

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.called(*arguments, **options)


@pytest.mark.long
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_evaluation_continues(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """A stop in the first run, in its further test set, and in the second run; then the table is that of no stop."""
    tasks = ["secondary_structure", "conservation"]
    whole = evaluate(made, tmp_path / "whole", tasks=tasks)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "resample", Broken(evaluation.resample, stop))
        with pytest.raises(KeyboardInterrupt):
            evaluate(made, tmp_path / "broken", tasks=tasks)
    assert (tmp_path / "broken" / flip.TABLE).exists() == (stop == 3)
    assert evaluate(made, tmp_path / "broken", tasks=tasks) == whole
    assert not list((tmp_path / "broken").glob("*/.*"))


def test_nothing_found_says_where_flip_comes_from(run: Run, made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"AFL-3\.0"):
        evaluate(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fails(run("evaluate", "flip", tmp_path / "absent", "-o", tmp_path / "out"), 1, "no such folder")
    fails(run("evaluate", "flip", made, "-o", tmp_path / "out", "--task", "gb2"), 2, "gb2", "meltome")
    write(tmp_path / "mine" / "notes.txt", "")
    fails(run("evaluate", "flip", made, "-o", tmp_path / "mine"), 1, "not written by this command")
