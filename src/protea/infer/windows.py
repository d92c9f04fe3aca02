"""Long sequences in overlapping windows, joined so that no seam shows.

A sequence of L residues over the limit W is cut into n = ceil((L - O) / (W - O)) windows of W residues each, with
O = W // 2, evenly spaced from the first residue to the last, so that neighbours overlap by at least O. Residue j of a
window, counted from 0, weighs

    w(j) = min(j + 1, W - j, O + 1) / (O + 1)

a ramp over O residues at both ends; the ends of the sequence itself have no ramp. A residue's embedding is the mean
over the windows that hold it, by these weights. From one residue to the next a weight moves by at most 1 / (O + 1), and
the weights of a residue add up to at least 1: where one window gives way to the next, the mean glides from the one to
the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spans(length: int, limit: int) -> tuple[tuple[int, int], ...]:
    """First residue and residue after the last of each window; one for all if the sequence fits.

    Args:
        length: residues of the sequence.
        limit: residues a window has, at least 2.
    """
    if length <= limit:
        return ((0, length),)
    overlap = limit // 2
    count = -(-(length - overlap) // (limit - overlap))
    starts = [round(number * (length - limit) / (count - 1)) for number in range(count)]
    return tuple((start, start + limit) for start in starts)


def weights(size: int, *, first: bool, last: bool) -> Tensor:
    """``[W]`` float32: how much each residue of a window of ``size`` counts.

    Args:
        size: residues of the window.
        first: the sequence begins with this window.
        last: it ends with it.
    """
    ramp = size // 2 + 1
    rising = torch.arange(1, size + 1).clamp(max=ramp).float() / ramp
    flat = torch.ones(size)
    return torch.minimum(flat if first else rising, flat if last else rising.flip(0))


def join(windows: list[Tensor], places: tuple[tuple[int, int], ...]) -> Tensor:
    """The weighted mean where windows overlap.

    Args:
        windows: ``[W, D]`` float32 each.
        places: from ``spans``.

    Returns:
        ``[L, D]`` float32.
    """
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
