"""How far a protein is from the training data, as a warning that a predictor extrapolates.

The distance is the cosine distance between mean vectors of residues, to the nearest of the training proteins. A protein
that is farther than 95 % of the validation proteins is called far. Vectors are centred by the mean of the training
vectors first, since all proteins share most of their direction.

Shapes: N proteins, K training proteins, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protea.finetune.tasks import Floats

MOST: Final = 20_000
"""Training proteins that are kept, drawn at random."""

FAR: Final = 0.95
_BLOCK: Final = 4096


@dataclass(frozen=True)
class Reference:
    """The training proteins: directions ``[K, D]`` float32, the centre ``[D]``, and the distance that is far."""

    directions: NDArray[np.float32]
    centre: NDArray[np.float32]
    far: float

    @classmethod
    def of(cls, train: NDArray[np.float32], validation: NDArray[np.float32], seed: int = 0) -> Reference:
        """The reference of training vectors ``[K, D]``; the validation vectors say what is far."""
        if len(train) > MOST:
            train = train[np.sort(np.random.default_rng(seed).choice(len(train), MOST, replace=False))]
        centre = train.mean(0)
        reference = cls(_directions(train - centre), centre, 0.0)
        distances = reference.distances(validation)
        far = float(np.quantile(distances, FAR)) if len(distances) else float("inf")
        return cls(reference.directions, centre, far)

    def distances(self, vectors: NDArray[np.float32]) -> Floats:
        """``[N]``: distances of mean vectors ``[N, D]``, from 0 to 2."""
        directions = _directions(np.asarray(vectors, np.float32) - self.centre)
        closest = np.full(len(directions), -1.0)
        for start in range(0, len(self.directions), _BLOCK):
            if len(directions):
                found = (directions @ self.directions[start : start + _BLOCK].T).max(1)
                closest = np.maximum(closest, found)
        distances: Floats = np.clip(1 - closest, 0, 2)
        return distances


def _directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return directions
