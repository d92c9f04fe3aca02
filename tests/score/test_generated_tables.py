"""Tables of every kind, generated: each is scored, with every row scored or reported, or refused by one error."""

from __future__ import annotations

import csv
import gzip
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from biotite.sequence import ProteinSequence

from protea.alphabet import ESM
from protea.delimited import folded
from protea.errors import ProteaError
from protea.score.effects import METHODS, Scoring
from protea.score.variant_table import Columns, check_columns, read_variants, rows_of, with_scores
from protea.score.variants import CANONICAL
from protea.tables import Beside, write_table

SEED = 20261128
WILD = {"a": "MKTAYIAKQRQISFVKSHFS", "b/2": "WWKKAXLLE"}
GARBAGE = (
    *("", " ", "NA", "nan", "None", "0", "-1", "1e309", "WT", "_wt", "_sy", "p.=", "p.?", "p.0", "p.(=)", "?", "="),
    *("#", "A4*", "R10X", "R10Ter", "p.Arg10fs", "p.Met1ext-5", "M1B", "K2J", "c.76A>C", "M999999999V", "M1V,K2R"),
    *("M" + "9" * 40 + "V", "K2delKK", "K2ins", "A4_K2del", "\u00e9", "\U0001f9ec", "\u0410\u0442", "\u200b", 'M1V"'),
    *("M\uff11V", "M1V;K2R", "two\nlines", "tab\there", "=1+1", "#NAME?", "\x00", "M1V:M1K", "mktayiakqr"),
    *("MKTAYIAKQRQISFVKSHF", "MKT-YIAKQRQISFVKSHFS"),
)
HEADERS = ("mutant", "mutants", "mutation", "hgvs_pro", "mutated_sequence", "id", "protein", "score", "", "M1V")
DISGUISED = (
    *(b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>\n<html></html>\n", b"PK\x03\x04\x14\x00\x06"),
    gzip.compress(b"mutant,x\nM1V,1\n"),
)


def change(random: random.Random, wild: str) -> str:
    """A change that fits, or almost."""
    start = random.randrange(len(wild))
    end = min(len(wild) - 1, start + random.randrange(4))
    new = "".join(random.choices(f"{CANONICAL}UOX", k=random.randrange(1, 4)))
    number = start + random.choice((1, 1, 1, 1, 0, 94))

    def name(letter: str) -> str:
        return ProteinSequence.convert_letter_1to3(letter).title() if three and letter in CANONICAL else letter

    three = random.random() < 0.4
    place = f"{name(wild[start])}{number}"
    places = f"{place}_{name(wild[end])}{number + end - start}"
    text = random.choice(
        [f"{place}{name(new[0])}"] * 4
        + [f"{places}delins{new}", f"{places}del", f"{place}del", f"{places}dup", f"{place}=", f"{places}ins{new}"]
    )
    return random.choice((text, text, f"p.{text}", f"p.({text})", f"NP_1.2:p.{text}"))


def cell(random: random.Random, header: str, name: str) -> str:
    if random.random() < 0.2:
        return random.choice(GARBAGE)
    if header in ("id", "protein"):
        return random.choice((name, name, *WILD, "other", "1"))
    if header == "mutated_sequence":
        letters = list(WILD[name])
        letters[random.randrange(len(letters))] = random.choice("ACDEF")
        return "".join(letters[random.choice((0, 0, 1)) :])
    if header == "score":
        return random.choice(("0.5", "-1", "0,5", "1e-3", "nan"))
    first = change(random, WILD[name])
    if random.random() < 0.2:
        second = change(random, WILD[name])
        return random.choice((f"{first}:{second}", f"p.[{first.removeprefix('p.')};{second.removeprefix('p.')}]"))
    return first


def content(random: random.Random) -> bytes:
    """A file: delimiter, quotes, ends of lines, comments, ragged rows and encoding by chance."""
    width = random.randrange(1, 5)
    headers = [random.choice(("mutant", "hgvs_pro", "mutated_sequence")), *random.sample(HEADERS, k=width - 1)]
    if random.random() < 0.95:
        headers = list(dict.fromkeys(headers))
    headers = [random.choice((name,) * 6 + (name.title(), f" {name.upper()} ")) for name in headers]
    random.shuffle(headers)
    delimiter = random.choice(",,,,\t\t\t;;;|")
    rows: list[Sequence[str]] = [headers] if random.random() < 0.97 else []
    for _ in range(random.choice((0, 1, 2, 4, 4, 8))):
        name = random.choice(("a", "b/2")) if {"id", "protein"} & set(headers) else "a"
        row = [cell(random, header, name) for header in headers]
        if random.random() < 0.01:
            row = row[: random.randrange(len(row) + 1)] + ["more"] * random.randrange(2)
        rows.append(row)
    text = io.StringIO()
    writer = csv.writer(
        text,
        delimiter=delimiter,
        quoting=random.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
        lineterminator=random.choice(("\n", "\n", "\r\n", "\r")),
    )
    text.write(random.choice(("",) * 18 + (f"sep={delimiter}\r\n", "# a comment\n")))
    text.write(random.choice(("",) * 18 + ("#", "# ")))
    for row in rows:
        if random.random() < 0.05:
            text.write(random.choice(("# a comment\n", "#\n", "\n", "# it's, a; \"comment\n")))
        writer.writerow(row)
    if random.random() < 0.01:
        return random.choice(DISGUISED)
    if random.random() < 0.02:
        return text.getvalue().encode("utf-8", "replace") + random.choice(
            (b"\xff", b"\xc3", b'"', b"\x00", b"\xfe\xff")
        )
    encoding = random.choice((*("utf-8",) * 4, *("utf-8-sig",) * 2, "utf-16", "utf-16-le", "latin-1"))
    return text.getvalue().encode(encoding, "replace")


def scored(path: Path, random: random.Random, out: Path) -> None:
    """Read a table, stand in for the model, write the result, and check that no row is lost."""
    how = Scoring(method=random.choice(METHODS), offset=random.choice((1, 1, 1, 0, 94)))
    columns = Columns() if random.random() < 0.9 else Columns(*random.choice((("mutant", None), (None, "score"))))
    notes: list[str] = []
    table = read_variants(path, columns, notes)
    named = {"id", "protein"} & set(map(folded, table.column_names)) or random.random() < 0.05
    wild = WILD if named and random.random() < 0.9 else {"a": WILD["a"]}
    rows = rows_of(table, wild, ESM, how, columns)
    check_columns(table, "model_score", ["m"])
    scores: list[float | None] = [None] * table.num_rows
    for protein, places in zip(rows.proteins, rows.places, strict=True):
        for place, variant in zip(places, protein.variants, strict=True):
            assert scores[place] is None
            ESM.encode(variant.apply(protein.sequence))
            scores[place] = float(variant.lengthens_by)
    assert {problem.row for problem in rows.problems} == {row for row, score in enumerate(scores, 1) if score is None}
    assert len(rows.problems) == scores.count(None)
    if random.random() < 0.75:
        return  # writing takes most of the time
    beside = Beside("row\tvariant\treason", [*rows.problems, *(("", "", advice) for advice in rows.advice)], {})
    write_table(out, with_scores(table, "model_score", {"m": scores}), beside)
    again = read_variants(out, columns)
    assert again.num_rows == table.num_rows
    for name in set(table.column_names):
        if table.column_names.count(name) == 1:
            assert again[name].to_pylist() == table[name].to_pylist(), name


def run(cases: int, folder: Path, check: Callable[[Path, random.Random, Path], None] = scored) -> tuple[int, int]:
    results = errors = 0
    for case in range(cases):
        chance = random.Random(f"{SEED} {case}")
        packed = chance.random() < 0.1
        path = folder / f"in{chance.choice(('.csv', '.csv', '.tsv'))}{'.gz' if packed else ''}"
        data = content(chance)
        path.write_bytes(gzip.compress(data, 1) if packed else data)
        try:
            check(path, chance, folder / "out.csv")
            results += 1
        except ProteaError:
            errors += 1
        except BaseException:
            print(f"seed {SEED}, case {case}: {data!r}")
            raise
    return results, errors


@pytest.mark.parametrize("cases", [300, pytest.param(100_000, marks=pytest.mark.long)])
def test_any_table_is_scored_or_refused(tmp_path: Path, cases: int) -> None:
    results, errors = run(cases, tmp_path)
    print(f"seed {SEED}: {results:,} results, {errors:,} errors")
    assert results > cases / 3
    assert errors > cases / 20
