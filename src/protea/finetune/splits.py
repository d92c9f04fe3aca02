"""Divides labelled data into parts: as the data say, at random, by clusters, or into folds, which may be nested.

Examples with the same sequence, or the same two in either order, are one group, and a split by clusters makes larger
groups. A group never lies in two parts of a split that is made here. Pairs with one protein in common are different
groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from protea.errors import DataError, UsageError
from protea.finetune.calibration import least_units
from protea.finetune.labelled_data import group_numbers, groups_of
from protea.finetune.likeness import clusters, joined
from protea.finetune.tasks import PARTS, Ints, Labelled, Part
from protea.progress import SILENT, Progress
from protea.text import counted, shown

SHARE: Final = 0.1
"""The share of the test part of a random split, and of a validation part that is drawn."""

CHOOSING: Final = 30
"""Sequences or clusters of a validation part that are left to choose by, before calibration takes half."""

_MOST_FOLDS: Final = 100
_FORMS: Final = "given, random, cluster:0.3, kfold:5, cluster-kfold:5:0.3, nested:5:4, cluster-nested:5:4:0.3"
_PATTERN: Final = re.compile(r"(given|random|cluster|(?:cluster-)?(?:kfold|nested))((?::[\d.]+)*)")


@dataclass(frozen=True)
class Split:
    """A way to divide data: ``folds`` is 1 unless each fold is the test part once; ``identity`` makes clusters.

    ``inner`` is 1 unless the examples outside each test part are divided again (``inner_folds``).
    """

    kind: Literal["given", "random", "cluster", "kfold", "cluster-kfold", "nested", "cluster-nested"]
    folds: int = 1
    inner: int = 1
    identity: float | None = None

    def __str__(self) -> str:
        folds = [str(number) for number in (self.folds, self.inner) if number > 1]
        return ":".join([self.kind, *folds, *([] if self.identity is None else [f"{self.identity:g}"])])


def parse(text: str) -> Split:
    """The split that a text names, as in ``cluster-kfold:5:0.3``."""
    match = _PATTERN.fullmatch(text.strip())
    kind, numbers = (match[1], match[2].split(":")[1:]) if match else ("", [])
    identity, levels = None, ("kfold" in kind) + 2 * ("nested" in kind)
    folds: list[int] = []
    try:
        folds = [int(numbers.pop(0)) for _ in range(levels)]
        if "cluster" in kind:
            identity = float(numbers.pop(0))
    except (IndexError, ValueError):
        match = None
    if match is None or numbers:
        raise UsageError(f"split {shown(text)}: use one of these forms: {_FORMS}")
    for number in folds:
        if not 2 <= number <= _MOST_FOLDS:
            raise UsageError(f"split {shown(text)}: {number} folds; use 2 to {_MOST_FOLDS}")
    if identity is not None and not 0 < identity < 1:
        raise UsageError(f"split {shown(text)}: identity {identity:g}; use a number between 0 and 1, as in 0.3")
    outer, inner = (*folds, 1, 1)[:2]
    return Split(kind, outer, inner, identity)  # type: ignore[arg-type]


def split(labelled: Labelled, how: Split, seed: int, progress: Progress = SILENT) -> list[Labelled]:
    """The data with parts, once for each fold; the same data and seed give the same parts.

    Raises:
        DataError: there is no training part, too few groups, or a training part that teaches nothing.
    """
    rng = np.random.default_rng(seed)
    if how.kind == "given":
        folds = [_given(labelled, rng)]
    else:
        notes = list[str]()
        if any(example.part for example in labelled.examples):
            notes.append(f"split: {how}; the parts that the data name are not used")
        groups = group_numbers(labelled)
        if how.identity is not None:
            groups = _clustered(labelled, how.identity, notes, progress)
            labelled = replace(labelled, groups=groups)
        if how.folds == 1:
            folds = [_random(labelled, groups, rng, notes)]
        else:
            folds = _kfold(labelled, groups, how.folds, rng, notes)
    for number, fold in enumerate(folds, start=1):
        check_training(fold, f"fold {number}: " if len(folds) > 1 else "")
    return folds


def inner_folds(labelled: Labelled, folds: int, seed: int) -> list[Labelled]:
    """Divisions of the training and validation parts together: each inner fold is the validation part once.

    The other parts stay as they are: what chooses between candidates on the divisions sees neither the test part nor
    the calibration part. Groups stay whole.
    """
    places = [place for place, example in enumerate(labelled.examples) if example.part in ("train", "validation")]
    groups = groups_of(labelled)[places]
    numbers = _fold_numbers(groups, _strata(labelled)[places], folds, np.random.default_rng(seed), "inner folds")
    found = []
    for fold in range(folds):
        parts: list[Part] = ["validation" if number == fold else "train" for number in numbers.tolist()]
        found.append(_with_parts(labelled, dict(zip(places, parts, strict=True)), []))
    return found


def calibration(labelled: Labelled, share: float | None, seed: int, coverage: float) -> Labelled:
    """The data with a share of the validation part as a part of its own that chooses nothing else.

    ``share`` None is half of the sequences or clusters; of a small validation part less, so that ``CHOOSING`` are left,
    but not less than intervals of this ``coverage`` need; nothing if half is less than that. Nothing is taken, too, if
    the share is 0, if the data have such a part already, or if all of the validation part is one cluster or sequence.
    Clusters of a split by clusters stay whole.
    """
    if given := sum(example.part == "calibration" for example in labelled.examples):
        return _with_parts(labelled, {}, [f"calibration: {counted(given, 'example')}, as the data say"])
    if share == 0:
        return _with_parts(labelled, {}, ["calibration: none; probabilities and intervals are not calibrated"])
    places = [place for place, example in enumerate(labelled.examples) if example.part == "validation"]
    groups = groups_of(labelled)[places]
    count, least = len(np.unique(groups)), least_units(1 - coverage)
    if count < (2 * least if share is None else 2):
        return _with_parts(labelled, {}, [_uncalibrated(labelled, count, 2 * least, coverage)])
    if share is None:
        share = min(count // 2, max(count - CHOOSING, least)) / count
    strata = _strata(labelled)[places]
    taken = _draw(groups, strata, {"calibration": share * len(places)}, np.random.default_rng(seed), "validation")
    parts = dict(zip(places, taken, strict=True))
    found = sum(part == "calibration" for part in taken)
    return _with_parts(labelled, parts, [f"calibration: {found:,} of {counted(len(places), 'validation example')}"])


def _uncalibrated(labelled: Labelled, count: int, needed: int, coverage: float) -> str:
    """Why nothing is calibrated, and what would help."""
    noun = "sequence" if labelled.groups is None else "cluster"
    total = -(-len(labelled.examples) * needed // max(1, count))
    fewer = "" if labelled.task.kind == "labels" else f"; a lower coverage than {coverage:g} needs fewer"
    return (
        f"calibration: the validation part has {counted(count, noun)}, too few to take any from it; probabilities and "
        f"intervals are not calibrated. It needs {needed:,}: about {total:,} examples, divided like these, would "
        f"do{fewer}"
    )


def _given(labelled: Labelled, rng: np.random.Generator) -> Labelled:
    """The parts of the data; a validation part that is missing is drawn from the training part."""
    counts = Counter(example.part for example in labelled.examples)
    first = labelled.examples[0].place
    if set(counts) == {""}:
        raise DataError(f"{first}: the data name no parts; add a set to each record, or use --split random")
    notes, parts = list[str](), dict[int, Part]()
    if counts[""]:
        notes.append(f"split: {counted(counts[''], 'example')} without a set count as training examples")
        parts = {place: "train" for place, example in enumerate(labelled.examples) if not example.part}
    labelled = _with_parts(labelled, parts, [])
    train = [place for place, example in enumerate(labelled.examples) if example.part == "train"]
    if not train:
        raise DataError(f"{first}: the data have no training part; add records with the set train, or another --split")
    parts = {}
    if not counts["validation"]:
        parts = _validation(labelled, train, group_numbers(labelled), rng, notes)
    if not counts["test"]:
        notes.append("split: the data have no test part; nothing is reported on one")
    return _with_parts(labelled, parts, notes)


def validation(labelled: Labelled, groups: Sequence[object] | None, seed: int) -> Labelled:
    """All examples as training examples, but for a validation part; whole groups of ``groups``, by example, if given.

    Raises:
        DataError: a training part that teaches nothing is left.
    """
    rng, numbers, notes = np.random.default_rng(seed), group_numbers(labelled), list[str]()
    if groups is not None:
        codes = {group: place for place, group in enumerate(dict.fromkeys(groups))}
        theirs = len(numbers) + np.array([codes[group] for group in groups], np.int64)
        numbers = joined(2 * len(numbers), numbers, theirs)[numbers]
    everything = list(range(len(numbers)))
    drawn = _validation(labelled, everything, numbers, rng, notes)
    found = _with_parts(labelled, {**dict.fromkeys(everything, "train"), **drawn}, notes)
    check_training(found, "")
    return found


def _validation(
    labelled: Labelled, train: list[int], groups: Ints, rng: np.random.Generator, notes: list[str]
) -> dict[int, Part]:
    """The new parts of the training examples, a share of which becomes the validation part."""
    drawn = _draw(groups[train], _strata(labelled)[train], {"validation": SHARE * len(train)}, rng, "train")
    count = sum(part == "validation" for part in drawn)
    notes.append(f"split: the data have no validation part; {count:,} of {len(train):,} training examples become it")
    return dict(zip(train, drawn, strict=True))


def _random(labelled: Labelled, groups: Ints, rng: np.random.Generator, notes: Sequence[str]) -> Labelled:
    wanted: dict[Part, float] = {"test": SHARE * len(groups), "validation": SHARE * len(groups)}
    return _finished(labelled, _draw(groups, _strata(labelled), wanted, rng, "train"), notes)


def _kfold(
    labelled: Labelled, groups: Ints, folds: int, rng: np.random.Generator, notes: Sequence[str]
) -> list[Labelled]:
    strata = _strata(labelled)
    number = _fold_numbers(groups, strata, folds, rng)
    found = []
    for fold in range(folds):
        rest = np.flatnonzero(number != fold)
        parts: list[Part] = ["test"] * len(groups)
        drawn = _draw(groups[rest], strata[rest], {"validation": SHARE * len(rest)}, rng, "train")
        for place, part in zip(rest.tolist(), drawn, strict=True):
            parts[place] = part
        found.append(_finished(labelled, parts, notes))
    return found


def _finished(labelled: Labelled, parts: Sequence[Part], notes: Sequence[str]) -> Labelled:
    counts = Counter(parts)
    sizes = ", ".join(f"{counts[part]:,} {part}" for part in PARTS if counts[part])
    return _with_parts(labelled, dict(enumerate(parts)), [*notes, f"split: {sizes}"])


def _clustered(labelled: Labelled, identity: float, notes: list[str], progress: Progress) -> Ints:
    numbers = clusters([example.sequences for example in labelled.examples], identity, progress)
    sizes = np.bincount(numbers)
    notes.append(
        f"split: {counted(len(sizes), 'cluster')} at {identity:.0%} identity, the largest has {sizes.max():,} of "
        f"{counted(len(numbers), 'example')}"
    )
    if len(sizes) < 3:
        raise DataError(
            f"split: all {counted(len(numbers), 'example')} lie in {counted(len(sizes), 'cluster')} at {identity:.0%} "
            "identity; use a higher identity, or --split random"
        )
    return numbers


# ---- drawing groups ----
def _strata(labelled: Labelled) -> Ints:
    """``[N]``: the class of each example, -1 if it has none; 0 for all where an example has no single class."""
    if labelled.task.kind != "class" or labelled.task.unit == "residue":
        return np.zeros(len(labelled.examples), np.int64)
    return np.array([int(target[0]) for target in labelled.targets], np.int64)


def _in_strata(groups: Ints, strata: Ints, rng: np.random.Generator) -> list[list[NDArray[np.int64]]]:
    """By stratum, the examples of each group in a random order; a group is of the stratum of its first example."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    members = np.split(order, starts[1:])
    first = np.array([strata[places[0]] for places in members])
    return [
        [members[place] for place in rng.permutation(np.flatnonzero(first == stratum)).tolist()]
        for stratum in np.unique(first).tolist()
    ]


def _draw(groups: Ints, strata: Ints, wanted: Mapping[Part, float], rng: np.random.Generator, rest: Part) -> list[Part]:
    """The part of each example: about ``wanted`` examples in some parts, the others in ``rest``.

    Whole groups are drawn, in each stratum as large a share as in all. A group that is too large for a part stays in
    ``rest``; a part without any group gets the smallest one.
    """
    wanted = {part: max(1.0, number) for part, number in wanted.items()}
    parts: list[Part] = [rest] * len(groups)
    drawn = dict.fromkeys(wanted, 0)
    left: list[NDArray[np.int64]] = []
    seen = 0
    for members in _in_strata(groups, strata, rng):
        seen += sum(map(len, members))
        for places in members:
            room = {part: number * seen / len(groups) - drawn[part] for part, number in wanted.items()}
            part = next((part for part in wanted if len(places) <= room[part] + 0.5), None)
            if part is None:
                left.append(places)
                continue
            drawn[part] += len(places)
            for place in places.tolist():
                parts[place] = part
    left.sort(key=len, reverse=True)
    for part in wanted:
        if not drawn[part] and len(left) > 1:
            for place in left.pop().tolist():
                parts[place] = part
    if len(set(parts)) <= len(wanted):
        names, other = ", ".join((rest, *wanted)), "--calibration" if "calibration" in wanted else "--split"
        raise DataError(
            f"split: {counted(len(np.unique(groups)), 'group')} of like sequences are too few for the parts {names}; "
            f"add data, or use another {other}"
        )
    return parts


def _fold_numbers(groups: Ints, strata: Ints, folds: int, rng: np.random.Generator, noun: str = "folds") -> Ints:
    """``[N]``: the fold of each example; large groups first, each to the fold that has least of its stratum."""
    if (count := len(np.unique(groups))) < max(folds, 3):
        few = f"{counted(count, 'group')} of like sequences for {folds} {noun}"
        raise DataError(f"split: {few}; use fewer, or add data")
    total, numbers = np.zeros(folds), np.zeros(len(groups), np.int64)
    for members in _in_strata(groups, strata, rng):
        here = np.zeros(folds)
        for places in sorted(members, key=len, reverse=True):
            fold = int(np.lexsort((total, here))[0])
            numbers[places] = fold
            here[fold] += len(places)
            total[fold] += len(places)
    if not total.all():  # a fold got nothing because each stratum has few groups
        return _fold_numbers(groups, np.zeros_like(strata), folds, rng)
    return numbers


def _with_parts(labelled: Labelled, parts: Mapping[int, Part], notes: Sequence[str]) -> Labelled:
    examples = [
        replace(example, part=parts.get(place, example.part)) for place, example in enumerate(labelled.examples)
    ]
    return replace(labelled, examples=examples, notes=[*labelled.notes, *notes], rows=list(labelled.rows))


def check_training(labelled: Labelled, where: str) -> None:
    """Refuse a training part whose labels are all missing or all the same."""
    train = labelled.part("train")
    targets = train.all_targets()
    known = targets.values[targets.known()]
    first = train.examples[0].place
    if not len(known):
        raise DataError(
            f"{where}{first}: all labels of the training part are missing; add labels, or use another split"
        )
    if labelled.task.kind != "labels" and (known == known[0]).all():
        name = shown(train.classes[int(known[0])]) if train.classes else f"{known[0]:g}"
        raise DataError(
            f"{where}{first}: all labels of the training part are {name}; add data, or use another split or seed"
        )
