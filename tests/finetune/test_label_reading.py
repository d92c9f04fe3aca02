"""Every form of labelled data, what is detected, what is said about oddities, and every error."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from messages import check_message
from protea.errors import DataError, FastaError, MissingExtraError, ProteaError, UnknownResidueError, UsageError
from protea.finetune.label_fasta import header_fields
from protea.finetune.labelled_data import DataFiles, read_labelled
from protea.finetune.tasks import MISSING, Labelled

FLIP = Path(__file__).parents[3] / "shared" / "data" / "flip"
needs_flip = pytest.mark.skipif(not FLIP.is_dir(), reason=f"{FLIP} is not there")

Read = Callable[..., Labelled]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write files given by name and text, and read the first as data, ``labels`` and ``mask`` as such."""

    def do(files: dict[str, str], **options: Any) -> Labelled:
        for name, text in files.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        roles = {Path(name).stem: tmp_path / name for name in files if Path(name).stem in ("labels", "mask")}
        data = tuple(str(tmp_path / name) for name in files if Path(name).stem not in roles)
        return read_labelled(DataFiles(data=data, **roles, **options))

    return do


def values(labelled: Labelled) -> list[Any]:
    return [np.squeeze(target).tolist() for target in labelled.targets]


def classes(labelled: Labelled) -> list[list[str | None]]:
    names = (*labelled.classes, None)  # MISSING is the last
    return [[names[number] for number in target] for target in labelled.targets]


def parts(labelled: Labelled) -> list[str]:
    return [example.part for example in labelled.examples]


# ---- FASTA ----
def test_values_in_headers(read: Read) -> None:
    text = (
        ">a TARGET=1.5 SET=train VALIDATION=False\nMKTAYI\nAKQR\n>b SET=train VALIDATION=True TARGET=-2e1\nMKV\n"
        ">c target=3 set=Test\nMKL\n>d TARGET=nan SET=val\nMKK\n"
    )
    found = read({"a.fasta": text})
    assert found.task.name == "sequence-value"
    assert values(found) == pytest.approx([1.5, -20, 3, nan], nan_ok=True)
    assert parts(found) == ["train", "validation", "test", "validation"]
    assert found.examples[0].sequences == ("MKTAYIAKQR",)
    assert "line 1, record 'a'" in found.examples[0].place
    check_message("labelled.missing", found.notes[-1])


def test_classes_with_blanks_and_other_fields(read: Read) -> None:
    text = ">a OS=Homo sapiens TARGET=Cell membrane SET=train\nMK\n>b some words TARGET=Nucleus GN=X\nMV\n"
    found = read({"a.fasta": text})
    assert classes(found) == [["Cell membrane"], ["Nucleus"]]
    assert parts(found) == ["train", ""]
    assert found.notes == ["task: sequence-class, because the targets are 2 different texts"]


def test_residues_in_headers(read: Read) -> None:
    found = read({"a.fasta": ">a TARGET=HHC? MASK=1011\nMKTA\n>b TARGET=EEEEE\nMKTAV\n"})
    assert found.task.name == "residue-class"
    assert classes(found) == [["H", None, "C", None], ["E"] * 5]
    found = read({"a.fasta": ">a TARGET=0.5;nan;-1;2 SET=train\nMKTA\n>b TARGET=1;2.5;;4\nMKTV\n"})
    assert found.task.name == "residue-value"
    assert np.concatenate(found.targets).tolist() == pytest.approx([0.5, nan, -1, 2, 1, 2.5, nan, 4], nan_ok=True)


def test_separate_files(read: Read) -> None:
    files = {
        "a.fasta": ">a\nMKTA\n>b\nMKTAV\n>c\nMK\n",
        "labels.fasta": ">b SET=test VALIDATION=False\nEEEEC\n>a SET=train VALIDATION=True\nHHCC\n",
        "mask.fasta": ">a\n0011\n>b\n11111\n>c\n11\n",
    }
    found = read(files)
    assert [example.id for example in found.examples] == ["a", "b"]
    assert classes(found) == [[None, None, "C", "C"], [*"EEEEC"]]
    assert parts(found) == ["validation", "test"]
    assert [(row.id, row.what) for row in found.rows] == [("c", "skipped")]
    assert any("1 sequence without labels" in note for note in found.notes)


def test_pairs_in_headers(read: Read) -> None:
    text = (
        ">a INTERACTOR=b TARGET=yes SET=train\nMKT\n>b INTERACTOR=a TARGET=yes SET=train\nAYI\n"
        ">c INTERACTOR=a TARGET=no SET=test\nAKQ\n"
    )
    found = read({"a.fasta": text})
    assert found.task.name == "pair-class"
    assert [(example.id, example.sequences) for example in found.examples] == [
        ("a&b", ("MKT", "AYI")),
        ("c&a", ("AKQ", "MKT")),
    ]


def test_deeploc_headers(read: Read) -> None:
    found = read({"a.fasta": ">a Nucleus-U test\nMK\n>b Cytoplasm-Nucleus-M new_test_set \nMV\n>c Plastid-S\nML\n"})
    assert found.classes == ("Cytoplasm-Nucleus", "Nucleus", "Plastid")
    assert parts(found) == ["test", "test", ""]
    assert any("-M, -S and -U" in note for note in found.notes)


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True),
        st.from_regex(r"([a-z0-9.;]+( [a-z0-9.;]+)*)?", fullmatch=True),
    )
)
def test_fields_of_headers(fields: dict[str, str]) -> None:
    assert header_fields(" ".join(f"{key}={value}" for key, value in fields.items())) == fields


# ---- tables ----
TABLE = "Accession,Sequence,Label,Stage,origin\na,MKT,1.5,train,x\nb,MKV,2.5,VALID,y\nc,MKL,,dev,z\nd,MKK,4,test,\n"


@pytest.mark.parametrize(("name", "text"), [("a.csv", TABLE), ("a.tsv", TABLE.replace(",", "\t"))])
def test_tables(read: Read, name: str, text: str, tmp_path: Path) -> None:
    found = read({name: text})
    assert found.task.name == "sequence-value"
    assert [example.id for example in found.examples] == [*"abcd"]
    assert values(found) == pytest.approx([1.5, 2.5, nan, 4], nan_ok=True)
    assert parts(found) == ["train", "validation", "validation", "test"]
    check_message("labelled.columns", found.notes[0], path=tmp_path / name)


def test_parquet_lists_and_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "mutated_sequence": ["MKT", "MKVA", "MKLLL"],
            "labels": [[0.5, 1.5, None], [1, 2, 3, 4], [1, 1, 1, 1, 0]],
            "DMS_score": [1.0, 2.0, nan],
            "x": [1, 0, None],
            "y": [True, True, False],
            "stage": ["train", "train", "test"],
        }
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    found = read_labelled(DataFiles(data=(str(path),)))
    assert found.task.name == "residue-value"
    assert found.targets[0].tolist() == pytest.approx([0.5, 1.5, nan], nan_ok=True)
    assert [example.id for example in found.examples] == ["row1", "row2", "row3"]
    found = read_labelled(DataFiles(data=(str(path),), target_column="dms_score"))
    assert values(found) == pytest.approx([1, 2, nan], nan_ok=True)
    found = read_labelled(DataFiles(data=(str(path),), target_column="y,x"))
    assert found.task.name == "multilabel"
    assert found.classes == ("x", "y")
    assert np.concatenate(found.targets).ravel().tolist() == pytest.approx([1, 1, 0, 1, nan, 0], nan_ok=True)


def test_residues_in_tables(read: Read) -> None:
    rows = "id,sequence,target,mask,set\na,MKTA,HHCC,1100,train\nb,MKV,EEE,,test\n"
    assert classes(read({"a.csv": rows})) == [["H", "H", None, None], ["E"] * 3]
    for cells in (('"[0.5, null, NaN, 2]"', "[1,2,3.5]"), ("0.5;;nan;2", "1;2;3.5"), ("0.5 NA nan 2", "1 2 3.5")):
        table = f"id\tsequence\ttarget\na\tMKTA\t{cells[0]}\nb\tMKV\t{cells[1]}\n"
        found = read({"a.tsv": table})
        assert found.task.name == "residue-value"
        assert np.concatenate(found.targets).tolist() == pytest.approx([0.5, nan, nan, 2, 1, 2, 3.5], nan_ok=True)


def test_a_label_that_is_missing_at_the_end(read: Read) -> None:
    found = read({"a.csv": "id,sequence,target\na,MKT,0.5;1.5;\nb,MK,1;2;\nc,MKV,;2;\n"})
    expected = [0.5, 1.5, nan, 1, 2, nan, 2, nan]
    assert np.concatenate(found.targets).tolist() == pytest.approx(expected, nan_ok=True)


def test_labels_of_residues_may_have_several_letters(read: Read) -> None:
    found = read({"a.tsv": 'id\tsequence\ttarget\na\tMKT\t["helix", null, "coil"]\nb\tMK\t["coil", "coil"]\n'})
    assert found.task.name == "residue-class"
    assert classes(found) == [["helix", None, "coil"], ["coil", "coil"]]


def test_several_labels(read: Read) -> None:
    rows = 'id\tsequence\tlabels\na\tMKTA\tin|out\nb\tMKV\tin; far\nc\tMKL\tout\nd\tMKK\t\ne\tMKI\t"[]"\n'
    found = read({"a.tsv": rows})
    assert found.task.name == "multilabel"
    assert found.classes == ("far", "in", "out")
    expected = [[0, 1, 1], [1, 1, 0], [0, 0, 1], [nan] * 3, [0, 0, 0]]
    assert np.concatenate(found.targets).ravel().tolist() == pytest.approx(np.ravel(expected).tolist(), nan_ok=True)


def test_pairs_in_tables(read: Read) -> None:
    rows = "sequence_1,sequence_2,label,split\nMKT,AYI,0.5,train\nMKV,AYI,1.5,test\n"
    found = read({"a.csv": rows})
    assert found.task.name == "pair-value"
    assert found.examples[1].sequences == ("MKV", "AYI")


def test_protein_is_an_id_beside_a_sequence_and_a_sequence_without(read: Read) -> None:
    beside = read({"a.csv": "protein,sequence,label\na,MKT,x\nb,MKV,y\n"})
    alone = read({"b.csv": "protein,label,stage\nMKT,x,train\nMKV,y,test\n"})
    assert [example.id for example in beside.examples] == ["a", "b"]
    assert [example.sequences for example in alone.examples] == [("MKT",), ("MKV",)]


def test_several_files(read: Read) -> None:
    found = read({"a.csv": "sequence,target\nMKT,x\n", "b.fasta": ">b TARGET=y SET=test\nMKV\n"})
    assert [(example.id, example.part) for example in found.examples] == [("a.csv:row1", ""), ("b", "test")]


# ---- Hugging Face's datasets ----
def save_dataset(folder: Path, table: pa.Table, features: dict[str, Any]) -> None:
    """The files of ``Dataset.save_to_disk`` of datasets 5.2, in two shards."""
    folder.mkdir(parents=True)
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def test_saved_datasets(tmp_path: Path) -> None:
    features = {"sequence": {"dtype": "string", "_type": "Value"}}
    features["label"] = {"names": ["out", "in"], "_type": "ClassLabel"}
    folder = tmp_path / "saved"
    save_dataset(folder / "train", pa.table({"sequence": ["MKT", "MKV", "MKA"], "label": [0, 1, -1]}), features)
    save_dataset(folder / "test", pa.table({"sequence": ["MKL"], "label": [0]}), features)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = read_labelled(DataFiles(data=(str(folder),)))
    assert classes(found) == [["out"], ["in"], [None], ["out"]]
    assert parts(found) == ["train", "train", "train", "test"]
    assert [example.id for example in found.examples] == ["train:row1", "train:row2", "train:row3", "test:row1"]
    tokens = {"sequence": features["sequence"], "label": {"feature": features["label"], "_type": "List"}}
    save_dataset(tmp_path / "one", pa.table({"sequence": ["MKT", "MK"], "label": [[0, 1, -1], [1, 1]]}), tokens)
    found = read_labelled(DataFiles(data=(str(tmp_path / "one"),)))
    assert classes(found) == [["out", "in", None], ["in", "in"]]
    (folder / "test" / "state.json").unlink()
    with pytest.raises(DataError, match="damaged"):
        read_labelled(DataFiles(data=(str(folder),)))


def test_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"hf:owner/name.*protea\[datasets\]"):
        read_labelled(DataFiles(data=("hf:owner/name",)))


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data:
        features: dict[str, Any] = {}  # noqa: RUF012

        def with_format(self, kind: str) -> Data:
            assert kind == "arrow"
            return self

        def __getitem__(self, rows: slice) -> pa.Table:
            return pa.table({"sequence": ["MKT", "MKV"], "label": ["x", "y"]})

    class Module:
        asked: list[Any] = []  # noqa: RUF012

        @classmethod
        def load_dataset(cls, name: str, configuration: str | None) -> dict[str, Data]:
            cls.asked.append((name, configuration))
            if name == "no/where":
                raise OSError("not found")
            return {"validation": Data()}

    monkeypatch.setitem(sys.modules, "datasets", Module)  # type: ignore[arg-type]
    assert parts(read_labelled(DataFiles(data=("hf:owner/name:one",)))) == ["validation"] * 2
    assert Module.asked == [("owner/name", "one")]
    with pytest.raises(DataError, match=r"hf:no/where.*not found"):
        read_labelled(DataFiles(data=("hf:no/where",)))


# ---- which task ----
def table(targets: list[str], sequence: str = "MKTAYIAK") -> str:
    rows = (f"r{place}\t{sequence}{'A' * (place % 3)}\t{target}\n" for place, target in enumerate(targets))
    return f"id\tsequence\ttarget\n{''.join(rows)}"


@pytest.mark.parametrize(
    ("targets", "task"),
    [
        (["1", "0", "1", "0", "2", "2"], "sequence-class"),
        (["1.0", "0.0", "1.0", "", "0.0"], "sequence-class"),
        ([str(number) for number in range(30)], "sequence-value"),
        (["1", "0.5", "1", "0.5"], "sequence-value"),
        (["1", "2", "3"], "sequence-value"),
        (["x", "y", "x"], "sequence-class"),
        (["1", "2", "x", "1"], "sequence-class"),
        (["x|y", "y"], "multilabel"),
    ],
)
def test_tasks(read: Read, targets: list[str], task: str) -> None:
    found = read({"a.tsv": table(targets)})
    assert found.task.name == task
    assert sum(note.startswith(f"task: {task}, because ") for note in found.notes) == 1


def test_reasons(read: Read) -> None:
    whole = read({"a.tsv": table(["1", "0", "1", "0", "2", "2"])})
    check_message("labelled.task-whole", whole.notes[1])
    assert read({"a.tsv": table(["1", "0", "1"])}, task="sequence-value").task.name == "sequence-value"
    named = read({"a.tsv": table(["1.0", "0", "1", "0"])}, task="sequence-class")
    assert named.classes == ("0", "1")
    assert not any(note.startswith("task") for note in named.notes)
    residues = read({"a.fasta": ">a TARGET=HHH\nMKT\n>b TARGET=CCCC\nMKTA\n"})
    check_message("labelled.task-residues", residues.notes[-1])


def test_short_peptides_with_numbers_of_their_length(read: Read) -> None:
    found = read({"a.csv": "sequence,target\nMKT,1.5\nMKV,0.2\nMKL,0.7\n"})
    assert found.task.name == "sequence-value"


def test_numbers_as_labels_of_residues(read: Read) -> None:
    found = read({"a.csv": "sequence,target\nMKTAY,12345\nMKVAA,99111\n"})
    assert found.task.name == "residue-class"


# ---- letters ----
def test_letters_and_labels_stay_together(read: Read) -> None:
    text = ">a TARGET=HHH.EE\nMK-Ta*\n>b TARGET=CCC\nMJV\n"
    found = read({"a.fasta": text}, gaps="drop")
    assert [example.sequences for example in found.examples] == [("MKTA",), ("MXV",)]
    assert classes(found) == [[*"HH.E"], [*"CCC"]]
    assert [(row.id, row.what) for row in found.rows] == [("a", "altered"), ("b", "altered")]
    with pytest.raises(UnknownResidueError, match="record 'b'"):
        read({"a.fasta": text}, unknown="error")
    skipped = read({"a.fasta": f"{text}>c TARGET=HHC\nMKA\n"}, unknown="skip", gaps="drop")
    assert [example.id for example in skipped.examples] == ["a", "c"]


def test_labels_may_be_given_without_gaps(read: Read) -> None:
    found = read({"a.fasta": ">a TARGET=HHHE\nMK-TA*\n>b TARGET=CCC\nMKV\n"}, gaps="drop")
    assert classes(found) == [[*"HHHE"], [*"CCC"]]


@given(st.lists(st.sampled_from([*"MKTa-.J* "]), min_size=1, max_size=30), st.sampled_from(["keep", "drop"]))
def test_each_residue_keeps_its_label(tmp_path_factory: pytest.TempPathFactory, letters: list[str], gaps: Any) -> None:
    """A value for each letter tells where the letter stood."""
    sequence = "".join(letters).strip()
    stood = [letter for letter in sequence if letter != " "]
    path = tmp_path_factory.mktemp("letters") / "a.fasta"
    numbers = ";".join(f"{place}.5" for place in range(len(stood)))
    path.write_text(f">a TARGET={numbers}\n{sequence}\n>b TARGET=0.1;0.2\nMK\n")
    files = DataFiles(data=(str(path),), task="residue-value", gaps=gaps)
    found = read_labelled(files)
    example = next((place for place, example in enumerate(found.examples) if example.id == "a"), None)
    expected = [(place, letter) for place, letter in enumerate(stood) if not (gaps == "drop" and letter in "-.")]
    while expected and expected[-1][1] == "*":
        expected.pop()
    if example is None:
        assert not expected
        return
    changes = {"J": "X", "*": "X"}
    assert found.examples[example].sequences[0] == "".join(
        changes.get(letter, letter.upper()) for _, letter in expected
    )
    assert found.targets[example].tolist() == [place + 0.5 for place, _ in expected]


# ---- oddities ----
def test_repeats_and_absent_classes_are_told(read: Read) -> None:
    text = (
        ">a TARGET=x SET=train\nMKT\n>b TARGET=y SET=train\nMKT\n>c TARGET=x SET=test\nMKT\n"
        ">d TARGET=z SET=test\nMKV\n>e TARGET=z SET=val\nMKL\n"
    )
    found = read({"a.fasta": text})
    assert found.classes == ("x", "y", "z")
    assert [(row.id, row.what) for row in found.rows] == [("b", "contradiction"), ("c", "in two parts")]
    check_message("labelled.absent-class", found.notes[-2])
    check_message("labelled.repeats", found.notes[-1])


def test_labels_that_nobody_has_are_told(read: Read) -> None:
    table = "id,sequence,u,v,set\na,MK,1,0,train\nb,MV,0,0,train\nc,ML,1,0,test\n"
    assert "v (nobody has it)" in read({"a.csv": table}, target_column="u,v").notes[-1]
    many = "".join(f">{n} TARGET=c{n % 40} SET={'test' if n % 40 else 'train'}\nMK\n" for n in range(80))
    told = next(note for note in read({"a.fasta": many}).notes if "training part lacks" in note)
    assert "and 19 more" in told
    assert len(told) < 600


# ---- errors ----
LABELS = "labels.fasta"
LONG = ">a TARGET=HHHHHHHHH\nMKTAYIAKQR\n>b TARGET=CCCCCCCCCC\nMVTAYIAKQR\n>c TARGET=CCCCCCCCCC\nMLTAYIAKQR\n"
SEQUENCES = ">a\nMKTA\n>b\nMKV\n"
ERRORS: dict[str, tuple[dict[str, str], dict[str, Any], type[ProteaError]]] = {
    "length": ({"a.fasta": LONG}, {}, DataError),
    "length-gaps": ({"a.fasta": LONG.replace("MKTAYIAKQR", "MKT---AYIAKQRA")}, {"gaps": "drop"}, DataError),
    "mask-length": ({"a.fasta": SEQUENCES, LABELS: ">a\nHHHH\n", "mask.fasta": ">a\n111\n"}, {}, DataError),
    "mask-letter": ({"a.fasta": SEQUENCES, LABELS: ">a\nHHHH\n", "mask.fasta": ">a\n1x11\n"}, {}, DataError),
    "mask-task": ({"a.fasta": ">a TARGET=x MASK=11\nMK\n>b TARGET=y\nMV\n"}, {"task": "sequence-class"}, DataError),
    "mask-alone": ({"a.fasta": SEQUENCES, "mask.fasta": ">a\n1\n"}, {}, UsageError),
    "no-sequence": ({"a.fasta": SEQUENCES, LABELS: ">a\nHHHH\n>x\nHH\n"}, {}, DataError),
    "no-mask": ({"a.fasta": SEQUENCES, LABELS: ">a\nHHHH\n", "mask.fasta": ">b\n111\n"}, {}, DataError),
    "one-class": ({"a.fasta": ">a TARGET=x\nMKTA\n>b TARGET=x\nMKV\n"}, {}, DataError),
    "constant": ({"a.fasta": ">a TARGET=0.5\nMKTA\n>b TARGET=0.50\nMKV\n"}, {}, DataError),
    "precision": ({"a.fasta": ">a TARGET=1e300\nMKTA\n>b TARGET=0.5\nMKV\n"}, {}, DataError),
    "precision-spread": ({"a.fasta": ">a TARGET=1e6\nMKTA\n>b TARGET=1000000.01\nMKV\n"}, {}, DataError),
    "constant-labels": ({"a.csv": "id,sequence,u,v\na,MK,1,0\nb,MV,1,0\n"}, {"target_column": "u,v"}, DataError),
    "all-missing": ({"a.fasta": ">a TARGET=NA\nMKTA\n>b TARGET=\nMKV\n"}, {}, DataError),
    "all-masked": ({"a.fasta": ">a TARGET=HH MASK=00\nMK\n>b TARGET=?C MASK=00\nMV\n"}, {}, DataError),
    "infinite": ({"a.fasta": ">a TARGET=inf\nMKTA\n>b TARGET=1.5\nMKV\n"}, {}, DataError),
    "comma": ({"a.fasta": ">a TARGET=1,5\nMKTA\n>b TARGET=1.5\nMKV\n"}, {"task": "sequence-value"}, DataError),
    "comma-found": ({"a.tsv": table([f"{number % 5},5" for number in range(30)])}, {}, DataError),
    "not-a-number": (
        {"a.tsv": table([*(f"{number}.5" for number in range(30)), "high"])},
        {},
        DataError,
    ),
    "names": ({"a.tsv": table([f"n{number}" for number in range(12)])}, {}, DataError),
    "set": ({"a.fasta": ">a TARGET=1.5 SET=tarin\nMKTA\n"}, {}, DataError),
    "set-predict": ({"a.fasta": ">a TARGET=1.5 SET=predict\nMKTA\n"}, {}, DataError),
    "validation-test": ({"a.fasta": ">a TARGET=1.5 SET=test VALIDATION=True\nMKTA\n"}, {}, DataError),
    "validation": ({"a.fasta": ">a TARGET=1.5 VALIDATION=maybe\nMKTA\n"}, {}, DataError),
    "no-target": ({"a.fasta": ">sp|P1|X Some protein OS=Homo sapiens\nMKTA\n"}, {}, DataError),
    "no-records": ({"a.csv": "id,sequence,target\n"}, {}, DataError),
    "same-id": ({"a.csv": "id,sequence,target\na,MK,1\na,MV,2\n"}, {}, DataError),
    "same-id-labels": ({"a.fasta": SEQUENCES, LABELS: ">a\nHHHH\n>a\nHHHH\n"}, {}, DataError),
    "flag": ({"a.csv": "id,sequence,u,v\na,MK,1,0\nb,MV,2,0\n"}, {"target_column": "u,v"}, DataError),
    "no-column": ({"a.csv": "id,sequence,melting\na,MK,1\n"}, {}, UsageError),
    "wrong-column": ({"a.csv": "id,sequence,melting\na,MK,1\n"}, {"target_column": "melt"}, UsageError),
    "column-of-fasta": ({"a.fasta": ">a TARGET=1\nMK\n"}, {"target_column": "melt"}, UsageError),
    "column-of-labels": ({"a.fasta": SEQUENCES, LABELS: ">a\nHHHH\n"}, {"set_column": "s"}, UsageError),
    "task": ({"a.fasta": ">a TARGET=1\nMK\n"}, {"task": "regression"}, UsageError),
    "task-pairs": ({"a.csv": "seq1,seq2,y\nMK,MV,1\n"}, {"task": "sequence-value"}, UsageError),
    "task-single": ({"a.csv": "seq,y\nMK,1\n"}, {"task": "pair-value"}, UsageError),
    "task-columns": ({"a.csv": "seq,u,v\nMK,1,0\n"}, {"task": "sequence-class", "target_column": "u,v"}, UsageError),
    "mixed-pairs": ({"a.csv": "seq1,seq2,y\nMK,MV,1\n", "b.csv": "id,seq,y\nb,MK,1\n"}, {}, DataError),
    "mixed-columns": (
        {"a.csv": "seq,u,v\nMK,1,0\n", "b.fasta": ">b TARGET=x\nMV\n"},
        {"target_column": "u,v"},
        DataError,
    ),
    "interactor": ({"a.fasta": ">a TARGET=1 INTERACTOR=b\nMK\n"}, {}, DataError),
    "no-interactor": ({"a.fasta": ">a TARGET=1 INTERACTOR=a\nMK\n>b TARGET=1\nMV\n"}, {}, DataError),
    "pair-twice": (
        {"a.fasta": ">a TARGET=1 INTERACTOR=b\nMK\n>b TARGET=0 INTERACTOR=a\nMV\n"},
        {},
        DataError,
    ),
    "pair-sequence": (
        {"a.fasta": ">a TARGET=1 INTERACTOR=a\nMK\n>a TARGET=0 INTERACTOR=a\nMV\n"},
        {},
        DataError,
    ),
    "pair-labels": ({"a.csv": "seq1,seq2,y\nMK,MV,a|b\nMK,MT,b\n"}, {}, DataError),
    "several-labels": (
        {"a.tsv": 'id\tseq\ty\na\tMKT\t["u", "v"]\nb\tMV\t["u"]\n'},
        {"task": "sequence-class"},
        DataError,
    ),
    "json": ({"a.tsv": "seq\ty\nMK\t[0.1 0.2 0.3]\nMV\t[0.1]\n"}, {}, DataError),
    "skipped": ({"a.fasta": ">a TARGET=x\nJJ\n>b TARGET=y\nJ\n"}, {"unknown": "skip"}, DataError),
    "empty": ({"a.fasta": ""}, {}, FastaError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(read: Read, name: str, tmp_path: Path) -> None:
    files, options, kind = ERRORS[name]
    with pytest.raises(kind) as caught:
        read(files, **options)
    check_message(f"labelled.error-{name}", caught.value, folder=tmp_path)


def test_no_files() -> None:
    with pytest.raises(UsageError, match="no data"):
        read_labelled(DataFiles(data=()))


# ---- FLIP's files ----
SCL = [f"scl/deeploc2_fold{fold}.csv.gz" for fold in range(1, 6)]
NAMES = {"labels": "sampled.fasta.gz", "mask": "mask.fasta.gz"}
CASES: list[tuple[list[str], list[str], str, dict[str, int]]] = [
    (["gb1/two_vs_rest.fasta.gz"], [], "sequence-value", {"train": 381, "validation": 43, "test": 8309}),
    (["gb1/sampled.fasta.gz"], [], "sequence-value", {"train": 6289, "validation": 699, "test": 1745}),
    (["meltome/clustered_task_2021.csv.gz"], [], "sequence-value", {"train": 2940, "test": 1504}),
    (["scl/deeploc_test_set.fasta.gz"], [], "sequence-class", {"test": 2768}),
    (["scl/deeploc_our_val_set.fasta.gz"], [], "sequence-class", {"": 1678}),
    (["scl/setHARD.fasta.gz"], [], "sequence-class", {"test": 490}),
    (SCL, [], "multilabel", {"": 28303}),
    (
        ["conservation/sequences.fasta.gz"],
        ["labels"],
        "residue-class",
        {"train": 9392, "validation": 555, "test": 519},
    ),
    (
        ["secondary_structure/sequences.fasta.gz"],
        ["labels", "mask"],
        "residue-class",
        {"train": 9712, "validation": 1080, "test": 648},
    ),
    (
        ["secondary_structure_2022-12/sequences.fasta.gz"],
        ["labels", "mask"],
        "residue-class",
        {"train": 9712, "validation": 1080, "test": 364},
    ),
]


@needs_flip
@pytest.mark.parametrize(("data", "others", "task", "counts"), CASES, ids=lambda value: str(value)[:40])
def test_flip(data: list[str], others: list[str], task: str, counts: dict[str, int]) -> None:
    paths = {role: FLIP / Path(data[0]).parent / NAMES[role] for role in others}
    found = read_labelled(DataFiles(data=tuple(str(FLIP / name) for name in data), **paths))
    assert found.task.name == task
    assert Counter(parts(found)) == counts
    if task.startswith("residue"):
        assert [len(target) for target in found.targets] == [len(example.sequences[0]) for example in found.examples]
        assert 0 < np.mean(np.concatenate(found.targets) == MISSING) < 0.1 or not others[1:]
