"""FASTA files in, files of embeddings out: one streaming pass, checked before it starts where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protea.embed import engine
from protea.embed.engine import Encoded, Long
from protea.embed.stores import open_store
from protea.fasta import STDIN, read_fasta, unique
from protea.models.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to embed, how, and where to.

    Attributes:
        inputs: FASTA files; ``-`` is standard input.
        sequences: file for one vector a sequence, if wanted.
        residues: file for one vector a residue, if wanted.
        layers: which hidden states, resolved.
        poolings: for ``sequences``, the first of them the main one.
        long: policy for sequences over the model's limit.
        token_budget: tokens a pack holds; ``None`` for the device's default.
    """

    inputs: tuple[str, ...]
    sequences: Path | None
    residues: Path | None
    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    long: Long
    token_budget: int | None

    @property
    def outputs(self) -> list[Path]:
        """The files that will be there in the end."""
        return [path for path in (self.sequences, self.residues) if path is not None]


@dataclass
class Totals:
    """Counts of records, residues embedded, and records cut short."""

    records: int = 0
    residues: int = 0
    truncated: int = 0

    def add(self, encoded: Encoded) -> None:
        """Count one record."""
        self.records += 1
        self.residues += len(encoded.ids)
        self.truncated += encoded.truncated_from is not None


def scan(job: Job, model: Encoder) -> Totals | None:
    """Read all input once without computing, so that bad records are found before hours of work.

    Returns:
        What there is, or ``None`` if some input can be read only once.

    Raises:
        ProteaError: whatever reading and encoding raise.
    """
    if any(_flows(path) for path in job.inputs):
        return None
    totals = Totals()
    for encoded in _encoded(job, model):
        totals.add(encoded)
    return totals


def run(job: Job, model: Encoder, settings: dict[str, Any], advance: Callable[[Encoded], None]) -> Totals:
    """Embed all input into the job's outputs, which appear only when complete.

    Args:
        job: what to do.
        model: on the device to compute on.
        settings: kept inside the outputs.
        advance: called after each record.
    """
    totals = Totals()
    with ExitStack() as stack:
        sequence_store = stack.enter_context(open_store(job.sequences, job.layers, settings)) if job.sequences else None
        residue_store = stack.enter_context(open_store(job.residues, job.layers, settings)) if job.residues else None
        results = engine.embed(
            model,
            _encoded(job, model),
            layers=job.layers,
            poolings=job.poolings if sequence_store else (),
            residues=residue_store is not None,
            token_budget=job.token_budget,
        )
        for result in results:
            if sequence_store is not None:
                sequence_store.write(result.encoded, result.pooled)
            if residue_store is not None and result.residues is not None:
                residue_store.write(result.encoded, {"residues": result.residues})
            totals.add(result.encoded)
            advance(result.encoded)
    return totals


def _flows(path: str) -> bool:
    """Whether the input is standard input or a pipe, gone once read."""
    return path == STDIN or (Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir())


def _encoded(job: Job, model: Encoder) -> Iterator[Encoded]:
    return engine.encode(unique(read_fasta(job.inputs)), model, job.long)
