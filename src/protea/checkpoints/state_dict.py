"""State dicts that training programs save: a file of tensors that says nothing of its model.

Reads ``torch.save(model.state_dict(), ...)``, the same under a usual name, checkpoints of Lightning, and safetensors,
with the tensor names of transformers or of Meta's ``esm`` package. The model is that of a ``config.json`` in the same
folder, or the published one whose shapes the tensors have.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Final

from protea.checkpoints import fair_esm, hf
from protea.checkpoints.checkpoint import Checkpoint, refuse_adapters
from protea.checkpoints.hf_config import read_config
from protea.checkpoints.layout import Layout, entries, stored_shape
from protea.checkpoints.region import Region
from protea.checkpoints.settings_files import CONFIG
from protea.checkpoints.tensors import Tensors, is_safetensors, open_safetensors
from protea.checkpoints.torch_file import TorchFile, has_words, is_torch_file, named_tensors, open_state_dicts, state_of
from protea.errors import CheckpointError, ProteaWarning
from protea.models.family import EncoderConfig
from protea.models.registry import build, families, family_of

NAME: Final = "state-dict"
TITLE: Final = "a state dict"

_WEIGHTS: Final = re.compile(r".*\.(pt|pth|ckpt|bin|safetensors)", re.IGNORECASE)
_NO_WEIGHTS: Final = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|(.*\.)?extras\.).*")
"""Names of weight files, and of what training programs and Protea write beside them."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a file of tensors."""
    tensors, beside = _tensors(path), (path.parent / CONFIG).exists()
    described = read_config(path.parent) if beside else None
    family = None if described is None else family_of(described)
    forms = [form for form in (hf, fair_esm) if family is None or form.NAME in family.stored]
    form = next((form for form in forms if any(key.endswith(form.words(family)) for key in tensors)), None)
    if form is None:
        refuse_adapters(tensors, tensors)
        raise CheckpointError(
            f"{path}: none of its {len(tensors)} tensors is called {hf.WORDS} (transformers) or {fair_esm.WORDS} "
            "(Meta's esm package); save the complete model"
        )
    form.normalize(tensors, family)
    config, name = _recognised(path, form, tensors) if described is None else (described, CONFIG)
    checkpoint: Checkpoint = form.checkpoint_of(config, tensors, name)
    if beside:
        return checkpoint
    message = f"{path}: read as {name}, whose shapes it has; if it is another model, put its {CONFIG} beside the file"
    warnings.warn(message, ProteaWarning, stacklevel=2)
    return checkpoint


def only_file(folder: Path) -> Path | None:
    """The only file of weights in a folder, by its content, with a note; ``None`` without one."""
    holding = {path: _holds_weights(path) for path in sorted(folder.iterdir())}
    found = [path for path in holding if holding[path]] or [path for path in holding if holding[path] is None]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: has several files of weights: {', '.join(path.name for path in found)}; name one, as in "
            f"`-m {found[0]}`; it is read with the {CONFIG} beside it"
        )
    for path in found:
        warnings.warn(f"{folder}: read {path.name}, its only file of weights", ProteaWarning, stacklevel=2)
        return path
    return None


def _holds_weights(path: Path) -> bool | None:
    """Whether a file holds the weights of a model; ``None`` if its name says so and its content cannot be read."""
    if not path.is_file() or _NO_WEIGHTS.fullmatch(path.name):
        return False
    try:
        region = Region.of_file(path)
        if is_torch_file(region):
            return has_words(key for key, _ in named_tensors(TorchFile(region).content))
        return is_safetensors(region) and has_words(open_safetensors({path: set()}))
    except CheckpointError:  # opening the file will say so
        return None if _WEIGHTS.fullmatch(path.name) else False


def _tensors(path: Path) -> Tensors:
    region = Region.of_file(path)
    if is_safetensors(region):
        return open_safetensors({path: set()})
    file = TorchFile(region)
    return open_state_dicts({path: (file, state_of(path, file.content))})


def _recognised(path: Path, form: ModuleType, tensors: Tensors) -> tuple[EncoderConfig, str]:
    """The published model whose encoder has the shapes of the tensors: its configuration and its name."""
    names: dict[EncoderConfig, str] = {}
    for family in families():
        if form.NAME in family.stored:
            layout = form.layout(family)
            for known in family.published:
                if known.config not in names and _fits(known.config, layout, tensors):
                    names[known.config] = known.name
    if not names:
        refuse_adapters(tensors, tensors)
    if len(names) != 1:
        several = f"the shapes of {' and of '.join(names.values())}" if names else "the shapes of no published model"
        raise CheckpointError(
            f"{path}: has {several}; put the {CONFIG} of its model into the same folder, or save the model with "
            "`save_pretrained`"
        )
    return next(iter(names.items()))


def _fits(config: EncoderConfig, layout: Layout, tensors: Tensors) -> bool:
    """Whether tensors have a model's shapes; its heads may be absent, and the file may have more."""
    words = layout.place("word_embeddings.weight")
    if words is None or words.key not in tensors or tensors.shape(words.key) != (config.vocab_size, config.hidden_size):
        return False  # most published models, and building them takes long
    model = build(config)
    for entry in entries(model, layout):
        if entry.place.key in tensors:
            if tensors.shape(entry.place.key) != stored_shape(model, layout, entry):
                return False
        elif not entry.names[0].startswith(("lm_head.", "contact_head.")):
            return False
    # Positions alone do not tell ESM-2 from ESM-1v: rotary models' files carry unused position embeddings.
    rotary = {tensors.shape(key) for key in tensors if key.endswith("inv_freq")}
    return not rotary or rotary == {tuple(value.shape) for value in model.stored_buffers.values()}
