"""Convert a checkpoint to another format, one tensor at a time, and prove that the copy is equal.

The copy is read again. Every tensor must equal the source's bit for bit. Logits of fixed sequences are compared with
the source's, and with those of the library that reads the format, if it is installed. Then the copy appears.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from protea.checkpoints import fair_esm
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import (
    EXTRAS,
    HEAD_RECORD,
    Format,
    companion,
    complete,
    format_named,
    recognised,
    unsupported,
    write_extras,
)
from protea.checkpoints.hub import locate
from protea.checkpoints.layout import VOCABULARY
from protea.checkpoints.peers import TOLERANCE, difference, logits, peer_logits
from protea.checkpoints.targets import check_target, differing_buffers, first_difference
from protea.checkpoints.tensors import FLOATS, same_bits
from protea.device import return_freed_memory
from protea.errors import CheckpointError, OutputError
from protea.models.encoder import Encoder
from protea.models.layers import ContactHead
from protea.output import staged
from protea.progress import SILENT, Progress


@dataclass
class Conversion:
    """The result of a conversion and its checks.

    Attributes:
        path: the checkpoint that was read.
        source: title of its format.
        target: title of the format written.
        tensors: number of parameters compared bit for bit.
        checks: what else was compared, in words, with the differences.
        apart: what the format cannot hold, and where it is instead.
        notes: what to know before other programs use the copy.
    """

    path: Path
    source: str
    target: str
    family: str
    parameters: int
    dtype: torch.dtype
    tensors: int
    checks: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    target: Path,
    to: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    peers: bool = True,
    progress: Progress = SILENT,
) -> Conversion:
    """Write a checkpoint in another format, and prove the copy. An error leaves nothing behind.

    Args:
        source: a checkpoint of any format, or a published name.
        target: what to write; must not exist.
        to: the format's name; by default ``fair-esm`` for a target that ends in ``.pt``, ``nemo`` for ``.nemo``,
            else ``hf``.
        dtype: type to store; the source's own by default.
        peers: compare with the library that reads the format, if it is installed and memory allows.
        progress: receives the progress.
    """
    to = to or {".pt": fair_esm.NAME, ".nemo": "nemo"}.get(target.suffix, "hf")
    written = format_named(to)
    path = locate(source)
    read = recognised(path)
    progress.begin("reading")
    if os.path.lexists(target):
        with complete(read.open_checkpoint(path), path) as checkpoint:
            to_compare = partial(_cast, checkpoint, dtype=dtype or checkpoint.dtype)
            record = companion(path, HEAD_RECORD) if checkpoint.model.contact_head is not None else None
            check_target(target, to, checkpoint.model, to_compare, progress, record)
    with complete(read.open_checkpoint(path), path) as checkpoint, staged(target) as place:
        model = checkpoint.model
        if reason := unsupported(model, to):
            raise CheckpointError(f"{path}: cannot be written as {written.TITLE}: {reason}")
        if to == fair_esm.NAME:
            fair_esm.check_target(target, model)
        for beside in (fair_esm.regression_path(target), companion(target, EXTRAS), companion(target, HEAD_RECORD)):
            if target.suffix and os.path.lexists(beside):
                raise OutputError(f"{beside}: exists already, and would be read with {target.name}; remove it")
        sizes = [parameter.numel() for parameter in model.parameters()]
        kind = dtype or checkpoint.dtype
        report = Conversion(path, read.TITLE, written.TITLE, model.config.family, sum(sizes), kind, len(sizes))

        def parameter(name: str) -> Tensor:
            progress.advance()
            return_freed_memory()
            return _cast(checkpoint, name, kind)

        progress.begin("writing", len(sizes))
        written.write(place, model, parameter, kind)
        zeroed = _write_lost(checkpoint, place, target, written, report)
        with complete(written.open_checkpoint(place), place) as copy:
            if part := first_difference(model, copy, partial(_cast, checkpoint, dtype=kind), progress):
                raise CheckpointError(f"{part} came back different from {place.name}; nothing was kept")
            ours = _compare_logits(checkpoint, copy, place, report, progress)
            if peers:
                # A library that sets a token's row to 0 gives other logits for it: compare the columns before that.
                columns = min(zeroed, default=len(model.alphabet))
                _compare_with_peer(copy, ours, place, to, columns, report)
        if model.contact_head is not None and companion(path, HEAD_RECORD).is_file():
            # An evaluation of the copy must know which structures its head was fitted on.
            shutil.copyfile(companion(path, HEAD_RECORD), companion(place, HEAD_RECORD))
        if to == fair_esm.NAME and not isinstance(model.contact_head, ContactHead) and "esm1v" not in target.name:
            report.notes.append(
                f"without a contact regression, Meta's loader misses {fair_esm.regression_path(target).name}: give "
                "load_model_and_alphabet_core the loaded file and no regression"
            )
    return report


def _cast(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    value = checkpoint.parameter(name)
    narrow = value.to(dtype)
    if value.dtype != dtype and not narrow.isfinite().all() and value.isfinite().all():
        raise CheckpointError(
            f"{checkpoint.tensors.paths[0]}: {name} has values up to {float(value.abs().max()):.3g}, beyond what "
            f"{str(dtype).removeprefix('torch.')} holds; choose another --dtype"
        )
    return narrow


def _write_lost(checkpoint: Checkpoint, place: Path, target: Path, written: Format, report: Conversion) -> list[int]:
    """Write beside the copy what its format lost; return the lost rows that the format's library sets to 0."""
    model = checkpoint.model
    with written.open_checkpoint(place) as copy:
        stored = dict(copy.model.named_parameters())
        lost: dict[str, Tensor] = {}
        for name, _ in model.named_parameters():
            if name not in stored or name in VOCABULARY:
                value = _cast(checkpoint, name, report.dtype)
                if name not in stored or not same_bits(value, copy.parameter(name)):
                    lost[name] = value
        lost |= differing_buffers(model, copy.model)
        ours, theirs = vars(model.config), vars(copy.model.config)
        settings = [key for key in ours if ours[key] != theirs[key]]
        rows = type(model).stored[written.NAME].zeroed(model.config)
        zeroed = [row for name, row in rows.items() if name in lost]
        if lost or settings:
            beside = write_extras(place, copy, model, lost)
            shown = target.parent / beside.relative_to(place.parent)
            report.apart += [f"{what}, in {shown}" for what in _described(model, lost, settings, bool(zeroed))]
    for row in zeroed:
        token = model.alphabet.tokens[row]
        report.notes.append(f"Meta's loader sets the mask token's row to 0: its logit for {token} differs there")
    return zeroed


def _described(model: Encoder, lost: Mapping[str, Tensor], settings: list[str], zeroed: bool) -> list[str]:
    """What a format lost, in words."""
    settings = [key for key in settings if key != "vocab_size"]
    parts = {
        "the contact head": any(name.startswith("contact_head.") for name in lost),
        "the language-model head": any(name.startswith("lm_head.") for name in lost.keys() - VOCABULARY),
        "the mask token's row" if zeroed else "rows of the vocabulary": any(name in VOCABULARY for name in lost),
        "the stored rotary frequencies": any(name in lost for name in model.stored_buffers),
        f"the settings {', '.join(settings)}": bool(settings),
    }
    return [part for part, is_lost in parts.items() if is_lost] or ["the size of the padded vocabulary"]


def _compare_logits(
    checkpoint: Checkpoint, copy: Checkpoint, place: Path, report: Conversion, progress: Progress
) -> list[Tensor]:
    """Compare the copy's logits with the source's, and return the copy's."""
    what = "logits" if copy.model.lm_head is not None else "last hidden states"
    progress.begin(f"computing {what}", 2)
    source = logits(checkpoint)
    progress.advance()
    ours = logits(copy)
    progress.advance()
    compared = f"{what} of {len(ours)} sequences"
    if [FLOATS[name] for name in checkpoint.stored_types] == [report.dtype]:
        if not all(same_bits(a, b) for a, b in zip(source, ours, strict=True)):
            raise CheckpointError(f"{what} of {place.name} differ from the source's; nothing was kept")
        report.checks.append(f"{compared} identical to the source's")
    else:
        largest = difference(ours, source)
        report.checks.append(f"{compared} within {largest:.1e} of the source's, which is stored in another type")
    return ours


def _compare_with_peer(
    copy: Checkpoint, ours: list[Tensor], place: Path, to: str, columns: int, report: Conversion
) -> None:
    """Compare the first columns of logits with those of the library that reads the format."""
    if not all(values.isfinite().all() for values in ours):
        report.checks.append("not compared with other libraries: logits are not finite, as in the source")
        return
    answer = peer_logits(to, place, copy)
    if isinstance(answer, str):
        report.checks.append(f"not compared with {answer}")
    elif answer is not None:
        library, theirs = answer
        largest = difference([rows[:, :columns] for rows in ours], [rows[:, :columns] for rows in theirs])
        if not largest <= TOLERANCE:
            raise CheckpointError(
                f"{library} computes other logits from {place.name}: they differ by {largest:.1e} of the largest; "
                "nothing was kept"
            )
        report.checks.append(f"logits within {largest:.1e} of {library}'s")
