"""A contact head for a model: the choice of chains, the folder with the model, and the record of the fit.

``contact-head.json`` beside a model lists the chains that its head was fitted on, so that nobody evaluates it on them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, get_args

from torch import Tensor

import protea
from protea.checkpoints import hf
from protea.checkpoints.checkpoint import Checkpoint, like
from protea.checkpoints.formats import HEAD_RECORD, open_checkpoint
from protea.checkpoints.hub import locate
from protea.checkpoints.settings_files import read_json, write_json
from protea.contacts.fit import RANK, C, Example, fit_bilinear, fit_regression
from protea.contacts.precision import ChainPrecision, measure, usable
from protea.contacts.structures import CONTACT, LEAST_SEPARATION, Chain, pairs, read_structures, structure_files
from protea.errors import ArgumentError, DataError
from protea.infer.loading import load_model, stored_weights
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.models.layers import AnyContactHead, ContactHead
from protea.output import WRITTEN, fingerprint, measured, staged
from protea.progress import SILENT, Progress
from protea.rerun import FAILED, INPUT, REMOVE, end_finished, failed
from protea.text import counted, shown

Head = Literal["regression", "bilinear"]

_LARGEST_SEED: Final = 2**32 - 1  # scikit-learn refuses larger ones
_HELD_OUT: Final = 5  # a fifth of the chains is held out and decides when the training of a bilinear head stops


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a head is fitted: its kind, the number of chains, and the parameters of the fit."""

    head: Head = "regression"
    count: int = 20
    seed: int = 0
    c: float = C
    rank: int = RANK

    def __post_init__(self) -> None:
        if self.head not in get_args(Head):
            raise ArgumentError(f"head={self.head!r}: use {' or '.join(get_args(Head))}")
        least = 2 if self.head == "bilinear" else 1
        if self.count < least:
            raise ArgumentError(f"count={shown(self.count)}: use at least {least} for a {self.head} head")
        if not 0 < self.c <= sys.float_info.max:
            raise ArgumentError(f"c={shown(self.c)}: use a finite number above 0")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ArgumentError(f"seed={shown(self.seed)}: use a number from 0 to {_LARGEST_SEED:,}")
        if self.rank < 1:
            raise ArgumentError(f"rank={shown(self.rank)}: use at least 1")


def write_fitted(
    model: str,
    structures: Iterable[Path],
    folder: Path,
    settings: FitSettings,
    rows: list[ReportRow],
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> tuple[dict[str, Any], list[ChainPrecision]]:
    """Fit a head for a model, and write both as a new Hugging Face folder; weights stay as they are stored.

    Returns the content of ``contact-head.json``, and the precision of the head on chains that it was not fitted on;
    ``rows`` receives what was skipped or odd.
    """
    structures = structure_files(structures)
    given = {"settings": asdict(settings), "model": stored_weights(model), INPUT: fingerprint(structures)}
    if (folder / HEAD_RECORD).is_file():
        recorded = read_json(folder / HEAD_RECORD)
        end_finished(folder, {name: recorded.get(name) for name in (*given, FAILED, WRITTEN)}, given, REMOVE)
    with staged(folder) as aside, open_checkpoint(locate(model)) as checkpoint:
        module = load_model(model, device=device, trainable=True).module
        replaced = module.contact_head is not None
        head, fitted, others = fit_to_structures(module, structures, settings, rows, progress)
        # The precision is that of the head as stored, perhaps rounded.
        head = head.to(checkpoint.dtype).float()
        module.contact_head = head
        precisions = measure(module, others, progress=progress)
        _write(aside, checkpoint, head)
        record = given | _record(fitted, rows, replaced=replaced) | failed(rows)
        record[WRITTEN] = {path.name: measured(path) for path in sorted(aside.iterdir())}
        write_json(aside / HEAD_RECORD, record)
    if isinstance(head, ContactHead) and not head.regression.weight.any():
        progress.note("no attention head follows contacts: the regression uses none, and all pairs get one probability")
    if replaced:
        progress.note("this head replaces the one that the model had")
    return record, precisions


def fit_to_structures(
    model: Encoder,
    structures: Iterable[Path],
    settings: FitSettings,
    rows: list[ReportRow],
    progress: Progress = SILENT,
) -> tuple[AnyContactHead, list[Chain], list[Chain]]:
    """Choose chains of structures and fit a head to them; the model keeps its own head.

    Returns the head, the chains it was fitted on, and the other chains that the model can take; ``rows`` receives what
    was skipped or odd.
    """
    width = model.config.hidden_size
    chains, notes = read_structures(structures, progress)
    rows += notes
    chosen, others = _choose(usable(model, chains, rows), settings)
    if settings.head == "bilinear" and settings.rank > width:
        raise ArgumentError(f"rank={shown(settings.rank)}: use at most {width}, the model's width")
    examples = []
    for chain in chosen:
        known = pairs(chain)
        ids = model.alphabet.encode(chain.sequence)
        examples.append(Example(ids, known.rows, known.columns, known.contacts))
    if settings.head == "regression":
        head: AnyContactHead = fit_regression(model, examples, c=settings.c, seed=settings.seed, progress=progress)
    else:
        count = max(1, len(examples) // _HELD_OUT)
        train, held_out = examples[count:], examples[:count]
        head = fit_bilinear(model, train, held_out, rank=settings.rank, seed=settings.seed, progress=progress)
    return head, chosen, others


def _choose(chains: Iterable[Chain], settings: FitSettings) -> tuple[list[Chain], list[Chain]]:
    """Chains to fit, and the other chains, which share no sequence with them.

    The order of chains is a hash of the seed and the sequence, so a few more or fewer chains change it very little.
    """
    by_hash: dict[str, list[Chain]] = {}
    for chain in sorted(chains, key=lambda chain: chain.name):
        by_hash.setdefault(hashlib.sha256(f"{settings.seed}/{chain.sequence}".encode()).hexdigest(), []).append(chain)
    order = sorted(by_hash)
    with_pairs = [key for key in order if len(pairs(by_hash[key][0]).rows)]
    if len(with_pairs) < settings.count:
        short = len(order) - len(with_pairs)
        without = f" ({short} more have no pair {LEAST_SEPARATION} residues apart)" if short else ""
        raise DataError(
            f"count {shown(settings.count)}: the model can take {counted(len(with_pairs), 'chain')} with different "
            f"sequences{without}; give more structures, or a smaller count"
        )
    chosen = with_pairs[: settings.count]
    others = [chain for key in order if key not in set(chosen) for chain in by_hash[key]]
    return [by_hash[key][0] for key in chosen], others


def _record(chains: list[Chain], rows: list[ReportRow], *, replaced: bool) -> dict[str, Any]:
    contacts = [pairs(chain).contacts for chain in chains]
    return {
        "contact": f"CB (CA for glycine) below {CONTACT:g} Angstrom, {LEAST_SEPARATION} or more residues apart",
        "pairs": sum(map(len, contacts)),
        "contacts": int(sum(touch.sum() for touch in contacts)),
        "structures": [{"name": chain.name, "sequence": chain.sequence} for chain in chains],
        "notes": [{"name": row.id, "what": row.what, "detail": row.detail} for row in rows],
        "replaced": replaced,
        "versions": {"protea": protea.__version__}
        | {name: version(name) for name in ("torch", "scikit-learn", "biotite")},
    }


def _write(folder: Path, checkpoint: Checkpoint, head: AnyContactHead) -> None:
    model = like(checkpoint.model)
    model.contact_head = head
    given = {f"contact_head.{name}": value.cpu() for name, value in head.state_dict().items()}

    def parameter(name: str) -> Tensor:
        return (given[name] if name in given else checkpoint.parameter(name)).to(checkpoint.dtype)

    hf.write(folder, model, parameter, checkpoint.dtype)
