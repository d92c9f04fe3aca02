"""Labelled examples as heads see them: which sequences they consist of, and their targets.

Each distinct sequence is prepared once, under the policy for length. Labels of residues that are cut off have no
vector; they are left out, with a row in the report.

Shapes: N examples, S distinct sequences, X rows of hidden states, D their width, R rows to predict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protea.alphabet import Alphabet
from protea.embed.prepare import EncodedRecord, Long, fit
from protea.fasta import Record
from protea.finetune.features import Features
from protea.finetune.tasks import Ints, Labelled, Part, Targets
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.text import counted


@dataclass(frozen=True)
class EncodedExamples:
    """Labelled examples and their distinct sequences.

    Attributes:
        labelled: the examples, with targets for the residues that are kept alone.
        sequences: the S distinct sequences, encoded.
        which: ``[N, 1]``, or ``[N, 2]`` for pairs: the sequences of each example.
    """

    labelled: Labelled
    sequences: list[EncodedRecord]
    which: Ints

    def places(self, part: Part) -> Ints:
        """The examples of a part."""
        chosen = [place for place, example in enumerate(self.labelled.examples) if example.part == part]
        return np.array(chosen, np.int64)

    def chosen(self, places: Ints) -> EncodedExamples:
        """The examples at these places, with their sequences alone."""
        sequences, which = np.unique(self.which[places], return_inverse=True)
        records = [self.sequences[number] for number in sequences]
        return EncodedExamples(self.labelled.chosen(places.tolist()), records, which.reshape(len(places), -1))

    def split(self, labelled: Labelled) -> EncodedExamples:
        """The same examples in the parts of another split."""
        examples = [
            replace(example, part=other.part)
            for example, other in zip(self.labelled.examples, labelled.examples, strict=True)
        ]
        return replace(self, labelled=replace(self.labelled, examples=examples, groups=labelled.groups))


def prepare(labelled: Labelled, model: Encoder, long: Long, rows: list[ReportRow]) -> EncodedExamples:
    """Encode all sequences for a model; ``rows`` receives what is cut."""
    alphabet: Alphabet = model.alphabet
    numbers: dict[str, int] = {}
    sequences: list[EncodedRecord] = []
    which = []
    told: list[list[ReportRow]] = []
    for example in labelled.examples:
        for sequence in example.sequences:
            if sequence not in numbers:
                record = Record(example.id, "", sequence, example.place)
                numbers[sequence] = len(sequences)
                told.append([])
                sequences.append(fit(record, alphabet.encode(sequence), model, long, told[-1]))
            rows += [row._replace(id=example.id) for row in told[numbers[sequence]]]
        which.append([numbers[sequence] for sequence in example.sequences])
    width = 2 if labelled.task.unit == "pair" else 1
    targets = labelled.targets
    if labelled.task.unit == "residue":
        kept = [len(sequences[place].ids) for (place,) in which]
        targets = [target[:length] for target, length in zip(targets, kept, strict=True)]
    return EncodedExamples(replace(labelled, targets=targets), sequences, np.array(which, np.int64).reshape(-1, width))


def length_notes(labelled: Labelled, prepared: EncodedExamples) -> list[str]:
    """Notes for the user: how many examples were cut, with how many labels, and how many have several windows."""
    long = [record.truncated_from is not None for record in prepared.sequences]
    cut = sum(any(long[number] for number in numbers) for numbers in prepared.which.tolist())
    windowed = sum(any(len(prepared.sequences[n].windows) > 1 for n in numbers) for numbers in prepared.which.tolist())
    notes = []
    if cut:
        lost = int(labelled.all_targets().known().sum() - prepared.labelled.all_targets().known().sum())
        labels = f" with {counted(lost, 'residue label')}" if lost else ""
        notes.append(f"{counted(cut, 'example')} cut to what the model takes{labels}; the report lists them")
    if windowed:
        notes.append(f"{counted(windowed, 'example')} computed in windows; the report lists them")
    return notes


class Batch(NamedTuple):
    """Some examples: hidden states ``[X, D]``, lengths of the sequences ``[n]``, and targets ``[R]`` or ``[R, C]``."""

    x: Tensor
    lengths: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Examples:
    """The examples of one part with the features of one layer; ``layer`` counts among those of ``features``."""

    features: Features
    which: Ints
    targets: list[Tensor]
    layer: int = 0

    @classmethod
    def of(cls, prepared: EncodedExamples, part: Part, features: Features, layer: int = 0) -> Examples:
        """The examples of a part."""
        places = prepared.places(part)
        targets = [torch.from_numpy(prepared.labelled.targets[place]) for place in places]
        return cls(features, prepared.which[places], targets, layer)

    def __len__(self) -> int:
        return len(self.which)

    def batch(self, places: Ints) -> Batch:
        """The examples at these places."""
        x, lengths = self.features.of(self.which[places].reshape(-1), self.layer)
        return Batch(x, lengths, torch.cat([self.targets[place] for place in places]))

    def batches(self, rows: int) -> Iterator[Batch]:
        """All examples in order, in batches of about so many rows of hidden states."""
        sizes = np.diff(self.features.offsets)[self.which].sum(1)
        if len(sizes):
            ends = np.flatnonzero(np.diff(np.cumsum(sizes) // rows)) + 1
            yield from map(self.batch, np.split(np.arange(len(sizes)), ends))

    def chosen(self, places: Ints) -> Examples:
        """The examples at these places."""
        return replace(self, which=self.which[places], targets=[self.targets[place] for place in places])


def targets_of(prepared: EncodedExamples, part: Part) -> Targets:
    """All targets of a part as one array."""
    return prepared.labelled.chosen(prepared.places(part).tolist()).all_targets()
