"""Predictions beside deep mutational scans, by ProteinGym's measures (Notin et al. 2023).

A folder holds a table of assays with their wild types (a CSV with a column ``target_seq``) and a table of variants
each, in ProteinGym's own layout (``DMS_id, DMS_filename, UniProt_ID, coarse_selection_type``; ``mutant, DMS_score,
DMS_score_bin``) or the short one (``assay``; ``mutant, score``). Columns ``spearman NAME`` are what was published.

    spearman    rank correlation of predicted and measured
    auc         of ``DMS_score_bin``; without that column, of measured at or above their median
    mcc         of the same classes, predicted ones split at the median
    ndcg        of the best tenth by prediction, gains measured from 0 to 1
    top_recall  share of the best measured tenth that is in the best predicted tenth
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xopen import xopen

from protea.alphabet import Alphabet
from protea.errors import DataError, UnknownResidueError
from protea.fasta import DAMAGED
from protea.models.encoder import Encoder
from protea.optional import extra
from protea.progress import Progress
from protea.score.effects import Scoring
from protea.score.variant_table import Problem, read_variants, rows_of, scores_of

if TYPE_CHECKING:
    import pyarrow as pa

MEASURES: Final = ("spearman", "auc", "mcc", "ndcg", "top_recall")
_TOP: Final = 10
"""Percent that ``ndcg`` and ``top_recall`` look at."""

_PUBLISHED: Final = "spearman "
_NAME, _FILE, _PROTEIN, _KIND = ("assay", "DMS_id"), ("DMS_filename",), ("UniProt_ID",), ("coarse_selection_type",)
_SCORE: Final = ("DMS_score", "score")
_CLASS: Final = "DMS_score_bin"
_MISSING: Final = frozenset(("", "na", "nan", "none", "null"))
_HIGH, _LOW = frozenset(("1", "1.0", "true")), frozenset(("0", "0.0", "false"))


class Assay(NamedTuple):
    """One scan.

    Attributes:
        name: of the assay.
        protein: its UniProt id; assays of one protein are averaged first.
        kind: of function that was selected for, or empty.
        sequence: of the wild type.
        path: of the table of variants.
        published: Spearman's correlation of other models, by name.
    """

    name: str
    protein: str
    kind: str
    sequence: str
    path: Path
    published: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """How well one assay was predicted.

    Attributes:
        assay: which.
        count: variants compared.
        problems: variants that could not be scored, or were not measured.
        advice: what would explain many of them.
        measures: by name; ``nan`` where one is not defined.
    """

    assay: Assay
    count: int
    problems: Sequence[Problem]
    advice: Sequence[str]
    measures: Mapping[str, float]

    @property
    def left_out(self) -> int:
        """How many variants could not be scored."""
        return len(self.problems)


class AssayScores:
    """An assay as it is scored by one model after another.

    Args:
        assay: which.
        alphabet: of the models.
        how: they score.

    Raises:
        DataError: its file is damaged, or lacks a column, or its sequence holds a letter outside the alphabet.
    """

    def __init__(self, assay: Assay, alphabet: Alphabet, how: Scoring) -> None:
        self._assay, self._how = assay, how
        try:
            alphabet.encode(assay.sequence)
        except UnknownResidueError as error:
            raise DataError(f"{assay.name}: target_seq: {error}") from error
        table, self._scores, self._high = read_scan(assay)
        self.rows = rows_of(table, {assay.name: assay.sequence}, alphabet, how)
        self._sums = np.zeros(table.num_rows)
        told = {problem.row for problem in self.rows.problems}
        missing = (row + 1 for row in np.flatnonzero(np.isnan(self._scores)).tolist())
        self._problems = self.rows.problems + [Problem(row, "", "not measured") for row in missing if row not in told]

    def add(self, model: Encoder, progress: Progress) -> None:
        """Score it by a model more."""
        found = scores_of(model, self.rows, self._how, progress)
        self._sums += [np.nan if value is None else value for value in found]

    def measured(self) -> Measured:
        """The sum of all models' scores, which ranks as their mean does, beside the measurements."""
        scored = ~np.isnan(self._sums + self._scores)
        measures = measure(self._sums[scored], self._scores[scored], self._high[scored])
        return Measured(self._assay, int(scored.sum()), self._problems, self.rows.advice, measures)


def read_assays(folder: Path) -> list[Assay]:
    """The assays of a folder.

    Raises:
        DataError: it holds no table of assays, or a scan is not there.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is no folder' if folder.exists() else 'no such folder'}")
    references = [path for path in sorted(folder.glob("*.csv*")) if "target_seq" in _header(path)]
    if len(references) != 1:
        found = ", ".join(path.name for path in references) or "none"
        raise DataError(f"{folder}: needs one CSV of assays, with a column target_seq; found {found}")
    reference = references[0]
    files = list(folder.rglob("*.csv*"))
    assays = [_assay(row, files, reference) for row in _rows(reference)]
    if not assays:
        raise DataError(f"{reference}: has no rows")
    if doubled := [name for name, count in Counter(assay.name for assay in assays).items() if count > 1]:
        raise DataError(f"{reference}: {doubled[0]} is there twice; give each assay its own name")
    return assays


def read_scan(assay: Assay) -> tuple[pa.Table, NDArray[np.float64], NDArray[np.bool_]]:
    """Variants, measurements, NaN where there is none, and which of them count as high.

    Raises:
        DataError: the file is damaged, or a column is missing or no number.
    """
    table = read_variants(assay.path)
    if doubled := [name for name in (*_SCORE, _CLASS) if table.column_names.count(name) > 1]:
        raise DataError(f"{assay.path}: two columns are named {doubled[0]}; rename one")
    column = next((name for name in _SCORE if name in table.column_names), None)
    if column is None:
        raise DataError(
            f"{assay.path}: no column is named {' or '.join(_SCORE)}; it has {', '.join(table.column_names)}"
        )
    scores = _numbers(table, column, assay.path)
    if _CLASS in table.column_names:
        return table, scores, _classes(table, assay.path)
    return table, scores, scores >= np.nanmedian(scores)


def measure(predicted: NDArray[np.float64], measured: NDArray[np.float64], high: NDArray[np.bool_]) -> dict[str, float]:
    """All of ``MEASURES``.

    Args:
        predicted: ``[n]``.
        measured: ``[n]``, higher is fitter.
        high: ``[n]``, which count as fit.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with extra("evaluate", "evaluating needs scikit-learn"):
        from scipy.stats import spearmanr
        from sklearn.metrics import matthews_corrcoef, roc_auc_score
    constant = len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(measured) == 0
    both = 0 < high.sum() < len(high)
    return {
        "spearman": float("nan") if constant else float(spearmanr(predicted, measured).statistic),
        "auc": float(roc_auc_score(high, predicted)) if both else float("nan"),
        "mcc": float(matthews_corrcoef(high, predicted >= np.median(predicted))) if both else float("nan"),
        "ndcg": float("nan") if constant else _ndcg(predicted, measured),
        "top_recall": _top_recall(predicted, measured) if len(predicted) else float("nan"),
    }


def means(results: Sequence[Measured], name: str, values: Mapping[str, float] | None = None) -> dict[str, float]:
    """Means over assays: plain; over proteins; over kinds of function, where they are known, each over its proteins.

    Args:
        results: of the assays.
        name: of a measure.
        values: by assay, instead of a measure of ours.
    """
    known = [
        (one.assay, value)
        for one in results
        if (value := one.measures[name] if values is None else values.get(one.assay.name, np.nan)) == value
    ]
    proteins: dict[str, list[float]] = {}
    kinds: dict[str, dict[str, list[float]]] = {}
    for assay, value in known:
        proteins.setdefault(assay.protein, []).append(value)
        kinds.setdefault(assay.kind, {}).setdefault(assay.protein, []).append(value)
    result = {"assays": _mean(value for _, value in known), "proteins": _mean(map(_mean, proteins.values()))}
    if not kinds.keys() - {""}:
        return result
    return result | {"functions": _mean(_mean(map(_mean, one.values())) for one in kinds.values())}


def _ndcg(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    top = max(1, int(len(measured) * _TOP / 100))
    gains = (measured - measured.min()) / np.ptp(measured)
    discounts = 1 / np.log2(np.arange(2, top + 2))
    chosen = np.argsort(-predicted, kind="stable")[:top]
    return float((gains[chosen] * discounts).sum() / (np.sort(gains)[::-1][:top] * discounts).sum())


def _top_recall(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    best = measured >= np.percentile(measured, 100 - _TOP)
    return float((best & (predicted >= np.percentile(predicted, 100 - _TOP))).sum() / best.sum())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def _assay(row: Mapping[str, str], files: Sequence[Path], reference: Path) -> Assay:
    name = _first(row, _NAME)
    if not name:
        raise DataError(f"{reference}: a row has no {' or '.join(_NAME)}")
    sequence = row["target_seq"]
    if not sequence:
        raise DataError(f"{reference}: {name} has no target_seq")
    if not sequence.isalpha() or not sequence.isupper():
        raise DataError(f"{reference}: {name}: target_seq is to be letters in upper case, without gaps")
    protein = _first(row, _PROTEIN) or "_".join(name.split("_")[:2])
    path = _scan_file(files, _first(row, _FILE) or f"{name}.csv", name, reference)
    return Assay(name, protein, _first(row, _KIND), sequence, path, dict(_published(row, name, reference)))


def _scan_file(files: Sequence[Path], file: str, assay: str, reference: Path) -> Path:
    """The file of that name nearest to the top of a folder, compressed or not."""
    found = [path for path in files if path.name in (file, f"{file}.gz")]
    least = min((len(path.parts) for path in found), default=0)
    nearest = sorted(path for path in found if len(path.parts) == least)
    if not nearest:
        raise DataError(f"{reference}: {file}, the scan of {assay}, is not in its folder")
    if len(nearest) > 1:
        raise DataError(f"{reference}: of {assay} there are {' and '.join(map(str, nearest))}; remove one")
    return nearest[0]


def _published(row: Mapping[str, str], assay: str, reference: Path) -> Iterator[tuple[str, float]]:
    for column, value in row.items():
        if column.startswith(_PUBLISHED) and value:
            try:
                yield column.removeprefix(_PUBLISHED), float(value)
            except ValueError as error:
                raise DataError(f"{reference}: {assay}: {column}: {value!r} is no number") from error


def _first(row: Mapping[str, str], names: Sequence[str]) -> str:
    return next((row[name] for name in names if row.get(name)), "")


def _header(path: Path) -> list[str]:
    """Names of the columns of a CSV; none if it is no CSV."""
    try:
        with xopen(path, "rt", encoding="utf-8-sig", newline="", threads=0) as file:
            return next((row for row in csv.reader(file) if row), [])
    except (*DAMAGED, OSError, UnicodeDecodeError, csv.Error):
        return []


def _rows(path: Path) -> list[dict[str, str]]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    # As text: a name such as 0012 is no number.
    names = _header(path)
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: two columns are named {doubled[0]}; rename one")
    types = arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    try:
        reading = arrow_csv.ReadOptions(use_threads=False)
        return list(arrow_csv.read_csv(path, read_options=reading, convert_options=types).to_pylist())
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def _numbers(table: pa.Table, column: str, path: Path) -> NDArray[np.float64]:
    found = np.empty(table.num_rows)
    for row, value in enumerate(table.column(column).to_pylist()):
        try:
            found[row] = np.nan if _is_missing(value) else float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: {column}: row {row + 1}: {value!r} is no number") from error
    if np.isinf(found).any():
        raise DataError(f"{path}: {column}: row {int(np.argmax(np.isinf(found))) + 1} is no finite number")
    if np.isnan(found).all():
        raise DataError(f"{path}: {column}: nothing was measured")
    return found


def _is_missing(value: object) -> bool:
    return value is None or str(value).strip().lower() in _MISSING


def _classes(table: pa.Table, path: Path) -> NDArray[np.bool_]:
    found = np.zeros(table.num_rows, bool)
    for row, value in enumerate(table.column(_CLASS).to_pylist()):
        text = str(value).strip().lower()
        if not _is_missing(value) and text not in _HIGH | _LOW:
            raise DataError(f"{path}: {_CLASS}: row {row + 1}: {value!r} is neither 0 nor 1")
        found[row] = text in _HIGH
    return found
