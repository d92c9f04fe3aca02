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

from protea.alphabet import ESM
from protea.checkpoints.checkpoint import Checkpoint, like
from protea.checkpoints.files import Region
from protea.checkpoints.layout import Layout, Place, plan_of
from protea.checkpoints.torch_file import TorchFile, TorchTensors, is_torch_file, save_torch_file
from protea.checkpoints.unpickle import Inert, shown
from protea.errors import CheckpointError
from protea.models.encoder import Encoder, EncoderConfig
from protea.models.esm1b import ESM1bConfig
from protea.models.esm2 import ESM2, ESM2Config

NAME: Final = "fair-esm"
TITLE: Final = "a file of Meta's esm package"

_NAMES: Final = {
    "word_embeddings.weight": "embed_tokens.weight",
    "position_embeddings.weight": "embed_positions.weight",
}
_PREFIX: Final = re.compile(r"^(encoder\.)?(sentence_encoder\.)?")
_MAX_WRAPPINGS: Final = 4
_SOURCE: Final = "args or cfg"


def fair_name(name: str) -> str:
    """Meta's name for one of our parameters; they differ in the embeddings alone."""
    return _NAMES.get(name, name)


LAYOUT: Final = Layout(
    place=lambda name: Place(fair_name(name)),
    frequencies=lambda layer: (f"layers.{layer}.self_attn.rot_emb.inv_freq",),
    leftovers=lambda key: key == "lm_head.weight" or key.endswith((".version", "_float_tensor")),
)


def recognise(path: Path) -> bool:
    """Whether a path is a file of ``torch.save``; what is in it shows when it is opened."""
    return path.is_file() and is_torch_file(Region.of_file(path))


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
        config = _config(content, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    checkpoint = Checkpoint(config, tensors, LAYOUT, _SOURCE)
    checkpoint.check_tied(("lm_head.weight", "embed_tokens.weight"))
    if isinstance(config, ESM1bConfig) and config.token_dropout:
        # Meta's loader does so; the input is masked by token dropout, and this is the row's use as output.
        words = checkpoint.parameter("word_embeddings.weight").clone()
        words[ESM.mask] = 0
        checkpoint.complete({"word_embeddings.weight": words})
    return checkpoint


def _config(content: Mapping[str, Any], tensors: TorchTensors) -> EncoderConfig:
    cfg = plain(content.get("cfg"))
    esm2 = plain(cfg.get("model")) if isinstance(cfg, dict) else None
    if isinstance(esm2, dict):
        return _config_of_esm2(esm2, tensors)
    args = plain(content.get("args"))
    if not isinstance(args, dict):
        raise CheckpointError("holds neither 'args' nor 'cfg' to say what its model is")
    args = {key.removeprefix("encoder_"): plain(value) for key, value in args.items() if isinstance(key, str)}
    if args.get("arch") != "roberta_large":
        raise CheckpointError(
            f"architecture {shown(args.get('arch'))} is not supported; ESM-1b and ESM-1v (roberta_large) are, and ESM-2"
        )
    return ESM1bConfig(
        **_sizes(args, "layers", "attention_heads", tensors),
        max_position_embeddings=_shape(tensors, "embed_positions.weight")[0],
        token_dropout=bool(args.get("token_dropout", False)),
        emb_layer_norm_before=any(key.startswith("emb_layer_norm_before") for key in tensors),
    )


def _config_of_esm2(cfg: Mapping[str, Any], tensors: TorchTensors) -> ESM2Config:
    sizes = _sizes(cfg, "encoder_layers", "encoder_attention_heads", tensors)
    return ESM2Config(**sizes, token_dropout=bool(plain(cfg.get("token_dropout", True))))


def _sizes(found: Mapping[str, Any], layers: str, heads: str, tensors: TorchTensors) -> dict[str, int]:
    depth, count = plain(found.get(layers)), plain(found.get(heads))
    for key, value in ((layers, depth), (heads, count)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{key} is {shown(value)}, not a number")
    rows, width = _shape(tensors, "embed_tokens.weight")
    if rows != len(ESM):
        raise CheckpointError(f"{rows} tokens are not the alphabet's {len(ESM)}; models with another are not supported")
    return {
        "num_hidden_layers": depth,
        "num_attention_heads": count,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "layers.0.fc1.weight")[0],
        "vocab_size": rows,
    }


def _shape(tensors: TorchTensors, key: str) -> tuple[int, int]:
    if key not in tensors or len(tensors.shape(key)) != 2:
        raise CheckpointError(f"no tensor {key} of two axes; the file is incomplete: fetch it again")
    rows, columns = tensors.shape(key)
    return rows, columns


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
    config = model.config
    if not isinstance(config, ESM2Config | ESM1bConfig):
        return f"Meta's esm package has no {config.family}"
    if config.layer_norm_eps != 1e-5:
        return f"Meta's classes norm with epsilon 1e-05, this model with {config.layer_norm_eps:g}"
    if isinstance(config, ESM2Config) and config.intermediate_size != 4 * config.hidden_size:
        return f"Meta's ESM-2 has feed-forward layers of 4 times the width, this model of {config.intermediate_size}"
    if model.lm_head is None:
        return "Meta's classes have a language-model head, this checkpoint has none"
    return None


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
    trimmed = like(model, replace(model.config, vocab_size=len(ESM)))
    rows = dict(trimmed.named_parameters())
    plan = plan_of(trimmed, LAYOUT, lambda name: parameter(name)[: len(rows[name])], dtype)
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
    config = model.config
    if isinstance(model, ESM2):
        described = Namespace(
            encoder_layers=config.num_hidden_layers,
            encoder_embed_dim=config.hidden_size,
            encoder_attention_heads=config.num_attention_heads,
            token_dropout=model.config.token_dropout,
        )
        return {"cfg": {"model": described}}
    assert isinstance(config, ESM1bConfig)
    described = Namespace(
        arch="roberta_large",
        encoder_layers=config.num_hidden_layers,
        encoder_embed_dim=config.hidden_size,
        encoder_ffn_embed_dim=config.intermediate_size,
        encoder_attention_heads=config.num_attention_heads,
        max_positions=config.max_position_embeddings - 2,
        token_dropout=config.token_dropout,
        final_bias=True,
    )
    return {"args": described}
