"""The same models computed by other libraries: transformers and Meta's ``esm``, where they are installed.

They unpickle no file: transformers reads safetensors, and Meta's package is given the tensors that we read.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.checkpoints import fair_esm, hf
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import format_named, open_checkpoint, unsupported
from protea.checkpoints.probe import probe_batch
from protea.device import available_memory
from protea.errors import CheckpointError, MissingExtraError, UsageError
from protea.models.encoder import Encoder

TOLERANCE: Final = 2e-5
"""Largest allowed difference of logits, as a share of max(1, the largest logit): both libraries round to float32."""

_MEMORY: Final = 1.3
"""Memory that another library needs for a model, as a multiple of its weights in float32."""

Run = Callable[[Tensor], Tensor]
"""Logits ``[T, V]`` of the tokens ``[T]`` of one sequence."""


class Peer(NamedTuple):
    """Another library.

    Attributes:
        title: what messages call it.
        module: what Python imports.
        format: the format of the checkpoints that it reads.
    """

    title: str
    module: str
    format: str


PEERS: Final = {
    "transformers": Peer("transformers", "transformers", hf.NAME),
    "fair-esm": Peer("Meta's esm", "esm", fair_esm.NAME),
}
"""By the names that users type, which are also those of the Python packages."""


def _has_model(peer: Peer, model: Encoder) -> bool:
    """Whether a library has a class for a model's family."""
    stored = type(model).stored.get(peer.format)
    return stored is not None and (peer.format == fair_esm.NAME or stored.classes is not None)


def check_peer(name: str, model: Encoder | None = None) -> None:
    """Check that a library is known and installed and, if a model is given, that it has the model's family.

    Raises:
        UsageError: there is no such library, or it has no such model.
        MissingExtraError: it is not installed.
    """
    if name not in PEERS:
        raise UsageError(f"--against {name}: unknown; use {' or '.join(PEERS)}")
    if find_spec(PEERS[name].module) is None:
        raise MissingExtraError(f"--against {name} needs it installed: pip install {name}")
    if model is not None and not _has_model(PEERS[name], model):
        raise UsageError(f"--against {name}: it has no {model.config.family}")


def load_peer(name: str, path: Path) -> Run:
    """A checkpoint of any format as the float32 model of another library.

    Args:
        name: of the library, one of ``PEERS``.
        path: of the checkpoint.

    Raises:
        UsageError: there is no such library, or it has no such model.
        MissingExtraError: it is not installed.
        CheckpointError: the checkpoint is damaged, or the library's format cannot hold it.
    """
    check_peer(name)
    target = format_named(PEERS[name].format)
    with tempfile.TemporaryDirectory() as folder:
        with open_checkpoint(path) as checkpoint:
            model = checkpoint.model
            check_peer(name, model)
            if reason := unsupported(model, target.NAME):
                raise CheckpointError(f"{path}: {name} cannot compute it: {reason}")
            copy = Path(folder) / "copy.pt"
            target.write(copy, model, lambda key: checkpoint.parameter(key).float(), torch.float32)
        with target.open_checkpoint(copy) as written:
            return _load(target.NAME, copy, written)


def probe_logits(path: Path, form: str, checkpoint: Checkpoint) -> tuple[str, list[Tensor] | str] | None:
    """Logits of the probes by the library that reads a format; ``None`` if there is no such library.

    Args:
        path: the checkpoint, written by us.
        form: its format.
        checkpoint: the same, opened.

    Returns:
        What messages call the library; its logits, or the reason why there are none.

    Raises:
        CheckpointError: the library does not load the checkpoint.
    """
    model = checkpoint.model
    peer = next((peer for peer in PEERS.values() if peer.format == form and _has_model(peer, model)), None)
    if peer is None:
        return None
    if model.lm_head is None:
        return peer.title, "the checkpoint has no language-model head"
    if find_spec(peer.module) is None:
        return peer.title, f"{peer.title} is not installed"
    needed = _MEMORY * 4 * sum(parameter.numel() for parameter in model.parameters())
    if needed > available_memory():
        return peer.title, f"{peer.title} would need {needed / 1e9:.1f} GB of memory"
    batch = probe_batch(model)
    try:
        run = _load(form, path, checkpoint)
        return peer.title, [run(batch.input_ids[start:end]) for start, end in batch.cu_seqlens.spans()]
    # Whatever exception a library raises over our file, it means that the file is wrong.
    except Exception as error:
        raise CheckpointError(f"{path}: {peer.title} does not load it: {' '.join(str(error).split())[:300]}") from error


def masked_losses(
    run: Run, tokens: NDArray[np.uint8], places: NDArray[np.int64], truth: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Negative log-probability ``[P]`` of the masked tokens of one sequence, in nats.

    Args:
        run: the other library's model.
        tokens: ``[T]`` with masks.
        places: ``[P]`` where the masks are.
        truth: ``[P]`` the tokens under the masks.
    """
    log_probabilities = run(torch.from_numpy(tokens)).float().log_softmax(-1).numpy()
    losses: NDArray[np.float32] = -log_probabilities[places, truth.astype(np.int64)]
    return losses


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        yield


def _load(form: str, path: Path, checkpoint: Checkpoint) -> Run:
    """The float32 model, on the CPU, of the library that reads a format."""
    with _quiet():
        model = _transformers(path, checkpoint) if form == hf.NAME else _fair_esm(checkpoint)

    def run(tokens: Tensor) -> Tensor:
        with _quiet():
            return model(tokens[None].long())

    return run


def _transformers(path: Path, checkpoint: Checkpoint) -> Run:
    from transformers import EsmForMaskedLM
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = EsmForMaskedLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    size = len(checkpoint.model.alphabet)
    return lambda ids: model(ids, attention_mask=torch.ones_like(ids)).logits[0, :, :size]


def _fair_esm(checkpoint: Checkpoint) -> Run:
    from esm.pretrained import load_model_and_alphabet_core

    tensors = checkpoint.tensors
    head = {key: tensors[key].float() for key in tensors if key.startswith("contact_head.")}
    state = {f"encoder.{key}": tensors[key].float().clone() for key in tensors if key not in head}
    content: dict[str, Any] = fair_esm.described(checkpoint.model) | {"model": state}
    # Meta's loader relies on names, and accepts a missing regression only for ESM-1v.
    name = type(checkpoint.model).stored[fair_esm.NAME].prefix or ("esm1b" if head else "esm1v")
    model, _ = load_model_and_alphabet_core(name, content, {"model": head} if head else None)
    model.eval()
    return lambda ids: model(ids)["logits"][0]
