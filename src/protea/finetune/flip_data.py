"""FLIP's files in a folder: where they are, the options of a task on them, and a stand-in for a training set.

FLIP (Dallago et al. 2021; licence AFL-3.0) comes as FASTA files or as zips with CSV files. A file is found at
``TASK/NAME`` or ``TASK/splits/NAME``, in the folder or in its subfolder ``splits``, as ``.fasta`` or ``.csv``, plain or
compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from protea.errors import DataError, OutputError, UsageError
from protea.finetune.labelled_data import DataFiles, read_labelled
from protea.finetune.likeness import nearest
from protea.finetune.tasks import MISSING, Ints, Labelled, Part
from protea.output import WRITTEN, fingerprint, measured, read_run
from protea.progress import Progress
from protea.settings_errors import read_yaml, suggestion
from protea.tables import Beside, read_table, write_table
from protea.train.recipe import RECIPES

SOURCE: Final = (
    "FLIP (licence AFL-3.0) is at https://github.com/J-SNACKKB/FLIP, splits/TASK/splits.zip, and at "
    "http://data.bioembeddings.com/public/FLIP/fasta/; put the files of a task, unpacked, into DIR/TASK/"
)
IDENTITY: Final = 0.3
"""A stand-in holds nothing from this identity on to what it is measured with; DeepLoc's own parts differ as much."""

FILES: Final = ("data", "labels", "mask")
"""Options that name files of FLIP."""

_ENDINGS: Final = tuple(kind + packed for kind in (".fasta", ".csv") for packed in ("", ".gz"))
_FOLDS: Final = tuple(f"scl/deeploc2_fold{number}.csv" for number in range(1, 6))
_HELD_OUT: Final[Mapping[Part, str]] = {"validation": "scl/deeploc_our_val_set", "test": "scl/deeploc_test_set"}
_HARD: Final = "scl/setHARD"
_SPARE: Final = 3  # times as many candidates as a limit asks for


def find(folder: Path, name: str) -> Path | None:
    """The file that FLIP calls ``name``, as in ``gb1/sampled.fasta``, whatever its ending; ``None`` if it is absent."""
    task, stem = Path(name).parent, Path(name).name.removesuffix(".gz").rpartition(".")[0] or Path(name).name
    for place in (
        folder / task,
        folder / task / "splits",
        folder / "splits" / task,
        folder / "splits" / task / "splits",
    ):
        for ending in _ENDINGS:
            if (path := place / f"{stem}{ending}").is_file():
                return path
    return None


def located(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options with the files that they name in a folder; a ``DataError`` if one is not there."""
    found = dict(values)
    for option in FILES:
        names = values.get(option)
        if names is not None:
            paths = [_found(folder, str(name)) for name in (names if isinstance(names, list | tuple) else [names])]
            found[option] = paths if option == "data" else paths[0]
    return found


def _found(folder: Path, name: str) -> str:
    path = find(folder, name)
    if path is None:
        raise DataError(f"{folder}: has no {name}, also not compressed; {SOURCE}")
    return str(path)


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The options in a YAML file, or in a recipe that comes with the package, as in ``flip/gb1``."""
    path, names = Path(source), [f"flip/{path.stem}" for path in sorted((RECIPES / "flip").glob("*.yaml"))]
    if str(source) in names:
        path = RECIPES / f"{source}.yaml"
    elif not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"--config {source}: is neither a file nor the name of a recipe{suggestion(str(source), names)}"
        )
    return {name.replace("-", "_"): value for name, value in read_yaml(path).items()}


def read(values: Mapping[str, Any]) -> Labelled:
    """The labelled data that options name."""
    data = values["data"]
    labels, mask = (Path(values[option]) if values.get(option) else None for option in ("labels", "mask"))
    names = (data,) if isinstance(data, str) else tuple(data)
    return read_labelled(DataFiles(data=names, labels=labels, mask=mask, task=values.get("task", "auto")))


def limited(labelled: Labelled, limit: int) -> Labelled:
    """The data with ``limit`` training examples, drawn at random but always the same."""
    train = np.array([place for place, example in enumerate(labelled.examples) if example.part in ("train", "")])
    drawn = set(np.random.default_rng(0).permutation(train)[:limit].tolist())
    others = set(range(len(labelled.examples))) - set(train.tolist())
    return labelled.chosen(sorted(drawn | others))


def write_labelled(path: Path, labelled: Labelled, settings: Mapping[str, Any]) -> None:
    """Write single sequences with their labels as a table that ``protea finetune`` reads."""
    end = ";" if labelled.task.unit == "residue" else ""  # so that a last label may be missing
    columns = {
        "id": [example.id for example in labelled.examples],
        "sequence": [example.sequences[0] for example in labelled.examples],
        "target": [";".join(_labels(labelled, target)) + end for target in labelled.targets],
        "set": [example.part for example in labelled.examples],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, pa.table(columns), Beside("id\twhat\tdetail", [], settings))


def _labels(labelled: Labelled, target: np.ndarray[Any, Any]) -> Iterator[str]:
    for value in target.tolist():
        if labelled.task.kind == "class":
            yield "" if value == MISSING else labelled.classes[value]
        else:
            yield repr(value)


# ---- localisation: DeepLoc 2 in place of the training set of DeepLoc 1 ----
def can_stand_in(folder: Path) -> bool:
    """Whether the folder has what a stand-in for ``scl/mixed_soft`` is made of."""
    return all(find(folder, name) for name in (*_FOLDS, *_HELD_OUT.values()))


def stand_in(folder: Path, path: Path, limit: int | None, progress: Progress) -> None:
    """Write a table with DeepLoc 1's validation and test sets, and a training part of proteins of DeepLoc 2.

    The training part has the proteins of one place alone. Those with the accession of a held-out protein (validation,
    test, setHARD) are left out, and those with ``IDENTITY`` or more to one. A table that was made of the same files
    stays.
    """
    folds = [_found(folder, name) for name in _FOLDS]
    held = {part: _found(folder, name) for part, name in _HELD_OUT.items()}
    hard = [str(place)] if (place := find(folder, _HARD)) else []
    made_of = {"input": fingerprint([*folds, *held.values(), *hard]), "limit": limit, "identity": IDENTITY}
    if is_made_of(path, made_of):
        return
    kept = [in_ten_classes(read({"data": name, "task": "sequence-class"}), part) for part, name in held.items()]
    others = [read({"data": name, "task": "sequence-class"}) for name in hard]
    known = [example for data in (*kept, *others) for example in data.examples]
    accessions = {example.id for example in known}
    rows = [row for name in folds for row in read_table(Path(name)).to_pylist()]
    rows = [row for row in rows if "|" not in row["label"] and row["accession"] not in accessions]
    if limit is not None:
        rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))[: _SPARE * limit]]
    alike = nearest([(row["sequence"],) for row in rows], [example.sequences for example in known], progress)
    rows = [row for row, identity in zip(rows, alike.identity, strict=True) if identity < IDENTITY][:limit]
    columns: dict[str, list[str]] = {
        "id": [row["accession"] for row in rows],
        "sequence": [row["sequence"] for row in rows],
        "target": [row["label"] for row in rows],
        "set": ["train"] * len(rows),
    }
    for data in kept:
        columns["id"] += [example.id for example in data.examples]
        columns["sequence"] += [example.sequences[0] for example in data.examples]
        columns["target"] += [data.classes[int(target[0])] for target in data.targets]
        columns["set"] += [example.part for example in data.examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, pa.table(columns), Beside("id\twhat\tdetail", [], made_of | {"method": alike.method}))


def in_ten_classes(data: Labelled, part: Part) -> Labelled:
    """The examples in one part, with DeepLoc 2's names; ``Cytoplasm-Nucleus`` is Cytoplasm, as Stärk et al. read it."""
    names = [name.partition("-")[0].replace(".", " ") for name in data.classes]
    classes = tuple(sorted(set(names)))
    number: Ints = np.array([classes.index(name) for name in names], np.int64)
    examples = [replace(example, part=part) for example in data.examples]
    return replace(data, classes=classes, examples=examples, targets=[number[target] for target in data.targets])


def is_made_of(path: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether a table is there, is intact, and has these settings in its run file."""
    try:
        recorded = read_run(path)
    except OutputError:
        return False
    wanted = {**made_of, WRITTEN: measured(path) if path.is_file() else None}
    return all(recorded.get(name) == value for name, value in wanted.items())
