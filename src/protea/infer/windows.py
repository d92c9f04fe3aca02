"""Long sequences in overlapping windows, joined without visible seams.

A sequence of L residues over the limit W has n = ceil((L - O) / (W - O)) windows of W residues, with O = W // 2, evenly
spaced from the first residue to the last, so that neighbours overlap by at least O. The weight of residue j of a
window, counted from 0, is

    w(j) = min(j + 1, W - j, O + 1) / (O + 1)

with a ramp over O residues at both ends, but none at the ends of the sequence. The embedding of a residue is the mean
over the windows that contain it, with these weights. Between neighbouring residues a weight changes by at most
1 / (O + 1), and the weights of a residue sum to at least 1, so the mean changes smoothly between windows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spans(length: int, limit: int) -> tuple[tuple[int, int], ...]:
    """First residue and residue after the last of each window of ``limit`` residues, at least 2."""
    if length <= limit:
        return ((0, length),)
    overlap = limit // 2
    count = -(-(length - overlap) // (limit - overlap))
    starts = [round(number * (length - limit) / (count - 1)) for number in range(count)]
    return tuple((start, start + limit) for start in starts)


def weights(size: int, *, first: bool, last: bool) -> Tensor:
    """The weights ``[W]`` float32 of a window; ``first`` or ``last`` if the sequence begins or ends with it."""
    ramp = size // 2 + 1
    rising = torch.arange(1, size + 1).clamp(max=ramp).float() / ramp
    flat = torch.ones(size)
    return torch.minimum(flat if first else rising, flat if last else rising.flip(0))


def join(windows: list[Tensor], places: tuple[tuple[int, int], ...]) -> Tensor:
    """The weighted mean ``[L, D]`` of windows ``[W, D]``, all float32, at ``places`` from ``spans``."""
    if len(windows) == 1:
        return windows[0]
    length, width = places[-1][1], windows[0].shape[1]
    total = torch.zeros(length, width, device=windows[0].device)
    weight = torch.zeros(length, 1, device=windows[0].device)
    for window, (start, end) in zip(windows, places, strict=True):
        share = weights(end - start, first=start == 0, last=end == length).to(window.device)[:, None]
        total[start:end] += window * share
        weight[start:end] += share
    return total / weight
