"""Files of Meta's ``esm`` package: ``NAME.pt`` with ``NAME-contact-regression.pt`` beside it.

ESM-1b and ESM-1v carry an ``args`` Namespace, ESM-2 a ``cfg`` of OmegaConf; both a dictionary ``model``. Follows
``esm/pretrained.py`` of fair-esm 2.0.0, which also goes by the file's name: ``esm2...`` is loaded as ESM-2, and only
``esm1v...`` without a regression file.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.alphabet import Alphabet
from protea.checkpoints.checkpoint import Checkpoint, like
from protea.checkpoints.layout import Layout, StoredShapes, plan_of
from protea.checkpoints.region import Region
from protea.checkpoints.torch_file import TorchFile, TorchTensors, save_torch_file
from protea.checkpoints.unpickle import Inert, shown
from protea.errors import CheckpointError, UsageError
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.models.registry import families, stored_in

NAME: Final = "fair-esm"
TITLE: Final = "a file of Meta's esm package"

_PREFIX: Final = re.compile(r"^(encoder\.)?(sentence_encoder\.)?")
_MAX_WRAPPINGS: Final = 4
_SOURCE: Final = "args or cfg"


def layout(family: type[Encoder]) -> Layout:
    """How the format keeps a family."""
    return Layout(keys=family.stored[NAME].keys, leftovers=_leftover)


def _leftover(key: str) -> bool:
    return key == "lm_head.weight" or key.endswith((".version", "_float_tensor"))


def regression_path(path: Path) -> Path:
    """Where the contact head of a file is."""
    return path.with_name(f"{path.with_suffix('').name}-contact-regression.pt")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.pt`` file, and its contact regression if that lies beside it.

    Raises:
        CheckpointError: it is damaged, of another architecture, or its parts do not fit together.
    """
    file = TorchFile(Region.of_file(path))
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path}: no checkpoint of Meta's esm package: it holds {held}, not 'model' with 'args' or 'cfg'"
        )
    files: dict[Path, tuple[TorchFile, Any, set[str]]] = {path: (file, content["model"], set())}
    regression = regression_path(path)
    if regression.exists():
        head = TorchFile(Region.of_file(regression))
        state = head.content.get("model") if isinstance(head.content, dict) else None
        if not isinstance(state, dict) or "contact_head.regression.weight" not in state:
            raise CheckpointError(
                f"{regression}: no contact regression of Meta's esm package; remove it, or fetch it again"
            )
        files[regression] = (head, state, set())
    tensors = TorchTensors(files, lambda key: _PREFIX.sub("", key))
    try:
        family, config = _config(content, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    checkpoint = Checkpoint(config, tensors, layout(family), _SOURCE)
    checkpoint.check_tied(("lm_head.weight", "embed_tokens.weight"))
    for name, row in family.stored[NAME].zeroed(config).items():
        values = checkpoint.parameter(name).clone()
        values[row] = 0
        checkpoint.complete({name: values})
    return checkpoint


def _config(content: Mapping[str, Any], tensors: TorchTensors) -> tuple[type[Encoder], EncoderConfig]:
    described = _described(content)
    family = stored_in(NAME, described)
    if family is None:
        raise CheckpointError(
            f"architecture {shown(described.get('arch'))} is not supported; ESM-1b and ESM-1v (roberta_large) are, and "
            "ESM-2"
        )
    shapes = StoredShapes(tensors, layout(family))
    return family, family.stored[NAME].config(described, _sizes(described, shapes, family.config_type.alphabet), shapes)


def _described(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its model: ``cfg`` or ``args`` as plain values, and which of the two it was."""
    cfg = plain(content.get("cfg"))
    said = plain(cfg.get("model")) if isinstance(cfg, dict) else None
    said_by = "cfg"
    if not isinstance(said, dict):
        said, said_by = plain(content.get("args")), "args"
    if not isinstance(said, dict):
        raise CheckpointError("holds neither 'args' nor 'cfg' to say what its model is")
    return {key: plain(value) for key, value in said.items() if isinstance(key, str)} | {"said_by": said_by}


def _sizes(described: Mapping[str, Any], shapes: StoredShapes, alphabet: Alphabet) -> dict[str, int]:
    rows, width = shapes["word_embeddings.weight"]
    if rows != len(alphabet):
        raise CheckpointError(
            f"{rows} tokens are not the alphabet's {len(alphabet)}; models with another are not supported"
        )
    return {
        "num_hidden_layers": _count(described, "layers"),
        "num_attention_heads": _count(described, "attention_heads"),
        "hidden_size": width,
        "intermediate_size": shapes["layers.0.fc1.weight"][0],
        "vocab_size": rows,
    }


def _count(described: Mapping[str, Any], key: str) -> int:
    """A number that files call by its name with the encoder's before it, or without."""
    value = described.get(f"encoder_{key}", described.get(key))
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{key} is {shown(value)}, not a number")
    return value


def plain(value: Any) -> Any:
    """What a configuration object says, whatever class it was: Namespace, or OmegaConf's containers and nodes.

    What is within stays as it is, to be asked for in its turn: objects may hold each other, and without end.
    """
    for _ in range(_MAX_WRAPPINGS):
        if not isinstance(value, Inert):
            return value
        state = value.state if isinstance(value.state, dict) else {}
        value = state.get("_content", state.get("_val")) if value.name.startswith("omegaconf.") else state
    return None


# --- writing -----------------------------------------------------------------------------------------------------


def unsupported(model: Encoder) -> str | None:
    """Why Meta's classes cannot run a model as it is."""
    stored = type(model).stored.get(NAME)
    if stored is None:
        return f"Meta's esm package has no {model.config.family}"
    if (why := stored.unsupported(model.config)) is not None:
        return why
    return None if model.lm_head is not None else "Meta's classes have a language-model head, this checkpoint has none"


def check_target(path: Path, model: Encoder) -> None:
    """See that Meta's package, which goes by names, will take a file for what it is.

    Raises:
        UsageError: its name says something else.
    """
    prefix = type(model).stored[NAME].prefix
    others = {family.stored[NAME].prefix for family in families() if NAME in family.stored} - {prefix, ""}
    if path.suffix != ".pt" or not path.name.startswith(prefix) or path.name.startswith(tuple(others)):
        wanted = f"{prefix}NAME.pt" if prefix else f"NAME.pt with another beginning than {' or '.join(sorted(others))}"
        raise UsageError(f"{path.name}: Meta's esm package goes by the file's name; call it {wanted}")


def write(path: Path, model: Encoder, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write ``NAME.pt`` and, if there is a contact head, ``NAME-contact-regression.pt``, one tensor at a time.

    Args:
        path: the file.
        model: says which parameters there are; may be on the meta device. Vocabulary rows beyond 33 are left out.
        parameter: gives the value of a parameter, of type ``dtype``, by our name.
        dtype: the type.

    Raises:
        OSError: a file cannot be written.
    """
    trimmed = like(model, replace(model.config, vocab_size=len(model.alphabet)))
    rows = dict(trimmed.named_parameters())
    plan = plan_of(trimmed, layout(type(model)), lambda name: parameter(name)[: len(rows[name])], dtype)
    head = [planned for planned in plan if planned.key.startswith("contact_head.")]
    body = [planned._replace(key=_published(planned.key)) for planned in plan if planned not in head]
    words = next(planned for planned in body if planned.key.endswith("embed_tokens.weight"))
    body.append(words._replace(key="encoder.lm_head.weight"))
    save_torch_file(path, lambda tensors: {**described(model), "model": tensors}, body)
    if head:
        save_torch_file(regression_path(path), lambda tensors: {"model": tensors}, head)


def _published(key: str) -> str:
    """The name in the file, with the prefix that Meta's loader strips."""
    return f"encoder.{key}" if key.startswith("lm_head.") else f"encoder.sentence_encoder.{key}"


def described(model: Encoder) -> dict[str, Any]:
    """What a file says of a model beside its tensors."""
    said = type(model).stored[NAME].describe(model.config)
    said_by = said.pop("said_by")
    return {"args": Namespace(**said)} if said_by == "args" else {"cfg": {"model": Namespace(**said)}}
