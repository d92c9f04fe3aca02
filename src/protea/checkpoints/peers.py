"""What other libraries, where they are installed, compute from a checkpoint that was just written.

Neither is given a file to unpickle: transformers reads safetensors, and Meta's package gets the tensors that we read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from protea.checkpoints import fair_esm, hf
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.probe import probe_batch
from protea.device import available_memory
from protea.errors import CheckpointError
from protea.models.encoder import Encoder

TOLERANCE: Final = 2e-5
"""Largest difference to another library, as a share of max(1, the largest logit): both round in float32."""

_MODULES: Final = {hf.NAME: "transformers", fair_esm.NAME: "esm"}
_TITLES: Final = {hf.NAME: "transformers", fair_esm.NAME: "Meta's esm"}

_SPARE: Final = 1.3
"""Memory that another library wants for a model, in shares of its weights in float32."""


Run = Callable[[Tensor], Tensor]
"""Logits ``[T, V]`` of the tokens ``[T]`` of one sequence."""


class Peer(NamedTuple):
    """What another library made of a checkpoint.

    Attributes:
        name: the library.
        logits: its logits of the probes, or nothing.
        why: why there are none.
    """

    name: str
    logits: list[Tensor] | None = None
    why: str = ""


def has_peer(kind: str, family: type[Encoder]) -> bool:
    """Whether the library whose format it is, if there is one, has a class for a family."""
    stored = family.stored.get(kind)
    return stored is not None and (kind == fair_esm.NAME or (kind == hf.NAME and stored.classes is not None))


def peer_logits(kind: str, path: Path, checkpoint: Checkpoint) -> Peer | None:
    """Logits of the probes by the library whose format a checkpoint is in; ``None`` if it has none.

    Args:
        kind: the format's name.
        path: the checkpoint, written by us.
        checkpoint: the same, opened.

    Raises:
        CheckpointError: the library does not take the checkpoint.
    """
    model = checkpoint.model
    if not has_peer(kind, type(model)):
        return None
    name = _TITLES[kind]
    if model.lm_head is None:
        return Peer(name, why="the checkpoint has no language-model head")
    if find_spec(_MODULES[kind]) is None:
        return Peer(name, why=f"{name} is not installed")
    wanted = _SPARE * 4 * sum(parameter.numel() for parameter in model.parameters())
    if wanted > available_memory():
        return Peer(name, why=f"{name} would need {wanted / 1e9:.1f} GB of memory")
    batch = probe_batch(model)
    try:
        run = load_peer(kind, path, checkpoint)
        return Peer(name, [run(batch.input_ids[start:end]) for start, end in batch.cu_seqlens.spans()])
    # Whatever a library raises over our file, it says that the file is not what it should be.
    except Exception as error:
        raise CheckpointError(f"{path}: {name} does not load it: {' '.join(str(error).split())[:300]}") from error


def load_peer(kind: str, path: Path, checkpoint: Checkpoint) -> Run:
    """The model of another library, float32, on the CPU.

    Args:
        kind: the format's name: that of transformers, or of Meta's package.
        path: the checkpoint, written by us.
        checkpoint: the same, opened.
    """
    load = _transformers if kind == hf.NAME else _fair_esm
    with _quiet():
        model = load(path, checkpoint)

    def run(tokens: Tensor) -> Tensor:
        with _quiet():
            return model(tokens[None].long())

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        yield


def _transformers(path: Path, checkpoint: Checkpoint) -> Run:
    from transformers import EsmForMaskedLM
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        theirs = EsmForMaskedLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    size = len(checkpoint.model.alphabet)
    return lambda ids: theirs(ids, attention_mask=torch.ones_like(ids)).logits[0, :, :size]


def _fair_esm(path: Path, checkpoint: Checkpoint) -> Run:
    from esm.pretrained import load_model_and_alphabet_core

    tensors = checkpoint.tensors
    head = {key: tensors[key].float() for key in tensors if key.startswith("contact_head.")}
    state = {f"encoder.{key}": tensors[key].float().clone() for key in tensors if key not in head}
    content: dict[str, Any] = fair_esm.described(checkpoint.model) | {"model": state}
    # Meta's loader goes by names, and asks only those of ESM-1v for no regression.
    name = type(checkpoint.model).stored[fair_esm.NAME].prefix or ("esm1b" if head else "esm1v")
    theirs, _ = load_model_and_alphabet_core(name, content, {"model": head} if head else None)
    theirs.eval()
    return lambda ids: theirs(ids)["logits"][0]
