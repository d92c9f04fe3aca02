"""ProteinGym's windows for proteins longer than a model was trained on (Notin et al. 2023, ``compute_fitness.py``).

A window is a slice of the tokens, BOS and EOS included; inner windows contain neither. ProteinGym's windows have 1,024
tokens; other sizes keep the proportions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def around(index: int, total: int, size: int) -> tuple[int, int]:
    """The window of a size that scores one of ``total`` tokens, as start and end; centred as far as the ends allow."""
    half = size // 2
    if total <= size or index < half:
        return 0, min(total, size)
    start = total - size if index >= total - half else index - half
    return start, start + size


def overlapping(total: int, size: int) -> list[int]:
    """Starts of the windows that cover a long protein, placed from both ends inward until they meet.

    Neighbours are half a window less one token apart. If the two that meet in the middle share fewer tokens than that,
    one more window lies between them.
    """
    if total <= size:
        return [0]
    step = size // 2 - 1
    left, right = 0, total - size
    starts = [left, right]
    while left + size - 1 <= right:
        left, right = left + step, right - step
        starts += [left, right]
    if left + size - right < step:
        starts.append(total // 2 - size // 2)
    return starts


def edge_weights(size: int) -> NDArray[np.float64]:
    """The weight ``[size]`` of each token of a window: 1 inside, less toward the edges.

    The edge is a sigmoid over a quarter of the window. As in ProteinGym's code, the outermost token has weight 1.
    """
    edge, slope = size // 4, size / 64
    weights = np.ones(size)
    for i in range(1, edge + 1):
        weights[i] = 1 / (1 + math.exp(-(i - edge / 2) / slope))
    for i in range(size - 2 - edge, size - 1):
        weights[i] = 1 / (1 + math.exp((i - (size - 2) + edge / 2) / slope))
    return weights
