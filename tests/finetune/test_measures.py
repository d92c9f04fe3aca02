"""Numbers of predictions beside scikit-learn's and SciPy's, with ties, missing labels and rows that count often."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import permutations
from math import isnan, nan

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import calibration, metrics

from protea.evaluate.ranking import RankAgreement, Ranking
from protea.finetune.measures import SELECTED, Meter, confusion, measure, measures, reliability
from protea.finetune.tasks import MISSING, TASKS, Floats, Targets, Task

seeds = st.integers(0, 2**32 - 1)


def drawn(task: Task, rng: np.random.Generator, examples: int, width: int) -> tuple[Floats, Targets]:
    """Predictions with many ties, and targets of which some are missing; examples without rows occur."""
    lengths = rng.integers(0, 6, examples) if task.unit == "residue" else np.ones(examples, int)
    rows, offsets = int(lengths.sum()), np.append(0, np.cumsum(lengths))
    if task.kind == "value":
        values = rng.integers(0, 8, rows) / 4
        values[rng.random(rows) < 0.2] = nan
        return rng.integers(0, 6, rows) / 7 + 0.3 * np.nan_to_num(values), Targets(values, offsets)
    if task.kind == "class":
        classes = np.where(rng.random(rows) < 0.2, MISSING, rng.integers(0, width, rows))
        kinds = rng.dirichlet(np.ones(width), 7)
        return kinds[rng.integers(0, 7, rows)], Targets(classes, offsets)
    labels = (rng.random((rows, width)) < 0.4).astype(float)
    labels[rng.random((rows, width)) < 0.2] = nan
    return rng.integers(0, 11, (rows, width)) / 10, Targets(labels, offsets)


def names(width: int) -> tuple[str, ...]:
    return tuple(f"c{place}" for place in range(width))


def mean_area(area: Callable[..., float], columns: list[tuple[Floats, Floats]]) -> float:
    found = [area(truth, scores) for truth, scores in columns if 0 < truth.sum() < len(truth)]
    return float(np.mean(found)) if found else nan


def oracle_class(task: Task, p: Floats, targets: Targets) -> dict[str, float]:
    known = targets.values != MISSING
    y, q, width = targets.values[known], p[known], p.shape[1]
    if not len(y):
        return dict.fromkeys(measures(task), nan)
    chosen = q.argmax(1)
    columns = [((y == c).astype(float), q[:, c]) for c in ([1] if width == 2 else range(width))]
    found = {
        "accuracy": metrics.accuracy_score(y, chosen),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, chosen),
        "macro_f1": metrics.f1_score(y, chosen, average="macro"),
        "mcc": metrics.matthews_corrcoef(y, chosen) if len(set(y)) > 1 else nan,
        "auroc": mean_area(metrics.roc_auc_score, columns),
        "auprc": mean_area(metrics.average_precision_score, columns),
        "log_loss": metrics.log_loss(y, q, labels=range(width)),
    }
    if task.unit == "residue":
        parts = [slice(a, b) for a, b in zip(targets.offsets, targets.offsets[1:], strict=False) if known[a:b].any()]
        shares = [np.mean(p[part].argmax(1)[known[part]] == targets.values[part][known[part]]) for part in parts]
        found["accuracy_per_protein"] = float(np.mean(shares))
    return found


def oracle_value(task: Task, p: Floats, targets: Targets) -> dict[str, float]:
    known = ~np.isnan(targets.values)
    y, q = targets.values[known], p[known]
    found = dict.fromkeys(measures(task), nan)
    if not len(y):
        return found
    mse = metrics.mean_squared_error(y, q)
    found |= {"mse": mse, "rmse": mse**0.5, "mae": metrics.mean_absolute_error(y, q)}
    if len(y) < 2 or not np.ptp(y):
        return found
    found["r2"] = metrics.r2_score(y, q)
    if np.ptp(q):
        found |= {"spearman": stats.spearmanr(y, q).statistic, "pearson": stats.pearsonr(y, q).statistic}
        gains = (y - y.min()) / np.ptp(y)
        found["ndcg"] = metrics.ndcg_score([gains], [q], k=max(1, len(y) // 10))
        found["top_recall"] = top_recall(q, y >= np.percentile(y, 90))
    return found


def top_recall(q: Floats, best: NDArray[np.bool_]) -> float:
    """Of the rows with the highest predictions; of those that tie for the last places, by a hypergeometric mean."""
    size = int(best.sum())
    last = np.sort(q)[-size]
    above, tied = q > last, q == last
    hits = stats.hypergeom(tied.sum(), (best & tied).sum(), size - above.sum()).mean()
    return float(((best & above).sum() + hits) / size)


def oracle_labels(task: Task, p: Floats, targets: Targets) -> dict[str, float]:
    y, known = targets.values, ~np.isnan(targets.values)
    if not known.any():
        return dict.fromkeys(measures(task), nan)
    columns = [(y[known[:, c], c], p[known[:, c], c]) for c in range(y.shape[1])]
    every = [(y[known], p[known])]
    return {
        "macro_auroc": mean_area(metrics.roc_auc_score, columns),
        "macro_auprc": mean_area(metrics.average_precision_score, columns),
        "micro_auroc": mean_area(metrics.roc_auc_score, every),
        "micro_auprc": mean_area(metrics.average_precision_score, every),
        "f1max": f1max(p, y),
        "log_loss": metrics.log_loss(y[known], p[known], labels=[0, 1]),
    }


def f1max(p: Floats, y: Floats) -> float:
    """By the definition of CAFA, in loops."""
    found = [nan]
    for threshold in [step / 100 for step in range(1, 101)]:
        precisions, recalls = [], []
        for scores, labels in zip(p, y, strict=True):
            true = {c for c in range(len(labels)) if labels[c] == 1}
            chosen = {c for c in range(len(labels)) if scores[c] >= threshold and not isnan(labels[c])}
            if true:
                recalls.append(len(true & chosen) / len(true))
                if chosen:
                    precisions.append(len(true & chosen) / len(chosen))
        if recalls:
            precision, recall = float(np.mean(precisions)) if precisions else 0.0, float(np.mean(recalls))
            found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return float(np.nanmax(found)) if len(found) > 1 else nan


ORACLES = {"class": oracle_class, "value": oracle_value, "labels": oracle_labels}


@settings(max_examples=40)
@given(st.sampled_from(sorted(TASKS)), st.integers(1, 40), st.integers(2, 5), seeds)
def test_every_number_is_that_of_scikit_learn(name: str, examples: int, width: int, seed: int) -> None:
    task = TASKS[name]
    predictions, targets = drawn(task, np.random.default_rng(seed), examples, width)
    found = measure(task, predictions, targets, () if task.kind == "value" else names(width))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, where one class occurs
        expected = ORACLES[task.kind](task, predictions, targets)
    assert found.keys() == expected.keys() == set(measures(task))
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(max_examples=40)
@given(st.sampled_from(sorted(TASKS)), st.integers(1, 30), seeds)
def test_counts_are_repeated_examples(name: str, examples: int, seed: int) -> None:
    task, rng = TASKS[name], np.random.default_rng(seed)
    predictions, targets = drawn(task, rng, examples, 3)
    classes = () if task.kind == "value" else names(3)
    counts = rng.integers(0, 4, examples)
    repeated = np.repeat(np.arange(examples), counts)
    rows = [np.arange(targets.offsets[i], targets.offsets[i + 1]) for i in repeated]
    chosen = np.concatenate([np.empty(0, int), *rows])
    again = Targets(targets.values[chosen], np.append(0, np.cumsum([len(row) for row in rows], dtype=int)))
    found = Meter(task, predictions, targets, classes)(counts.astype(float))
    assert found == pytest.approx(measure(task, predictions[chosen], again, classes), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", TASKS)
def test_undefined_numbers_are_nan(name: str) -> None:
    """Without a warning, which pytest would turn into an error."""
    task, rng = TASKS[name], np.random.default_rng(0)
    predictions, targets = drawn(task, rng, 30, 2)
    classes = () if task.kind == "value" else names(2)
    missing = np.full_like(targets.values, MISSING if task.kind == "class" else nan)
    assert all(map(isnan, measure(task, predictions, Targets(missing, targets.offsets), classes).values()))
    predictions[targets.known().argmax()] = nan
    assert all(map(isnan, measure(task, predictions, targets, classes).values()))
    none = Targets(targets.values[:0], np.zeros(1, int))
    assert all(map(isnan, measure(task, predictions[:0], none, classes).values()))


def test_one_class_and_constant_values() -> None:
    """Accuracy and errors are defined; what compares classes or orders rows is not."""
    ten = np.arange(11)
    alone = measure(TASKS["sequence-class"], np.tile([0.25, 0.75], (10, 1)), Targets(np.ones(10, int), ten), names(2))
    assert {name for name, value in alone.items() if isnan(value)} == {"mcc", "auroc", "auprc"}
    majority = measure(TASKS["sequence-class"], np.tile([0.25, 0.75], (10, 1)), Targets(ten[:10] % 2, ten), names(2))
    assert majority["mcc"] == 0
    assert majority["auroc"] == 0.5
    rising = Targets(np.arange(10.0), ten)
    mean = measure(TASKS["sequence-value"], np.full(10, 4.5), rising, ())
    assert {name for name, value in mean.items() if isnan(value)} == {"spearman", "ndcg", "top_recall", "pearson"}
    assert mean["r2"] == 0
    flat = measure(TASKS["sequence-value"], np.arange(10.0), Targets(np.full(10, 0.1), ten), ())
    assert {name for name, value in flat.items() if not isnan(value)} == {"rmse", "mse", "mae"}
    huge = measure(TASKS["sequence-value"], np.arange(10.0) * 1e200, rising, ())
    assert huge["spearman"] == pytest.approx(1)
    assert huge["pearson"] == pytest.approx(1)


def test_probabilities_of_zero_have_a_finite_loss() -> None:
    targets = Targets(np.array([0, 1]), np.arange(3))
    found = measure(TASKS["sequence-class"], np.array([[0.0, 1.0], [0.0, 1.0]], np.float32), targets, names(2))
    assert found["log_loss"] == pytest.approx(-np.log(np.finfo(np.float64).eps) / 2)


def test_numbers_can_be_chosen() -> None:
    predictions, targets = drawn(TASKS["residue-class"], np.random.default_rng(1), 20, 3)
    every = measure(TASKS["residue-class"], predictions, targets, names(3))
    some = Meter(TASKS["residue-class"], predictions, targets, names(3), {"mcc", "auroc"})(np.ones(20))
    assert some == {name: every[name] for name in ("mcc", "auroc")}


def test_wrong_shapes_are_refused() -> None:
    targets = Targets(np.array([0, 1]), np.arange(3))
    with pytest.raises(ValueError, match=r"\[2, 3\], must have \[2, 2\]"):
        measure(TASKS["sequence-class"], np.zeros((2, 3)), targets, names(2))


def test_each_task_selects_by_one_of_its_numbers() -> None:
    assert SELECTED.keys() == TASKS.keys()
    for name, (number, higher) in SELECTED.items():
        assert number in measures(TASKS[name])
        assert higher
    assert "accuracy_per_protein" not in measures(TASKS["sequence-class"])


@settings(max_examples=30)
@given(st.integers(1, 60), seeds)
def test_percentiles_are_those_of_numpy(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, counts = rng.integers(0, 9, rows) / 3, rng.integers(0, 4, rows)
    counts[0] += 1
    for percent in (10, 25, 50, 100):
        threshold = np.percentile(np.repeat(scores, counts), 100 - percent)
        found = Ranking(scores).best(counts.astype(float), percent)
        assert found[counts > 0].tolist() == (scores >= threshold)[counts > 0].tolist()


@settings(max_examples=40)
@given(st.integers(2, 7), st.sampled_from([10, 30, 50]), seeds)
def test_top_recall_is_the_mean_over_all_orders_of_equal_predictions(rows: int, percent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, measured = rng.integers(0, 3, rows) / 2, rng.integers(0, 5, rows) / 4
    assume(np.ptp(predicted) > 0)
    assume(np.ptp(measured) > 0)
    best = set(np.flatnonzero(measured >= np.percentile(measured, 100 - percent)).tolist())
    orders = [sorted(order, key=lambda row: -predicted[row]) for order in permutations(range(rows))]  # a stable sort
    expected = np.mean([len(best & set(order[: len(best)])) / len(best) for order in orders])
    agreement = RankAgreement(predicted, measured)
    assert agreement.expected_top_recall(np.ones(rows), percent) == pytest.approx(expected)


def test_top_recall_of_equal_and_of_different_predictions() -> None:
    """Nearly constant predictions find what chance finds; without equal values it is ProteinGym's number."""
    rng = np.random.default_rng(3)
    measured, counts = rng.permutation(200) / 7, np.ones(200)
    nearly_constant = np.where(measured == measured.min(), -1.0, 0.0)
    assert RankAgreement(nearly_constant, measured).top_recall(counts, 10) == 1
    assert RankAgreement(nearly_constant, measured).expected_top_recall(counts, 10) == pytest.approx(20 / 199)
    assert RankAgreement(measured, measured).expected_top_recall(counts, 10) == 1
    for rows in (5, 10, 11, 99, 200):
        agreement = RankAgreement(rng.permutation(rows) / 3, rng.permutation(rows) / 3)
        ones = np.ones(rows)
        assert agreement.expected_top_recall(ones, 10) == pytest.approx(agreement.top_recall(ones, 10))


def test_confusion_and_reliability() -> None:
    rng = np.random.default_rng(5)
    predictions, targets = drawn(TASKS["residue-class"], rng, 40, 4)
    known = targets.known()
    y, q = targets.values[known], predictions[known]
    table = confusion(predictions, targets)
    assert table.tolist() == metrics.confusion_matrix(y, q.argmax(1), labels=range(4)).tolist()
    found = reliability(predictions, targets, 8)
    right, means = calibration.calibration_curve(q.argmax(1) == y, q.max(1), n_bins=8)
    filled = found.rows > 0
    assert found.probability[filled] == pytest.approx(means)
    assert found.right[filled] == pytest.approx(right)
    assert np.isnan(found.right[~filled]).all()
    assert found.rows.sum() == len(y)
    assert found.error == pytest.approx(np.sum(np.abs(right - means) * found.rows[filled]) / len(y))


def test_reliability_of_labels_counts_each_label() -> None:
    labels = Targets(np.array([[1.0, 0.0], [nan, 1.0]]), np.arange(3))
    found = reliability(np.array([[1.0, 0.1], [0.3, 0.8]]), labels, 2)
    assert found.rows.tolist() == [1, 2]
    assert found.probability == pytest.approx([0.1, 0.9])
    assert found.right == pytest.approx([0, 1])
    assert found.error == pytest.approx((0.1 + 2 * 0.1) / 3)
    assert isnan(reliability(np.zeros((0, 2)), Targets(np.zeros((0, 2)), np.zeros(1, int))).error)


def test_f1max_takes_precision_over_proteins_with_a_prediction() -> None:
    """Of two proteins with a label one has no prediction: precision 1, recall 1/2. The third has no label."""
    labels = Targets(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), np.arange(4))
    predictions = np.array([[0.9, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert measure(TASKS["multilabel"], predictions, labels, names(2))["f1max"] == pytest.approx(2 / 3)
