"""The run behind ``protea score``: from tables of variants to tables of scores, by one model or several.

Errors in any model, protein or variant are found before the first model computes. Columns have ProteinGym's names; all
columns are kept as they are:

    mutant            a variant as ``notation.py`` reads it or, of letters only, the whole sequence, as in ProteinGym's
                      insertions and deletions; also ``mutants``, ``mutation``, ``mutations``, ``variant``, and MaveDB's
                      ``hgvs_pro``
    mutated_sequence  the whole sequence; alone, it is compared with the wild type, beside ``mutant`` it is checked
    id                the protein; also ``protein``. Without it, there is only one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from protea import bundled
from protea.alphabet import Alphabet
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.delimited import find_column, folded
from protea.errors import DataError, FastaError, UsageError, VariantError
from protea.infer.loading import IN_FLOAT32, ModelLoader
from protea.infer.runner import Runner
from protea.letters import GAPS, ReportRow
from protea.models.encoder import Encoder
from protea.output import fingerprint
from protea.progress import SILENT, Progress
from protea.records import MISSING, UNCLEAR
from protea.rerun import FAILED, INPUT, PLOT
from protea.score.effects import Protein, Scoring, score
from protea.score.expected import runner_for, tokens_seen_at_once
from protea.score.notation import parse
from protea.score.proteins import AS_USUAL, Reading, wild_types
from protea.score.variants import Variant, check, chosen_places, difference, explaining_offset, single_substitutions
from protea.shards import Shard
from protea.tables import Beside, check_output, read_table, write_table
from protea.text import counted

if TYPE_CHECKING:
    import pyarrow as pa

_VARIANT: Final = ("mutant", "mutants", "mutation", "mutations", "variant", "hgvs_pro")
PROTEIN_COLUMNS: Final = ("id", "protein")
_SEQUENCE: Final = "mutated_sequence"

SHARD: Final = "shard"
"""Name in run files of the shard that a table is."""

REPORT: Final = "row\tvariant\treason"
"""The header of the report; lines without a row tell of proteins or of the whole table."""


class Columns(NamedTuple):
    """Names of the columns of variants and of mutated sequences; ``None`` stands for the first of the usual names."""

    mutant: str | None = None
    mutated_sequence: str | None = None

    def of(self, table: pa.Table, place: str = "the table") -> list[str | None]:
        """Both names as the table has them; ``None`` for a usual one that it lacks."""
        usual = zip(self, (_VARIANT, (_SEQUENCE,)), strict=True)
        return [find_column(table.column_names, [name] if name else names, place) or name for name, names in usual]


_USUAL: Final = Columns()


class Problem(NamedTuple):
    """A row that cannot be scored; rows are counted from 1, without the header."""

    row: int
    variant: str
    reason: str


@dataclass
class Rows:
    """The rows of a table, by protein; ``places`` holds the row, from 0, of each variant of each protein.

    After a run, the table has scores, and ``changes`` are those of the wild types.
    """

    table: pa.Table
    changes: list[ReportRow] = field(default_factory=list)
    proteins: list[Protein] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def scored(self) -> int:
        """The number of rows that can be scored."""
        return sum(map(len, self.places))

    def share(self, shard: Shard, how: Scoring) -> Rows:
        """The rows of a shard, and its problems, numbered as in the whole table; the first has changes and advice."""
        work = np.zeros(self.table.num_rows)
        for protein, places in zip(self.proteins, self.places, strict=True):
            work[places] = how.work(protein)
        part = shard.part(work)
        share = Rows(self.table.slice(part.start, len(part)))
        share.problems = [problem for problem in self.problems if problem.row - 1 in part]
        if shard.number == 1:
            share.changes, share.advice = self.changes, self.advice
        for protein, places in zip(self.proteins, self.places, strict=True):
            pairs = zip(places, protein.variants, strict=True)
            if kept := [(place - part.start, variant) for place, variant in pairs if place in part]:
                share.places.append([place for place, _ in kept])
                share.proteins.append(protein._replace(variants=[variant for _, variant in kept]))
        return share


def score_variants(
    proteins: str,
    variants: Path | Sequence[str] | None,
    how: Scoring,
    *,
    models: Sequence[str] = (bundled.NAME,),
    columns: Columns = _USUAL,
    positions: str | None = None,
    column: str = "model_score",
    reading: Reading = AS_USUAL,
    check: Callable[[Sequence[str]], object] | None = None,
    plot: Path | None = None,
    output: Path | None = None,
    shard: Shard | None = None,
    overwrite: bool = False,
    load: ModelLoader = IN_FLOAT32,
    progress: Progress = SILENT,
    make_runner: Callable[[Encoder, int | None], Runner] = runner_for,
) -> Rows:
    """Score variants of the proteins in a FASTA file, and write the output.

    Arguments are the options of the command; ``variants`` are a table, in which ``columns`` are read, the variants
    themselves, or ``None`` for a single-site scan, of all ``positions`` or of some, as in ``10-40,55``.
    ``check`` is called with the names of the proteins before a model computes; ``plot`` is a picture that the caller
    draws. With a ``shard``, its rows alone are scored, into its part of the output; its report is that of all rows,
    what is returned tells of its own rows.
    ``progress`` counts passes. ``make_runner`` makes what computes, from a model and a token budget. A
    ``FinishedError`` says that the same call has written the output already.
    """
    if columns != _USUAL and not isinstance(variants, Path):
        raise UsageError("--mutant-column and --mutated-sequence-column name columns of a table; name a table")
    if positions is not None and variants is not None:
        raise UsageError("--positions limits a scan; add --scan, and name no variants")
    options = {**asdict(how), **asdict(reading), **_named(columns), "column": column}
    run = _settings(proteins, variants, positions) | options
    if output is not None:
        files = (proteins, variants) if isinstance(variants, Path) else (proteins,)
        run |= {INPUT: fingerprint(files)} | {PLOT: plot and str(plot)}
        if shard is not None:
            if run[INPUT] is None:
                raise UsageError(f"--shard needs files that can be read twice; {' or '.join(map(str, files))} cannot")
            output, run = shard.output(output), run | {SHARD: str(shard)}
        check_output(output, run, lambda: load.identities(models), overwrite=overwrite)
    ensemble, alphabet = open_ensemble(models)
    changes: list[ReportRow] = []
    notes: list[str] = []
    wild = wild_types([proteins], alphabet, reading, changes)
    if variants is None:
        table = scan_table(wild, how.offset, positions)
    elif isinstance(variants, Path):
        table = read_variants(variants, columns, notes)
    else:
        table = variant_table(variants)
    rows = rows_of(table, wild, alphabet, how, columns)
    rows.advice += notes
    rows.changes += changes
    check_columns(table, column, models)
    if not table.num_rows:
        raise FastaError(f"{proteins}: nothing to scan; no protein in it has residues other than gaps")
    if check is not None:
        check([protein.name for protein in rows.proteins])
    check_lengths(ensemble.values(), rows.proteins, how.long)
    altered = [("", change.id, f"{change.what}: {change.detail}") for change in rows.changes]
    lines = [*altered, *rows.problems, *(("", "", advice) for advice in rows.advice)]
    rows = rows if shard is None else rows.share(shard, how)
    scores, provenance = {}, {}
    for name in models:
        model = load(name)
        progress.begin("scoring", how.passes(rows.proteins))
        scores[name] = scores_of(model.module, rows, how, progress, runner=make_runner(model.module, how.token_budget))
        provenance[name] = model.circumstances()
        del model  # free this model's memory before the next one is loaded
    scored = replace(rows, table=with_scores(rows.table, column, scores))
    if output is not None:
        run |= failed_rows(0 if shard else len(rows.problems))
        run |= {"models": provenance, PLOT: None}
        write_table(output, scored.table, Beside(REPORT, lines, run))
    return scored


def _settings(proteins: str, variants: Path | Sequence[str] | None, positions: str | None) -> dict[str, Any]:
    """What a run scores, as its run file names it."""
    table, typed = None, None
    if isinstance(variants, Path):
        table = str(variants)
    elif variants is not None:
        typed = ",".join(variants)
    else:
        typed = "scan" if positions is None else f"scan {positions}"
    return {"command": "score", "proteins": proteins, "table": table, "variants": typed}


def _named(columns: Columns) -> dict[str, str | None]:
    return {f"{name}_column": value for name, value in columns._asdict().items()}


def failed_rows(count: int) -> dict[str, str]:
    """What the run file says of rows that could not be scored."""
    return {FAILED: f"{counted(count, 'row')} could not be scored"} if count else {}


def open_ensemble(names: Sequence[str]) -> tuple[dict[str, Encoder], Alphabet]:
    """Models by name, without their weights, and their smallest alphabet, which every model must be able to read."""
    models: dict[str, Encoder] = {}
    places: set[Path] = set()
    for name in names:
        path = locate(name)
        if path.resolve() in places:
            raise UsageError(f"-m {name}: this model is named twice; name each model once")
        places.add(path.resolve())
        with open_checkpoint(path) as checkpoint:
            checkpoint.model.require("logits")
            models[name] = checkpoint.model
    smallest = min((model.alphabet for model in models.values()), key=lambda alphabet: len(alphabet.residues))
    for name, model in models.items():
        if missing := sorted(set(smallest.residues) - set(model.alphabet.residues)):
            raise UsageError(
                f"-m {name}: its alphabet lacks {', '.join(missing)}, which the other models have; score it separately"
            )
    return models, smallest


def check_lengths(models: Iterable[Encoder], proteins: Sequence[Protein], long: str) -> None:
    """Refuse a protein that is too long for a model, even if only an insertion makes it so."""
    for protein in proteins:
        mutants = (variant.apply(protein.sequence) for variant in protein.variants if not variant.is_substitution)
        longest = max(map(len, (protein.sequence, *mutants)))
        for model in models:
            tokens_seen_at_once(model, protein.name, model.alphabet.frame.tokens(longest), long)


def read_variants(path: Path, columns: Columns = _USUAL, notes: list[str] | None = None) -> pa.Table:
    """A table of variants; a ``DataError`` if it cannot be read, is empty, or lacks a column.

    ``notes`` receives what ``read_table`` left out.
    """
    known = {*_VARIANT, _SEQUENCE, *PROTEIN_COLUMNS, *(folded(name) for name in columns if name)}
    table = read_table(path, notes, known)
    names = table.column_names
    used = columns.of(table, str(path))
    if lacking := [name for name in used if name is not None and name not in names]:
        raise DataError(f"{path}: has no column {' and '.join(lacking)}; its columns: {', '.join(names)}")
    if used == [None, None]:
        raise DataError(
            f"{path}: has no column {', '.join(_VARIANT)} or {_SEQUENCE}; its columns: {', '.join(names)}; "
            "`protea score --mutant-column NAME` reads another one"
        )
    if not table.num_rows:
        raise DataError(f"{path}: has no rows")
    return table


def variant_table(variants: Sequence[str]) -> pa.Table:
    """A table of variants that were typed."""
    import pyarrow as pa

    for variant in variants:
        _check_text("--variants", variant)
    return pa.table({"mutant": list(variants)})


def scan_table(wild_types: Mapping[str, str], offset: int, positions: str | None = None) -> pa.Table:
    """A single-site scan of each protein, or of some positions: ``id, position, wild_type, letter, mutant``."""
    import pyarrow as pa

    rows = [
        (name, place + offset, sequence[place], new, f"{sequence[place]}{place + offset}{new}")
        for name, sequence in wild_types.items()
        for place, new in single_substitutions(sequence, chosen_places(name, sequence, positions, offset))
    ]
    names = ("id", "position", "wild_type", "letter", "mutant")
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})


def rows_of(
    table: pa.Table, wild_types: Mapping[str, str], alphabet: Alphabet, how: Scoring, columns: Columns = _USUAL
) -> Rows:
    """The variants of a table with the columns of ``read_variants``, by protein.

    Raises:
        DataError: there are several proteins, and no column names the protein of a row.
    """
    rows = Rows(table)
    parsed: dict[str, list[Variant]] = {name: [] for name in wild_types}
    good: dict[str, list[tuple[int, Variant]]] = {name: [] for name in wild_types}
    protein_column = _protein_column(table, wild_types)
    only_protein = next(iter(wild_types)) if protein_column is None else None
    cells = (_cells(table, name) for name in (*columns.of(table), protein_column))
    for row, (*written, cell) in enumerate(zip(*cells, strict=True)):
        text, sequence = ("" if str(value).strip() in MISSING else str(value) for value in written)
        protein = only_protein or str(cell)
        try:
            if protein not in wild_types:
                raise VariantError(
                    f"{protein!r} is not one of the proteins; correct it, or rename the column {protein_column} if it "
                    "does not name proteins"
                )
            wild = wild_types[protein]
            variant = _variant(text, sequence, wild, how.offset)
            parsed[protein].append(variant)
            check(variant, wild, alphabet, how.offset)
            how.check(variant)
            if text and sequence and variant.apply(wild) != sequence:
                raise VariantError(f"{text}: the mutated sequence is not the wild type with that change")
            good[protein].append((row, variant))
        except VariantError as error:
            rows.problems.append(Problem(row + 1, str(written[0] or written[1] or ""), str(error)))
    for name, variants in good.items():
        if variants:
            rows.proteins.append(Protein(name, wild_types[name], [variant for _, variant in variants]))
            rows.places.append([row for row, _ in variants])
        if len(variants) < len(parsed[name]):
            better = explaining_offset(parsed[name], wild_types[name], how.offset)
            if better is not None:
                count = counted(len(parsed[name]), "variant")
                rows.advice.append(f"{name}: with offset {better}, all {count} would fit")
    if note := how.of_lengths(rows.proteins):
        rows.advice.append(note)
    return rows


def _protein_column(table: pa.Table, wild_types: Mapping[str, str]) -> str | None:
    """The column that names the protein of a row; ``None`` for a single protein and no such column."""
    named = (find_column(table.column_names, [name], "the table") for name in PROTEIN_COLUMNS)
    columns = [name for name in named if any(_cells(table, name))]
    if not columns and len(wild_types) > 1:
        raise DataError(
            f"there are {len(wild_types)} proteins, and no column names the protein of a row; add a column "
            f"{' or '.join(PROTEIN_COLUMNS)}, or give one protein"
        )
    for name in columns:
        if not wild_types.keys().isdisjoint(map(str, _cells(table, name))):
            return name
    return columns[0] if columns else None


def _cells(table: pa.Table, column: str | None) -> list[Any]:
    return [None] * table.num_rows if column is None else table.column(column).to_pylist()


def _variant(text: str, mutated: str, wild: str, offset: int) -> Variant:
    """The variant of a row; a text of letters only is a whole sequence."""
    if text and not text.isalpha():
        return parse(text, wild, offset)
    sequence = text or mutated
    if not sequence or (sequence in UNCLEAR and 2 * len(sequence) < len(wild)):
        raise VariantError("the row names no variant; write one, or remove the row")
    if gaps := [gap for gap in GAPS if gap in sequence and gap not in wild]:
        position = sequence.index(gaps[0]) + 1
        raise VariantError(f"the mutated sequence has a gap, {gaps[0]!r} at {position}; leave gaps out")
    if sequence != sequence.upper():
        raise VariantError("the mutated sequence is in lower case; write it in upper case")
    # A short text may be a label such as WT, NA or DEL; so large deletions must be written with numbers.
    if 2 * len(sequence) < len(wild):
        raise VariantError(
            f"{sequence}: neither a variant nor a whole sequence: {counted(len(sequence), 'residue')}, the protein has "
            f"{len(wild):,}; write large deletions as A4_K30del"
        )
    return difference(wild, sequence, offset)


def scores_of(
    model: Encoder, rows: Rows, how: Scoring, progress: Progress, *, runner: Runner | None = None
) -> list[float | None]:
    """A score for each row of a table; ``None`` for a row that cannot be scored. ``runner`` is as for ``score``."""
    scores: list[float | None] = [None] * rows.table.num_rows
    for places, values in zip(rows.places, score(model, rows.proteins, how, progress, runner=runner), strict=True):
        for place, value in zip(places, values.tolist(), strict=True):
            scores[place] = value
    return scores


def check_columns(table: pa.Table, column: str, models: Sequence[str]) -> None:
    """Refuse a name for the column of scores, before they are computed."""
    _check_text("--column", column)
    for name in _score_columns(column, models):
        if name in table.column_names:
            raise UsageError(f"the table has a column {name!r} already; choose another by --column NAME")


def with_scores(table: pa.Table, column: str, scores: Mapping[str, Sequence[float | None]]) -> pa.Table:
    """The table with a column of scores; for several models a column of means, and then one for each model."""
    import pyarrow as pa

    by_model = list(scores.values())
    means = [None if None in row else sum(row) / len(row) for row in zip(*by_model, strict=True)]
    for name, values in zip(_score_columns(column, list(scores)), [means, *by_model], strict=False):
        table = table.append_column(name, pa.array(values, pa.float64()))
    return table


def _score_columns(column: str, models: Sequence[str]) -> list[str]:
    return [column, *(f"{column} {name}" for name in models if len(models) > 1)]


def _check_text(option: str, text: str) -> None:
    """Refuse text that a table cannot hold: a command line may have any bytes."""
    if not text.strip().isprintable() or not text.strip():
        raise UsageError(f"{option} {text!a}: is empty or not printable; type it again")
