"""A contact head for a model: which chains it is fitted to, the fit, and what is kept of how it was made.

``contact-head.json`` beside a model says what its head was fitted on, so that nobody evaluates it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Final, Literal, get_args

from torch import Tensor

from protea.checkpoints import hf
from protea.checkpoints.checkpoint import Checkpoint, like
from protea.checkpoints.json_files import read_json, write_json
from protea.checkpoints.sidecar import HEAD_RECORD
from protea.contacts.fit import RANK, C, Example, Progress, fit_bilinear, fit_regression
from protea.contacts.structures import CONTACT, LEAST_SEPARATION, Chain, Note, pairs
from protea.errors import CheckpointError, DataError, UsageError
from protea.models.encoder import Encoder
from protea.models.heads import AnyContactHead

Head = Literal["regression", "bilinear"]

_LARGEST_SEED: Final = 2**32 - 1
"""That scikit-learn takes."""

_APART: Final = 5
"""One in so many of the chains of a bilinear head stops its training."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a head is fitted.

    Attributes:
        head: ``regression`` on attention maps, or ``bilinear`` on last hidden states.
        count: chains.
        seed: which, and of what is random in fitting.
        c: inverse strength of the regression's L1 penalty.
        rank: of the bilinear head.

    Raises:
        UsageError: a value is out of range.
    """

    head: Head = "regression"
    count: int = 20
    seed: int = 0
    c: float = C
    rank: int = RANK

    def __post_init__(self) -> None:
        if self.head not in get_args(Head):
            raise UsageError(f"unknown head {self.head!r}; use {', '.join(get_args(Head))}")
        least = 2 if self.head == "bilinear" else 1
        if self.count < least:
            raise UsageError(f"--count must be at least {least} for a {self.head} head, got {self.count}")
        if not 0 < self.c < inf:
            raise UsageError(f"--c must be above 0 and finite, got {self.c:g}")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise UsageError(f"--seed must be from 0 to {_LARGEST_SEED:,}, got {self.seed}")
        if self.rank < 1:
            raise UsageError(f"--rank must be at least 1, got {self.rank}")


def choose(chains: Iterable[Chain], settings: FitSettings) -> tuple[list[Chain], list[Chain]]:
    """Chains to fit, and those that are left, which share no sequence with them.

    A chain's turn is a hash of the seed and its sequence: others that come or go change nothing but who is last.

    Raises:
        DataError: there are fewer than asked for.
    """
    by_turn: dict[str, list[Chain]] = {}
    for chain in sorted(chains, key=lambda one: one.name):
        by_turn.setdefault(hashlib.sha256(f"{settings.seed}/{chain.sequence}".encode()).hexdigest(), []).append(chain)
    turns = sorted(by_turn)
    usable = [turn for turn in turns if len(pairs(by_turn[turn][0]).rows)]
    if len(usable) < settings.count:
        short = len(turns) - len(usable)
        without = f" ({short} more have no pair {LEAST_SEPARATION} residues apart)" if short else ""
        raise DataError(
            f"{len(usable)} chains of different sequence that the model can see{without}, and --count asks for "
            f"{settings.count}; give more structures, or a smaller --count"
        )
    taken = set(usable[: settings.count])
    chosen = [by_turn[turn][0] for turn in usable[: settings.count]]
    return chosen, [chain for turn in turns if turn not in taken for chain in by_turn[turn]]


def fit(model: Encoder, chains: Sequence[Chain], settings: FitSettings, progress: Progress) -> AnyContactHead:
    """A contact head for a model.

    Args:
        model: on the device to compute on; needs none.
        chains: that it can see.
        settings: how.
        progress: told how far it is.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UsageError: the rank is above the model's width.
        DataError: the chains have no contacts.
        DeviceError: they do not fit in memory.
    """
    if settings.head == "bilinear" and settings.rank > model.config.hidden_size:
        raise UsageError(f"--rank must be at most {model.config.hidden_size}, the model's width, got {settings.rank}")
    examples = [_example(model, chain) for chain in chains]
    if settings.head == "regression":
        return fit_regression(model, examples, c=settings.c, seed=settings.seed, progress=progress)
    apart = max(1, len(examples) // _APART)
    return fit_bilinear(
        model, examples[apart:], examples[:apart], rank=settings.rank, seed=settings.seed, progress=progress
    )


def _example(model: Encoder, chain: Chain) -> Example:
    found = pairs(chain)
    return Example(model.alphabet.encode(chain.sequence), found.rows, found.columns, found.contacts)


def description(
    chains: Sequence[Chain],
    settings: FitSettings,
    notes: Iterable[Note],
    versions: Mapping[str, str],
    *,
    replaced: bool,
) -> dict[str, Any]:
    """What ``contact-head.json`` says.

    Args:
        chains: that the head was fitted on.
        settings: how.
        notes: on these and others.
        versions: of programs.
        replaced: whether the model had a head of its own.
    """
    counts = [pairs(chain) for chain in chains]
    return {
        "settings": asdict(settings),
        "contact": f"CB (CA for glycine) below {CONTACT:g} Angstrom, {LEAST_SEPARATION} or more residues apart",
        "pairs": sum(len(one.rows) for one in counts),
        "contacts": int(sum(one.contacts.sum() for one in counts)),
        "structures": [{"name": chain.name, "sequence": chain.sequence} for chain in chains],
        "notes": [note._asdict() for note in notes],
        "replaced": replaced,
        "versions": dict(versions),
    }


def write(folder: Path, checkpoint: Checkpoint, head: AnyContactHead, described: Mapping[str, Any]) -> None:
    """Write a checkpoint with another contact head as a Hugging Face folder, its weights as they are stored.

    Args:
        folder: where.
        checkpoint: the model.
        head: its new contact head.
        described: of ``contact-head.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    model = like(checkpoint.model)
    model.contact_head = head
    given = {f"contact_head.{name}": value.cpu() for name, value in head.state_dict().items()}
    dtype = checkpoint.dtype

    def parameter(name: str) -> Tensor:
        return (given[name] if name in given else checkpoint.parameter(name)).to(dtype)

    hf.write(folder, model, parameter, dtype)
    write_json(folder / HEAD_RECORD, dict(described))


@dataclass(frozen=True)
class Fitted:
    """What a head was fitted on.

    Attributes:
        names: of chains.
        sequences: of the same, which may have other names elsewhere.
    """

    names: frozenset[str]
    sequences: frozenset[str]

    @classmethod
    def of(cls, chains: Iterable[tuple[str, str]]) -> Fitted:
        """By names and sequences of chains."""
        found = dict(chains)
        return cls(frozenset(found), frozenset(found.values()))

    def covers(self, chain: Chain) -> bool:
        """Whether a chain is among them."""
        return chain.name in self.names or chain.sequence in self.sequences


def fitted_on(path: Path) -> Fitted:
    """Read a ``contact-head.json``.

    Raises:
        CheckpointError: it is absent, or nothing that ``protea fit-contacts`` wrote.
    """
    try:
        chains = [(str(one["name"]), str(one["sequence"])) for one in read_json(path)["structures"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: does not say what a contact head was fitted on; remove it, or fit the head again"
        ) from error
    return Fitted.of(chains)


def fitted_beside(record: Path | None) -> Fitted | None:
    """The same, if there is such a file.

    Raises:
        CheckpointError: it is nothing that ``protea fit-contacts`` wrote.
    """
    return fitted_on(record) if record is not None and record.exists() else None
