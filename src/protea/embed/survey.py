"""The survey: a first reading of the input that finds errors, counts records and finds repeated ids.

It takes half a minute per gigabyte and saves hours: a record with an error is found before any work is done.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from protea.embed.prepare import Prepared, RecordPolicies, SeenIds, prepare
from protea.embed.stores import store_name
from protea.errors import DamagedFileError
from protea.fasta import Record
from protea.letters import Doubts
from protea.models.encoder import Encoder
from protea.packing import pack_by_budget
from protea.progress import Progress

Item = TypeVar("Item")


class SurveyedIds(SeenIds):
    """For surveyed input: 8 bytes for each id, and the names of the repeated ids alone."""

    def __init__(self, known: NDArray[np.uint64], repeated: frozenset[int]) -> None:
        super().__init__()
        self._known, self._repeated = known, repeated

    def first_time(self, name: str) -> bool:
        """Whether this is the first record of that name."""
        known_once = not self._repeated or (_hash(name) not in self._repeated and not self.free(name))
        return known_once or super().first_time(name)

    def free(self, name: str) -> bool:
        """Whether no record of the input has that name."""
        key = np.uint64(_hash(name))
        place = int(np.searchsorted(self._known, key))
        return place == len(self._known) or bool(self._known[place] != key)


class _HashedIds(SeenIds):
    """Treats every id as new and keeps its hash."""

    def __init__(self) -> None:
        super().__init__()
        self.values = array("Q")

    def first_time(self, name: str) -> bool:
        self.values.append(_hash(name))
        return True


@dataclass(frozen=True)
class Group:
    """Records that are computed together, skipped ones included: one pack, or one long sequence by itself.

    Groups are numbered from 0 in the order of the input. ``records`` is the number of records in the input up to the
    end of this group, ``fingerprint`` is a hash of them.
    """

    number: int
    items: list[Prepared]
    records: int
    fingerprint: bytes


@dataclass(frozen=True)
class Totals:
    """Counts of a run's records by what becomes of them, and of its residues."""

    records: int = 0
    embedded: int = 0
    skipped: int = 0
    truncated: int = 0
    windowed: int = 0
    altered: int = 0
    renamed: int = 0
    gapped: int = 0
    nucleotides: int = 0
    residues: int = 0

    def plus(self, items: Iterable[Prepared]) -> Totals:
        """The counts after more records."""
        counts = Counter(asdict(self))
        for item in items:
            counts["records"] += 1
            for row in item.rows:
                counts[row.what] += 1
            if item.encoded is not None:
                counts["embedded"] += 1
                counts["residues"] += len(item.encoded.ids)
        return Totals(**counts)


@dataclass(frozen=True)
class Survey:
    """The result of a survey.

    Attributes:
        totals: counts of the whole run; ``None`` for input that can be read only once.
        residues: ``[G]``, of each group.
        fingerprint: hash of all records, in hexadecimal; ``None`` if unknown.
        new_ids: makes the ids that ``prepare`` needs.
        damage: the error of a compressed file that is cut short; the totals then count the records before it.
        doubts: what to tell the user about records that are hardly meant.
    """

    totals: Totals | None
    residues: NDArray[np.uint32]
    fingerprint: str | None
    new_ids: Callable[[], SeenIds]
    damage: DamagedFileError | None = None
    doubts: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.residues)


UNKNOWN: Final = Survey(None, np.empty(0, np.uint32), None, SeenIds)
"""For input that can be read only once."""


def survey(
    read: Callable[[], Iterable[Record]], model: Encoder, policies: RecordPolicies, budget: int, progress: Progress
) -> Survey:
    """Read all records once without computing, from an input that ``read`` opens at its start.

    Raises what reading and preparing raise, except for damage that ends a file early. Progress counts residues.
    """
    hashes = _HashedIds()
    result = None
    if policies.duplicates == "skip":
        # A skipped duplicate may have any error. So all ids must be known before a record is prepared.
        for record in _until_damage(read(), []):
            hashes.first_time(store_name(record.id))
    else:
        result = _count(prepare(read(), model, policies, hashes), budget, progress)
    known, counts = np.unique(np.frombuffer(hashes.values, np.uint64), return_counts=True)
    repeated = frozenset(known[counts > 1].tolist())
    new_ids = partial(SurveyedIds, known if repeated else np.empty(0, np.uint64), repeated)
    if result is None or repeated:
        # The policy for repeated ids can be applied only now.
        result = _count(prepare(read(), model, policies, new_ids()), budget, progress)
    return replace(result, new_ids=new_ids)


def _count(items: Iterable[Prepared], budget: int, progress: Progress) -> Survey:
    totals, residues, fingerprint = Totals(), array("I"), b""
    damage, doubts = None, Doubts()
    try:
        for group in groups(items, budget):
            before = totals.residues
            totals = totals.plus(group.items)
            for item in group.items:
                doubts.add(item.rows)
            progress.advance(totals.residues - before)
            residues.append(totals.residues - before)
            fingerprint = group.fingerprint
    except DamagedFileError as error:
        damage = error
    sizes = np.frombuffer(residues, np.uint32) if residues else np.empty(0, np.uint32)
    return Survey(totals, sizes, None if damage else fingerprint.hex(), SeenIds, damage, tuple(doubts.lines()))


def groups(items: Iterable[Prepared], budget: int, *, number: int = 0, records: int = 0) -> Iterator[Group]:
    """Group records by a token budget, in order; after the last group raises the damage of an input that is cut short.

    The groups depend on the records and the budget alone. Grouping may start at the first record of any group, whose
    number and number of records before it are given, and then gives the same groups; a resumed run relies on
    that.
    """
    damage: list[DamagedFileError] = []
    # A skipped record counts for one token, so that a million of them do not make one group.
    packs = pack_by_budget(
        _until_damage(items, damage), lambda item: item.encoded.tokens if item.encoded else 1, budget
    )
    for count, members in enumerate(packs):
        records += len(members)
        yield Group(number + count, members, records, members[-1].fingerprint)
    if damage:
        raise damage[0]


def _until_damage(items: Iterable[Item], damage: list[DamagedFileError]) -> Iterator[Item]:
    try:
        yield from items
    except DamagedFileError as error:
        damage.append(error)


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
