"""Any format to any other, one tensor at a time, and the proof that the copy is one.

What is written is read back: every tensor is compared bit for bit with the source's, logits of fixed sequences with
the source's and, where it is installed, with the library whose format it is. Only then does the copy appear.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from protea.allocator import return_freed_memory
from protea.checkpoints import fair_esm
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import Format, format_named, recognised
from protea.checkpoints.json_files import staged
from protea.checkpoints.layout import VOCABULARY
from protea.checkpoints.peers import TOLERANCE, peer_logits
from protea.checkpoints.probe import difference, logits
from protea.checkpoints.sidecar import complete, extras_path, head_record_path, write_extras
from protea.checkpoints.tensors import FLOATS, raw_bytes
from protea.errors import CheckpointError, OutputError
from protea.models.encoder import Encoder
from protea.models.heads import ContactHead

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass
class Conversion:
    """What was done, and what was found to be so.

    Attributes:
        source: title of the format read.
        target: title of the format written.
        family: of the model.
        parameters: how many it has.
        dtype: type the copy is stored in.
        tensors: parameters compared bit for bit.
        checks: what else was compared, in words, with the differences found.
        apart: what the format has no room for and where it is kept.
        notes: what to know before using the copy elsewhere.
    """

    source: str
    target: str
    family: str
    parameters: int
    dtype: torch.dtype
    tensors: int = 0
    checks: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    peers: bool = True,
    progress: Progress = lambda _what, _done, _of: None,
) -> Conversion:
    """Write a checkpoint in another format, and prove the copy.

    Args:
        source: a checkpoint of any format.
        target: what to write; must not exist.
        to: the format's name, one of ``NAMES``.
        dtype: type to store; the source's own by default.
        peers: compare with the library whose format it is, if it is installed and memory allows.
        progress: told how far it is.

    Raises:
        UsageError: no such format, or a target that the format's library would not take by its name.
        CheckpointError: the source is damaged or cannot be held by the format, or the copy differs.
        OutputError: the target exists or cannot be written. Nothing is left behind in any case.
    """
    written = format_named(to)
    read = recognised(source)
    with complete(read.open_checkpoint(source), source) as checkpoint, staged(target) as place:
        model = checkpoint.model
        why = written.unsupported(model)
        if why:
            raise CheckpointError(f"{source}: cannot be written as {written.TITLE}: {why}")
        if to == fair_esm.NAME:
            fair_esm.check_target(target, model)
        _check_beside(target)
        kind = dtype or checkpoint.dtype
        report = Conversion(
            read.TITLE, written.TITLE, model.config.family, sum(one.numel() for one in model.parameters()), kind
        )
        total = len(list(model.parameters()))
        done = 0

        def parameter(name: str) -> Tensor:
            nonlocal done
            done += 1
            progress("writing", done, total)
            return_freed_memory()
            return _cast(checkpoint, name, kind)

        written.write(place, model, parameter, kind)
        lost = _verify(checkpoint, place, target, written, report, progress)
        if model.contact_head is not None and head_record_path(source).is_file():
            # Whoever evaluates the copy must know what its head has seen.
            shutil.copyfile(head_record_path(source), head_record_path(place))
        # A library cannot agree on a column whose row it replaces.
        columns = min(_zeroed(model, to, lost).values(), default=len(model.alphabet))
        _compare_logits(checkpoint, place, written, report, columns if peers else 0, progress)
        if to == fair_esm.NAME and not isinstance(model.contact_head, ContactHead) and "esm1v" not in target.name:
            report.notes.append(
                f"without a contact regression, Meta's loader misses {fair_esm.regression_path(target).name}: give "
                "load_model_and_alphabet_core the loaded file and no regression"
            )
    return report


def _check_beside(target: Path) -> None:
    """What lies beside a file from an earlier one would be taken for the new one's."""
    for beside in (fair_esm.regression_path(target), extras_path(target), head_record_path(target)):
        if target.suffix and os.path.lexists(beside):
            raise OutputError(f"{beside}: exists already, and would be read with {target.name}; remove it")


def _cast(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    value = checkpoint.parameter(name)
    if value.dtype == dtype:
        return value
    narrow = value.to(dtype)
    if not narrow.isfinite().all() and value.isfinite().all():
        raise CheckpointError(
            f"{checkpoint.files[0]}: {name} has values up to {float(value.abs().max()):.3g}, beyond what "
            f"{str(dtype).removeprefix('torch.')} holds; choose another --dtype"
        )
    return narrow


def _verify(
    checkpoint: Checkpoint, place: Path, target: Path, written: Format, report: Conversion, progress: Progress
) -> dict[str, Tensor]:
    """Compare every parameter of what was written with the source's; what is lost is put beside it, and returned."""
    lost: dict[str, Tensor] = {}
    model = checkpoint.model
    names = [name for name, _ in model.named_parameters()]
    with written.open_checkpoint(place) as copy:
        there = dict(copy.model.named_parameters())
        for number, name in enumerate(names, start=1):
            value = _cast(checkpoint, name, report.dtype)
            if name not in there or (name in VOCABULARY and not same_bits(value, copy.parameter(name))):
                lost[name] = value
            elif not same_bits(value, copy.parameter(name)):
                raise CheckpointError(f"{name} came back different from {place.name}; nothing was kept")
            progress("comparing", number, len(names))
            return_freed_memory()
        lost |= _differing_buffers(model, copy.model)
        differing = [
            key
            for key, value in vars(model.config).items()
            if key != "vocab_size" and vars(copy.model.config)[key] != value
        ]
        if not lost and model.config == copy.model.config:
            report.tensors = len(names)
            return lost
        beside = write_extras(place, copy, model, lost)
    shown = target.parent / beside.relative_to(place.parent)
    report.apart += [f"{what}, in {shown}" for what in _described(model, written.NAME, lost, differing)]
    for row in _zeroed(model, written.NAME, lost).values():
        token = model.alphabet.tokens[row]
        report.notes.append(f"Meta's loader sets the mask token's row to 0: its logit for {token} differs there")
    with complete(written.open_checkpoint(place), place) as copy:
        if copy.model.config != model.config:
            raise CheckpointError(f"the configuration came back different from {place.name}; nothing was kept")
        for name in names:
            if name in lost and not same_bits(lost[name], copy.parameter(name)):
                raise CheckpointError(f"{name} came back different from {beside.name}; nothing was kept")
        for name in _differing_buffers(model, copy.model):
            raise CheckpointError(f"{name} came back different from {beside.name}; nothing was kept")
    report.tensors = len(names)
    return lost


def _differing_buffers(model: Encoder, copy: Encoder) -> dict[str, Tensor]:
    """Buffers of a model that its copy has other values of."""
    there = copy.stored_buffers
    return {name: value for name, value in model.stored_buffers.items() if not torch.equal(value, there[name])}


def _zeroed(model: Encoder, form: str, lost: Mapping[str, Tensor]) -> dict[str, int]:
    """Rows that the format's library sets to 0 as it loads, of parameters that are not so."""
    rows = type(model).stored[form].zeroed(model.config)
    return {name: row for name, row in rows.items() if name in lost}


def _described(model: Encoder, form: str, lost: dict[str, Tensor], differing: list[str]) -> list[str]:
    """What a format had no room for, in words."""
    found: list[str] = []
    if any(name.startswith("contact_head.") for name in lost):
        found.append("the contact head")
    if any(name.startswith("lm_head.") and name not in VOCABULARY for name in lost):
        found.append("the language-model head")
    if any(name in VOCABULARY for name in lost):
        found.append("the mask token's row" if _zeroed(model, form, lost) else "rows of the vocabulary")
    if any(name in lost for name in model.stored_buffers):
        found.append("the stored rotary frequencies")
    if differing:
        found.append(f"the settings {', '.join(differing)}")
    return found or ["the size of the padded vocabulary"]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one type, and the same bits, NaN and signs of zero included."""
    return a.shape == b.shape and a.dtype == b.dtype and raw_bytes(a) == raw_bytes(b)


def _compare_logits(
    checkpoint: Checkpoint, place: Path, written: Format, report: Conversion, peer_columns: int, progress: Progress
) -> None:
    """Compare logits with the source's, and the first ``peer_columns`` of them with another library's."""
    what = "logits" if checkpoint.model.lm_head is not None else "last hidden states"
    progress(f"computing {what}", 0, 2)
    source = logits(checkpoint)
    progress(f"computing {what}", 1, 2)
    with complete(written.open_checkpoint(place), place) as copy:
        ours = logits(copy)
        progress(f"computing {what}", 2, 2)
        if [FLOATS[name] for name in checkpoint.stored_types] == [report.dtype]:
            if not all(same_bits(a, b) for a, b in zip(source, ours, strict=True)):
                raise CheckpointError(f"{what} of {place.name} differ from the source's; nothing was kept")
            report.checks.append(f"{what} of {len(ours)} sequences identical to the source's")
        else:
            report.checks.append(
                f"{what} of {len(ours)} sequences within {difference(ours, source):.1e} of the source's, whose type is "
                "another"
            )
        if not peer_columns:
            return
        if not all(one.isfinite().all() for one in ours):
            report.checks.append(f"not compared with other libraries: {what} are not finite, as in the source")
            return
        peer = peer_logits(written.NAME, place, copy)
        if peer is None:
            return
        if peer.logits is None:
            report.checks.append(f"not compared with {peer.name}: {peer.why}")
            return
        found = difference([one[:, :peer_columns] for one in ours], [one[:, :peer_columns] for one in peer.logits])
        if not found <= TOLERANCE:
            raise CheckpointError(
                f"{peer.name} computes other logits from {place.name}: they differ by {found:.1e} of the "
                "largest; nothing was kept"
            )
        report.checks.append(f"logits within {found:.1e} of {peer.name}'s")
