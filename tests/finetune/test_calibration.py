"""Temperatures beside SciPy's optimiser, and the coverage of intervals and sets by simulation."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax

from messages import check_message
from protea.errors import DataError, UsageError
from protea.finetune.calibration import Calibration, calibrate
from protea.finetune.tasks import MISSING, TASKS, Floats, Targets

VALUE, CLASS, RESIDUE = TASKS["sequence-value"], TASKS["sequence-class"], TASKS["residue-class"]
LABELS, RESIDUE_VALUE = TASKS["multilabel"], TASKS["residue-value"]


def single(values: Floats) -> Targets:
    """One row for each example."""
    return Targets(values, np.arange(len(values) + 1))


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 5))
def test_temperature_is_that_of_an_optimiser(seed: int, true: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(400, 4)) * 2
    truth = np.array([rng.choice(4, p=row) for row in softmax(logits / true, 1)])
    targets = np.where(rng.random(400) < 0.1, MISSING, truth)
    found = calibrate(CLASS, softmax(logits, 1), single(targets))
    rows = np.flatnonzero(targets != MISSING)

    def loss(logarithm: float) -> float:
        truth = (len(rows) * np.eye(4)[targets[rows]] + 1) / (len(rows) + 4)
        return -float((log_softmax(logits[rows] / np.exp(logarithm), 1) * truth).sum(1).mean())

    best = np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).x)
    assert found.temperature == pytest.approx(best, rel=1e-4)
    assert not found.notes
    assert found.probabilities(softmax(logits, 1)) == pytest.approx(softmax(logits / found.temperature, 1))


def test_temperature_of_labels() -> None:
    """One temperature for the logits of all labels; missing ones are left out."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(300, 5)) * 3
    truth = (rng.random((300, 5)) < expit(logits / 2.5)).astype(float)
    truth[rng.random((300, 5)) < 0.2] = nan
    known = ~np.isnan(truth)
    found = calibrate(LABELS, expit(logits), single(truth))

    def loss(logarithm: float) -> float:
        signed = (np.where(truth == 1, 1, -1) * logits / np.exp(logarithm))[known]
        wrong = 1 / (known.sum() + 2)
        return float(((1 - wrong) * np.logaddexp(0, -signed) + wrong * np.logaddexp(0, signed)).mean())

    best = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    assert found.temperature == pytest.approx(best, rel=1e-4)
    assert found.probabilities(expit(logits)) == pytest.approx(expit(logits / found.temperature))
    assert not found.notes


def test_temperatures_that_do_not_exist_stay_1() -> None:
    def note(predictions: Floats, truth: list[int]) -> str:
        calibration = calibrate(CLASS, predictions, single(np.array(truth, int)), alpha=0.5)
        assert calibration.temperature == 1
        assert calibration.probabilities(predictions) is predictions
        return next(note for note in calibration.notes if "probabilities" in note)

    certain = np.array([[0.9, 0.1], [0.2, 0.8]])
    check_message("finetune.temperature-right", note(np.array([[0.5001, 0.4999]] * 3), [0, 0, 0]))
    check_message("finetune.temperature-wrong", note(certain, [1, 0]))
    check_message("finetune.temperature-equal", note(np.full((2, 2), 0.5), [0, 1]))
    check_message("finetune.temperature-nothing", note(certain, [MISSING, MISSING]))
    assert "nothing to calibrate" in note(np.full((2, 2), nan), [0, 1])


def test_few_right_predictions_do_not_make_certainties() -> None:
    """Of n rows that are all right and alike, the next is right with (n + 1) / (n + 2): the rule of succession."""
    for n in (2, 10, 1000):
        for sure in (0.9, 1.0):
            predictions = np.tile([sure, 1 - sure], (n, 1))
            found = calibrate(CLASS, predictions, single(np.zeros(n, int)), alpha=0.5)
            assert found.probabilities(predictions)[0, 0] == pytest.approx((n + 1) / (n + 2))


def test_one_row_for_each_protein_gives_the_usual_quantile() -> None:
    rng = np.random.default_rng(2)
    for n in (9, 10, 29, 99, 250):
        predictions, truth = rng.normal(size=(2, n))
        scores = np.sort(np.abs(predictions - truth))
        for alpha in (0.1, 0.2, 0.5):
            rank = int(np.ceil(round((n + 1) * (1 - alpha), 9)))
            assert calibrate(VALUE, predictions, single(truth), alpha=alpha).threshold == scores[rank - 1]


def coverage_of_values(n: int, rng: np.random.Generator) -> float:
    truth, predictions = rng.normal(size=(2, n + 400))
    calibration = calibrate(VALUE, predictions[:n], single(truth[:n]))
    low, high = calibration.intervals(predictions[n:]).T
    return float(np.mean((low <= truth[n:]) & (truth[n:] <= high)))


def coverage_of_classes(n: int, rng: np.random.Generator) -> float:
    """Overconfident probabilities, so that their temperature differs from 1."""
    logits = rng.normal(size=(n + 400, 4)) * 1.5
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    probabilities = softmax(2 * logits, 1)
    calibration = calibrate(CLASS, probabilities[:n], single(truth[:n]))
    return float(calibration.sets(probabilities[n:])[np.arange(400), truth[n:]].mean())


def proteins(n: int, rng: np.random.Generator) -> tuple[Floats, Targets]:
    """Residues of three classes; long proteins are easy, so residues pooled without weights look easy."""
    easy = rng.random(n)
    lengths = 3 + (57 * easy**4).astype(int)
    truth = rng.integers(0, 3, lengths.sum())
    logits = rng.normal(size=(len(truth), 3)) + 3 * np.repeat(easy, lengths)[:, None] * np.eye(3)[truth]
    return softmax(logits, 1), Targets(truth, np.append(0, np.cumsum(lengths)))


def by_protein(inside: Floats, targets: Targets) -> float:
    """The chance that a random residue of a random protein is inside."""
    return float(np.mean(np.add.reduceat(inside, targets.offsets[:-1]) / np.diff(targets.offsets)))


def coverage_of_residues(n: int, rng: np.random.Generator) -> float:
    calibration = calibrate(RESIDUE, *proteins(n, rng))
    probabilities, targets = proteins(120, rng)
    inside = calibration.sets(probabilities)[np.arange(len(targets.values)), targets.values]
    return by_protein(inside.astype(float), targets)


def coverage_of_residue_values(n: int, rng: np.random.Generator) -> float:
    def drawn(count: int) -> tuple[Floats, Targets]:
        lengths = rng.integers(1, 60, count)
        noise = np.repeat(rng.gamma(2, 10 / (10 + lengths)), lengths)  # short proteins are noisy
        offsets = np.append(0, np.cumsum(lengths))
        return np.zeros(len(noise)), Targets(rng.normal(size=len(noise)) * noise, offsets)

    calibration = calibrate(RESIDUE_VALUE, *drawn(n))
    predictions, targets = drawn(120)
    low, high = calibration.intervals(predictions).T
    return by_protein(((low <= targets.values) & (targets.values <= high)).astype(float), targets)


@pytest.mark.parametrize(
    "coverage", [coverage_of_values, coverage_of_classes, coverage_of_residues, coverage_of_residue_values]
)
def test_coverage(coverage: Callable[[int, np.random.Generator], float]) -> None:
    rng = np.random.default_rng(4)
    found = np.mean([coverage(99, rng) for _ in range(80)])
    assert found == pytest.approx(0.9, abs=0.02)


def test_residues_without_weights_would_not_cover() -> None:
    """The simulation can tell: each residue as a unit of its own promises too much."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(40):
        probabilities, targets = proteins(99, rng)
        calibration = calibrate(CLASS, probabilities, single(targets.values))
        probabilities, targets = proteins(120, rng)
        inside = calibration.sets(probabilities)[np.arange(len(targets.values)), targets.values]
        found.append(by_protein(inside.astype(float), targets))
    assert np.mean(found) < 0.87


def test_each_cluster_weighs_the_same() -> None:
    """Copies of proteins in a cluster change nothing."""
    rng = np.random.default_rng(6)
    predictions, truth = rng.normal(size=(2, 30))
    copies = rng.integers(1, 5, 30)
    again = np.repeat(np.arange(30), copies)
    clustered = calibrate(VALUE, predictions[again], single(truth[again]), groups=again)
    assert clustered == calibrate(VALUE, predictions, single(truth))
    assert clustered.groups == 30


def test_too_few_proteins_are_said() -> None:
    few = np.arange(8.0)
    values = calibrate(VALUE, few, single(few + 1))
    assert values.threshold == inf
    assert values.intervals(few)[0].tolist() == [-inf, inf]
    check_message("finetune.too-few-proteins", *values.notes)
    assert calibrate(VALUE, np.arange(9.0), single(np.arange(9.0) + 1)).threshold == 1
    classes = calibrate(
        CLASS, np.full((4, 2), 0.5), single(np.array([0, 1, 0, MISSING])), groups=np.array([0, 1, 1, 2]), noun="cluster"
    )
    assert classes.groups == 2
    assert classes.sets(np.array([[0.0, 1.0]])).all()
    assert "9 labelled clusters" in classes.notes[-1]
    broken = calibrate(VALUE, np.full(20, nan), single(np.arange(20.0)))
    assert broken.threshold == inf
    check_message("finetune.calibration-not-finite", *broken.notes)


def test_numbers_survive_a_file() -> None:
    rng = np.random.default_rng(7)
    probabilities, targets = proteins(30, rng)
    for calibration in (
        calibrate(RESIDUE, probabilities, targets, alpha=0.2),
        calibrate(VALUE, np.zeros(3), single(np.ones(3))),
        Calibration(LABELS, 1.5),
    ):
        read = Calibration.from_numbers(
            calibration.task, json.loads(json.dumps(calibration.numbers(), allow_nan=False))
        )
        assert read.numbers() == calibration.numbers()
        assert read.threshold == calibration.threshold
    with pytest.raises(DataError) as caught:
        Calibration.from_numbers(VALUE, {"threshold": 1.0})
    check_message("finetune.calibration-numbers", caught.value)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, nan])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(UsageError, match=f"alpha: {alpha}"):
        calibrate(VALUE, np.zeros(3), single(np.ones(3)), alpha=alpha)
