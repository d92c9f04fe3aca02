"""Pooling: one vector from the hidden states of a sequence.

Every pooling except ``bos`` uses the residues only, without BOS and EOS, as all published systems do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from protea.alphabet import Frame
from protea.errors import UsageError

BOS: Final = "bos"
"""Pooling that takes the vector of BOS."""

_OF_RESIDUES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "mean": lambda residues: residues.mean(0),
    "max": lambda residues: residues.amax(0),
    "std": lambda residues: residues.std(0, correction=0),
}
"""From ``[L, D]`` to ``[D]``. ``std`` divides by L, not L - 1, so that a single residue gives 0 and not NaN."""

POOLINGS: Final = (*_OF_RESIDUES, BOS)


def pooled(name: str, tokens: Tensor, frame: Frame) -> Tensor:
    """One vector ``[D]`` from a sequence's hidden states ``[T, D]``.

    Args:
        name: one of ``POOLINGS``; the frame must allow it.
        tokens: hidden states of the sequence, BOS and EOS included.
        frame: of the model's alphabet.
    """
    return tokens[0] if name == BOS else _OF_RESIDUES[name](tokens[frame.rows])


def check_poolings(names: Sequence[str], frame: Frame | None = None) -> tuple[str, ...]:
    """Return the names after checking them.

    Args:
        names: of poolings.
        frame: of the model's alphabet, if the model is known.

    Raises:
        UsageError: a name is unknown or repeated, or the model has no BOS token for it.
    """
    for name in names:
        if name not in POOLINGS:
            raise UsageError(f"unknown pooling {name!r}; use {', '.join(POOLINGS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"pooling {','.join(names)}: a name is repeated")
    if BOS in names and frame is not None and frame.bos is None:
        raise UsageError("pooling bos needs a BOS token, and this model has none; use mean, max or std")
    return tuple(names)
