"""One vector from a sequence's residues.

Every pooling but ``bos`` sees residues only, never BOS or EOS, as all published systems average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from protea.errors import UsageError

POOLINGS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "mean": lambda tokens: tokens[1:-1].mean(0),
    "max": lambda tokens: tokens[1:-1].amax(0),
    "std": lambda tokens: tokens[1:-1].std(0, correction=0),
    "bos": lambda tokens: tokens[0],
}
"""From one sequence's hidden states ``[L+2, D]``, BOS first and EOS last, to ``[D]``.

``std`` is the population's (divided by L), so that a single residue has 0 and not NaN.
"""


def check_poolings(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all are known and none is repeated.

    Raises:
        UsageError: for an unknown or repeated name.
    """
    for name in names:
        if name not in POOLINGS:
            raise UsageError(f"unknown pooling {name!r}; use {', '.join(POOLINGS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"pooling {','.join(names)} names one twice")
    return tuple(names)
