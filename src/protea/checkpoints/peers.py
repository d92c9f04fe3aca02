"""Logits of fixed sequences by Protea, and by transformers and Meta's ``esm`` where they are installed.

The other libraries unpickle no file: transformers reads safetensors, and Meta's package is given tensors that we read.
"""

from __future__ import annotations

import re
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
from torch import Tensor, nn

from protea.checkpoints import fair_esm, hf
from protea.checkpoints.checkpoint import Checkpoint, like
from protea.checkpoints.formats import format_named, open_checkpoint, unsupported
from protea.device import return_freed_memory
from protea.errors import CheckpointError, MissingExtraError, UsageError
from protea.limits import available_memory
from protea.models.encoder import Encoder
from protea.optional import install
from protea.packing import PackedBatch, pack

PROBES: Final = (
    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK",
    "ACDEFGHIKLMNPQRSTVWYXBUZO",
    "GSHMASMTGGQQMGRDP<mask>FRAEIAKRLG<mask>EWNHHHHHH",
)
"""Part of a protein, all letters, and a sequence with masked positions."""

TOLERANCE: Final = 2e-5
"""Largest allowed difference of logits, as a share of max(1, the largest logit): both libraries round to float32."""

_MEMORY: Final = 1.3
"""Memory that another library needs for a model, as a multiple of its weights in float32."""

Run = Callable[[Tensor], Tensor]
"""Logits ``[T, V]`` of the tokens ``[T]`` of one sequence."""


class Peer(NamedTuple):
    """Another library: its title in messages, the name that Python imports, and the format that it reads."""

    title: str
    module: str
    format: str

    def has(self, model: Encoder) -> bool:
        """Whether it has a class for a model's family."""
        stored = type(model).stored.get(self.format)
        return stored is not None and (self.format == fair_esm.NAME or stored.classes is not None)


PEERS: Final = {
    "transformers": Peer("transformers", "transformers", hf.NAME),
    "fair-esm": Peer("Meta's esm", "esm", fair_esm.NAME),
}
"""By the names that users type, which are also those of the Python packages."""


def logits(checkpoint: Checkpoint) -> list[Tensor]:
    """Logits of the probes in float32, ``[T, V]`` each, V the alphabet; last hidden states without a head.

    The weights of one layer at a time are in memory.
    """
    model = like(checkpoint.model)

    def fill(module: nn.Module, prefix: str, recurse: bool = True) -> None:
        names = [name for name, _ in module.named_parameters(recurse=recurse)]
        values = {name: checkpoint.parameter(f"{prefix}{name}").float() for name in names}
        module.load_state_dict(values, assign=True, strict=False)

    def empty(module: nn.Module) -> None:
        module.to("meta")
        return_freed_memory()  # else this layer's memory stays reserved, in pieces too small for the next layer

    fill(model, "", recurse=False)
    for name, module in model.named_children():
        if name != "layers":
            fill(module, f"{name}.")
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda module, _, number=number: fill(module, f"layers.{number}."))
        layer.register_forward_hook(lambda module, _, __: empty(module))
    batch = _probe_batch(model)
    with torch.inference_mode():
        x = model(batch)
        if model.lm_head is not None:
            x = model.head(x)[:, : len(model.alphabet)]
    return [x[start:end] for start, end in batch.cu_seqlens.spans()]


def _probe_batch(model: Encoder) -> PackedBatch:
    """The probes as a model's tokens, without letters that are not in its alphabet."""
    alphabet = model.alphabet
    probes = [re.sub(r"[A-Z]", lambda letter: letter[0] * (letter[0] in alphabet.tokens), probe) for probe in PROBES]
    return pack([alphabet.frame.around(alphabet.encode(probe)) for probe in probes])


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of max(1, the largest value of ``theirs``)."""
    scale = max(1.0, *(float(values.abs().max()) for values in theirs))
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale


def peer_logits(form: str, path: Path, checkpoint: Checkpoint) -> tuple[str, list[Tensor]] | str | None:
    """Logits of the probes, from a checkpoint that we wrote and opened, by the library that reads its format.

    Returns:
        The library's title and its logits; or why it could not compute them; ``None`` if there is no such library.
    """
    model = checkpoint.model
    peer = next((peer for peer in PEERS.values() if peer.format == form and peer.has(model)), None)
    if peer is None:
        return None
    if model.lm_head is None:
        return f"{peer.title}: the checkpoint has no language-model head"
    if find_spec(peer.module) is None:
        return f"{peer.title}: it is not installed"
    needed = _MEMORY * 4 * sum(parameter.numel() for parameter in model.parameters())
    if needed > available_memory():
        return f"{peer.title}: it would need {needed / 1e9:.1f} GB of memory"
    batch = _probe_batch(model)
    try:
        run = _load(form, path, checkpoint)
        return peer.title, [run(batch.input_ids[start:end]) for start, end in batch.cu_seqlens.spans()]
    # Any exception that the library raises for our file means that the file is wrong.
    except Exception as error:
        raise CheckpointError(f"{path}: {peer.title} does not load it: {' '.join(str(error).split())[:300]}") from error


def check_peer(name: str, model: Encoder | None = None) -> None:
    """Check that a library is known and installed and, if a model is given, that it has the model's family."""
    if name not in PEERS:
        raise UsageError(f"--against {name}: unknown; use {' or '.join(PEERS)}")
    if find_spec(PEERS[name].module) is None:
        raise MissingExtraError(f"--against {name} needs it installed: {install(name)}")
    if model is not None and not PEERS[name].has(model):
        raise UsageError(f"--against {name}: it has no {model.config.family}")


def load_peer(name: str, path: Path) -> Run:
    """A checkpoint of any format as the float32 model of a library, for which ``check_peer`` has passed."""
    target = format_named(PEERS[name].format)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.pt"
        with open_checkpoint(path) as checkpoint:
            if reason := unsupported(checkpoint.model, target.NAME):
                raise CheckpointError(f"{path}: {name} cannot compute it: {reason}")
            target.write(copy, checkpoint.model, lambda key: checkpoint.parameter(key).float(), torch.float32)
        with target.open_checkpoint(copy) as written:
            return _load(target.NAME, copy, written)


def masked_losses(
    run: Run, tokens: NDArray[np.uint8], places: NDArray[np.int64], truth: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Negative log-probability ``[P]``, in nats, of the true tokens ``[P]`` at the masked places ``[P]`` of ``[T]``."""
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
    from transformers import EsmForMaskedLM, __version__
    from transformers.utils import logging

    version = tuple(map(int, re.findall(r"\d+", __version__)[:2]))
    kind: Any = {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32}  # it was renamed
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = EsmForMaskedLM.from_pretrained(path, attn_implementation="eager", **kind)
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    size = len(checkpoint.model.alphabet)
    return lambda ids: model(ids, attention_mask=torch.ones_like(ids)).logits[0, :, :size]


def _fair_esm(checkpoint: Checkpoint) -> Run:
    from esm.pretrained import load_model_and_alphabet_core

    tensors = checkpoint.tensors
    head = {key: tensors[key].float() for key in tensors if key.startswith("contact_head.")}
    state = {key: tensors[key].float().clone() for key in tensors if key not in head}
    content: dict[str, Any] = fair_esm.described(checkpoint.model) | {"model": state}
    # Meta's loader relies on names, and accepts a missing regression only for ESM-1v.
    name = type(checkpoint.model).stored[fair_esm.NAME].prefix or ("esm1b" if head else "esm1v")
    model, _ = load_model_and_alphabet_core(name, content, {"model": head} if head else None)
    model.eval()
    return lambda ids: model(ids)["logits"][0]
