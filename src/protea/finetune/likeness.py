"""How alike sequences are: of test sequences to training sequences, and in clusters.

Three ways, by what the data and the machine allow:

- Variants of one protein, all of one length: residues are compared position by position, exactly.
- MMseqs2, where it is installed: identity over the local alignment, if it covers half of the shorter sequence. Without
  such an alignment identity is 0. Sequences under ``SHORTEST`` residues, which MMseqs2 cannot find, take the third way.
- Else an estimate from shared words (``kmers.py``).

Equal sequences have identity 1 in any case. The identity of two pairs is the smaller one of the identities of their
proteins, in the better of both orders; a pair is as alike to the training pairs as its most similar one.

Clusters are connected: sequences that are more alike than the threshold are in one cluster, directly or through others.
So nothing in one cluster is that alike to anything in another, as far as the search finds it. Two pairs are in one
cluster if their proteins are, in either order.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.data.mmseqs import MMseqs, read_rows
from protea.finetune.kmers import Words
from protea.finetune.tasks import Floats, Ints
from protea.progress import SILENT, Progress
from protea.text import counted

SHORTEST: Final = 30
COVERAGE: Final = 0.5

_PROGRAM: Final = "mmseqs"
_SEARCH: Final = "--alignment-mode 3 -s 5.7 -e 1e-3 --max-seqs 50"
"""Candidates are aligned in the order of the score of their best diagonal; 50 are enough for the nearest one."""

_PAIR_SEARCH: Final = _SEARCH.replace("50", "300")
_CLUSTER_SEARCH: Final = "--alignment-mode 3 -s 5.7 -e 1e-2 --max-seqs 10"
"""A family of more than 10 is connected through other members. A search among more sequences has higher E-values, so
that it finds less; the tenfold limit makes up for that."""

_CLOSE: Final = "--min-seq-id {} -c 0.8 --cov-mode 0"
_CLOSE_IDENTITY: Final = 0.5
_CELLS: Final = 1 << 20  # letters compared at once, which fit the cache
_VARIANTS: Final = 0.5  # mean identity to the consensus from which on sequences are variants of one protein
_PARTIAL: Final = 300  # most similar sequences that are kept for each sequence


class Likeness(NamedTuple):
    """Identities ``[N]`` from 0 to 1 of sequences to their most similar training sequence, and how they were found.

    ``neighbour`` ``[N]`` is that sequence's place, the first one of equals; where identity is 0 it means nothing.
    """

    identity: Floats
    neighbour: Ints
    method: str


class _Hits(NamedTuple):
    """Pairs of numbers of sequences, ``query`` and ``target``, with their identity; each ``[H]``."""

    query: Ints
    target: Ints
    identity: Floats


def nearest(
    queries: Sequence[tuple[str, ...]], training: Sequence[tuple[str, ...]], progress: Progress = SILENT
) -> Likeness:
    """The identity of each sequence, or pair, to the most similar one of the training part."""
    progress.begin("similarity to the training part")
    asked, of_query = _unique(queries)
    known, of_training = _unique(training)
    single = all(len(item) == 1 for item in (*queries, *training))
    if single and known and _are_variants([*asked, *known]):
        best, target = _by_position(asked, known)
        method = "residues compared position by position"
    else:
        hits, method = _search(asked, known, _SEARCH if single else _PAIR_SEARCH)
        if not single:
            return Likeness(*_pairs(hits, of_query, of_training, len(known)), method)
        best, target = np.zeros(len(asked)), np.zeros(len(asked), np.int64)
        order = np.lexsort((-hits.target, hits.identity))  # of equals the first training sequence comes last, and stays
        best[hits.query[order]], target[hits.query[order]] = hits.identity[order], hits.target[order]
    if not len(queries):
        return Likeness(np.zeros(0), np.zeros(0, np.int64), method)
    _, first = np.unique(of_training[:, 0], return_index=True)
    places = first[target] if len(first) else target
    return Likeness(best[of_query[:, 0]], places[of_query[:, 0]], method)


def clusters(sequences: Sequence[tuple[str, ...]], identity: float, progress: Progress = SILENT) -> Ints:
    """``[N]``: the number of the cluster of each sequence or pair, in the order of first occurrence."""
    progress.begin("clusters")
    unique, places = _unique(sequences)
    if not len(places):
        return np.zeros(0, np.int64)
    if places.shape[1] == 1 and _are_variants(unique):
        letters = _letters(unique)
        found = _connected(len(unique), lambda one, rest: _identities(letters[:, [one]], letters[:, rest]) >= identity)
    elif shutil.which(_PROGRAM) is None:
        found = _word_clusters(unique, identity)
    else:
        found = _mmseqs_clusters(unique, identity)
    keys = np.sort(found[places], axis=1)
    _, first, number = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number.reshape(-1)]


def leak(found: Likeness, threshold: float = 0.3) -> str:
    """A sentence for users: how many test sequences are alike to a training sequence, and how that was found."""
    total, near, same = len(found.identity), int((found.identity > threshold).sum()), int((found.identity >= 1).sum())
    if not near:
        none = (
            f"none of {counted(total, 'test sequence')} is more than {threshold:.0%} identical to a training sequence"
        )
        return f"{none} ({found.method})"
    equal = f", {same:,} of them fully" if same else ""
    return (
        f"{near:,} of {counted(total, 'test sequence')} {'is' if near == 1 else 'are'} more than {threshold:.0%} "
        f"identical to a training sequence{equal} ({found.method}); the numbers hold for such relatives, not for other "
        "families"
    )


def _unique(items: Sequence[tuple[str, ...]]) -> tuple[list[str], Ints]:
    """Different sequences, and ``[N, 1 or 2]``: the numbers of those that each item consists of."""
    numbers: dict[str, int] = {}
    places = [[numbers.setdefault(text, len(numbers)) for text in item] for item in items]
    return list(numbers), np.array(places, np.int64).reshape(len(items), -1) if items else np.zeros((0, 1), np.int64)


# ---- variants of one protein ----
def _letters(sequences: Sequence[str]) -> NDArray[np.uint8]:
    """``[L, N]``: letters of sequences of one length."""
    joined = np.frombuffer("".join(sequences).encode("latin-1"), np.uint8)
    return np.ascontiguousarray(joined.reshape(len(sequences), -1).T)


def _are_variants(sequences: Sequence[str]) -> bool:
    """Whether all have one length and, on average, half of their letters in common with the consensus."""
    if len(sequences) < 2 or len(set(map(len, sequences))) > 1:
        return False
    letters = _letters(sequences)
    consensus = np.array([np.bincount(row).argmax() for row in letters], np.uint8)
    return float((letters == consensus[:, None]).mean()) >= _VARIANTS


def _identities(one: NDArray[np.uint8], others: NDArray[np.uint8]) -> Floats:
    """``[N]``: the share of equal letters of ``[L, 1]`` and ``[L, N]``."""
    same = np.add.reduce((one == others).view(np.uint8), axis=0, dtype=np.uint32)
    found: Floats = same / len(one)
    return found


def _by_position(queries: Sequence[str], training: Sequence[str]) -> tuple[Floats, Ints]:
    """``[Q]``: the highest identity to a training sequence, and which; positions where all agree are compared once."""
    letters = _letters([*queries, *training])
    varied = letters[(letters != letters[:, :1]).any(1)]
    asked, known = np.ascontiguousarray(varied[:, : len(queries)]), varied[:, len(queries) :]
    best, target = np.zeros(len(queries), np.uint32), np.zeros(len(queries), np.int64)
    step = max(1, _CELLS // max(1, len(varied)))
    for start in range(0, len(queries), step):
        some = asked[:, start : start + step]
        for place, column in enumerate(known.T):
            same = np.add.reduce((some == column[:, None]).view(np.uint8), axis=0, dtype=np.uint32)
            target[start : start + step][same > best[start : start + step]] = place
            np.maximum(best[start : start + step], same, out=best[start : start + step])
    found: Floats = (best + (len(letters) - len(varied))) / max(1, len(letters))
    return found, target


# ---- searches ----
def _search(queries: Sequence[str], targets: Sequence[str], flags: str) -> tuple[_Hits, str]:
    """Similar sequences among ``targets``, equal ones included, and the method in words."""
    places = {text: place for place, text in enumerate(targets)}
    equal = [(place, places[text], 1.0) for place, text in enumerate(queries) if text in places]
    words = "estimated from words of 4 letters in common; MMseqs2 is not installed"
    if shutil.which(_PROGRAM) is None:
        return _hits([*equal, *_by_words(queries, range(len(queries)), targets)]), words
    long = [place for place, text in enumerate(queries) if len(text) >= SHORTEST]
    short = [place for place, text in enumerate(queries) if len(text) < SHORTEST]
    aligned, version = _by_mmseqs(queries, long, targets, flags)
    method = f"MMseqs2 {version}: alignments over half of the shorter sequence"
    if short:
        method += f"; for {counted(len(short), 'sequence')} under {SHORTEST} residues an estimate from common words"
    estimated = _hits([*equal, *_by_words(queries, short, targets)])
    return _Hits(*(np.concatenate(arrays) for arrays in zip(aligned, estimated, strict=True))), method


def _hits(rows: Sequence[tuple[int, int, float]] | Floats) -> _Hits:
    table = np.array(rows, np.float64).reshape(-1, 3)
    return _Hits(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2])


def _by_words(
    queries: Sequence[str], chosen: Iterable[int], targets: Sequence[str]
) -> Iterator[tuple[int, int, float]]:
    words: Words | None = None
    for place in chosen:
        words = words or Words(targets)
        found = words.identity(queries[place])
        near = np.flatnonzero(found)
        near = near[np.argsort(-found[near], kind="stable")[:_PARTIAL]]
        yield from ((place, int(target), float(found[target])) for target in near)


def _by_mmseqs(queries: Sequence[str], chosen: Sequence[int], targets: Sequence[str], flags: str) -> tuple[_Hits, str]:
    """Hits of MMseqs2, whose alignments cover enough of the shorter sequence, and the program's version."""
    with TemporaryDirectory(prefix="protea-") as name:
        folder = Path(name)
        program = MMseqs(_PROGRAM, None, folder / "log", SILENT)
        if not chosen or not targets:
            return _hits([]), program.version
        asked = _write(folder / "queries.fasta", ((place, queries[place]) for place in chosen))
        known = _write(folder / "targets.fasta", enumerate(targets))
        tables = read_rows(program.search(asked, known, folder / "search", flags), np.float64)
        covered = [rows[np.maximum(rows[:, 3], rows[:, 4]) >= COVERAGE, :3] for rows in tables]
        return _hits(np.concatenate([np.empty((0, 3)), *covered])), program.version


def _mmseqs_clusters(sequences: Sequence[str], identity: float) -> Ints:
    """Connected through hits of all sequences among the representatives of clusters of close relatives.

    Without these clusters, a family of thousands would need millions of alignments.
    """
    with TemporaryDirectory(prefix="protea-") as name:
        folder = Path(name)
        fasta = _write(folder / "all.fasta", enumerate(sequences))
        flags = _CLOSE.format(max(identity, _CLOSE_IDENTITY))
        table = MMseqs(_PROGRAM, None, folder / "log", SILENT).cluster(fasta, folder / "clusters", flags)
        close = np.concatenate([np.empty((0, 2), np.int64), *read_rows(table, np.int64)])
    chosen = np.unique(close[:, 0])
    hits, _ = _search(sequences, [sequences[place] for place in chosen.tolist()], _CLUSTER_SEARCH)
    near = hits.identity >= identity
    one, other = (
        np.concatenate([close[:, 0], hits.query[near]]),
        np.concatenate([close[:, 1], chosen[hits.target[near]]]),
    )
    return joined(len(sequences), one, other)


def _write(path: Path, sequences: Iterable[tuple[int, str]]) -> Path:
    with path.open("w", encoding="latin-1") as stream:
        for place, text in sequences:
            stream.write(f">{place}\n{''.join(letter if letter.isalpha() else 'X' for letter in text)}\n")
    return path


def _pairs(hits: _Hits, queries: Ints, training: Ints, width: int) -> tuple[Floats, Ints]:
    """``[Q]``: the highest identity of query pairs to training pairs, and which, from the hits of their proteins."""
    order = np.argsort(hits.query, kind="stable")
    starts = np.searchsorted(hits.query[order], np.arange(queries.max(initial=-1) + 2))

    def row(protein: int) -> Floats:
        found = np.zeros(width)
        mine = order[starts[protein] : starts[protein + 1]]
        np.maximum.at(found, hits.target[mine], hits.identity[mine])
        return found

    best, target = np.zeros(len(queries)), np.zeros(len(queries), np.int64)
    for place, (first, second) in enumerate(queries.tolist()):
        one, other = row(first)[training], row(second)[training]  # [T, 2]
        both = np.maximum(np.minimum(one[:, 0], other[:, 1]), np.minimum(one[:, 1], other[:, 0]))
        if len(both):
            target[place] = both.argmax()
            best[place] = both[target[place]]
    return best, target


# ---- connected sequences ----
def joined(count: int, one: Ints, other: Ints) -> Ints:
    """``[count]``: the smallest number that each number is connected with by edges ``one`` to ``other``."""
    label = np.arange(count)
    while True:
        least = np.minimum(label[one], label[other])
        new = label.copy()
        np.minimum.at(new, label[one], least)
        np.minimum.at(new, label[other], least)
        new = new[new]
        if (new == label).all():
            return label
        label = new


def _connected(count: int, alike: Callable[[int, Ints], NDArray[np.bool_]]) -> Ints:
    """As ``joined``; ``alike`` says which of some numbers are connected with one."""
    label, rest = np.full(count, -1, np.int64), np.arange(count)
    while len(rest):
        seed, rest = int(rest[0]), rest[1:]
        label[seed], waiting = seed, [seed]
        while waiting and len(rest):
            near = alike(waiting.pop(), rest)
            label[rest[near]] = seed
            waiting += rest[near].tolist()
            rest = rest[~near]
    return label


def _word_clusters(sequences: Sequence[str], identity: float) -> Ints:
    """Connected by estimated identities; the words of sequences that have their cluster are dropped by and by."""
    held, words = np.arange(len(sequences)), Words(sequences)

    def alike(one: int, rest: Ints) -> NDArray[np.bool_]:
        nonlocal held, words
        if 2 * len(rest) <= len(held):
            held, words = rest, Words([sequences[place] for place in rest.tolist()])
        found = words.identity(sequences[one])
        near: NDArray[np.bool_] = found[np.searchsorted(held, rest)] >= identity
        return near

    return _connected(len(sequences), alike)
