"""Files of Meta's ``esm`` package: ``NAME.pt`` with ``NAME-contact-regression.pt`` beside it.

ESM-1, ESM-1b and ESM-1v files hold an ``args`` Namespace, ESM-2 files a ``cfg`` of OmegaConf; both hold a dictionary
``model``. Follows ``esm/pretrained.py`` of fair-esm 2.0.0, which relies on file names: it loads ``esm2...`` as ESM-2,
and only ``esm1v...`` without a regression file.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from protea.checkpoints.checkpoint import Checkpoint, like
from protea.checkpoints.layout import Layout, Parameter, StoredShapes, plan_of
from protea.checkpoints.region import Region
from protea.checkpoints.settings_files import count, shown
from protea.checkpoints.tensors import Planned, Tensors
from protea.checkpoints.torch_file import TorchFile, open_state_dicts, save_torch_file
from protea.checkpoints.unpickle import Inert
from protea.checkpoints.wrappers import unwrap
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.registry import families, family_of, stored_in

NAME: Final = "fair-esm"
TITLE: Final = "a file of Meta's esm package"

WORDS: Final = "embed_tokens.weight"
"""How the key of the word embeddings ends, whatever is before it."""

_PREFIX: Final = r"(?:(?:encoder\.)?sentence_encoder\.|decoder\.)?"
_MAX_WRAPPINGS: Final = 4


def layout(family: type[Encoder]) -> Layout:
    """How the format keeps a family's parameters."""
    return Layout(keys=family.stored[NAME].keys, leftovers=r"lm_head\.weight|(.*\.)?(version|_float_tensor)")


def words(family: type[Encoder] | None = None) -> tuple[str, ...]:
    """How the key of the word embeddings may end."""
    return (WORDS,)


def normalize(tensors: Tensors, family: type[Encoder] | None = None) -> None:
    """Give tensors the names of the layout: without what a wrapper, or Meta's training, put before them."""
    unwrap(tensors, WORDS, _PREFIX)
    tensors.rename(lambda key: re.sub(r"^(decoder\.|(encoder\.)?(sentence_encoder\.)?)", "", key))


def checkpoint_of(config: EncoderConfig, tensors: Tensors, source: str) -> Checkpoint:
    """The checkpoint of tensors with the names of the layout (see ``Checkpoint``)."""
    checkpoint = Checkpoint(config, tensors, layout(family_of(config)), source)
    checkpoint.check_tied(("lm_head.weight", WORDS))
    return checkpoint


def is_described(content: Any) -> bool:
    """Whether the content of a file says, as Meta's files do, what its model is."""
    state = content.get("model") if isinstance(content, dict) and {"args", "cfg"} & set(content) else None
    return isinstance(state, dict) and any(isinstance(key, str) and key.endswith(WORDS) for key in state)


def regression_path(path: Path) -> Path:
    """The path of the contact head that belongs to a file."""
    return path.with_name(f"{path.with_suffix('').name}-contact-regression.pt")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.pt`` file, and its contact regression if that is beside it (see ``Format``)."""
    file = TorchFile(Region.of_file(path))
    content = file.content
    states: dict[Path, tuple[TorchFile, Any]] = {path: (file, content["model"])}
    regression = regression_path(path)
    if regression.exists():
        head = TorchFile(Region.of_file(regression))
        state = head.content.get("model") if isinstance(head.content, dict) else None
        if not isinstance(state, dict) or "contact_head.regression.weight" not in state:
            raise CheckpointError(f"{regression}: holds no contact regression; remove it, or fetch it again")
        states[regression] = (head, state)
    return from_settings(path, settings_of(content), open_state_dicts(states))


def from_settings(path: Path, settings: Mapping[str, Any], tensors: Tensors) -> Checkpoint:
    """The checkpoint of tensors as Meta's files name them, whose settings are those of ``path``."""
    normalize(tensors)
    try:
        family, config = _config(settings, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    checkpoint = checkpoint_of(config, tensors, "args or cfg")
    for name, row in family.stored[NAME].zeroed(config).items():
        values = checkpoint.parameter(name).clone()
        values[row] = 0
        checkpoint.complete({name: values})
    return checkpoint


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model, from ``cfg`` or ``args``; ``said_by`` names which of the two."""
    cfg = _plain(content.get("cfg"))
    model = _plain(cfg.get("model")) if isinstance(cfg, dict) else None
    for said_by, settings in (("cfg", model), ("args", _plain(content.get("args")))):
        if isinstance(settings, dict):
            values = {key: _plain(value) for key, value in settings.items() if isinstance(key, str)}
            return values | {"said_by": said_by}
    raise CheckpointError("holds neither 'args' nor 'cfg' to describe its model")


def _config(settings: Mapping[str, Any], tensors: Tensors) -> tuple[type[Encoder], EncoderConfig]:
    family = stored_in(NAME, settings)
    if family is None:
        known = dict.fromkeys(
            known.config.family for family in families() for known in family.published if NAME in family.stored
        )
        arch = shown(settings.get("arch"))
        raise CheckpointError(f"architecture {arch} is not supported; those of {', '.join(known)} are")
    shapes, alphabet = StoredShapes(tensors, layout(family)), family.config_type.alphabet
    rows, width = shapes["word_embeddings.weight"]
    if rows != len(alphabet):
        raise CheckpointError(f"{rows} tokens, the alphabet has {len(alphabet)}; other alphabets are not supported")
    # Files use either name.
    short = {key.removeprefix("encoder_").removeprefix("decoder_"): value for key, value in settings.items()}
    sizes = {
        "num_hidden_layers": count(short, "layers"),
        "num_attention_heads": count(short, "attention_heads"),
        "hidden_size": width,
        "intermediate_size": shapes["layers.0.fc1.weight"][0],
        "vocab_size": rows,
    }
    return family, family.stored[NAME].config(settings, sizes, shapes)


def _plain(value: Any) -> Any:
    """The content of a configuration object of any class: Namespace, or OmegaConf's containers and nodes.

    Values inside are not converted, because objects may contain each other in a circle. The object may be one that
    somebody has loaded.
    """
    if isinstance(value, Namespace):
        return vars(value)
    if isinstance(value, Mapping):
        return dict(value)
    for _ in range(_MAX_WRAPPINGS):
        if not isinstance(value, Inert):
            return value
        state = value.state if isinstance(value.state, dict) else {}
        value = state.get("_content", state.get("_val")) if value.name.startswith("omegaconf.") else state
    return None


def check_target(path: Path, model: Encoder) -> None:
    """Check that Meta's package, which relies on file names, will recognise a file."""
    prefix = type(model).stored[NAME].prefix
    others = {family.stored[NAME].prefix for family in families() if NAME in family.stored} - {prefix, ""}
    if path.suffix != ".pt" or not path.name.startswith(prefix) or path.name.startswith(tuple(others)):
        wanted = f"{prefix}NAME.pt" if prefix else f"NAME.pt with another beginning than {' or '.join(sorted(others))}"
        raise UsageError(f"{path.name}: Meta's esm package recognises models by the file's name; call it {wanted}")


def write(path: Path, model: Encoder, parameter: Parameter, dtype: torch.dtype) -> None:
    """Write ``NAME.pt`` without padding and, for a contact head, ``NAME-contact-regression.pt`` (see ``Format``)."""
    stored = type(model).stored[NAME]
    encoder_root, head_root = stored.roots
    trimmed = like(model, replace(model.config, vocab_size=len(model.alphabet)))
    rows = {name: len(value) for name, value in trimmed.named_parameters()}
    head: list[Planned] = []
    body: list[Planned] = []
    for planned in plan_of(trimmed, layout(type(model)), lambda name: parameter(name)[: rows[name]], dtype):
        if planned.key.startswith("contact_head."):
            head.append(planned)
        else:
            # Meta's loader strips these prefixes.
            root = head_root if planned.key.startswith("lm_head.") else encoder_root
            body.append(planned._replace(key=f"{root}{planned.key}"))
    body += [
        Planned(f"{encoder_root}{key}", (1,), dtype, partial(torch.zeros, 1, dtype=dtype)) for key in stored.blanks
    ]
    if "lm_head.weight" not in rows:  # tied to the word embeddings, which the file holds twice
        words = next(planned for planned in body if planned.key.endswith(WORDS))
        body.append(words._replace(key=f"{head_root}lm_head.weight"))
    save_torch_file(path, lambda tensors: {**described(model), "model": tensors}, body)
    if head:
        save_torch_file(regression_path(path), lambda tensors: {"model": tensors}, head)


def described(model: Encoder) -> dict[str, Any]:
    """The description of a model that a file holds beside its tensors."""
    settings = type(model).stored[NAME].describe(model.config)
    said_by = settings.pop("said_by")
    return {"args": Namespace(**settings)} if said_by == "args" else {"cfg": {"model": Namespace(**settings)}}
