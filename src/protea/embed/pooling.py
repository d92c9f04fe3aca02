"""One vector from a sequence's residues.

Every pooling but ``bos`` sees residues only, never BOS or EOS, as all published systems average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from protea.alphabet import Frame
from protea.errors import UsageError

BOS: Final = "bos"
"""The pooling that takes the vector of BOS."""

_OF_RESIDUES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "mean": lambda residues: residues.mean(0),
    "max": lambda residues: residues.amax(0),
    "std": lambda residues: residues.std(0, correction=0),
}
"""From ``[L, D]`` to ``[D]``; ``std`` is the population's, divided by L: a single residue has 0 and not NaN."""

POOLINGS: Final = (*_OF_RESIDUES, BOS)


def pooled(name: str, tokens: Tensor, frame: Frame) -> Tensor:
    """One vector ``[D]`` from a sequence's hidden states ``[T, D]``.

    Args:
        name: one of ``POOLINGS``, which the frame allows.
        tokens: of the sequence, those of its frame included.
        frame: of the model's alphabet.
    """
    return tokens[0] if name == BOS else _OF_RESIDUES[name](tokens[frame.rows])


def check_poolings(names: Sequence[str], frame: Frame | None = None) -> tuple[str, ...]:
    """The names, if all are known and none is repeated.

    Args:
        names: of poolings.
        frame: of the model's alphabet, where that is known.

    Raises:
        UsageError: for an unknown or repeated name, or one that the model has no token for.
    """
    for name in names:
        if name not in POOLINGS:
            raise UsageError(f"unknown pooling {name!r}; use {', '.join(POOLINGS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"pooling {','.join(names)} names one twice")
    if BOS in names and frame is not None and frame.bos is None:
        raise UsageError("pooling bos takes the vector of BOS, which this model does not see; use mean, max or std")
    return tuple(names)
