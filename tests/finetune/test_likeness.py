"""Identities against a plain count, an alignment of another program, and MMseqs2; clusters against a plain search."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from messages import check_message
from protea.finetune import likeness
from protea.finetune.kmers import Words
from protea.finetune.labelled_data import DataFiles, read_labelled
from protea.finetune.likeness import Likeness, clusters, leak, nearest
from protea.finetune.splits import parse, split
from protea.finetune.tasks import TASKS, Labelled, LabelledExample

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
FLIP = Path(__file__).parents[3] / "shared" / "data" / "flip"
needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
needs_flip = pytest.mark.skipif(not FLIP.is_dir(), reason=f"{FLIP} is not there")

WAYS = [pytest.param("mmseqs", marks=needs_mmseqs), "words"]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without MMseqs2."""
    monkeypatch.setattr(likeness, "_PROGRAM", "mmseqs-that-is-not-installed")


def protein(rng: random.Random, low: int = 80, high: int = 200) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def relative(rng: random.Random, text: str, identity: float) -> str:
    """Substitutions at random places, and an end that is a little longer or shorter."""
    changed = "".join(rng.choice(LETTERS.replace(x, "")) if rng.random() > identity else x for x in text)
    return changed + protein(rng, 1, 5) if rng.random() < 0.5 else changed[: -rng.randint(1, 5)]


def singles(texts: Iterable[str]) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]


# ---- variants of one protein ----
@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(6, 40), st.integers(1, 30), st.integers(1, 30))
def test_variants_are_compared_position_by_position(seed: int, length: int, queries: int, training: int) -> None:
    rng = random.Random(seed)
    wild = protein(rng, length, length)
    texts = ["".join(x if rng.random() < 0.8 else rng.choice(LETTERS) for x in wild) for _ in range(queries + training)]
    assume(likeness._are_variants(sorted(set(texts))) and likeness._are_variants(texts))
    asked, known = texts[:queries], texts[queries:]
    found = nearest(singles(asked), singles(known))
    expected = [max(sum(a == b for a, b in zip(x, y, strict=True)) / length for y in known) for x in asked]
    assert found.identity == pytest.approx(expected)
    threshold = rng.choice([0.5, 0.8, 0.95])
    same = np.array(
        [[sum(a == b for a, b in zip(x, y, strict=True)) >= threshold * length for y in texts] for x in texts]
    )
    check_partition(clusters(singles(texts), threshold), same)


def check_partition(found: np.ndarray, same: np.ndarray) -> None:
    """The connected components of a relation, numbered by first occurrence."""
    _, expected = connected_components(coo_array(same), directed=False)
    seen: dict[int, int] = {}
    assert found.tolist() == [seen.setdefault(number, len(seen)) for number in expected.tolist()]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25))
def test_joined_numbers_are_connected_components(edges: list[tuple[int, int]]) -> None:
    one, other = (np.array([edge[side] for edge in edges], np.int64) for side in (0, 1))
    same = np.eye(20, dtype=bool)
    same[one, other] = True
    labels = likeness.joined(20, one, other)
    check_partition(np.unique(labels, return_inverse=True)[1], same)


# ---- proteins ----
@pytest.mark.parametrize("way", WAYS)
def test_relatives_are_found(way: str, request: pytest.FixtureRequest) -> None:
    if way == "words":
        request.getfixturevalue("without")
    rng = random.Random(1)
    families = [protein(rng) for _ in range(12)]
    asked = [relative(rng, text, 0.8) for text in families]
    unrelated = [protein(rng) for _ in range(12)]
    found = nearest(singles([*asked, *unrelated, families[0]]), singles(families))
    assert found.identity[:12] == pytest.approx(np.full(12, 0.8), abs=0.13)
    assert found.identity[12:24].tolist() == [0] * 12
    assert found.identity[24] == 1
    assert ("MMseqs2 is not installed" in found.method) == (way == "words")
    numbers = clusters(singles([*families, *asked, *unrelated, families[3]]), 0.5)
    assert numbers.tolist() == [*range(12), *range(12), *range(12, 24), 3]


@pytest.mark.parametrize("way", WAYS)
def test_pairs(way: str, request: pytest.FixtureRequest) -> None:
    """A pair is alike to another if both proteins are, in either order."""
    if way == "words":
        request.getfixturevalue("without")
    rng = random.Random(2)
    a, b, c = (protein(rng, 120) for _ in range(3))
    near = relative(rng, a, 0.9)
    found = nearest([(b, near), (near, c), (a, b), (a, a)], [(a, b), (c, c)])
    assert found.identity[0] == pytest.approx(0.9, abs=0.1)
    assert found.identity[1:].tolist() == [0, 1, 0]
    assert clusters([(a, b), (b, near), (a, c), (b, a)], 0.5).tolist() == [0, 0, 1, 0]


@needs_mmseqs
def test_peptides_too_short_for_mmseqs() -> None:
    rng = random.Random(3)
    known = [protein(rng, 12, 20) for _ in range(50)]
    asked = [known[0][:-1] + "W", known[1], protein(rng, 12, 20)]
    found = nearest(singles(asked), singles(known))
    assert found.identity[0] > 0.8
    assert found.identity[1:].tolist() == [1, 0]
    check_message("likeness.short", found.method.replace(found.method.split()[1], "VERSION"))


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_compare(way: str, request: pytest.FixtureRequest) -> None:
    if way == "words":
        request.getfixturevalue("without")
    assert nearest([], singles(["MKTAYIAK"])).identity.tolist() == []
    assert nearest(singles(["MKTAYIAK"]), []).identity.tolist() == [0]
    assert clusters([], 0.3).tolist() == []
    assert clusters(singles(["MKT", "MKT"]), 0.3).tolist() == [0, 0]


def test_words_of_odd_letters() -> None:
    words = Words(["MKTAYIAKQRMKV-.", "MK", ""])
    assert words.identity("MKTAYIAKQRMKV--").tolist() == pytest.approx([1, 0, 0], abs=0.1)
    assert words.identity("").tolist() == [0, 0, 0]


# ---- splits by clusters ----
@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("words", "cluster:0.4"),
        ("words", "cluster-kfold:3:0.4"),
        pytest.param("mmseqs", "cluster:0.4", marks=needs_mmseqs),
        pytest.param("mmseqs", "cluster-kfold:3:0.4", marks=[needs_mmseqs, pytest.mark.long]),
    ],
)
def test_nothing_leaks_from_a_split_by_clusters(way: str, how: str, request: pytest.FixtureRequest) -> None:
    if way == "words":
        request.getfixturevalue("without")
    rng = random.Random(4)
    texts = [relative(rng, text, 0.75) for text in (protein(rng) for _ in range(25)) for _ in range(4)]
    examples = [LabelledExample(str(place), (text,), "", str(place)) for place, text in enumerate(texts)]
    targets = [np.array([place], np.float64) for place in range(len(texts))]
    for fold in split(Labelled(TASKS["sequence-value"], (), examples, [*targets]), parse(how), 0):
        parts = {
            name: [example.sequences for example in fold.part(name).examples]
            for name in ("train", "validation", "test")
        }
        assert all(parts.values())
        for name in ("validation", "test"):
            found = nearest(parts[name], parts["train"])
            assert leak(found, 0.4).startswith("none of")
        assert way == "words" or any("25 clusters" in note for note in fold.notes)


def test_leak_in_words() -> None:
    check_message("likeness.leak", leak(Likeness(np.array([0.2, 0.31, 0.5, 1.0]), np.zeros(4, np.int64), "some way")))
    check_message("likeness.no-leak", leak(Likeness(np.array([0.2, 0.3]), np.zeros(2, np.int64), "some way")))


# ---- real proteins ----
def deeploc() -> list[str]:
    path = FLIP / "scl" / "deeploc2_fold1.csv.gz"
    texts = [example.sequences[0] for example in read_labelled(DataFiles(data=(str(path),))).examples]
    return random.Random(0).sample(texts, 1200)


@needs_flip
@needs_mmseqs
def test_the_estimate_agrees_with_mmseqs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean error 0.08 above 40 % identity, and the same answer to "50 % identical?" for 9 of 10 proteins."""
    texts = deeploc()
    asked, known = singles(texts[:250]), singles(texts[250:])
    exact = nearest(asked, known).identity
    monkeypatch.setattr(likeness, "_PROGRAM", "mmseqs-that-is-not-installed")
    estimate = nearest(asked, known).identity
    near = exact >= 0.4
    assert near.sum() > 40
    assert np.abs(estimate - exact)[near].mean() < 0.08
    assert ((estimate >= 0.5) == (exact >= 0.5)).mean() > 0.9


@needs_flip
@needs_mmseqs
@pytest.mark.long
def test_real_clusters_do_not_leak() -> None:
    """The search among fewer sequences may still find a pair or two at the threshold."""
    texts = deeploc()[:500]
    examples = [LabelledExample(str(place), (text,), "", str(place)) for place, text in enumerate(texts)]
    targets = [np.array([place], np.float64) for place in range(len(texts))]
    (fold,) = split(Labelled(TASKS["sequence-value"], (), examples, [*targets]), parse("cluster:0.3"), 0)
    test, train = ([example.sequences for example in fold.part(name).examples] for name in ("test", "train"))
    assert (nearest(test, train).identity >= 0.3).sum() <= 2
