"""Sequences from Python, in every form that callers have them in, read and checked before anything computes.

A sequence is a string, a ``Seq`` of Biopython or biotite, or a record that holds one as ``seq`` or ``sequence``, such
as Biopython's ``SeqRecord`` and Protea's ``Record``. Several sequences are a mapping of names to them, or what gives
them in order: a list, a generator, an array, a column of a table. Results come back in the same form. Everything else
is a ``UsageError`` with the value, its place and the way out.

What could be read in two ways is refused: pairs, which may be names with sequences or the two chains of a complex;
sets, whose order is not the caller's; the keys of a mapping, which are rather names; lists of single letters, which are
one protein in pieces; and a ``Series`` with a label ``seq`` or ``sequence``, which may be a row or a column of a table.
"""

from __future__ import annotations

from collections.abc import Hashable, KeysView, Mapping
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.errors import UnknownResidueError, UsageError, warn
from protea.fasta import Record
from protea.letters import Doubts, clean, doubtful, joined_chains
from protea.score.proteins import check_no_masks
from protea.text import counted, shown

Name = TypeVar("Name", bound=Hashable)


class SequenceRecord(Protocol):
    """A record of a sequence, such as Biopython's ``SeqRecord``."""

    @property
    def id(self) -> Any:
        """The name that messages use."""

    @property
    def seq(self) -> Any:
        """The sequence: a string or a ``Seq``."""


OneSequence = str | SequenceRecord | Record

_SEQ_CLASSES: Final = {("Bio", "Seq"), ("Bio", "MutableSeq"), ("biotite", "Sequence")}  # str() gives their residues
_SEQUENCE: Final = ("seq", "sequence")
_NAME: Final = ("id", "name")
_LETTERS_SHOWN: Final = 5

_DROP_GAPS: Final = "re.sub('[-.]', '', text) removes them"
_MISSING: Final = "a value is missing; leave it out, as dropna() does in pandas and drop_nulls() in polars"
_BYTES: Final = "decode bytes, as in data.decode()"
_NESTED: Final = "give each protein as one string"
_NOT_ONE: Final = {
    "NoneType": _MISSING,
    "float": _MISSING,
    "floating": _MISSING,
    "NAType": _MISSING,
    "NaTType": _MISSING,
    "bytes": _BYTES,
    "bytearray": _BYTES,
    "tuple": "for results by name give a mapping, as in dict(pairs)",
    "dict": _NESTED,
    "list": _NESTED,
    "ndarray": _NESTED,
    "Series": f"{_NESTED}, as in row['sequence']",
    "Scalar": "convert the column, as in column.to_pylist()",
}
"""What to do about a value that is no sequence, by the name of its class or of a class that it inherits from."""
_NOT_SEVERAL: Final = {
    "set": "a set has no order; give a list",
    "frozenset": "a set has no order; give a list",
    "bytes": _BYTES,
    "bytearray": _BYTES,
    "DataFrame": "give the column, as in table['sequence']",
    "LazyFrame": "collect it and give the column, as in table.collect()['sequence']",
    "Table": "give the column, as in table['sequence'].to_pylist()",
    "recarray": "give the column, as in table['sequence']",
}
_ROW: Final = {"Series": "give row['seq'] for the sequence of a row, or list(column) for all values of a column"}


class Given(NamedTuple):
    """The sequences of a caller: a record of each, with its place for messages, and its ids ``[L]``.

    ``names`` are the keys of a mapping; they are ``None`` for one sequence (``single``) and for a list.
    """

    sequences: list[tuple[Record, NDArray[np.uint8]]]
    names: list[Any] | None
    single: bool

    def in_form(self, results: Any) -> Any:
        """Results in the form of the input: the only one, by name, or all as they are."""
        if self.single:
            return results[0]
        return results if self.names is None else dict(zip(self.names, results, strict=True))


def read(sequences: object, alphabet: Alphabet, *, masks: bool = True) -> Given:
    """One sequence or several, as the module says; without ``masks``, ``<mask>`` is refused."""
    names, single = None, _is_one(sequences)
    if single:
        records = [_record(sequences, "the sequence")]
    elif isinstance(sequences, Mapping):
        names = list(sequences)
        records = [_record(value, f"sequence {shown(name)}") for name, value in sequences.items()]
    elif isinstance(sequences, KeysView):
        raise UsageError(
            f"sequences: got {_described(sequences)}, which are names; give the mapping itself, its .values() or, "
            "if the keys are the sequences, list(mapping)"
        )
    else:
        items = listed("sequences", sequences, "a string, a list of strings, or a mapping of names to strings")
        _refuse_letters(items)
        _refuse_row(sequences)
        records = [_record(item, f"sequence {number}", str(number)) for number, item in enumerate(items)]
    return Given(_encoded(records, alphabet, masks), names, single)


def read_one(sequence: object, alphabet: Alphabet, *, masks: bool = True) -> tuple[Record, NDArray[np.uint8]]:
    """The only sequence, for what computes one at a time."""
    if not _is_one(sequence):
        raise UsageError(
            f"sequence: got {_described(sequence)}; give one protein, as a string; for several call the method for each"
        )
    return _encoded([_record(sequence, "the sequence")], alphabet, masks)[0]


def listed(argument: str, values: Any, expected: str) -> list[Any]:
    """The items of what gives them in order, once or many times; ``expected`` is for the error if it does not."""
    remedy = _remedy(values, _NOT_SEVERAL)
    if remedy is None and not isinstance(values, str | Mapping):
        try:
            items = iter(values)
        except TypeError:
            pass
        else:
            return list(items)
    raise UsageError(f"{argument}: got {_described(values)}; {remedy or f'give {expected}'}")


def _is_one(value: object) -> bool:
    return isinstance(value, str) or _is_seq(value) or (not isinstance(value, Mapping) and bool(_residues_in(value)))


def _is_seq(value: object) -> bool:
    return any((kind.__module__.partition(".")[0], kind.__name__) in _SEQ_CLASSES for kind in type(value).__mro__)


def _residues_in(value: object) -> list[str]:
    """The attributes that hold a record's residues; a column or a table, whose labels are attributes, has none."""
    tabular = _remedy(value, {**_NOT_SEVERAL, **_ROW})
    return [] if tabular else [name for name in _SEQUENCE if hasattr(value, name)]


def _record(value: object, place: str, number: str = "0") -> Record:
    """The record of a string, a ``Seq`` or a record; messages about the last also give its name."""
    if not isinstance(value, str) and not _is_seq(value) and (attributes := _residues_in(value)):
        names = [getattr(value, name) for name in _NAME if hasattr(value, name)]
        place = f"{place} ({shown(names[0])})" if names else place
        value = getattr(value, attributes[0])
    return Record(number, "", _letters(value, place), place)


def _letters(value: object, place: str) -> str:
    if isinstance(value, str):
        letters = str.__str__(value)
    elif _is_seq(value):
        try:
            letters = str(value)
        except ValueError as error:  # Biopython's Seq may have a length without letters
            raise UsageError(f"{place}: {error}") from error
    else:
        remedy = _remedy(value, _NOT_ONE) or "give its residues as a string"
        raise UsageError(f"{place}: expected a string, got {_described(value)}; {remedy}")
    if not letters:
        raise UsageError(f"{place} is empty; give at least one residue")
    return letters


def _encoded(records: list[Record], alphabet: Alphabet, masks: bool) -> list[tuple[Record, NDArray[np.uint8]]]:
    """Records with their ids; a warning a kind tells of those that are hardly meant, such as DNA."""
    encoded, doubts = [], Doubts()
    for record in records:
        if not masks:
            check_no_masks(record.sequence, record.place)
        try:
            encoded.append((record, alphabet.encode(record.sequence)))
        except UnknownResidueError as error:
            what = joined_chains(record.sequence, alphabet) or error
            raise UnknownResidueError(f"{record.place}: {what}") from error
        if doubtful(record.sequence):
            doubts.add(clean(record, alphabet, "error", masks=True).rows, record.place)
    for line in doubts.lines("sequence", _DROP_GAPS):
        warn(line)
    return encoded


def _refuse_letters(items: list[Any]) -> None:
    if len(items) > 1 and all(isinstance(item, str) and len(item) == 1 for item in items):
        joined = "".join(items[:_LETTERS_SHOWN]) + ("..." if len(items) > _LETTERS_SHOWN else "")
        raise UsageError(
            f"sequences: got a list of {counted(len(items), 'single letter')}, as of one protein in pieces; give it as "
            f"one string, {shown(joined)}. For proteins of one residue, give a mapping of names to them"
        )


def _refuse_row(value: object) -> None:
    remedy = _remedy(value, _ROW)
    for label in (name for name in _SEQUENCE if remedy and hasattr(value, name)):
        raise UsageError(f"sequences: got a Series with a label {label!r}, which may be a row or a column; {remedy}")


def _remedy(value: object, remedies: Mapping[str, str]) -> str | None:
    return next((remedies[kind.__name__] for kind in type(value).__mro__ if kind.__name__ in remedies), None)


def _described(value: object) -> str:
    return f"{shown(value)} ({type(value).__name__})"
