"""Properties that every split has, the words for splits, and what is said about data that cannot be split."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from messages import check_message
from protea.errors import DataError, UsageError
from protea.finetune.splits import Split, calibration, inner_folds, parse, split
from protea.finetune.tasks import TASKS, Labelled, LabelledExample, Part

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
RANDOM, GIVEN, FOLDS = parse("random"), parse("given"), parse("kfold:3")


def labelled(
    sequences: list[Any], targets: list[float], parts: list[Part] | None = None, task: str = "sequence-value"
) -> Labelled:
    names = parts or [""] * len(sequences)
    examples = [
        LabelledExample(f"p{place}", (text,) if isinstance(text, str) else text, part, f"a.csv, row {place + 1}")
        for place, (text, part) in enumerate(zip(sequences, names, strict=True))
    ]
    if TASKS[task].kind == "class":
        classes = tuple(f"c{number}" for number in range(int(max(targets)) + 1))
        return Labelled(TASKS[task], classes, examples, [np.array([number], np.int64) for number in targets])
    return Labelled(TASKS[task], (), examples, [np.array([number], np.float64) for number in targets])


def proteins(count: int, seed: int = 0, low: int = 20) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(low, 60))) for _ in range(count)]


def by_sequence(data: Labelled) -> dict[tuple[str, ...], set[str]]:
    found = defaultdict(set)
    for example in data.examples:
        found[tuple(sorted(example.sequences))].add(example.part)
    return found


def counts(data: Labelled) -> Counter[str]:
    return Counter(example.part for example in data.examples)


@given(
    st.lists(st.integers(0, 40), min_size=12, max_size=120),
    st.sampled_from(["random", "kfold:2", "kfold:5"]),
    st.sampled_from(["sequence-value", "sequence-class"]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_parts_are_disjoint_complete_and_repeatable(
    numbers: list[int], how: str, task: str, seed: int, pairs: bool
) -> None:
    """Equal numbers are equal sequences; a pair may stand in either order."""
    assume(len(set(numbers)) >= 10)
    pool = proteins(41)
    if pairs:
        task = task.replace("sequence", "pair")
        items: list[Any] = [(pool[n], pool[0])[:: (-1) ** place] for place, n in enumerate(numbers)]
    else:
        items = [pool[n] for n in numbers]
    targets = [place % 3 for place in range(len(numbers))]
    data = labelled(items, targets, task=task)
    try:
        folds = split(data, parse(how), seed)
    except DataError as error:
        assert "all labels of the training part" in str(error)  # noqa: PT017
        return
    again = split(data, parse(how), seed)
    assert [fold.examples for fold in folds] == [fold.examples for fold in again]
    assert len(folds) == parse(how).folds
    for fold in folds:
        assert [example.id for example in fold.examples] == [example.id for example in data.examples]
        assert fold.targets == data.targets
        assert {len(parts) for parts in by_sequence(fold).values()} == {1}
        assert set(counts(fold)) == {"train", "validation", "test"}
        assert any("train" in note and "test" in note for note in fold.notes)
    if len(folds) > 1:
        tested = Counter(example.id for fold in folds for example in fold.examples if example.part == "test")
        assert tested == Counter(example.id for example in data.examples)
    assert counts(data) == {"": len(numbers)}


def test_seeds_differ_and_shares_are_kept() -> None:
    data = labelled(proteins(1000), list(range(1000)))
    one, two = (split(data, RANDOM, seed)[0] for seed in (1, 2))
    assert counts(one) == counts(two) == {"train": 800, "validation": 100, "test": 100}
    assert one.examples != two.examples
    for fold in split(data, parse("kfold:4"), 1):
        assert counts(fold) == {"train": 675, "validation": 75, "test": 250}


@pytest.mark.parametrize("how", [RANDOM, FOLDS], ids=str)
def test_classes_have_their_share_of_each_part(how: Split) -> None:
    targets = [*[0] * 200, *[1] * 90, *[2] * 10]
    data = labelled(proteins(300), targets, task="sequence-class")
    for fold in split(data, how, 5):
        share = counts(fold)["test"] / 300
        found = np.bincount(fold.part("test").all_targets().values)
        assert found == pytest.approx(np.array([200, 90, 10]) * share, abs=1.01)


def test_large_groups_stay_in_the_training_part() -> None:
    pool = proteins(50)
    data = labelled([*pool, *[pool[0]] * 100], list(range(150)))
    fold = split(data, RANDOM, 0)[0]
    assert by_sequence(fold)[pool[0],] == {"train"}
    assert counts(fold) == {"train": 120, "validation": 15, "test": 15}


# ---- parts that the data name ----
def test_given_parts_stay() -> None:
    parts: list[Part] = ["train", "train", "validation", "test", "calibration"]
    data = labelled(proteins(5), [1, 2, 3, 4, 5], parts)
    (fold,) = split(data, GIVEN, 0)
    assert fold.examples == data.examples
    assert fold.notes == []


def test_a_missing_validation_part_is_drawn_from_the_training_part() -> None:
    pool = proteins(90)
    parts: list[Part] = [*(["train"] * 100), *([""] * 50), *(["test"] * 30)]
    data = labelled([*pool[:75], *pool[:75], *pool[60:90]], list(range(180)), parts)
    (fold,) = split(data, GIVEN, 3)
    assert counts(fold) == {"train": 135, "validation": 15, "test": 30} or counts(fold)["validation"] in (14, 16)
    assert [example.part for example in fold.examples[150:]] == ["test"] * 30
    assert all(len(found - {"test"}) <= 1 for found in by_sequence(fold).values())
    assert [note.split(":")[0] for note in fold.notes] == ["split"] * 2
    check_message("splits.no-set", fold.notes[0])


def test_given_validation_is_stratified() -> None:
    targets = [*[0] * 150, *[1] * 50]
    data = labelled(proteins(200), targets, ["train"] * 200, task="sequence-class")
    (fold,) = split(data, GIVEN, 0)
    assert np.bincount(fold.part("validation").all_targets().values).tolist() == [15, 5]
    check_message("splits.no-validation", fold.notes[0])
    check_message("splits.no-test", fold.notes[1])


def test_parts_of_the_data_are_not_used_silently() -> None:
    data = labelled(proteins(20), list(range(20)), ["train"] * 20)
    check_message("splits.unused", split(data, RANDOM, 0)[0].notes[0])


# ---- inner folds ----
@given(
    st.lists(st.integers(0, 40), min_size=40, max_size=120),
    st.integers(2, 5),
    st.sampled_from(["sequence-value", "sequence-class", "pair-class"]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_inner_folds_divide_all_but_test_and_calibration(
    numbers: list[int], inner: int, task: str, seed: int, clustered: bool
) -> None:
    assume(len(set(numbers)) >= 20)
    pool = proteins(41)
    items: list[Any] = [(pool[n], pool[0]) if task.startswith("pair") else pool[n] for n in numbers]
    data = labelled(items, [place % 3 for place in range(len(numbers))], task=task)
    for fold in split(data, FOLDS, seed):
        outer = calibration(fold, 0.5, seed, 3)
        if clustered:
            outer.groups = np.array([number // 3 for number in numbers])
            assume(
                len({number // 3 for number, e in zip(numbers, outer.examples, strict=True) if e.part[0] in "tv"}) > 9
            )
        divisions = inner_folds(outer, inner, seed)
        assert len(divisions) == inner
        assert [one.examples for one in inner_folds(outer, inner, seed)] == [one.examples for one in divisions]
        groups = numbers if outer.groups is None else outer.groups.tolist()
        for place, example in enumerate(outer.examples):
            parts = Counter(division.examples[place].part for division in divisions)
            if example.part in ("test", "calibration"):
                assert parts == {example.part: inner}
            else:
                assert parts == {"validation": 1, "train": inner - 1}
        for division in divisions:
            found = defaultdict(set)
            for group, example in zip(groups, division.examples, strict=True):
                if example.part in ("train", "validation"):
                    found[group].add(example.part)
            assert {len(parts) for parts in found.values()} == {1}
            assert {"train", "validation"} <= set(counts(division))


@given(st.integers(0, 2**32 - 1), st.randoms())
def test_inner_folds_do_not_look_at_test_labels(seed: int, rng: random.Random) -> None:
    data = labelled(proteins(60), [place % 3 for place in range(60)], task="sequence-class")
    outer = split(data, FOLDS, seed)[0]
    other = [
        np.array([rng.randrange(3)]) if example.part == "test" else target
        for example, target in zip(outer.examples, outer.targets, strict=True)
    ]
    changed = Labelled(outer.task, outer.classes, outer.examples, other)
    for one, two in zip(inner_folds(outer, 4, seed), inner_folds(changed, 4, seed), strict=True):
        assert one.examples == two.examples


def test_nested_folds_are_those_of_kfold() -> None:
    data = labelled(proteins(60), list(range(60)))
    nested, plain = split(data, parse("nested:3:4"), 2), split(data, FOLDS, 2)
    assert [fold.examples for fold in nested] == [fold.examples for fold in plain]


# ---- calibration ----
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 2))
def test_calibration_takes_whole_groups_of_validation(seed: int, share: float, repeats: int) -> None:
    pool = proteins(60)
    parts: list[Part] = [*["train"] * 20, *["validation"] * 40, *["validation"] * 40 * repeats]
    data = labelled([*pool, *pool[20:] * repeats], list(range(len(parts))), parts)
    found = calibration(data, share, seed, 0.9)
    assert found.examples == calibration(data, share, seed, 0.9).examples
    assert [example.part for example in found.examples[:20]] == ["train"] * 20
    assert {len(names) for names in by_sequence(found).values()} == {1}
    assert counts(found)["calibration"] == pytest.approx(share * counts(data)["validation"], abs=1 + repeats)
    assert counts(data)["validation"] == 40 * (1 + repeats)


def test_calibration_needs_examples() -> None:
    data = labelled(proteins(170), list(range(170)), [*["train"] * 153, *["validation"] * 17])
    found = calibration(data, None, 0, 0.9)
    assert found.examples == data.examples
    check_message("splits.no-calibration", found.notes[0])
    more = labelled(proteins(180), list(range(180)), [*["train"] * 162, *["validation"] * 18])  # as the note says
    assert counts(calibration(more, None, 0, 0.9))["calibration"] == 9
    same = labelled(proteins(1) * 40, list(range(40)), ["validation"] * 40)
    assert counts(calibration(same, 0.5, 0, 0.9)) == {"validation": 40}


@pytest.mark.parametrize(
    ("size", "coverage", "taken"),
    [
        *((18, 0.9, 9), (39, 0.9, 9), (43, 0.9, 13), (60, 0.9, 30), (61, 0.9, 30), (400, 0.9, 200)),
        *((37, 0.95, 0), (38, 0.95, 19), (50, 0.95, 20), (40, 0.5, 10), (100, 0.99, 0)),
    ],
)
def test_calibration_takes_less_of_a_small_validation_part(size: int, coverage: float, taken: int) -> None:
    """Half, but not what leaves fewer than 30 to choose by, unless the coverage needs them."""
    data = labelled(proteins(size), list(range(size)), ["validation"] * size)
    assert counts(calibration(data, None, 0, coverage))["calibration"] == taken
    assert counts(calibration(data, 0.25, 0, coverage))["calibration"] == pytest.approx(size / 4, abs=0.5)


def test_calibration_is_not_taken_unasked() -> None:
    data = labelled(proteins(40), list(range(40)), ["validation"] * 40)
    assert counts(calibration(data, 0, 0, 0.9)) == {"validation": 40}
    given = labelled(proteins(60), list(range(60)), [*["validation"] * 40, *["calibration"] * 20])
    found = calibration(given, 0.5, 0, 0.9)
    assert found.examples == given.examples
    assert "as the data say" in found.notes[-1]


def test_clusters_stay_whole_in_the_calibration_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relatives of what chose the model would make intervals too narrow for the families of the test part."""
    monkeypatch.setattr("protea.finetune.likeness._PROGRAM", "no-mmseqs")
    families = [[text, text[:-1] + "W", "W" + text[1:]] for text in proteins(40, low=50)]
    data = labelled([text for family in families for text in family], list(range(120)))
    (found,) = split(data, parse("cluster:0.5"), 0)
    found = calibration(found, 0.5, 0, 0.9)
    assert {"calibration", "validation"} <= set(counts(found))
    for place in range(0, 120, 3):
        assert len({example.part for example in found.examples[place : place + 3]}) == 1
    part = found.part("calibration")
    assert part.groups is not None
    assert len(set(part.groups.tolist())) == len(part.examples) / 3


# ---- words and errors ----
@pytest.mark.parametrize(
    "text",
    ["given", "random", "cluster:0.3", "kfold:5", "cluster-kfold:10:0.25", "nested:5:4", "cluster-nested:5:4:0.3"],
)
def test_words(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "kfold",
            "kfold:1",
            "kfold:2.5",
            "kfold:5:0.3",
            "cluster",
            "cluster:0",
            "cluster:1",
            "cluster:1.2.3",
        ),
        *("nested:5", "nested:5:1", "nested:1:5", "nested:5:4:0.3", "cluster-nested:5:4", "cluster-nested:5:4:2"),
    ],
)
def test_wrong_words(text: str) -> None:
    with pytest.raises(UsageError, match=f"split '{text}'"):
        parse(text)


def test_too_few_groups_for_inner_folds() -> None:
    with pytest.raises(DataError) as caught:
        inner_folds(labelled(proteins(3) * 5, list(range(15)), ["train"] * 15), 4, 0)
    check_message("splits.error-few-inner", caught.value)


def test_wording() -> None:
    for key, text in (("form", "kfold:x"), ("folds", "kfold:1"), ("identity", "cluster:30")):
        with pytest.raises(UsageError) as caught:
            parse(text)
        check_message(f"splits.{key}", caught.value)


@pytest.mark.parametrize(
    ("key", "data", "how"),
    [
        ("no-parts", labelled(proteins(9), list(range(9))), GIVEN),
        ("no-train", labelled(proteins(9), list(range(9)), ["test"] * 9), GIVEN),
        ("few", labelled(proteins(2) * 5, list(range(10))), RANDOM),
        ("few-given", labelled(proteins(1) * 5, list(range(5)), ["train"] * 5), GIVEN),
        ("few-folds", labelled(proteins(2) * 5, list(range(10))), FOLDS),
        ("constant", labelled(proteins(3), [1, 1, 2], ["train", "train", "validation"]), GIVEN),
        ("one-class", labelled(proteins(3), [1, 1, 0], ["train", "train", "test"], "sequence-class"), GIVEN),
        ("unlabelled", labelled(proteins(3), [np.nan, 1, 2], ["train", "validation", "test"]), GIVEN),
        ("one-cluster", labelled([LETTERS * 2 + x for x in LETTERS], list(range(20))), parse("cluster:0.3")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(key: str, data: Labelled, how: Split) -> None:
    with pytest.raises(DataError) as caught:
        split(data, how, 0)
    check_message(f"splits.error-{key}", caught.value)
