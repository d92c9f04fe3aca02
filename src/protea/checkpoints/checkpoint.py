"""An opened checkpoint of any format: an architecture, and its parameters by our names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Final, Self

import torch
from torch import Tensor

from protea.checkpoints.layout import APART, Layout, encoder_root, entries, fused_heads, stored_shape
from protea.checkpoints.region import damaged
from protea.checkpoints.tensors import FLOATS, Tensors
from protea.errors import CheckpointError, ProteaWarning
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.layers import AnyContactHead, BilinearContactHead, ContactHead
from protea.models.registry import build
from protea.progress import SILENT, Progress
from protea.text import counted

_NO_PARAMETERS: Final = r".*(inv_freq|_extra_state|position_ids)"
"""Pattern of the keys of tensors that are not parameters, and need no warning."""

_ADAPTER: Final = re.compile(
    r"adapt[eo]r|prompt|prefix|virtual_token|(?<![a-z])(q|x|dy|ada|vb)?lora|(?-i:LoRA|Lora)|"
    r"(?<![a-z])(base_layer|original_module|modules_to_save|to_wrap|ia3|hada|loha|lokr|b?oft|vera)(?![a-z])",
    re.IGNORECASE,
)
"""Parts of the keys of adapters, prompts and prefixes (peft, loralib, NeMo, own ones), and of weights in them."""

_PROMPT: Final = re.compile(r"prompt|prefix|virtual_token", re.IGNORECASE)
_MERGE: Final = (
    "merge adapters before you save (in peft with `model.merge_and_unload().save_pretrained(FOLDER)`; in loralib with "
    "`model.eval()`, and save without the lora_ tensors); where that is impossible, use the program that trained them"
)
_BEFORE: Final = (
    "prompts and prefixes cannot be merged: use the program that trained them, or, for a model without them, save the "
    "one that they were trained on (in peft with `model.get_base_model().save_pretrained(FOLDER)`)"
)

HEAD: Final = re.compile(
    r"(lm_head|contact_head|pooler|classifier|qa_outputs|(classification|regression)_heads?|binary_head|output_layer)\."
)
"""What transformers, fairseq with Meta's esm, NeMo and BioNeMo call heads: they read what an encoder computes."""

_NAMED: Final = 5
"""So many tensors are named in a message."""


def like(model: Encoder, config: EncoderConfig | None = None) -> Encoder:
    """A copy of a model on the meta device, with its heads, its buffers, and its configuration unless one is given."""
    twin = build(config or model.config)
    set_heads(twin, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    for name, buffer in model.stored_buffers.items():
        twin.set_buffer(name, buffer)
    return twin


def set_heads(model: Encoder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a new model on the meta device only those heads whose parameters have these names and shapes."""
    if not any(name.startswith("lm_head.") for name in shapes):
        model.lm_head = None
    model.contact_head = contact_head(model.config, shapes)


def contact_head(config: EncoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> AnyContactHead | None:
    """The contact head for parameters of these names and shapes, on the meta device; ``None`` if none is among them."""
    rank, *_ = shapes.get(APART[0]) or (1,)
    with torch.device("meta"):
        if any(name in shapes for name in APART):
            return BilinearContactHead(config.hidden_size, max(1, rank)).eval()
        if any(name.startswith("contact_head.") for name in shapes):
            return ContactHead(sum(config.attention_heads)).eval()
    return None


def refuse_adapters(tensors: Tensors, keys: Iterable[str]) -> None:
    """Refuse adapters among the tensors with these keys: the model gives other numbers without them."""
    if adapters := [key for key in keys if _ADAPTER.search(key)]:
        prompts = sum(_PROMPT.search(key) is not None for key in adapters)
        advice = [_MERGE] * (prompts < len(adapters)) + [_BEFORE] * (prompts > 0)
        raise CheckpointError(
            f"{tensors.stored[adapters[0]].path}: holds {counted(len(adapters), 'tensor')} of adapters or prompts: "
            f"{_listed(adapters)}; without them the model gives other numbers: {'; '.join(advice)}"
        )


def _listed(keys: list[str]) -> str:
    """The first of some keys, and the number of the others."""
    return ", ".join(keys[:_NAMED]) + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")


class Checkpoint:
    """An opened checkpoint, whose parameters are read when asked for.

    ``model`` is on the meta device, with the stored heads and the stored values of buffers; ``source`` is the name of
    the configuration's file in messages.
    """

    def __init__(self, config: EncoderConfig, tensors: Tensors, layout: Layout, source: str) -> None:
        self.tensors, self.layout = tensors, layout
        self._source = source
        self._replaced: dict[str, Tensor] = {}
        self.model = build(config)
        # A bare encoder is a complete checkpoint, and so is one without a contact head.
        heads = [name for name, _ in self.model.named_parameters() if name.startswith("lm_head.")]
        heads += [f"contact_head.regression.{kind}" for kind in ("weight", "bias")]
        places = {name: layout.place(name) for name in heads}
        set_heads(self.model, {name: () for name, place in places.items() if place and place.key in tensors})
        self.entries = entries(self.model, layout)
        self._part = {name: (entry, part) for entry in self.entries for part, name in enumerate(entry.names)}
        unplaced = self._unplaced()
        refuse_adapters(tensors, unplaced)
        root, alone = encoder_root(self.entries, layout)
        # Where heads stand among the encoder's modules, only their names tell them apart.
        inside = [
            key
            for key in unplaced
            if key not in tensors.outside
            and (key.startswith(root) or not alone)
            and not HEAD.match(key.removeprefix(root))
        ]
        if missing := [entry.place.key for entry in self.entries if entry.place.key not in tensors]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise self._misfit(f"{', '.join(map(str, tensors.paths))}: no tensor {missing[0]}{more}")
        for entry in self.entries:
            stack = () if entry.place.layer is None else (config.num_hidden_layers,)
            self._check_tensor(entry.place.key, (*stack, *stored_shape(self.model, layout, entry)))
        for name, exact in self.model.stored_buffers.items():
            self.model.set_buffer(name, self._stored_buffer(name, exact))
        self._refuse(inside)
        self._warn_of([key for key in unplaced if key not in inside])

    @property
    def stored_types(self) -> list[str]:
        """The types of its parameters, as safetensors names them."""
        return sorted({self.tensors.stored[entry.place.key].dtype for entry in self.entries})

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every stored parameter exactly."""
        return reduce(torch.promote_types, (FLOATS[name] for name in self.stored_types))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.stored.clear()  # releases the files; tensors that were read stay valid

    def parameter(self, name: str) -> Tensor:
        """A parameter as stored; mapped from its file where it is stored in one piece."""
        if name in self._replaced:
            return self._replaced[name]
        entry, part = self._part[name]
        key, layer = entry.place
        value = self.tensors[key] if layer is None else self.tensors.stored[key].row(layer)
        if len(entry.names) > 1:
            heads = fused_heads(self.model, self.layout)
            fused: Tensor = value.reshape(heads, len(entry.names), -1, *value.shape[1:])
            return fused[:, part].flatten(0, 1)
        return value[: self.model.get_parameter(name).shape[0]]

    def complete(self, values: Mapping[str, Tensor], config: EncoderConfig | None = None) -> None:
        """Add or replace the configuration, and parameters and buffers by our names; they must fit the stored ones."""
        model = build(config or self.model.config)
        if type(model) is not type(self.model):
            raise CheckpointError(f"describe {model.config.family}, and the checkpoint is {self.model.config.family}")
        parameters = dict(values)
        for name, exact in model.stored_buffers.items():
            buffer = parameters.pop(name, self.model.stored_buffers[name])
            if buffer.shape != exact.shape:
                raise CheckpointError(f"{name} has shape {list(buffer.shape)}, not {list(exact.shape)}")
            model.set_buffer(name, buffer)
        given = dict(self.model.named_parameters()) | parameters
        stored = {name: tuple(value.shape) for name, value in given.items()}
        set_heads(model, stored)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                raise CheckpointError(f"{name} has shape {stored.get(name)}, the model asks for {expected.get(name)}")
        self.model = model
        self._replaced |= parameters

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        others: Mapping[str, torch.dtype] | None = None,
        progress: Progress = SILENT,
    ) -> Encoder:
        """The model with its weights in a type; buffers keep theirs. Weights that have the type stay in their file.

        ``others`` are the types of parameters that get another one.
        """
        types = {name: dtype for name, _ in self.model.named_parameters()} | dict(others or {})
        state = {}
        progress.begin("reading weights", len(types))
        for name, kind in types.items():
            state[name] = self.parameter(name).to(device=device, dtype=kind)
            progress.advance()
        model = like(self.model)
        for name, buffer in model.named_buffers():
            model.set_buffer(name, buffer.to(device))
        model.load_state_dict(state | model.stored_buffers, assign=True)
        return model

    def check_tied(self, *pairs: tuple[str, str]) -> None:
        """Check tensors that repeat the tied output matrix or its bias; unequal ones mean another architecture."""
        for key, tied in pairs:
            if key in self.tensors and tied in self.tensors and not torch.equal(self.tensors[key], self.tensors[tied]):
                raise CheckpointError(
                    f"{self.tensors.stored[key].path}: {key} differs from {tied}; an untied head is not supported: "
                    f"leave {key} out if {tied} is right"
                )

    def _misfit(self, reason: str) -> CheckpointError:
        advice = f"the file does not fit its {self._source}, or is incomplete: fetch both again"
        return CheckpointError(f"{reason}; {advice}")

    def _check_tensor(self, key: str, expected: tuple[int, ...]) -> None:
        path, shape, dtype, *_ = self.tensors.stored[key]
        if shape != expected:
            asked = f"{self._source} asks for {list(expected)}"
            raise self._misfit(f"{path}: {key} has shape {list(shape)}, {asked}")
        # Quantized weights mean nothing without their scales.
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {key} is stored as {dtype}, which is not supported; save it as one of {', '.join(FLOATS)}"
            )

    def _stored_buffer(self, name: str, exact: Tensor) -> Tensor:
        """A buffer as stored, or its exact values if the file lacks them or stores them in a type that is too coarse.

        For example, Meta's models have rotary frequencies that are rounded to float16.
        """
        keys = self._buffer_keys(name)
        if not keys:
            return exact
        first, path = keys[0], self.tensors.stored[keys[0]].path
        for key in keys:
            self._check_tensor(key, tuple(exact.shape))
        stored = self.tensors[first]
        if not stored.isfinite().all():
            raise damaged(path, f"{first} is not finite")
        for key in keys:
            if not torch.equal(self.tensors[key], stored):
                raise CheckpointError(
                    f"{path}: {key} differs from {first}; all layers must have the same: fetch the file again, or "
                    "leave these tensors out to have them computed"
                )
        if stored.dtype != torch.bfloat16:
            return stored.to(exact.dtype)
        computed = f"computed again{self.model.buffer_origin(name)}"
        message = f"{path}: {first} is stored in bfloat16, too coarse for positions; {computed}"
        warnings.warn(message, ProteaWarning, stacklevel=2)
        return exact

    def _buffer_keys(self, name: str) -> list[str]:
        """Keys of a buffer: those of the format or, if a file lacks them, all keys that end in the buffer's name."""
        keys = self.layout.buffer_keys(name, self.model.config.num_hidden_layers)
        stored = sorted(key for key in keys if key in self.tensors)
        if stored or "." in name:
            return stored
        return sorted(key for key in self.tensors if key.rpartition(".")[2] == name)

    def _unplaced(self) -> list[str]:
        """The keys of tensors that have no place in the model, without those that files are known to carry unused."""
        used = {entry.place.key for entry in self.entries}
        used.update(key for name in self.model.stored_buffers for key in self._buffer_keys(name))
        known = re.compile(f"{self.layout.leftovers}|{_NO_PARAMETERS}")
        return [key for key in sorted(self.tensors.keys() - used) if not known.fullmatch(key)]

    def _refuse(self, keys: list[str]) -> None:
        """Refuse tensors of the encoder without a place: without them the model would give other numbers."""
        if keys:
            raise CheckpointError(
                f"{self.tensors.stored[keys[0]].path}: {counted(len(keys), 'tensor')} in or beside the encoder without "
                f"a place in {self.model.config.family}: {_listed(keys)}; without them the model may give other "
                f"numbers: correct {self._source}; where the encoder was changed, use the program that changed it; if "
                "they are a head of your own, which only reads what the encoder computes, save the file again without "
                "them (`del state[NAME]`)"
            )

    def _warn_of(self, keys: list[str]) -> None:
        if keys:
            left = f"{counted(len(keys), 'tensor')} outside the encoder left out: {_listed(keys)}"
            message = f"{self.tensors.paths[0]}: {left}; the encoder computes the same without them"
            warnings.warn(message, ProteaWarning, stacklevel=2)
