"""Differences of two models on the same resamples, and published figures by the names of models."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protea.checkpoints.hub import architecture, published_models
from protea.compare.measured import Items
from protea.compare.published import FIGURES, NAMES, called, figures, published_name
from protea.finetune import flip
from protea.models.esm2 import ESM2Config
from protea.models.registry import build

VALUES = st.dictionaries(st.sampled_from("abcdefgh"), st.one_of(st.floats(-5, 5), st.just(math.nan)), max_size=8)


@settings(max_examples=25)
@given(VALUES, VALUES, st.integers(0, 9))
def test_differences_are_on_common_items(one: dict[str, float], two: dict[str, float], seed: int) -> None:
    ours, theirs = Items.of_values(one), Items.of_values(two)
    found, count = ours.minus(theirs, seed)
    names = [name for name in sorted(one) if name in two and not math.isnan(one[name] + two[name])]
    assert count == len(names)
    back, _ = theirs.minus(ours, seed)
    if not names:
        assert all(math.isnan(value) for value in (*found[:3], found.flips))
        return
    apart = np.array([one[name] - two[name] for name in names])
    assert found.value == pytest.approx(apart.mean(), abs=1e-9)
    assert back.value == pytest.approx(-found.value, abs=1e-9)
    if len(names) > 1:
        draws = np.random.default_rng(seed)
        means = [apart[draws.integers(0, len(names), len(names))].mean() for _ in range(1000)]
        assert found[1:3] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=1e-9)
        assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    same, _ = ours.minus(ours, seed)
    assert (same.value, same.flips) == (0, 1)


def test_a_weighted_number() -> None:
    parts = {"a": (4.0, 2.0), "b": (3.0, 1.0), "c": (1.0, 4.0)}
    value, low, high = Items(parts, math.exp).interval()
    assert value == pytest.approx(math.exp(8 / 7))
    assert math.exp(1 / 4) <= low < value < high <= math.exp(3)
    assert Items({"a": (1.0, 1.0)}).interval()[0] == 1
    assert math.isnan(Items({}).interval()[0])
    other = Items(parts | {"a": (4.0, 3.0), "b": (2.0, 1.0)}, math.exp)
    difference, count = Items(parts, math.exp).minus(other)
    assert count == 2  # "a" weighs differently
    assert difference.value == pytest.approx(math.exp(4 / 5) - math.exp(3 / 5))
    difference, count = Items(parts, math.exp).minus(Items({"a": (4.0, 3.0), "d": (4.0, 3.0)}, math.exp))
    assert math.isnan(difference.value)
    assert count == 0


def test_published_figures_are_of_known_models() -> None:
    with FIGURES.open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    for row in rows:
        assert row["model"] in published_models()
        assert row["source"]
        assert row["differs"]
        assert (row["benchmark"], row["number"]) in {("contacts", "long P@L"), ("perplexity", "perplexity")}
    with NAMES.open() as stream:
        names = list(csv.DictReader(stream, delimiter="\t"))
    assert {row["model"] for row in names} <= published_models().keys()
    with flip.PUBLISHED.open() as stream:
        columns = next(csv.reader(stream, delimiter="\t"))
    assert {row["flip"] for row in names} - {""} == set(columns) & {"ESM-1nv", "8M", "35M", "150M", "650M", "3B", "15B"}
    assert [figure.value for figure in figures("esm2_t6_8M_UR50D", "contacts", "long P@L")] == [0.159, 0.098, 0.157]
    assert called("carp_640M", "proteingym") == "CARP (640M)"
    assert figures(None, "contacts", "long P@L") == []
    assert called(None, "flip") == ""


def test_a_checkpoint_is_known_by_its_name_and_shape() -> None:
    name = "esm2_t6_8M_UR50D"
    same = architecture(published_models()[name])
    other = build(ESM2Config(num_hidden_layers=2, hidden_size=40, num_attention_heads=5, intermediate_size=160))
    assert published_name(name, same) == name
    assert published_name(f"facebook/{name}", same) == name
    assert published_name(f"models/{name}.pt", same) == name
    assert published_name(f"models/{name}", other) is None
    assert published_name("models/mine", same) is None
