"""Predictions compared with deep mutational scans, by ProteinGym's measures (Notin et al. 2023).

A folder holds a table of assays with their wild types (a CSV with a column ``target_seq``) and a table of variants for
each assay, in ProteinGym's own layout (``DMS_id, DMS_filename, UniProt_ID, coarse_selection_type``; ``mutant,
DMS_score, DMS_score_bin``) or a short one (``assay``; ``mutant, score``). Columns ``spearman NAME`` hold the published
correlations of other models.

    spearman    rank correlation of predicted and measured scores
    auc         for the classes of ``DMS_score_bin``; without that column, scores from the median up are high
    mcc         for the same classes; predicted scores are split at their median
    ndcg        of the best tenth by prediction, gains scaled to 0 to 1
    top_recall  share of the best measured tenth that is in the best predicted tenth
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.delimited import find_column, folded, text_rows
from protea.errors import DataError, FastaError, UnknownResidueError, UsageError
from protea.evaluate.ranking import RankAgreement, Ranking, pearson
from protea.infer.loading import IN_FLOAT32, LoadedModel, ModelLoader
from protea.models.encoder import Encoder
from protea.output import fingerprint
from protea.progress import SILENT, Progress
from protea.rerun import FAILED, INPUT
from protea.score.effects import Scoring
from protea.score.variant_table import (
    PROTEIN_COLUMNS,
    Problem,
    check_lengths,
    open_ensemble,
    read_variants,
    rows_of,
    scores_of,
)
from protea.tables import Beside, check_output, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

MEASURES: Final = ("spearman", "auc", "mcc", "ndcg", "top_recall")
_TOP: Final = 10  # percent of the variants that ndcg and top_recall look at
PUBLISHED: Final = "spearman "
"""What the name of a column with published correlations begins with."""
_SCORE: Final = ("DMS_score", "score")
_CLASS: Final = "DMS_score_bin"
_WILD_TYPE: Final = "target_seq"
_MISSING: Final = frozenset(("", "na", "nan", "none", "null"))
_HIGH, _LOW = frozenset(("1", "1.0", "true")), frozenset(("0", "0.0", "false"))


class Assay(NamedTuple):
    """A deep mutational scan; ``kind`` is the function selected for, ``published`` other models' correlations.

    The file at ``path`` may be absent: an assay without a scan is left out of means.
    """

    name: str
    protein: str
    kind: str
    sequence: str
    path: Path
    published: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """How well an assay was predicted; ``nan`` for measures that are not defined, all of them without a scan."""

    assay: Assay
    count: int
    problems: Sequence[Problem]
    advice: Sequence[str]
    measures: Mapping[str, float]

    @property
    def left_out(self) -> int:
        """Number of variants that were not compared."""
        return len(self.problems)


class AssayScores:
    """The sum of the scores that several models give to the variants of an assay."""

    def __init__(self, assay: Assay, alphabet: Alphabet, how: Scoring) -> None:
        self._assay, self._how = assay, how
        try:
            alphabet.encode(assay.sequence)
        except UnknownResidueError as error:
            raise DataError(f"{assay.name}: target_seq: {error}") from error
        notes: list[str] = []
        table, self._scores, self._high = read_scan(assay, notes)
        # The assay says which protein it is. Numbers select columns that share a name.
        others = [place for place, name in enumerate(table.column_names) if folded(name) not in PROTEIN_COLUMNS]
        self.rows = rows_of(table.select(others), {assay.name: assay.sequence}, alphabet, how)
        self.rows.advice += notes if assay.path.exists() else [f"{assay.name}: skipped: {assay.path} is absent"]
        self._sums = np.zeros(table.num_rows)
        reported = {problem.row for problem in self.rows.problems}
        missing = np.flatnonzero(np.isnan(self._scores)) + 1
        self._problems = self.rows.problems + [
            Problem(row, "", "not measured") for row in missing.tolist() if row not in reported
        ]

    def add(self, model: Encoder, progress: Progress = SILENT) -> None:
        """Add the scores of a further model; progress counts passes."""
        scores = scores_of(model, self.rows, self._how, progress)
        self._sums += [np.nan if score is None else score for score in scores]

    def measured(self) -> Measured:
        """Compare the sum of all models' scores, which ranks like their mean, with the measurements."""
        scored = ~np.isnan(self._sums + self._scores)
        measures = measure(self._sums[scored], self._scores[scored], self._high[scored])
        return Measured(self._assay, int(scored.sum()), self._problems, self.rows.advice, measures)


def evaluate_scans(
    assays: Iterable[Assay],
    how: Scoring,
    models: Sequence[str],
    load: Callable[[str], LoadedModel],
    progress: Progress = SILENT,
) -> tuple[list[Measured], dict[str, Any]]:
    """Score assays with an ensemble, and compare the scores with the measurements.

    Also returns the circumstances of each model, by name. Errors in the assays are reported before a model computes.
    """
    ensemble, alphabet = open_ensemble(models)
    scans = [AssayScores(assay, alphabet, how) for assay in assays]
    check_lengths(ensemble.values(), [protein for scan in scans for protein in scan.rows.proteins], how.long)
    provenance: dict[str, Any] = {}
    for name in models:
        model = load(name)
        progress.begin(name, sum(how.passes(scan.rows.proteins) for scan in scans))
        for scan in scans:
            scan.add(model.module, progress)
        provenance[name] = model.circumstances()
        del model  # free this model's memory before the next one is loaded
    return [scan.measured() for scan in scans], provenance


def evaluate_assays(
    folder: Path,
    assays: Sequence[Assay],
    how: Scoring,
    *,
    models: Sequence[str],
    output: Path | None = None,
    overwrite: bool = False,
    load: ModelLoader = IN_FLOAT32,
    progress: Progress = SILENT,
) -> list[Measured]:
    """The run behind ``protea evaluate proteingym``: ``evaluate_scans`` on assays of a folder, and its output.

    A ``FinishedError`` says that the same call has written the output already.
    """
    run: dict[str, Any] = {"command": "evaluate proteingym", "folder": str(folder)}
    run |= {"assays": [assay.name for assay in assays], **asdict(how)}
    if output is not None:
        run[INPUT] = fingerprint([assay_table(folder), *(assay.path for assay in assays if assay.path.exists())])
        check_output(output, run, lambda: load.identities(models), overwrite=overwrite)
    results, provenance = evaluate_scans(assays, how, models, load, progress)
    if output is not None:
        write_results(output, results, run | {"models": provenance})
    return results


def assay_table(folder: Path) -> Path:
    """The table of assays in a folder; a ``DataError`` if there is none, or several."""
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    references = [path for path in sorted(folder.glob("*.csv*")) if _has_assays(path)]
    if len(references) != 1:
        names = ", ".join(path.name for path in references) or "none"
        raise DataError(f"{folder}: needs exactly one CSV of assays, with a column target_seq; found {names}")
    return references[0]


def read_assays(folder: Path, names: Iterable[str] | None = None) -> list[Assay]:
    """The assays of a folder, all or those with ``names``; a ``DataError`` names what is missing or wrong."""
    reference = assay_table(folder)
    table = read_table(reference, known={_WILD_TYPE})
    _check_unique(reference, "columns", table.column_names)
    files = list(folder.rglob("*.csv*"))
    assays = [_assay(row, files, reference) for row in table.to_pylist()]
    if not assays:
        raise DataError(f"{reference}: has no rows")
    _check_unique(reference, "assays", (assay.name for assay in assays))
    if not any(assay.path.exists() for assay in assays):
        raise DataError(f"{reference}: none of its scans is in the folder, such as {assays[0].path.name}")
    by_name = {assay.name: assay for assay in assays}
    return [by_name[name] for name in chosen_names("--assays", by_name if names is None else names, by_name)]


def chosen_names(option: str, names: Iterable[str], known: Collection[str]) -> list[str]:
    """The names in an option's value, each once; a ``UsageError`` for one that is not known."""
    chosen = list(dict.fromkeys(name.strip() for name in names))
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"{option} {unknown[0]!r}: unknown name; known are {', '.join(sorted(known)) or 'none'}")
    return chosen


def read_scan(assay: Assay, notes: list[str] | None = None) -> tuple[pa.Table, NDArray[np.float64], NDArray[np.bool_]]:
    """The table of variants, their measured scores, NaN where there is none, and which of them are high.

    Without a file, the table is empty. ``notes`` receives what ``read_table`` left out.
    """
    import pyarrow as pa

    path = assay.path
    if not path.exists():
        return pa.table({"mutant": pa.array([], pa.string())}), np.empty(0), np.empty(0, bool)
    table = read_variants(path, notes=notes)
    column = find_column(table.column_names, _SCORE, str(path))
    if column is None:
        raise DataError(f"{path}: no column is named {' or '.join(_SCORE)}; it has {', '.join(table.column_names)}")
    texts = table.column(column).to_pylist()
    scores = np.array([_number(text, f"{path}: {column}: row {row}") for row, text in enumerate(texts, start=1)])
    if np.isinf(scores).any():
        raise DataError(f"{path}: {column}: row {int(np.argmax(np.isinf(scores))) + 1} is not finite")
    if np.isnan(scores).all():
        raise DataError(f"{path}: {column}: nothing was measured")
    classes = find_column(table.column_names, [_CLASS], str(path))
    if classes is None:
        return table, scores, scores >= np.nanmedian(scores)
    high = np.zeros(table.num_rows, bool)
    for row, text in enumerate(table.column(classes).to_pylist()):
        cell = text.strip().lower()
        if cell not in _MISSING | _HIGH | _LOW:
            raise DataError(f"{path}: {_CLASS}: row {row + 1}: {text!r} is neither 0 nor 1")
        high[row] = cell in _HIGH
    return table, scores, high


def measure(predicted: NDArray[np.float64], measured: NDArray[np.float64], high: NDArray[np.bool_]) -> dict[str, float]:
    """All of ``MEASURES`` for predicted and measured scores ``[n]``; ``high`` marks the fit variants."""
    if not len(predicted):
        return dict.fromkeys(MEASURES, float("nan"))
    once = np.ones(len(predicted))
    agreement = RankAgreement(predicted, measured)
    return {
        "spearman": agreement.spearman(once),
        "auc": Ranking(predicted).areas(once, high)[0],
        "mcc": _mcc(predicted >= np.median(predicted), high),
        "ndcg": RankAgreement(_in_order(predicted), measured).ndcg(once, _TOP) if np.ptp(predicted) else float("nan"),
        "top_recall": agreement.top_recall(once, _TOP),
    }


def means(results: Sequence[Measured], name: str, values: Mapping[str, float] | None = None) -> dict[str, float]:
    """Means over assays, over proteins, and over kinds of function where these are known.

    A protein counts by the mean over its assays, a kind of function by the mean over its proteins. If ``values`` by
    assay are given, they are averaged instead of the measure ``name``.
    """
    known: list[float] = []
    proteins: dict[str, list[float]] = {}
    kinds: dict[str, dict[str, list[float]]] = {}
    for result in results:
        assay = result.assay
        value = result.measures[name] if values is None else values.get(assay.name, np.nan)
        if not np.isnan(value):
            known.append(value)
            proteins.setdefault(assay.protein, []).append(value)
            kinds.setdefault(assay.kind, {}).setdefault(assay.protein, []).append(value)
    averages = {"assays": _mean(known), "proteins": _mean(map(_mean, proteins.values()))}
    if kinds.keys() - {""}:
        averages["functions"] = _mean(_mean(map(_mean, by_protein.values())) for by_protein in kinds.values())
    return averages


def counts(results: Sequence[Measured]) -> dict[str, int]:
    """The numbers of assays, of proteins and of kinds of function that ``means`` are taken over."""
    assays = [result.assay for result in results]
    kinds = {assay.kind for assay in assays}
    return {"assays": len(assays), "proteins": len({assay.protein for assay in assays}), "functions": len(kinds)}


def rows_of_results(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row for each assay: its numbers, and the published ones."""
    published = dict.fromkeys(name for result in results for name in result.assay.published)
    return [
        {"assay": result.assay.name, "protein": result.assay.protein}
        | {"variants": result.count, "left_out": result.left_out, **result.measures}
        | {f"{PUBLISHED}{name}": result.assay.published.get(name) for name in published}
        for result in results
    ]


def write_results(path: Path, results: Sequence[Measured], settings: Mapping[str, Any]) -> None:
    """Write a table with one row for each assay, a report of the variants that were left out, and the settings."""
    import pyarrow as pa

    if any(result.problems or not result.count for result in results):
        settings = {**settings, FAILED: "some variants or assays could not be scored"}
    lines: list[tuple[object, ...]] = []
    for result in results:
        lines += [(result.assay.name, *problem) for problem in result.problems]
        lines += [(result.assay.name, "", "", advice) for advice in result.advice]
    write_table(
        path, pa.Table.from_pylist(rows_of_results(results)), Beside("assay\trow\tvariant\treason", lines, settings)
    )


def _in_order(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ranks of scores from the lowest; equal scores fall in the order of the table, as in ProteinGym."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = -np.arange(len(scores))
    return ranks


def _mcc(chosen: NDArray[np.bool_], high: NDArray[np.bool_]) -> float:
    """Matthews' correlation, which is Pearson's of two classes; 0 if all variants are chosen, as in scikit-learn."""
    correlation = pearson(chosen.astype(np.float64), high.astype(np.float64), np.ones(len(high)))
    return 0.0 if chosen.all() and 0 < high.sum() < len(high) else correlation


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return float(np.mean(known)) if known else float("nan")


def _assay(row: Mapping[str, str], files: Sequence[Path], reference: Path) -> Assay:
    name = row.get("assay") or row.get("DMS_id")
    if not name:
        raise DataError(f"{reference}: a row has no assay or DMS_id")
    sequence = row["target_seq"]
    if not sequence:
        raise DataError(f"{reference}: {name} has no target_seq")
    if not sequence.isalpha() or not sequence.isupper():
        raise DataError(f"{reference}: {name}: target_seq must be upper-case letters without gaps")
    protein = row.get("UniProt_ID") or "_".join(name.split("_")[:2])
    path = _scan_file(files, row.get("DMS_filename") or f"{name}.csv", name, reference)
    published = {
        column.removeprefix(PUBLISHED): _number(value, f"{reference}: {name}: {column}")
        for column, value in row.items()
        if column.startswith(PUBLISHED) and value
    }
    return Assay(name, protein, row.get("coarse_selection_type", ""), sequence, path, published)


def _scan_file(files: Sequence[Path], file: str, assay: str, reference: Path) -> Path:
    """The file of that name nearest to the top of the folder, compressed or not; its place there if it is absent."""
    matches = [path for path in files if path.name in (file, f"{file}.gz")]
    depth = min((len(path.parts) for path in matches), default=0)
    nearest = sorted(path for path in matches if len(path.parts) == depth)
    if not nearest:
        return reference.parent / file
    if len(nearest) > 1:
        raise DataError(f"{reference}: {assay} has several scans, {' and '.join(map(str, nearest))}; remove one")
    return nearest[0]


def _number(text: str, place: str) -> float:
    if text.strip().lower() in _MISSING:
        return np.nan
    try:
        return float(text)
    except ValueError as error:
        raise DataError(f"{place}: {text!r} is not a number") from error


def _check_unique(path: Path, what: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{path}: two {what} are named {name}; rename one")


def _has_assays(path: Path) -> bool:
    try:
        return _WILD_TYPE in next(text_rows(path, ",", {_WILD_TYPE}))
    except FastaError:
        return False
