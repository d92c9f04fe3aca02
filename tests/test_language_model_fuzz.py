"""Generated calls of the Python interface end in a result in the form of the input, or in a ``ProteaError``.

The generator knows of every item, container and argument whether it is right, and so which of the two is due.
``python -m tests.test_language_model_fuzz 100000 SEED`` runs as many calls, and the tests do.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from biotite.sequence import ProteinSequence

import protea
from protea.checkpoints import hf
from protea.data.masking import Masking
from protea.errors import ProteaError, ProteaWarning
from protea.models.esm2 import ESM2Config
from protea.models.registry import build

try:
    from Bio.Seq import Seq
    from Bio.SeqRecord import SeqRecord
except ImportError:  # without Biopython another library and a plain record take its place
    Seq = ProteinSequence
    SeqRecord = SimpleNamespace

TINY = ESM2Config(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32)
LIMIT = 1022  # residues that a model of this family was trained on
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
CANONICAL = "ACDEFGHIKLMNPQRSTVWY"
NUCLEOTIDES = "ACGT" * 5 + "RYSWKMN"  # some are IUPAC's ambiguous letters
DNA_LENGTH = 60  # no other sequence is so long, or it is over the limit


class Text(str):
    """A string of another class."""

    def __str__(self) -> str:
        return "not the residues"


class Item(NamedTuple):
    """A sequence or what is none; ``letters`` are its residues, or ``None`` where an error is due."""

    value: Any
    letters: str | None
    plain: bool = False  # a string


def wrong_texts(letters: str) -> list[Any]:
    texts = [f"{letters}J", f"{letters.lower()}m", f" {letters}", f"{letters}\n", f">p1\n{letters}", "J" * 5000]
    texts += [
        f"{letters}:{letters}",
        f"{letters}/{letters}",
        f"{letters}:",
        "",
        "é",
        "日本",
        "\ud800",
        "\0",
        "M\0K",
        "5",
        "<mask",
        "<MASK>",
        "*",
    ]
    return [*texts, Text(""), np.str_("m")]


def wrong_values(letters: str) -> list[Any]:
    numbers = [5, 0, -1.5, 10**30, True, 1j, np.int64(3), torch.tensor(3), np.array(5)]
    data = [letters.encode(), bytearray(b"MK"), np.bytes_(b"MK"), memoryview(b"MK")]
    return [*numbers, *data, None, math.nan, np.float32("nan"), pd.NA, pd.NaT, object(), str, lambda: letters]


def wrong_lists(letters: str) -> list[Any]:
    lists = [("p1", letters), (letters,), (), [letters], [], {"id": "a", "seq": letters}, {letters}, range(3)]
    arrays = [np.array([letters]), np.array(letters), pd.Series([letters]), pl.Series([letters]), torch.zeros(3)]
    arrays += [pd.Series([letters, "a"], index=["seq", "id"]), np.rec.array([(letters,)], names="seq")]
    return [*lists, *arrays, pd.DataFrame({"seq": [letters]}), (text for text in [letters]), Path(letters)]


def wrong_records(letters: str) -> list[Any]:
    texts = [None, b"MK", "", letters.lower() + "m", [letters], 5, math.nan, pd.Series([letters])]
    return [*(SimpleNamespace(seq=text, id="a") for text in texts), SimpleNamespace(sequence=5)]


def item(rng: random.Random, right: float, *, long: bool) -> Item:
    """A sequence, rarely one over the limit if ``long``; with a probability of ``1 - right`` something else."""
    canonical = rng.random() < 0.5
    letters = "".join(rng.choices(CANONICAL if canonical else RESIDUES, k=rng.choice((1, 1, 2, 3, 5, 9, 14))))
    if rng.random() < 0.05:
        letters, canonical = "ACGT" + "".join(rng.choices(NUCLEOTIDES, k=DNA_LENGTH - 4)), True
    if rng.random() < right:
        if long and rng.random() < 0.002:
            letters *= 1100 // len(letters)
        kind = rng.randrange(10)
        if kind == 0:
            return Item(SimpleNamespace(seq=letters, id=rng.choice(("p1", "", None, 7, "é\ud800"))), letters)
        if kind == 1 and canonical:
            return Item(Seq(letters), letters)
        if kind == 2 and canonical:
            return Item(SeqRecord(seq=Seq(letters), id="sp|P1"), letters)
        return Item(rng.choice((str, str, str, np.str_, Text))(letters), letters, plain=True)
    wrong = rng.choice(rng.choice((wrong_texts, wrong_texts, wrong_values, wrong_lists, wrong_records))(letters))
    return Item(wrong, None, plain=isinstance(wrong, str))


class Call(NamedTuple):
    """The input of a call; ``letters`` are those of each sequence or ``None``, and ``form`` is the form of results."""

    value: Any
    letters: list[str | None]
    form: str  # one, many, named, none


def column(make: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """What a library makes of the values, or the list where it refuses to hold them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy and pandas warn when they guess
        try:
            made = make(values)
            kept = len(made) == len(values) and all(
                type(a) is type(b) and a == b for a, b in zip(made, values, strict=True)
            )
        except BaseException as error:
            # polars panics at some objects, and its panics are no Exceptions
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return values
    return made if kept else values


CONTAINERS: list[Callable[[list[Any]], Any]] = [
    *(
        list,
        tuple,
        iter,
        deque,
        lambda values: (value for value in values),
        lambda values: dict(enumerate(values)).values(),
    ),
    *(lambda values: column(np.array, values), lambda values: column(lambda v: np.array(v, dtype=object), values)),
    lambda values: column(lambda v: pd.Series(v, dtype=object), values),
    lambda values: column(lambda v: pd.Series(v, dtype="string"), values),
    lambda values: column(lambda v: pd.Series(v, ["id", "name", "a", "b", "c"][: len(v)], dtype=object), values),
    lambda values: column(lambda v: pd.Series(v, dtype="category"), values),
    lambda values: column(pl.Series, values),
]
NAMES = ["KRAS", "", "p/3", 5, None, ("a", 1), "é\ud800", "x" * 500, 1.5, frozenset("a"), b"b", "seq", "id", True]


def given(rng: random.Random, *, long: bool) -> Call:
    """One sequence, a list, a mapping, or something else."""
    right = rng.choice((1.0, 1.0, 0.9, 0.5))
    kind = rng.random()
    if kind < 0.15:
        only = item(rng, right, long=long)
        while isinstance(only.value, Iterable | pl.LazyFrame) and not (only.letters or only.plain):
            only = item(rng, right, long=long)  # it could be a list
        return Call(only.value, [only.letters], "one")
    items = [item(rng, right, long=long) for _ in range(rng.choice((0, 1, 1, 2, 3, 5)))]
    letters = [entry.letters for entry in items]
    if kind < 0.35:
        names = rng.sample(NAMES, len(items))
        return Call(dict(zip(names, (entry.value for entry in items), strict=True)), letters, "named")
    values = [entry.value for entry in items]
    if kind < 0.9:
        pieces = len(items) > 1 and all(entry.plain and len(entry.value) == 1 for entry in items)
        return Call(rng.choice(CONTAINERS)(values), letters, "none" if pieces else "many")
    return Call(rng.choice(wrong_containers([entry.value for entry in items if entry.plain])), [], "none")


def wrong_containers(strings: list[str]) -> list[Any]:
    sets = [set(strings), frozenset(strings), {"MKT"}]
    tables = [
        pd.DataFrame({"seq": strings}, dtype=object),
        pl.DataFrame({"seq": ["MK"]}),
        pl.LazyFrame({"seq": ["MK"]}),
    ]
    nested = [
        [strings, 5],
        [[strings]],
        np.array([["MK", "MT"]]),
        [("p1", "MKT")],
        zip("ab", ["MK", "MT"], strict=True),
    ]
    tables += [pd.Series(["MK", "GG"], ["seq", "a"]), pd.Series(["KRAS", "MK"], ["id", "sequence"])]
    tables.append(np.rec.array([("a", "MK"), ("b", "GG")], names="id,seq"))
    return [*sets, *tables, *nested, list("MKT"), b"MKT", range(3), np.arange(2), np.array(5), str, 3.5, Ellipsis, None]


GOOD: dict[str, list[Any]] = {
    "layers": [None, 0, 1, -1, [0, 2], (1,), np.int64(2), np.arange(3), range(2), pd.Series([0, 1])],
    "pool": [None, "mean", "bos", np.str_("max"), ["mean", "max"], ("std",), np.array(["bos", "mean"])],
    "long": ["full"],
    "token_budget": [None, 1, 7, np.int32(50), 10**30],
    "masking": ["standard", "bionemo1", Masking(select=0.9, at_least_one=True)],
    "seed": [0, -1, 2**70, np.int64(7)],
    "method": ["masked-marginals", "wildtype-marginals", "pseudo-likelihood"],
}
WRONG: dict[str, list[Any]] = {
    "layers": [6, 1.5, True, [1.5], [True], "1", ["1"], {1}, {1: 2}, [], [0, 0], [None], np.ones((2, 2)), 10**30, b"1"],
    "pool": [
        "median",
        "",
        3,
        ["mean", 3],
        [],
        ["mean", "mean"],
        {"mean"},
        b"mean",
        True,
        [["mean"]],
        Ellipsis,
        "mean,max",
    ],
    "long": ["cut", None, 3, [], ["full"], True, np.array(["full", "error"])],
    "token_budget": [0, -1, 1.5, "7", True, [7], math.nan, math.inf, np.array(7)],
    "masking": [None, "none", 3, Masking, {"select": 0.1}, [], np.array(["standard", "a"])],
    "seed": [None, "1", 1.5, True, [1], math.nan],
    "method": [None, "best", 3, [], {}, True],
}
METHODS = {
    "embed": ("layers", "pool", "long", "token_budget"),
    "logits": ("long", "token_budget"),
    "perplexity": ("masking", "seed", "long", "token_budget"),
    "pseudo_perplexity": ("long", "token_budget"),
}
LONG = ("embed", "logits", "perplexity")  # methods with one pass a sequence
OF_ONE = ("contacts", "attention", "scan", "score")


def check_call(model: protea.LanguageModel, rng: random.Random) -> str:
    """Make one call and compare its outcome with what is due."""
    method = rng.choice((*METHODS, *METHODS, *OF_ONE))
    call = given(rng, long=method in LONG)
    right = call.form != "none" and None not in call.letters
    arguments: dict[str, Any] = {}
    for name in METHODS.get(method, ()):
        if rng.random() < 0.3:
            wrong = rng.random() < 0.15
            right &= not wrong
            arguments[name] = rng.choice((WRONG if wrong else GOOD)[name])
    if method in OF_ONE:
        right &= call.form == "one"
        arguments = of_one(rng, method, call, right)
    shown = f"{method}({call.value!r:.300}, {arguments!r:.200})"
    error, result = None, None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ProteaWarning)
        try:
            result = getattr(model, method)(call.value, **arguments)
        except ProteaError as caught:
            error = caught
    if error is None:
        assert right, f"{shown} gave {result!r:.300}"
        check_doubts([letters or "" for letters in call.letters], [str(one.message) for one in told], shown)
        check_form(model, method, call, arguments, result)
        return "result"
    assert not right or (method == "perplexity" and "no residue was masked" in str(error)), f"{shown}: {error}"
    assert str(error).isprintable(), repr(str(error))
    return type(error).__name__


def check_doubts(sequences: list[str], told: list[str], shown: str) -> None:
    """One warning tells of all DNA, and one of all gaps."""
    dna = any(len(letters) == DNA_LENGTH for letters in sequences)
    gapped = any("-" in letters or "." in letters for letters in sequences)
    long = any(len(letters) > LIMIT for letters in sequences)  # such a sequence of A, C and G would look like DNA too
    for kind, due in (("DNA or RNA", dna), ("gaps", gapped)):
        number = sum(text.startswith(kind) for text in told)
        assert number == due or (number == 1 and long), f"{shown} told {told}"


def of_one(rng: random.Random, method: str, call: Call, right: bool) -> dict[str, Any]:
    """The arguments of a method of one sequence; all are right, since variants depend on the sequence."""
    if method == "attention":
        return {"layers": rng.choice((1, [1, -1], np.int64(2)))}
    if method != "score":
        return {}
    letters = (call.letters[0] or "M") if right else "M"
    fits = letters[0].isalpha()
    return {"variants": [f"{letters[0]}1A"] if fits else [], "method": rng.choice(GOOD["method"])}


def check_form(model: protea.LanguageModel, method: str, call: Call, arguments: Mapping[str, Any], result: Any) -> None:
    """Results have the form of the input and the shapes of the sequences, and are finite."""
    if method == "perplexity":
        assert result > 0
        return
    if method in OF_ONE:
        assert np.isfinite(result).all() or method == "scan"
        return
    if call.form == "named":
        assert list(result) == list(call.value)
        results = list(result.values())
    else:
        results = [result] if call.form == "one" else list(result)
    assert len(results) == len(call.letters)
    for letters, array in zip(call.letters, results, strict=True):
        assert letters is not None
        assert np.isfinite(array).all()
        residues = len(letters) if arguments.get("long") == "full" else min(len(letters), LIMIT)
        shape: tuple[int, ...] = (residues, len(model.alphabet)) if method == "logits" else ()
        if method == "embed":
            layers, pool = arguments.get("layers"), arguments.get("pool")
            axes = () if layers is None or np.ndim(layers) == 0 else (len(layers),)
            rows = (residues,) if pool is None else ()
            pools = () if pool is None or np.ndim(pool) == 0 else (len(pool),)
            shape = (*pools, *axes, *rows, 16)
        assert np.shape(array) == shape, f"{np.shape(array)}, not {shape}"


def load_tiny(folder: Path) -> protea.LanguageModel:
    hf.write_random(folder / "tiny", build(TINY), seed=1, dtype=torch.float32)
    return protea.load(folder / "tiny", device="cpu", trainable=True)  # packed weights are slow for ever new shapes


def run_calls(model: protea.LanguageModel, seed: int, count: int) -> Counter[str]:
    """Make calls, each from a seed of its own, which is shown if its outcome is not what is due."""
    outcomes: Counter[str] = Counter()
    for number in range(count):
        try:
            outcomes[check_call(model, random.Random(f"{seed}/{number}"))] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}/{number}: {type(error).__name__}: {error}") from error
    return outcomes


def check_outcomes(outcomes: Counter[str], count: int) -> None:
    """Every kind of outcome is common, so that no test passes because everything is an error."""
    assert outcomes["result"] > count / 5
    assert outcomes["UsageError"] > count / 5
    assert outcomes["UnknownResidueError"] > count / 100


@pytest.mark.usefixtures("one_thread")
def test_some_calls(tmp_path: Path) -> None:
    check_outcomes(run_calls(load_tiny(tmp_path), seed=1, count=300), 300)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_many_calls(tmp_path: Path) -> None:
    check_outcomes(run_calls(load_tiny(tmp_path), seed=2, count=100_000), 100_000)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print(run_calls(load_tiny(Path(place)), seed=int(sys.argv[2]), count=int(sys.argv[1])))
