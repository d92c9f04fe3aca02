"""Random sequences with lengths like UniRef50's: log-normal, a mean of about 300, from 30 to 1,022 residues.

Letters have their frequencies in Swiss-Prot. The same seed gives the same sequences on every machine.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

LETTERS = "LAGVESIKRDTPNQFYMHCW"
SHARES = (9.6, 8.3, 7.1, 6.9, 6.7, 6.6, 5.9, 5.8, 5.5, 5.5, 5.4, 4.7, 4.1, 3.9, 3.9, 2.9, 2.4, 2.3, 1.4, 1.1)
SHORTEST, LONGEST = 30, 1022
MEDIAN, SPREAD = 250.0, 0.62


def sequences(count: int, seed: int, *, median: float = MEDIAN, longest: int = LONGEST) -> list[str]:
    """Return random sequences."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(median), SPREAD, count), SHORTEST, longest).astype(int)
    letters = np.frombuffer(LETTERS.encode(), np.uint8)
    drawn = letters[rng.choice(len(letters), size=int(lengths.sum()), p=np.array(SHARES) / sum(SHARES))].tobytes()
    ends = np.cumsum(lengths)
    return [drawn[end - length : end].decode() for length, end in zip(lengths, ends, strict=True)]


def write_fasta(path: Path, found: list[str]) -> None:
    """Write sequences to a FASTA file."""
    path.write_text("".join(f">s{number}\n{one}\n" for number, one in enumerate(found)), encoding="ascii")


def read_fasta(path: Path) -> list[str]:
    """Read a FASTA file with one line per sequence."""
    return path.read_text(encoding="ascii").splitlines()[1::2]


def write_shards(folder: Path, splits: dict[str, list[tuple[str, str]]]) -> Path:
    """Write BioNeMo 1's CSV folders; ``protea data import --csv`` makes a store from them without MMseqs2.

    Args:
        folder: to write to.
        splits: ``train``, ``val`` and ``test``, each with pairs of an id and a sequence; every sequence is a cluster.
    """
    for split, records in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / "x000.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["record_id", "record_name", "sequence_length", "sequence"])
            writer.writerows((row, name, len(one), one) for row, (name, one) in enumerate(records))
    return folder
