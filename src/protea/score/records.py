"""FASTA files for scoring: letters to ids, and a note of everything that was changed or left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.embed.names import store_name
from protea.embed.prepare import RecordPolicies, encode
from protea.errors import FastaError, UnknownResidueError, UsageError
from protea.fasta import Record, read_fasta
from protea.letters import ReportRow as Note
from protea.letters import Unknown

GAPS: Final = "-."


class Encoded(NamedTuple):
    """One record.

    Attributes:
        record: as it was read.
        ids: ``[L]`` residues.
    """

    record: Record
    ids: NDArray[np.uint8]


def encoded(paths: Iterable[str | Path], alphabet: Alphabet, unknown: str, notes: list[Note]) -> Iterator[Encoded]:
    """Records as the model will see them; ids may come twice.

    Args:
        paths: of FASTA files.
        alphabet: of the model.
        unknown: what to do with letters outside it.
        notes: is told of what was changed or left out.

    Raises:
        FastaError: a file that is missing, unreadable, empty or no FASTA.
        UnknownResidueError: a letter that the policy does not allow, or a mask.
    """
    policy = _choice("unknown", unknown, Unknown)
    for record in read_fasta(paths):
        ids = encode(record, alphabet, policy, notes)
        if ids is not None:
            check_residues(ids, alphabet, record.place)
            gaps = int(np.isin(ids, [alphabet.tokens.index(gap) for gap in GAPS if gap in alphabet.tokens]).sum())
            if gaps:
                notes.append(Note(record.id, "odd", f"{gaps:,} gaps, which count as residues"))
            yield Encoded(record, ids)


def check_residues(ids: NDArray[np.uint8], alphabet: Alphabet, place: str) -> None:
    """See that a sequence says what stands at each of its places, which is what models are asked to predict.

    Raises:
        UnknownResidueError: it holds a mask.
    """
    masks = np.flatnonzero(ids == alphabet.mask)
    if len(masks):
        raise UnknownResidueError(
            f"{place}: {alphabet.tokens[alphabet.mask]} at position {masks[0] + 1}; scoring needs the residue there"
        )


def cutting(long: str) -> RecordPolicies:
    """What becomes of sequences that are too long, where windows are of no use.

    Raises:
        UsageError: the policy is unknown.
    """
    return RecordPolicies(long=_choice("long", long, Literal["truncate", "full", "error"]))


def wild_types(paths: Iterable[str | Path], alphabet: Alphabet, unknown: str, notes: list[Note]) -> dict[str, str]:
    """Sequences by id; ids that outputs would name alike are one.

    Raises:
        UsageError: two records have one id.
        FastaError: no record is left, or a file cannot be read.
        UnknownResidueError: a letter that the policy does not allow, or a mask.
    """
    found: dict[str, str] = {}
    names: set[str] = set()
    for record, ids in encoded(paths, alphabet, unknown, notes):
        if store_name(record.id) in names:
            raise UsageError(f"{record.place}: this id was used before; give each its own")
        names.add(store_name(record.id))
        found[record.id] = alphabet.decode(ids)
    if not found:
        raise FastaError(f"{', '.join(map(str, paths))}: no sequence is left")
    return found


def _choice(option: str, value: str, choices: Any) -> Any:
    if value not in get_args(choices):
        raise UsageError(f"--{option} {value!r} should be one of {', '.join(get_args(choices))}")
    return value
