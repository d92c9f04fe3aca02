"""The examples of each update of the weights, their packs, and the hidden states that a head reads from a pack.

Everything is a function of the seed and the step, so that a run can begin at any step.

Shapes: T tokens of a pack, n sequences in it, X rows of hidden states, R rows to predict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protea.alphabet import Frame
from protea.data.draws import EPOCH_ORDER, Permutation, key
from protea.embed.embeddings import POOLINGS
from protea.errors import UsageError
from protea.finetune.examples import Batch, EncodedExamples
from protea.finetune.heads import RESIDUES
from protea.finetune.tasks import Ints
from protea.models.encoder import Encoder
from protea.packing import PackedBatch, pack, pack_by_budget
from protea.train.model import Precision


@dataclass(frozen=True)
class Updates:
    """Which examples each update has, counted from 1, and after which updates weights are validated.

    Attributes:
        examples: how many there are to train on.
        batch: examples of an update, at most; the updates of an epoch have equal numbers of them.
        steps: updates in all.
        validations: validations of an epoch, if it has updates enough.
        apart: updates from one validation to the next, at least.
        seed: of the orders of all epochs.
    """

    examples: int
    batch: int
    steps: int
    validations: int
    apart: int
    seed: int

    @property
    def of_epoch(self) -> int:
        """Updates of an epoch."""
        return -(-self.examples // self.batch)

    def __getitem__(self, step: int) -> Ints:
        """The numbers of the examples of an update, ascending."""
        epoch, number = divmod(step - 1, self.of_epoch)
        first, last = (self.examples * part // self.of_epoch for part in (number, number + 1))
        order = Permutation(self.examples, key(self.seed, epoch, EPOCH_ORDER))
        return np.sort(order[np.arange(first, last)])

    def validates(self, step: int) -> bool:
        """Whether weights are validated after an update; the last update is always followed by one."""
        span = max(self.of_epoch, self.apart * self.validations)  # updates in which there are so many validations
        before, after = ((step - 1) * self.validations // span, step * self.validations // span)
        return after > before or step == self.steps


class Pack(NamedTuple):
    """Some examples side by side.

    Attributes:
        inputs: the tokens of their sequences.
        rows: ``[X]``, the tokens that are residues.
        lengths: ``[n]``, residues of each sequence.
        targets: ``[R]`` or ``[R, C]``.
    """

    inputs: PackedBatch
    rows: Tensor
    lengths: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Pack:
        """The same pack on another device."""
        return Pack(self.inputs.to(device), *(part.to(device) for part in self[1:]))


@dataclass(frozen=True)
class Packer:
    """Makes packs of about ``budget`` tokens; the sequences of a pair share one."""

    prepared: EncodedExamples
    frame: Frame
    budget: int

    def __post_init__(self) -> None:
        long = next((record for record in self.prepared.sequences if len(record.windows) > 1), None)
        if long is not None:
            raise UsageError(
                f"{long.record.place}: {len(long.ids):,} residues would need windows, which only frozen models can "
                "join; choose the policy truncate or full for long sequences"
            )

    def tokens(self, example: int) -> int:
        """Tokens of an example."""
        return sum(self.prepared.sequences[number].tokens for number in self.prepared.which[example])

    def packs(self, examples: Ints) -> Iterator[Pack]:
        """The packs of some examples, in order."""
        for group in pack_by_budget(examples.tolist(), self.tokens, self.budget):
            records = [self.prepared.sequences[number] for example in group for number in self.prepared.which[example]]
            inputs = pack([self.frame.around(record.ids) for record in records])
            inside = np.zeros(len(inputs.input_ids), bool)
            for start, end in inputs.cu_seqlens.spans():
                inside[start:end][self.frame.rows] = True
            targets = [torch.from_numpy(self.prepared.labelled.targets[example]) for example in group]
            lengths = torch.tensor([len(record.ids) for record in records])
            yield Pack(inputs, torch.from_numpy(np.flatnonzero(inside)), lengths, torch.cat(targets))


def head_inputs(model: Encoder, batch: Pack, reads: str, precision: Precision) -> Batch:
    """What a head reads of a pack on the model's device, in float32; the head itself is not computed in a narrow type.

    ``reads`` is ``RESIDUES`` or a pooling.
    """
    with precision.autocast():
        hidden = model(batch.inputs)
    hidden = hidden.float()
    if reads == RESIDUES:
        return Batch(hidden.index_select(0, batch.rows), batch.lengths, batch.targets)
    # Split instead of slice: the gradient of every slice would be as long as the whole pack.
    sequences = hidden.split([end - start for start, end in batch.inputs.cu_seqlens.spans()])
    pooled = [POOLINGS[reads](tokens, model.alphabet.frame) for tokens in sequences]
    return Batch(torch.stack(pooled), batch.lengths, batch.targets)
