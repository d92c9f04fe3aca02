"""``--profile``: how fast this machine embeds, measured by a short run of the same code over made-up sequences."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from protea.embed.run import EmbedRun
from protea.embed.settings import EmbedSettings
from protea.infer.loading import ModelLoader
from protea.models.encoder import Encoder

_SECONDS: Final = 10.0  # of the second run
_FIRST: Final = 8_192
"""Residues of the first run, which warms up and tells how long the second may be."""

_LETTERS: Final = "LAGVSERTIDPKQNFYMHWC"
_SPREAD: Final = 0.6
"""Of the logarithm of lengths, as in proteomes, about."""

_SHORTEST, _LONGEST = 30, 1022


def made_up(residues: float, length: float, seed: int = 0) -> Iterator[str]:
    """Random sequences with lengths as in proteomes, of about that many residues in all."""
    draw = random.Random(seed)
    made = 0
    while made < residues:
        size = round(draw.lognormvariate(0.0, _SPREAD) * length / 1.2)
        sequence = "".join(draw.choices(_LETTERS, k=min(_LONGEST, max(_SHORTEST, size))))
        made += len(sequence)
        yield sequence


class EmbeddingRate(NamedTuple):
    """Residues per second from file to file, and the seconds that loading the model takes."""

    residues: float
    loading: float


def embedding_rate(model: str, load: ModelLoader, *, length: float) -> EmbeddingRate:
    """How fast ``protea embed`` is here, with vectors of sequences as output."""
    began = time.perf_counter()
    loaded = load(model)
    loaded.weights_sha256()  # embed records it
    loading = time.perf_counter() - began
    rate = _timed(loaded.module, model, _FIRST, length)
    return EmbeddingRate(_timed(loaded.module, model, max(_FIRST, rate * _SECONDS), length), loading)


def _timed(module: Encoder, model: str, residues: float, length: float) -> float:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "made-up.fasta"
        records = (f">{number}\n{sequence}\n" for number, sequence in enumerate(made_up(residues, length)))
        path.write_text("".join(records), encoding="ascii")
        settings = EmbedSettings(inputs=(str(path),), sequences=folder / "vectors.parquet", model=model)
        began = time.perf_counter()
        totals = EmbedRun(settings, module, {})()
        return totals.residues / (time.perf_counter() - began)
