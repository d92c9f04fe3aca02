"""Predictions that need no language model: what a model must beat before it is worth anything.

``constant``     the mean of the training values, or the shares of the training classes.
``composition``  a linear model of the shares of amino acids and the length of the sequence.
``one-hot``      a linear model of the residues: those of every position if all sequences have one length (as in a deep
                 mutational scan), pairs of neighbours otherwise; for residues, the residue and 7 on each side.
``nearest``      the label of the training sequence of highest identity; for residues, of the longest stretch of up
                 to 11 residues around it that also occurs in the training part.

All linear models are those of ``linear.py``, with the penalty chosen on the validation part.

Shapes: N examples, R rows, C outputs, F inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.finetune.heads import Head, HeadConfig, combined
from protea.finetune.likeness import nearest
from protea.finetune.linear import LabelledRows, known, solve
from protea.finetune.tasks import MISSING, Floats, Ints, Labelled, Part
from protea.progress import SILENT, Progress

_LETTERS: Final = np.full(256, 20, np.int64)
_LETTERS[[ord(letter) for letter in "ACDEFGHIKLMNPQRSTVWY"]] = np.arange(20)
_KINDS: Final = 21  # 20 amino acids, and everything else
_SIDE: Final = 7
_MOST_ROWS: Final = 200_000
_STRETCHES: Final = (11, 9, 7, 5, 3, 1)
_BLOCK: Final = 50_000
_MOST_POSITIONS: Final = 2_000

Predictions = dict[Part, Floats]
"""By part, probabilities ``[R, C]`` or values ``[R]``."""


def constant(data: Labelled, parts: Iterable[Part]) -> Predictions:
    """The same prediction for every row."""
    targets = data.part("train").all_targets()
    values = targets.values[targets.known()]
    if data.task.kind == "class":
        shares = np.bincount(values.astype(np.int64), minlength=len(data.classes)) / max(1, len(values))
    else:
        # Of a label that nobody states nothing is known.
        known = ~np.isnan(values)
        shares = np.where(known.any(0), np.nansum(values, 0) / np.maximum(known.sum(0), 1), 0.5)
    return {part: _repeated(shares, len(data.part(part).all_targets().values)) for part in parts}


def composition(data: Labelled, parts: Iterable[Part]) -> Predictions:
    """A linear model of amino-acid shares and length."""
    return _linear(data, parts, _composition)


def one_hot(data: Labelled, parts: Iterable[Part]) -> Predictions:
    """A linear model of the residues themselves."""
    if data.task.unit == "residue":
        return _linear(data, parts, _windows)
    lengths = {len(sequence) for example in data.examples for sequence in example.sequences}
    if len(lengths) == 1 and max(lengths) <= _MOST_POSITIONS:
        return _linear(data, parts, _positions(data.part("train")))
    return _linear(data, parts, _neighbours)


def nearest_neighbour(data: Labelled, parts: Iterable[Part], progress: Progress = SILENT) -> Predictions:
    """The label of the most similar training example."""
    if data.task.unit == "residue":
        return _stretches(data, parts)
    train = _rated(data.part("train"))
    found: Predictions = {}
    for part in parts:
        queries = [example.sequences for example in data.part(part).examples]
        likeness = nearest(queries, [example.sequences for example in train.examples], progress)
        labels = _as_predictions(data, train.all_targets().values[likeness.neighbour])
        # Nothing resembles a sequence of identity 0.
        found[part] = _where(likeness.identity > 0, labels, constant(data, [part])[part])
    return found


BASELINES: Final[Mapping[str, Callable[[Labelled, Iterable[Part]], Predictions]]] = {
    "constant": constant,
    "composition": composition,
    "one-hot": one_hot,
    "nearest": nearest_neighbour,
}
"""All baselines by name."""


# --- linear models ---------------------------------------------------------------------------------------------------


def _linear(data: Labelled, parts: Iterable[Part], inputs: Callable[[Labelled], Tensor]) -> Predictions:
    train, validation = (_sample(data.part(part), _MOST_ROWS) for part in ("train", "validation"))
    of_train, of_validation = (_rows(part, inputs) for part in (train, validation))
    outputs = 1 if data.task.kind == "value" else len(data.classes)
    width = of_train.x.shape[1] // (3 if data.task.unit == "pair" else 1)
    config = HeadConfig(kind="linear", task=data.task.name, width=width, outputs=outputs)
    head = solve(config, of_train, of_validation).head
    return {part: _predictions(head, data.part(part), inputs) for part in parts}


def _rows(data: Labelled, inputs: Callable[[Labelled], Tensor]) -> LabelledRows:
    return known(_inputs(data, inputs), torch.from_numpy(data.all_targets().values))


def _inputs(data: Labelled, inputs: Callable[[Labelled], Tensor]) -> Tensor:
    x = inputs(data)
    return combined(x) if data.task.unit == "pair" else x


def _predictions(head: Head, data: Labelled, inputs: Callable[[Labelled], Tensor]) -> Floats:
    width = () if data.task.kind == "value" else (head.config.outputs,)
    found = [np.empty((0, *width))]
    sizes = np.cumsum([len(target) for target in data.targets])
    with torch.inference_mode():
        for places in np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(sizes // _BLOCK)) + 1):
            x = _inputs(data.chosen(places.tolist()), inputs)
            found.append(head.outcome(head.body((x - head.centre) / head.spread, x)).numpy())
    return np.concatenate(found)


def _sample(data: Labelled, most: int) -> Labelled:
    """Examples with about ``most`` rows, drawn at random."""
    sizes = np.array([len(target) for target in data.targets], np.int64)
    if sizes.sum() <= most:
        return data
    order = np.random.default_rng(0).permutation(len(sizes))
    count = max(1, int(np.searchsorted(np.cumsum(sizes[order]), most)))
    return data.chosen(np.sort(order[:count]).tolist())


def _encoded(data: Labelled) -> Iterator[Ints]:
    """The sequences of all examples, one after the other, as numbers from 0 to 20."""
    for example in data.examples:
        for sequence in example.sequences:
            yield _LETTERS[np.frombuffer(sequence.encode("latin-1", "replace"), np.uint8)]


def _composition(data: Labelled) -> Tensor:
    """``[.., 22]``: shares of the amino acids and log length, of the protein of each residue for residue tasks."""
    rows = [
        np.append(np.bincount(letters, minlength=_KINDS) / max(1, len(letters)), np.log(max(1, len(letters))))
        for letters in _encoded(data)
    ]
    x = torch.from_numpy(np.array(rows, np.float32).reshape(-1, _KINDS + 1))
    if data.task.unit != "residue":
        return x
    return torch.repeat_interleave(x, torch.tensor([len(target) for target in data.targets], dtype=torch.int64), 0)


def _positions(train: Labelled) -> Callable[[Labelled], Tensor]:
    """Inputs ``[.., F]``: whether a position has a residue, for the F pairs of these that vary in the training part.

    The others are constant there, so that a linear model gives them the weight 0. Variants of one protein have few F.
    """
    letters = _aligned(train)
    present = np.stack([(letters == kind).sum(0) for kind in range(_KINDS)], 1)
    varying = (present > 0) & (present < len(letters))
    varying[0, 0] |= not varying.any()  # a model of no input at all does not exist
    positions, kinds = np.nonzero(varying)
    return lambda data: torch.from_numpy(_aligned(data)[:, positions] == kinds.astype(np.uint8)).float()


def _aligned(data: Labelled) -> NDArray[np.uint8]:
    """``[.., L]``: the letters of sequences of one length."""
    return np.stack([letters.astype(np.uint8) for letters in _encoded(data)])


def _neighbours(data: Labelled) -> Tensor:
    """``[.., 441]``: shares of the pairs of neighbours."""
    rows = [
        np.bincount(letters[:-1] * _KINDS + letters[1:], minlength=_KINDS**2) / max(1, len(letters) - 1)
        for letters in _encoded(data)
    ]
    return torch.from_numpy(np.array(rows, np.float32).reshape(-1, _KINDS**2))


def _windows(data: Labelled) -> Tensor:
    """``[R, 15 * 22]``: the residue and 7 on each side; a kind of its own stands for what is beyond the ends."""
    beyond = _KINDS
    found = []
    for letters, target in zip(_encoded(data), data.targets, strict=True):
        padded = np.pad(letters, _SIDE, constant_values=beyond)
        found.append(np.lib.stride_tricks.sliding_window_view(padded, 2 * _SIDE + 1)[: len(target)])
    windows = torch.from_numpy(np.concatenate([np.empty((0, 2 * _SIDE + 1), np.int64), *found]))
    return torch.nn.functional.one_hot(windows, _KINDS + 1).flatten(1).float()


# --- neighbours ------------------------------------------------------------------------------------------------------


def _stretches(data: Labelled, parts: Iterable[Part]) -> Predictions:
    """For each residue the mean label of training residues with the same surroundings, as many as are known."""
    train = data.part("train")
    targets = train.all_targets()
    rated = targets.known()
    labels = _as_predictions(data, targets.values[rated])
    tables = {}
    for length in _STRETCHES:
        words, place = np.unique(_words(train, length)[rated], return_inverse=True)
        counts = np.bincount(place, minlength=len(words))
        columns = [np.bincount(place, column, len(words)) / counts for column in labels.reshape(len(labels), -1).T]
        tables[length] = (words, np.stack(columns, 1))
    found: Predictions = {}
    for part in parts:
        chosen = data.part(part)
        predicted = constant(data, [part])[part].reshape(len(chosen.all_targets().values), -1)
        open_rows = np.ones(len(predicted), bool)
        for length in _STRETCHES:
            words, means = tables[length]
            wanted = _words(chosen, length)
            place = np.minimum(np.searchsorted(words, wanted), len(words) - 1)
            match = open_rows & (words[place] == wanted) if len(words) else np.zeros(len(wanted), bool)
            predicted[match] = means[place[match]]
            open_rows &= ~match
        found[part] = predicted if data.task.kind != "value" else predicted[:, 0]
    return found


def _words(data: Labelled, length: int) -> Ints:
    """``[R]``: the stretch of ``length`` residues around each residue, as one number."""
    powers = (_KINDS + 1) ** np.arange(length, dtype=np.int64)
    found = [np.empty(0, np.int64)]
    for letters, target in zip(_encoded(data), data.targets, strict=True):
        padded = np.pad(letters, length // 2, constant_values=_KINDS)
        found.append((np.lib.stride_tricks.sliding_window_view(padded, length) @ powers)[: len(target)])
    return np.concatenate(found)


def _rated(data: Labelled) -> Labelled:
    """The examples that have a label."""
    targets = data.all_targets()
    rated = np.unique(targets.examples()[targets.known()])
    return data.chosen(rated.tolist())


def _as_predictions(data: Labelled, targets: NDArray[np.float64] | NDArray[np.int64]) -> Floats:
    """Targets of labelled rows in the form of predictions; a label that is missing counts as absent."""
    if data.task.kind != "class":
        return np.nan_to_num(np.asarray(targets, np.float64))
    one_hot = np.zeros((len(targets), len(data.classes)))
    present = np.flatnonzero(targets != MISSING)
    one_hot[present, targets[present].astype(np.int64)] = 1
    return one_hot


def _repeated(value: Floats | float, rows: int) -> Floats:
    return np.tile(np.asarray(value, np.float64), (rows, *([1] * np.ndim(value))))


def _where(chosen: NDArray[np.bool_], a: Floats, b: Floats) -> Floats:
    found: Floats = np.where(chosen.reshape(-1, *([1] * (a.ndim - 1))), a, b)
    return found
