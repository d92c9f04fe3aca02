"""ProteinGym's windows for proteins longer than a model was trained on.

Windows are slices of the token sequence, BOS and EOS included, so that inner ones carry neither. Sizes are those of
``compute_fitness.py`` for 1,024 tokens, in proportion for models of others (Notin et al. 2023; facts as in its code).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def around(index: int, total: int, size: int) -> tuple[int, int]:
    """The window that scores one token: centred on it as far as the ends allow.

    Args:
        index: of the token.
        total: tokens there are.
        size: of the window.

    Returns:
        The first token and the token after the last.
    """
    half = size // 2
    if total <= size or index < half:
        return 0, min(total, size)
    start = total - size if index >= total - half else index - half
    return start, start + size


def overlapping(total: int, size: int) -> list[int]:
    """Where the windows begin that cover a long protein once: from both ends inward until they meet.

    Neighbours are half a window less one token apart; where the two that meet in the middle share less than that, one
    more lies between them.
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
    """``[size]``: how much each token of a window counts: 1 inside, less toward the edges.

    A sigmoid over a quarter of the window, centred at half of that; the outermost token counts fully, which where it is
    not BOS or EOS is an oddity of the reference.
    """
    edge, slope = size // 4, size / 64
    weights = np.ones(size)
    for i in range(1, edge + 1):
        weights[i] = 1 / (1 + math.exp(-(i - edge / 2) / slope))
    for i in range(size - 2 - edge, size - 1):
        weights[i] = 1 / (1 + math.exp((i - (size - 2) + edge / 2) / slope))
    return weights
