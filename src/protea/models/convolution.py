"""A dilated convolution over packed sequences, which reads nothing beyond the ends of a sequence.

Shapes: T tokens, I width of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from protea.models.layers import LayerContext
from protea.packing import PackedBatch

Shift = tuple[Tensor, Tensor]
"""Rows that read, and the rows of the same sequences that they read."""


@dataclass(frozen=True)
class ConvolutionContext(LayerContext):
    """Which rows a kernel reads at each distance other than 0, and ``[T, 1]`` of which tokens are no padding."""

    shifts: Mapping[int, Shift] = field(default_factory=dict)
    kept: Tensor | None = None

    @classmethod
    def of(cls, batch: PackedBatch, distances: Iterable[int], pad: int) -> ConvolutionContext:
        """The context of a pack, for kernels that read at these distances."""
        positions, longest = batch.positions(), batch.cu_seqlens.max_length
        lengths = batch.cu_seqlens.lengths[batch.sequence_index()]
        kept = (batch.input_ids != pad)[:, None]
        shifts = {}
        for distance in sorted(set(distances) - {0}):
            if abs(distance) < longest:
                readers = ((positions + distance >= 0) & (positions + distance < lengths)).nonzero()[:, 0]
                shifts[distance] = (readers, readers + distance)
        return cls(batch.cu_seqlens, shifts=shifts, kept=None if bool(kept.all()) else kept)


def reads(kernel_size: int, dilation: int) -> list[int]:
    """How far before or behind a token a kernel reads, in the order of its weights."""
    half = kernel_size // 2
    return [step * dilation for step in range(-half, half + 1)]


class Convolution(nn.Conv1d):
    """A convolution with as many outputs as inputs and an odd kernel; padding is 0 for it."""

    def __init__(self, width: int, kernel_size: int, dilation: int) -> None:
        super().__init__(width, width, kernel_size, dilation=dilation)
        self.reads = reads(kernel_size, dilation)

    def forward(self, x: Tensor, context: ConvolutionContext) -> Tensor:  # type: ignore[override]
        """``[T, I]`` to ``[T, I]``: a product for each weight of the kernel, of the rows that can read with it."""
        x = x if context.kept is None else x * context.kept
        middle = len(self.reads) // 2
        y = self.multiply(x, self.weight[..., middle], self.bias)
        for place, distance in enumerate(self.reads):
            if distance in context.shifts:
                readers, read = context.shifts[distance]
                y = y.index_add(0, readers, self.multiply(x[read], self.weight[..., place], None))
        return y

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the weights of one place, ``[T, I]``; a transform may compute it otherwise."""
        return F.linear(x, weight, bias)
