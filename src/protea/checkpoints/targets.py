"""Checkpoints that exist where a command would write one: whether they are the same, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import HEAD_RECORD, companion, open_checkpoint, recognised
from protea.checkpoints.hf_config import NAME, write_config
from protea.checkpoints.layout import Parameter
from protea.checkpoints.settings_files import CONFIG
from protea.checkpoints.tensors import same_bits
from protea.checkpoints.vocabulary import VOCABULARY
from protea.device import return_freed_memory
from protea.errors import FinishedError, OutputError, ProteaError
from protea.journal import complete
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.rerun import REMOVE


def check_target(
    target: Path, name: str, model: Encoder, parameter: Parameter, progress: Progress = SILENT, head: Path | None = None
) -> None:
    """End the writing of a checkpoint that exists; a new path or an empty folder passes.

    The error is a ``FinishedError`` if the checkpoint has the format with this name, this model, these parameters,
    and beside them a copy of the record of the contact ``head``, if there is one.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        known = recognised(target).NAME
        with open_checkpoint(target) as copy:
            part = first_difference(model, copy, parameter, progress) if known == name else None
        part = part or (_incomplete(target, name, model, head) if known == name else None)
    except (ProteaError, OSError) as error:
        raise OutputError(f"{target}: exists already, and is no checkpoint, or a damaged one; {REMOVE}") from error
    if known == name and part is None:
        raise FinishedError(complete(target))
    reason = f"{part} differs" if part else f"format {known} -> {name}"
    raise OutputError(f"{target}: exists already, of another run ({reason}); {REMOVE}")


def _incomplete(target: Path, name: str, model: Encoder, head: Path | None) -> str | None:
    """Name the first file beside a checkpoint's tensors and configuration that is missing or has changed."""
    with TemporaryDirectory() as folder:
        write_config(Path(folder), model, torch.float32)
        texts = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name != CONFIG}
    names = texts if name == NAME else (VOCABULARY,) if target.is_dir() else ()
    texts = {file: texts[file] for file in names}
    if head is not None and head.is_file():
        texts[HEAD_RECORD] = head.read_bytes()
    for file, text in texts.items():
        if not any(
            text == path.read_bytes() for path in (companion(target, file), *target.rglob(file)) if path.is_file()
        ):
            return file
    return None


def first_difference(model: Encoder, copy: Checkpoint, parameter: Parameter, progress: Progress = SILENT) -> str | None:
    """What a copy of a model holds otherwise, bit for bit: its configuration, or the first buffer or parameter."""
    if copy.model.config != model.config:
        return "the configuration"
    names = [name for name, _ in model.named_parameters()]
    copied = {name for name, _ in copy.model.named_parameters()}
    progress.begin("comparing", len(names))
    for name in (*differing_buffers(model, copy.model), *sorted(copied.symmetric_difference(names))):
        return name
    for name in names:
        if not same_bits(parameter(name), copy.parameter(name)):
            return name
        progress.advance()
        return_freed_memory()
    return None


def differing_buffers(model: Encoder, copy: Encoder) -> dict[str, Tensor]:
    """The stored buffers of a model that its copy holds otherwise."""
    copied = copy.stored_buffers
    return {name: value for name, value in model.stored_buffers.items() if not torch.equal(value, copied[name])}
