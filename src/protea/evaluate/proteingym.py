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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.errors import DataError
from protea.extras import extra
from protea.models.encoder import Encoder
from protea.score.effects import Scoring
from protea.score.expected import Advance
from protea.score.table import Problem, read_table, rows_of, scores_of

if TYPE_CHECKING:
    import pyarrow as pa

MEASURES: Final = ("spearman", "auc", "mcc", "ndcg", "top_recall")
_TOP: Final = 10
"""Percent that ``ndcg`` and ``top_recall`` look at."""

_PUBLISHED: Final = "spearman "
_NAME, _FILE, _PROTEIN, _KIND = ("assay", "DMS_id"), ("DMS_filename",), ("UniProt_ID",), ("coarse_selection_type",)
_SCORE: Final = ("DMS_score", "score")
_CLASS: Final = "DMS_score_bin"


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
        problems: variants that could not be scored.
        measures: by name; ``nan`` where one is not defined.
    """

    assay: Assay
    count: int
    problems: Sequence[Problem]
    measures: Mapping[str, float]

    @property
    def left_out(self) -> int:
        """How many variants could not be scored."""
        return len(self.problems)


class Scan:
    """An assay as it is scored by one model after another.

    Args:
        assay: which.
        alphabet: of the models.
        how: they score.

    Raises:
        DataError: its file is damaged, or lacks a column.
    """

    def __init__(self, assay: Assay, alphabet: Alphabet, how: Scoring) -> None:
        self._assay, self._how = assay, how
        table, self._scores, self._high = read_scan(assay)
        self.rows = rows_of(table, {assay.name: assay.sequence}, alphabet, how)
        self._sums = np.zeros(table.num_rows)

    def add(self, model: Encoder, advance: Advance) -> None:
        """Score it by a model more."""
        found = scores_of(model, self.rows, self._how, advance)
        self._sums += [np.nan if value is None else value for value in found]

    def measured(self) -> Measured:
        """The sum of all models' scores, which ranks as their mean does, beside the measurements."""
        scored = ~np.isnan(self._sums)
        measures = measure(self._sums[scored], self._scores[scored], self._high[scored])
        return Measured(self._assay, int(scored.sum()), self.rows.problems, measures)


def read_assays(folder: Path) -> list[Assay]:
    """The assays of a folder.

    Raises:
        DataError: it holds no table of assays, or a scan is not there.
    """
    references = [path for path in sorted(folder.glob("*.csv*")) if "target_seq" in _header(path)]
    if len(references) != 1:
        found = ", ".join(path.name for path in references) or "none"
        raise DataError(f"{folder}: needs one CSV of assays, with a column target_seq; found {found}")
    rows = _rows(references[0])
    files = {path.name: path for path in sorted(folder.rglob("*.csv*"))}
    return [_assay(row, files, references[0]) for row in rows]


def read_scan(assay: Assay) -> tuple[pa.Table, NDArray[np.float64], NDArray[np.bool_]]:
    """Variants, measurements, and which of them count as high.

    Raises:
        DataError: the file is damaged, or a column is missing or no number.
    """
    table = read_table(assay.path)
    column = next((name for name in _SCORE if name in table.column_names), None)
    if column is None:
        raise DataError(
            f"{assay.path}: no column is named {' or '.join(_SCORE)}; it has {', '.join(table.column_names)}"
        )
    scores = _numbers(table, column, assay.path)
    if _CLASS in table.column_names:
        return table, scores, _numbers(table, _CLASS, assay.path) > 0.5
    return table, scores, scores >= np.median(scores)


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
    """Means over assays: plain; over proteins; over kinds of function, where they are known.

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
    proteins: dict[tuple[str, str], list[float]] = {}
    for assay, value in known:
        proteins.setdefault((assay.kind, assay.protein), []).append(value)
    kinds: dict[str, list[float]] = {}
    for (kind, _), found in proteins.items():
        kinds.setdefault(kind, []).append(float(np.mean(found)))
    result = {
        "assays": _mean([value for _, value in known]),
        "proteins": _mean([v for one in kinds.values() for v in one]),
    }
    return result | ({"functions": _mean([_mean(one) for one in kinds.values()])} if set(kinds) != {""} else {})


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


def _assay(row: Mapping[str, Any], files: Mapping[str, Path], reference: Path) -> Assay:
    name = _first(row, _NAME)
    if not name:
        raise DataError(f"{reference}: a row has no {' or '.join(_NAME)}")
    wanted = [_first(row, _FILE) or f"{name}.csv"]
    path = next((files[one] for file in wanted for one in (file, f"{file}.gz") if one in files), None)
    if path is None:
        raise DataError(f"{reference}: {wanted[0]}, the scan of {name}, is not in its folder")
    published = {
        column.removeprefix(_PUBLISHED): float(value)
        for column, value in row.items()
        if column.startswith(_PUBLISHED) and value not in ("", None)
    }
    protein = _first(row, _PROTEIN) or "_".join(name.split("_")[:2])
    return Assay(name, protein, _first(row, _KIND), str(row["target_seq"]), path, published)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((str(row[name]) for name in names if row.get(name)), "")


def _header(path: Path) -> list[str]:
    from pyarrow import ArrowException, csv

    try:
        with csv.open_csv(path) as stream:
            return list(stream.schema.names)
    except (OSError, ArrowException):
        return []


def _rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, csv

    try:
        return list(csv.read_csv(path).to_pylist())
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def _numbers(table: pa.Table, column: str, path: Path) -> NDArray[np.float64]:
    values = table.column(column).to_pylist()
    try:
        found = np.array([float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {column}: {error}") from error
    if not np.isfinite(found).all():
        raise DataError(f"{path}: {column}: row {int(np.argmin(np.isfinite(found))) + 1} is no finite number")
    return found
