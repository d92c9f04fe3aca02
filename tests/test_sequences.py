"""Sequences in every form that Python users have them in, with the real libraries where they are installed."""

from __future__ import annotations

import warnings
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from biotite.sequence import ProteinSequence
from biotite.sequence.io.fasta import FastaFile

import protea
from conftest import LoadModel
from messages import check_message
from protea.data.masking import Masking
from protea.errors import ProteaError, ProteaWarning, UnknownResidueError, UsageError
from protea.fasta import read_fasta

SEQUENCES = ["MKTAYIAKQR", "G", "ACDEFGHIKLMNPQRSTVWY"]
NAMES = ["KRAS", "GFP", "p/3"]
NAMED = dict(zip(NAMES, SEQUENCES, strict=True))
TABLE = pd.DataFrame({"id": NAMES, "seq": SEQUENCES})


class Row(NamedTuple):
    """A record as pandas, sqlite3 and many parsers give it."""

    id: str
    seq: Any


@dataclass
class DataRow:
    """A record of a program."""

    name: str
    sequence: str


@pytest.fixture
def model(load_small: LoadModel) -> protea.LanguageModel:
    return load_small("esm2")


LISTS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(SEQUENCES),
    "generator": lambda: (text for text in SEQUENCES),
    "deque": lambda: deque(SEQUENCES),
    "values": NAMED.values,
    "numpy strings": lambda: np.array(SEQUENCES),
    "numpy objects": lambda: np.array(SEQUENCES, dtype=object),
    "values of a mapping": NAMED.values,
    "values in order": lambda: OrderedDict(NAMED).values(),
    "keys as a list": lambda: list(dict.fromkeys(SEQUENCES)),
    "numpy StringDType": lambda: np.array(SEQUENCES, dtype=np.dtypes.StringDType()),
    "pandas column": lambda: TABLE["seq"],
    "pandas objects": lambda: pd.Series(SEQUENCES, index=[5, 5, 6], dtype=object),
    "pandas categories": lambda: TABLE["seq"].astype("category"),
    "pandas Arrow": lambda: TABLE["seq"].astype("string[pyarrow]"),
    "pandas rows": lambda: list(TABLE.itertuples()),
    "polars column": lambda: pl.DataFrame({"seq": SEQUENCES})["seq"],
    "polars categories": lambda: pl.Series(SEQUENCES, dtype=pl.Categorical),
    "biotite": lambda: [ProteinSequence(text) for text in SEQUENCES],
    "records": lambda: [Row(name, text) for name, text in NAMED.items()],
    "dataclasses": lambda: [DataRow(name, text) for name, text in NAMED.items()],
    "rows of an array": lambda: list(np.rec.array(list(NAMED.items()), names="id,seq")),
    "pandas column with names": lambda: pd.Series(SEQUENCES, index=["id", "name", "other"]),
}


@pytest.mark.parametrize("form", LISTS)
def test_every_list_gives_what_a_list_gives(model: protea.LanguageModel, form: str) -> None:
    for ours, expected in zip(model.embed(LISTS[form]()), model.embed(SEQUENCES), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert model.perplexity(LISTS[form]()) == model.perplexity(SEQUENCES)


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"layers": [0, -1]}, {"pool": ["max", "std"], "layers": 1}])
def test_a_mapping_gives_the_same_bits_by_name(model: protea.LanguageModel, options: dict[str, Any]) -> None:
    pairs = [
        (model.embed(NAMED, **options), model.embed(SEQUENCES, **options)),
        (model.logits(NAMED), model.logits(SEQUENCES)),
        (model.pseudo_perplexity(NAMED), model.pseudo_perplexity(SEQUENCES)),
    ]
    for by_name, in_order in pairs:
        assert list(by_name) == NAMES
        for ours, expected in zip(by_name.values(), in_order, strict=True):
            np.testing.assert_array_equal(ours, expected)
    assert model.perplexity(NAMED) == model.perplexity(SEQUENCES)
    assert model.embed({}, **options) == {}


def test_one_sequence_gives_one_result(model: protea.LanguageModel) -> None:
    for given in (SEQUENCES[0], np.str_(SEQUENCES[0]), ProteinSequence(SEQUENCES[0]), Row("a", SEQUENCES[0])):
        np.testing.assert_array_equal(model.embed(given), model.embed(SEQUENCES[:1])[0])
        np.testing.assert_array_equal(model.embed(given, pool="mean"), model.embed(SEQUENCES[:1], pool="mean")[0])
        np.testing.assert_array_equal(model.logits(given), model.logits(SEQUENCES[:1])[0])
        assert model.pseudo_perplexity(given) == model.pseudo_perplexity(SEQUENCES[:1])[0]
        np.testing.assert_array_equal(model.contacts(given), model.contacts(SEQUENCES[0]))
        np.testing.assert_array_equal(model.attention(given, layers=[1]), model.attention(SEQUENCES[0], layers=[1]))
        np.testing.assert_array_equal(model.score(given, ["M1A"]), model.score(SEQUENCES[0], ["M1A"]))
        np.testing.assert_array_equal(model.scan(given), model.scan(SEQUENCES[0]))


def test_records_of_files(model: protea.LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in NAMED.items()))
    expected = model.embed(SEQUENCES)
    for ours, theirs in zip(model.embed(read_fasta([path])), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    by_name = model.embed(FastaFile.read(path))
    assert list(by_name) == NAMES
    for ours, theirs in zip(by_name.values(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_biopython(model: protea.LanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("Bio", reason="needs Biopython")
    from Bio import SeqIO
    from Bio.Seq import MutableSeq, Seq
    from Bio.SeqRecord import SeqRecord

    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in NAMED.items()))
    expected = model.embed(SEQUENCES)
    with path.open() as file:
        lists = [model.embed(SeqIO.parse(file, "fasta")), model.embed([Seq(text) for text in SEQUENCES])]
    with path.open() as file:
        by_name = [model.embed(SeqIO.to_dict(SeqIO.parse(file, "fasta")))]
    index = SeqIO.index(str(path), "fasta")
    by_name.append(model.embed(index))
    index.close()
    assert all(list(result) == NAMES for result in by_name)
    for result in (*lists, *(list(result.values()) for result in by_name)):
        for ours, theirs in zip(result, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    record = SeqRecord(Seq(SEQUENCES[0]), id="sp|P01116")
    for given in (record, record.seq, MutableSeq(SEQUENCES[0])):
        np.testing.assert_array_equal(model.embed(given), expected[0])
        np.testing.assert_array_equal(model.contacts(given), model.contacts(SEQUENCES[0]))
    with pytest.raises(UnknownResidueError, match=r"^sequence 1 \('sp\|x'\): .*'J' at position 2"):
        model.embed([record, SeqRecord(Seq("MJ"), id="sp|x")])
    with pytest.raises(UsageError, match=r"^the sequence \('q'\): .*NoneType"):
        model.embed(SeqRecord(None, id="q"))
    with pytest.raises(UsageError, match=r"^sequence 0: .*undefined"):
        model.embed([Seq(None, length=5)])


WRONG_LISTS: dict[str, tuple[Any, str]] = {
    "set": ({"MKT", "GG"}, "a list"),
    "frozenset": (frozenset(("MKT",)), "a list"),
    "keys": ({"KRAS": "MKT"}.keys(), r"the mapping itself, its \.values"),
    "keys in order": (OrderedDict(KRAS="MKT").keys(), r"list\(mapping"),
    "keys of a column": (ChainMap({"KRAS": "MKT"}).keys(), "are names"),
    "bytes": (b"MKT", "decode"),
    "bytearray": (bytearray(b"MKT"), "decode"),
    "None": (None, "a list"),
    "int": (5, "int"),
    "NaN": (float("nan"), "nan"),
    "path": (Path("in.fasta"), "Path"),
    "array without axes": (np.array("MKT"), "ndarray"),
    "pandas table": (TABLE, "column"),
    "polars table": (pl.DataFrame({"seq": SEQUENCES}), "column"),
    "polars plan": (pl.LazyFrame({"seq": SEQUENCES}), "collect"),
    "Arrow table": (pa.table({"seq": SEQUENCES}), "to_pylist"),
    "NumPy table": (np.rec.array([("a", "MKT"), ("b", "GGG")], names="id,seq"), "column"),
    "row or column": (pd.Series(["MKT", "GGG"], index=["seq", "other"]), "a label 'seq'"),
    "row": (pd.DataFrame({"id": ["KRAS"], "sequence": ["MKT"]}).iloc[0], "a label 'sequence'.*row.'seq'"),
    "letters": (list("MKT"), "'MKT'"),
    "letters of an array": (np.array(list("MKTAYIA")), "7 single letters.*'MKTAY...'"),
}


@pytest.mark.parametrize("form", WRONG_LISTS)
def test_what_is_no_list_of_sequences(model: protea.LanguageModel, form: str) -> None:
    value, part = WRONG_LISTS[form]
    for method in (model.embed, model.logits, model.perplexity, model.pseudo_perplexity):
        with pytest.raises(UsageError, match=rf"^sequences: got (?s:.*){part}"):
            method(value)
    if form in {"set", "keys", "letters", "bytes", "None", "row"}:
        with pytest.raises(UsageError) as caught:
            model.embed(value)
        if form != "set":  # its order varies
            check_message(f"sequences.list_{form}", caught.value)


WRONG_ITEMS: dict[str, tuple[Any, str]] = {
    "bytes": (b"MKT", "decode"),
    "numpy bytes": (np.bytes_(b"MKT"), "decode"),
    "None": (None, "missing"),
    "NaN": (float("nan"), "nan.*missing"),
    "numpy NaN": (np.float32("nan"), "missing"),
    "NA": (pd.NA, "missing"),
    "NaT": (pd.NaT, "missing"),
    "number": (5, r"5 \(int\)"),
    "pair": (("p1", "MKT"), r"dict\(pairs\)"),
    "list": (["MKT"], "one string"),
    "array": (np.array(["MKT"]), "one string"),
    "dict": ({"id": "a", "seq": "MKT"}, "one string"),
    "row of a table": (TABLE.iloc[0], "one string"),
    "huge number": (10**5000, "int too long"),
    "Arrow": (pa.scalar("MKT"), "to_pylist"),
    "record": (Row("a", None), "'a'.*NoneType"),
}


@pytest.mark.parametrize("form", WRONG_ITEMS)
def test_what_is_no_sequence(model: protea.LanguageModel, form: str) -> None:
    item, part = WRONG_ITEMS[form]
    for method in (model.embed, model.logits, model.perplexity, model.pseudo_perplexity):
        with pytest.raises(UsageError, match=f"^sequence 1.*{part}"):
            method(["MKT", item])
        with pytest.raises(UsageError, match=f"^sequence 'KRAS'.*{part}"):
            method({"GFP": "MKT", "KRAS": item})
    if form in {"pair", "None", "bytes"}:
        with pytest.raises(UsageError) as caught:
            model.embed(["MKT", item])
        check_message(f"sequences.item_{form}", caught.value)


def test_columns_with_missing_values(model: protea.LanguageModel) -> None:
    columns = [
        pd.Series(["MKT", np.nan]),
        pd.Series(["MKT", None], dtype="string"),
        pd.Series(["MKT", None], dtype="string[pyarrow]"),
        pd.Series(["MKT", None], dtype="category"),
        pl.Series(["MKT", None]),
    ]
    for column in columns:
        with pytest.raises(UsageError, match=r"^sequence 1: .*missing.*dropna.*drop_nulls"):
            model.embed(column)


@pytest.mark.parametrize("method", ["embed", "logits", "perplexity", "pseudo_perplexity"])
def test_letter_errors_name_the_sequence(model: protea.LanguageModel, method: str) -> None:
    call = getattr(model, method)
    for given, place in (
        (["MK", "MJ"], "sequence 1"),
        ({"GFP": "MK", "KRAS": "MJ"}, "sequence 'KRAS'"),
        ([Row("a", "MK"), Row("b", "MJ")], r"sequence 1 \('b'\)"),
        ("MJ", "the sequence"),
        (Row("b", "MJ"), r"the sequence \('b'\)"),
    ):
        with pytest.raises(UnknownResidueError, match=rf"^{place}: residue 'J' at position 2"):
            call(given)
    with pytest.raises(UsageError, match=r"^sequence 'KRAS' is empty"):
        call({"KRAS": ""})
    with pytest.raises(UnknownResidueError, match=r"^sequence '\\ud800': residue '\\ud800' at position 1"):
        call({"\ud800": "\ud800"})


def test_pseudo_perplexity_names_the_sequence(model: protea.LanguageModel) -> None:
    with pytest.raises(UnknownResidueError) as letter:
        model.pseudo_perplexity(["MKT", "MJT"])
    check_message("sequences.letter", letter.value)
    with pytest.raises(UnknownResidueError, match=r"^sequence 'KRAS': <mask> at position 3"):
        model.pseudo_perplexity({"KRAS": "MK<mask>"})


def test_methods_of_one_sequence(model: protea.LanguageModel) -> None:
    calls: list[Callable[[Any], Any]] = [
        model.contacts,
        model.scan,
        lambda sequence: model.score(sequence, ["M1A"]),
        lambda sequence: model.attention(sequence, layers=[1]),
    ]
    for call in calls:
        for value in (["MKT", "MKK"], {"KRAS": "MKT"}, ("p1", "MKT"), {"MKT"}, None, 5, b"MKT", TABLE, TABLE["seq"]):
            with pytest.raises(UsageError, match=r"^sequence: got (?s:.*)one protein"):
                call(value)
        with pytest.raises(UnknownResidueError, match=r"^the sequence \('b'\): residue 'J' at position 2"):
            call(Row("b", "MJ"))
    with pytest.raises(UsageError) as caught:
        model.contacts(["MKT", "MKK"])
    check_message("sequences.one", caught.value)


def test_nothing_is_computed_before_all_is_read(model: protea.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.module), "forward", lambda *_, **__: pytest.fail("the model computes"))
    for method in (model.embed, model.logits, model.perplexity, model.pseudo_perplexity):
        with pytest.raises(ProteaError, match=r"^sequence 5000"):
            method([*(["MKT"] * 5000), "MJ"])


def test_variants_and_structures_are_lists(model: protea.LanguageModel) -> None:
    np.testing.assert_array_equal(model.score("MKT", pd.Series(["M1A", "K2A"])), model.score("MKT", ["M1A", "K2A"]))
    for variants in ("M1A", {"M1A"}, {"M1A": 0.5}, None, 5, b"M1A", pd.DataFrame({"mutant": ["M1A"]})):
        with pytest.raises(UsageError, match=r"^variants: got "):
            model.score("MKT", variants)
    for call in (model.fit_contacts, model.evaluate_contacts):
        for structures in ("a.pdb", Path("a.pdb"), None, {"a.pdb"}):
            with pytest.raises(UsageError, match=r"^structures: got .*"):
                call(structures)
        with pytest.raises(UsageError, match=r"^structures\[1\]=5: "):
            call(["a.pdb", 5])


@pytest.mark.parametrize(("text", "place"), [("MKT:GGG", "4"), ("MK/TG", "3"), ("MK<mask>:GG", "4")])
def test_joined_chains_are_named(model: protea.LanguageModel, text: str, place: str) -> None:
    for call in (model.embed, model.contacts, model.logits):
        with pytest.raises(UnknownResidueError, match=rf"^the sequence: .*two chains: .* at {place}; write each chain"):
            call(text)
    with pytest.raises(UnknownResidueError) as caught:
        model.embed(["MKT", text])
    if place == "3":
        check_message("sequences.chains", caught.value)
    with pytest.raises(UnknownResidueError, match=r"^the sequence: residue 'm'"):
        model.embed("mkt:ggg")


DNA = "ATGGCCAAGCTTACGATAGC"


def test_what_is_hardly_meant_is_told_once_a_call(model: protea.LanguageModel) -> None:
    """The warning is about the line that called, and a scan, which scores, gives it once too."""
    calls: list[Callable[[Any], Any]] = [
        *(model.embed, model.logits, model.pseudo_perplexity, model.contacts, model.scan),
        lambda text: model.perplexity(text, masking=Masking(select=0.9, at_least_one=True)),
        lambda text: model.score(text, ["A1M"]),
        lambda text: model.attention(text, layers=1),
    ]
    for call in calls:
        with pytest.warns(ProteaWarning) as told:
            call(DNA)
        assert [str(one.message) for one in told] == [
            "DNA or RNA, read as amino acids: the sequence; translate to protein first"
        ]
        assert told[0].filename == __file__
    given = {"a": "MKT", "b": f"{DNA}-", "c": DNA, "d": "M.K"}
    with pytest.warns(ProteaWarning) as told:
        by_name = model.embed(given)
    assert list(by_name) == list(given)
    nucleotides, gapped = (str(one.message) for one in told)
    check_message("sequences.nucleotides", nucleotides)
    check_message("sequences.gapped", gapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.embed(SEQUENCES)


def test_sums_over_other_lengths_are_told(model: protea.LanguageModel) -> None:
    with pytest.warns(ProteaWarning, match=r"^1 variant of another length .*sums.*pseudo-likelihood") as told:
        model.score("MKTAY", ["K2del", "M1A"], method="pseudo-likelihood-sum")
    assert (len(told), told[0].filename) == (1, __file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score("MKTAY", ["K2del", "M1A"], method="pseudo-likelihood")
        model.score("MKTAY", ["M1A"], method="pseudo-likelihood-sum")
