"""The bootstrap over proteins and clusters, beside a plain loop that repeats examples."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest

from protea.finetune.bootstrap import bootstrap
from protea.finetune.measures import measure
from protea.finetune.tasks import MISSING, TASKS, Floats, Ints, Targets


def residues(rng: np.random.Generator, proteins: int) -> tuple[Floats, Floats, Targets]:
    """Probabilities of three classes from a better and a worse method."""
    lengths = rng.integers(3, 12, proteins)
    truth = rng.integers(0, 3, lengths.sum())
    logits = [np.eye(3)[truth] * size + rng.normal(size=(len(truth), 3)) for size in (2, 1)]
    good, bad = (np.exp(values) / np.exp(values).sum(1, keepdims=True) for values in logits)
    return good, bad, Targets(truth, np.append(0, np.cumsum(lengths)))


def repeated(targets: Targets, examples: Ints) -> tuple[Ints, Targets]:
    rows = [np.arange(targets.offsets[i], targets.offsets[i + 1]) for i in examples]
    chosen = np.concatenate(rows)
    return chosen, Targets(targets.values[chosen], np.append(0, np.cumsum([len(row) for row in rows])))


@pytest.mark.parametrize("clusters", [False, True])
def test_samples_are_those_of_a_plain_loop(clusters: bool) -> None:
    good, bad, targets = residues(np.random.default_rng(0), 14)
    groups = np.arange(14) // 3 * 7 if clusters else np.arange(14)
    found = bootstrap(
        TASKS["residue-class"],
        {"good": good, "bad": bad},
        targets,
        ("E", "H", "L"),
        groups if clusters else None,
        resamples=25,
        seed=3,
    )
    generator, numbers = np.random.default_rng(3), np.unique(groups)
    assert found.groups == len(numbers)
    for resample in range(25):
        drawn = numbers[generator.integers(0, len(numbers), len(numbers))]
        chosen, again = repeated(targets, np.concatenate([np.flatnonzero(groups == number) for number in drawn]))
        for method, predictions in (("good", good), ("bad", bad)):
            expected = measure(TASKS["residue-class"], predictions[chosen], again, ("E", "H", "L"))
            sample = {name: values[resample] for name, values in found.samples[method].items()}
            assert sample == pytest.approx(expected, abs=1e-9)


def test_intervals_and_paired_differences() -> None:
    good, bad, targets = residues(np.random.default_rng(1), 40)
    found = bootstrap(
        TASKS["residue-class"], {"good": good, "bad": bad}, targets, ("E", "H", "L"), resamples=400, names=["accuracy"]
    )
    interval, difference = found.interval("good", "accuracy"), found.difference("good", "bad", "accuracy")
    samples = found.samples["good"]["accuracy"]
    assert (interval.low, interval.high) == tuple(np.percentile(samples, (2.5, 97.5)))
    assert interval.low < interval.value < interval.high
    paired = samples - found.samples["bad"]["accuracy"]
    assert (difference.low, difference.high) == tuple(np.percentile(paired, (2.5, 97.5)))
    assert 0 < difference.low < difference.value
    assert difference.flips == 0
    backwards = found.difference("bad", "good", "accuracy")
    assert (backwards.value, backwards.low) == pytest.approx((-difference.value, -difference.high))
    same = found.difference("good", "good", "accuracy")
    assert (same.value, same.flips) == (0, 1)
    again = bootstrap(TASKS["residue-class"], {"good": good}, targets, ("E", "H", "L"), resamples=400)
    assert (again.samples["good"]["accuracy"] == samples).all()


def test_intervals_cover_the_truth() -> None:
    """95 % intervals of an accuracy, with proteins that differ; intervals over residues would be far too narrow."""
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(60):
        hits = (rng.random((40, 30)) < rng.beta(4, 1, (40, 1))).ravel()
        targets = Targets(np.zeros(1200, int), np.arange(0, 1201, 30))
        predictions = np.stack([hits, ~hits], 1).astype(float)
        found = bootstrap(
            TASKS["residue-class"],
            {"a": predictions},
            targets,
            ("a", "b"),
            resamples=100,
            seed=trial,
            names=["accuracy"],
        )
        interval = found.interval("a", "accuracy")
        inside += interval.low <= 0.8 <= interval.high
    assert 0.86 < inside / 60 < 0.995


def test_undefined_resamples_are_left_out_and_counted() -> None:
    """Of three proteins one has the second class: a resample without it has no AUROC."""
    targets = Targets(np.array([0, 0, 1]), np.arange(4))
    predictions = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    found = bootstrap(TASKS["sequence-class"], {"a": predictions}, targets, ("a", "b"))
    interval = found.interval("a", "auroc")
    missing = np.isnan(found.samples["a"]["auroc"])
    assert interval.undefined == missing.sum()
    assert 250 < interval.undefined < 420  # (2/3)³ + (1/3)³ of 1,000
    assert (interval.low, interval.high) == (0, 1)
    assert found.difference("a", "a", "auroc").undefined == interval.undefined


def test_proteins_without_a_label_are_not_drawn() -> None:
    good, _, targets = residues(np.random.default_rng(4), 10)
    values = targets.values.copy()
    values[: targets.offsets[4]] = MISSING
    partly = bootstrap(
        TASKS["residue-class"], {"a": good}, Targets(values, targets.offsets), ("E", "H", "L"), resamples=9
    )
    first = targets.offsets[4]
    rest = Targets(targets.values[first:], targets.offsets[4:] - first)
    alone = bootstrap(TASKS["residue-class"], {"a": good[first:]}, rest, ("E", "H", "L"), resamples=9)
    assert partly.groups == alone.groups == 6
    assert partly.interval("a", "mcc") == alone.interval("a", "mcc")


def test_one_group_has_no_interval() -> None:
    good, _, targets = residues(np.random.default_rng(5), 5)
    found = bootstrap(TASKS["residue-class"], {"a": good}, targets, ("E", "H", "L"), np.zeros(5, int), resamples=5)
    interval = found.interval("a", "accuracy")
    assert interval.value > 0
    assert isnan(interval.low)
    assert isnan(interval.high)
    nothing = Targets(np.full_like(targets.values, MISSING), targets.offsets)
    empty = bootstrap(TASKS["residue-class"], {"a": good}, nothing, ("E", "H", "L"), resamples=5)
    assert empty.interval("a", "accuracy") == pytest.approx((nan, nan, nan, 5), nan_ok=True)
    assert isnan(empty.difference("a", "a", "accuracy").flips)
