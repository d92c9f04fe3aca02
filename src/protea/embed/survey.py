"""A first reading of the input: what is wrong with it, how much there is, which ids come twice.

It costs half a minute a gigabyte and saves hours: a record that cannot be taken is found before any work is done.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from protea.embed.names import store_name
from protea.embed.prepare import IdCheck, Prepared, RecordPolicies, prepare
from protea.errors import DamagedFileError
from protea.fasta import Record
from protea.models.encoder import Encoder
from protea.packing import pack_by_budget

Item = TypeVar("Item")

Advance = Callable[[int], None]
"""Called with a number of residues done."""


class SeenIds:
    """For input that can be read only once: keeps every name."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def first_time(self, name: str) -> bool:
        """Whether this is the first record of that name."""
        if name in self._seen:
            return False
        self._seen.add(name)
        return True

    def free(self, name: str) -> bool:
        """Whether no record so far has that name."""
        return name not in self._seen


class SurveyedIds(SeenIds):
    """For surveyed input in which ids come twice: 8 bytes an id, and the names of those alone."""

    def __init__(self, known: NDArray[np.uint64], repeated: frozenset[int]) -> None:
        super().__init__()
        self._known = known
        self._repeated = repeated

    def first_time(self, name: str) -> bool:
        """Whether this is the first record of that name."""
        if _hash(name) not in self._repeated and not self.free(name):
            return True
        return super().first_time(name)

    def free(self, name: str) -> bool:
        """Whether no record of the input has that name."""
        key = np.uint64(_hash(name))
        place = int(np.searchsorted(self._known, key))
        return place == len(self._known) or bool(self._known[place] != key)


class _AllFirst:
    """For surveyed input in which no id comes twice."""

    def first_time(self, name: str) -> bool:
        return True

    def free(self, name: str) -> bool:
        return False


class _Hashes(_AllFirst):
    """Takes every id for a first one and remembers its hash."""

    def __init__(self) -> None:
        self.values = array("Q")

    def first_time(self, name: str) -> bool:
        self.values.append(_hash(name))
        return True


@dataclass(frozen=True)
class Group:
    """Records that are computed together: one pack, or one long sequence by itself.

    Attributes:
        number: its place in the input, from 0.
        items: the records, skipped ones included.
        records: how many records of the input end with this group.
        fingerprint: of those records.
    """

    number: int
    items: list[Prepared]
    records: int
    fingerprint: bytes


@dataclass(frozen=True)
class Totals:
    """Counts of what a run does, or did."""

    records: int = 0
    embedded: int = 0
    skipped: int = 0
    truncated: int = 0
    windowed: int = 0
    altered: int = 0
    renamed: int = 0
    residues: int = 0

    def plus(self, items: Iterable[Prepared]) -> Totals:
        """With some records more."""
        counts = Counter(asdict(self))
        for item in items:
            counts["records"] += 1
            for note in item.notes:
                counts[note.what] += 1
            if item.encoded is not None:
                counts["embedded"] += 1
                counts["residues"] += len(item.encoded.ids)
        return Totals(**counts)


@dataclass(frozen=True)
class Survey:
    """What a survey found.

    Attributes:
        totals: what the run will do; ``None`` where the input cannot be known beforehand.
        groups: how many groups there are.
        fingerprint: of all records, in hexadecimal.
        ids: gives the id check that ``prepare`` needs.
        damage: the file that breaks off, if one does; the totals then count what comes before.
    """

    totals: Totals | None
    groups: int
    fingerprint: str | None
    ids: Callable[[], IdCheck]
    damage: DamagedFileError | None = None


UNKNOWN = Survey(None, 0, None, SeenIds)
"""For input that can be read only once."""


def survey(
    read: Callable[[], Iterable[Record]], model: Encoder, policies: RecordPolicies, budget: int, advance: Advance
) -> Survey:
    """Read all records once without computing.

    Args:
        read: opens the input anew.
        model: whose alphabet and limits apply.
        policies: as for the run.
        budget: tokens a group holds.
        advance: told of progress.

    Raises:
        ProteaError: whatever reading and preparing raise, but for damage on the way.
    """
    hashes = _Hashes()
    found = None
    if policies.duplicates == "skip":
        # What is left out as a duplicate may be as odd as it likes; so ids come first.
        for record in _until_damage(read(), []):
            hashes.first_time(store_name(record.id))
    else:
        found = _count(prepare(read(), model, policies, hashes), budget, advance)
    known, counts = np.unique(np.frombuffer(hashes.values, np.uint64), return_counts=True)
    repeated = frozenset(known[counts > 1].tolist())
    new_ids = partial(SurveyedIds, known, repeated) if repeated else _AllFirst
    if found is None or repeated:
        # Only now can it be said what becomes of ids that come twice.
        found = _count(prepare(read(), model, policies, new_ids()), budget, advance)
    return replace(found, ids=new_ids)


def _count(items: Iterable[Prepared], budget: int, advance: Advance) -> Survey:
    totals, number, fingerprint = Totals(), 0, b""
    damage = None
    try:
        for group in groups(items, budget):
            before = totals.residues
            totals = totals.plus(group.items)
            advance(totals.residues - before)
            number, fingerprint = group.number + 1, group.fingerprint
    except DamagedFileError as error:
        damage = error
    return Survey(totals, number, None if damage else fingerprint.hex(), SeenIds, damage)


def groups(items: Iterable[Prepared], budget: int, *, number: int = 0, records: int = 0) -> Iterator[Group]:
    """Group records by a token budget, in order.

    The groups depend on the records and the budget alone. From the first record of any group on they come out the
    same again, which resuming relies on.

    Args:
        items: prepared records.
        budget: tokens a group holds.
        number: of the first group.
        records: how many came before it.

    Raises:
        DamagedFileError: after the last group, if the input broke off.
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
