"""An opened checkpoint of any format: an architecture, and its parameters by our names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from protea.checkpoints.layout import APART, Layout, entries, fused_heads, stored_shape
from protea.checkpoints.tensors import FLOATS, Tensors
from protea.errors import CheckpointError, ProteaWarning
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.models.heads import AnyContactHead, BilinearContactHead, ContactHead
from protea.models.registry import build

_NO_PARAMETERS: Final = ("inv_freq", "_extra_state")
"""What keys of tensors end with that files carry beside parameters, of use to a model or not."""


def like(model: Encoder, config: EncoderConfig | None = None) -> Encoder:
    """A model on the meta device with another's heads and buffers.

    Args:
        model: the other.
        config: its configuration, if not the other's.
    """
    twin = build(config or model.config)
    set_heads(twin, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    for name, buffer in model.stored_buffers.items():
        twin.set_buffer(name, buffer)
    return twin


def set_heads(model: Encoder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Leave a model on the meta device with the heads that some parameters belong to.

    Args:
        model: as built.
        shapes: by our names; only that of a bilinear head's P matters, whose first axis is the head's rank.
    """
    if not any(name.startswith("lm_head.") for name in shapes):
        model.lm_head = None
    model.contact_head = contact_head(model.config, shapes)


def contact_head(config: EncoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> AnyContactHead | None:
    """The contact head whose parameters are among some, on the meta device; nothing if there are none."""
    first, *_ = (*shapes.get(APART[0], ()), 0)
    with torch.device("meta"):
        if any(name in shapes for name in APART):
            return BilinearContactHead(config.hidden_size, max(1, first)).eval()
        if any(name.startswith("contact_head.") for name in shapes):
            return ContactHead(sum(config.attention_heads)).eval()
    return None


class Checkpoint:
    """An opened checkpoint: an architecture and its parameters by our names, read when asked for.

    Args:
        config: the architecture, its vocabulary as stored.
        tensors: what is stored.
        layout: how.
        source: what messages call the configuration.

    Attributes:
        model: the model on the meta device, with the heads that are stored; buffers have their stored values.
        files: the files that make up the checkpoint.

    Raises:
        CheckpointError: a tensor is missing, or of another shape or kind than the configuration asks for.
    """

    def __init__(self, config: EncoderConfig, tensors: Tensors, layout: Layout, source: str) -> None:
        self.tensors = tensors
        self.layout = layout
        self.source = source
        self._replaced: dict[str, Tensor] = {}
        self.model = build(config)
        # A checkpoint of the bare encoder, or one without contact head, is complete without them.
        heads = [name for name, _ in self.model.named_parameters() if name.startswith("lm_head.")]
        heads += [f"contact_head.regression.{kind}" for kind in ("weight", "bias")]
        places = {name: layout.place(name) for name in heads}
        set_heads(self.model, {name: () for name, place in places.items() if place and place.key in tensors})
        self.entries = entries(self.model, layout)
        self._part = {name: (entry, part) for entry in self.entries for part, name in enumerate(entry.names)}
        self._check()
        for name, exact in self.model.stored_buffers.items():
            self.model.set_buffer(name, self._stored_buffer(name, exact))
        self._report_ignored()

    @property
    def files(self) -> list[Path]:
        """The files it is in."""
        return self.tensors.paths

    @property
    def stored_types(self) -> list[str]:
        """Types the parameters are stored in, as safetensors names them."""
        return sorted({self.tensors.dtype(entry.place.key) for entry in self.entries})

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds every stored parameter exactly."""
        first, *others = (FLOATS[name] for name in self.stored_types)
        for other in others:
            first = torch.promote_types(first, other)
        return first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensors.close()

    def parameter(self, name: str) -> Tensor:
        """A parameter as stored; mapped from its file where it is stored in one piece."""
        if name in self._replaced:
            return self._replaced[name]
        entry, part = self._part[name]
        key, layer = entry.place
        value = self.tensors[key] if layer is None else self.tensors.row(key, layer)
        if len(entry.names) > 1:
            heads = fused_heads(self.model, self.layout)
            whole: Tensor = value.reshape(heads, len(entry.names), -1, *value.shape[1:])
            return whole[:, part].flatten(0, 1)
        return value[: self.model.get_parameter(name).shape[0]]

    def complete(self, values: Mapping[str, Tensor], config: EncoderConfig | None = None) -> None:
        """Add what a format could not hold: parameters beside stored ones or in their place, a configuration.

        Args:
            values: by our names, buffers among them.
            config: the configuration they fit, of the same family.

        Raises:
            CheckpointError: they fit neither each other nor what is stored.
        """
        model = build(config or self.model.config)
        if type(model) is not type(self.model):
            raise CheckpointError(f"describe {model.config.family}, and the checkpoint is {self.model.config.family}")
        values = dict(values)
        for name, exact in model.stored_buffers.items():
            buffer = values.pop(name, self.model.stored_buffers[name])
            if buffer.shape != exact.shape:
                raise CheckpointError(f"{name} has shape {list(buffer.shape)}, not {list(exact.shape)}")
            model.set_buffer(name, buffer)
        found = {name: tuple(value.shape) for name, value in (dict(self.model.named_parameters()) | values).items()}
        set_heads(model, found)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
            raise CheckpointError(
                f"{wrong[0]} has shape {found.get(wrong[0])}, the model asks for {expected.get(wrong[0])}"
            )
        self.model = model
        self._replaced |= values

    def load(self, *, dtype: torch.dtype, device: torch.device) -> Encoder:
        """The model with its weights.

        Args:
            dtype: type of all parameters; buffers keep theirs. Weights stored in it stay in their file.
            device: where they go.
        """
        state = {name: self.parameter(name).to(device=device, dtype=dtype) for name, _ in self.model.named_parameters()}
        model = like(self.model)
        for name, buffer in model.named_buffers():
            model.set_buffer(name, buffer.to(device))
        model.load_state_dict(state | model.stored_buffers, assign=True)
        return model

    def _check(self) -> None:
        tensors = self.tensors
        if missing := [entry.place.key for entry in self.entries if entry.place.key not in tensors]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{', '.join(map(str, tensors.paths))}: no tensor {missing[0]}{more}; {self._misfit}")
        depth = self.model.config.num_hidden_layers
        for entry in self.entries:
            expected = stored_shape(self.model, self.layout, entry)
            if entry.place.layer is not None:
                expected = (depth, *expected)
            self.check_tensor(entry.place.key, expected)

    def check_tensor(self, key: str, expected: tuple[int, ...]) -> None:
        """Check a stored tensor's shape, and that it holds plain numbers.

        Quantized weights mean nothing without their scales, whatever type they are converted to.

        Raises:
            CheckpointError: naming file, tensor, and both shapes or the type.
        """
        found = self.tensors.shape(key)
        if found != expected:
            raise CheckpointError(
                f"{self.tensors.path(key)}: {key} has shape {list(found)}, {self.source} asks for {list(expected)}; "
                f"{self._misfit}"
            )
        if self.tensors.dtype(key) not in FLOATS:
            raise CheckpointError(
                f"{self.tensors.path(key)}: {key} is stored as {self.tensors.dtype(key)}, which is not supported; save "
                f"it as one of {', '.join(FLOATS)}"
            )

    def check_tied(self, *pairs: tuple[str, str]) -> None:
        """Files may repeat the tied output matrix and its bias; ones that differ belong to another architecture.

        Raises:
            CheckpointError: a repeat differs from what it repeats.
        """
        for key, tied in pairs:
            if key in self.tensors and tied in self.tensors and not torch.equal(self.tensors[key], self.tensors[tied]):
                raise CheckpointError(
                    f"{self.tensors.path(key)}: {key} differs from {tied}; an untied head is not supported: leave "
                    f"{key} out if {tied} is right"
                )

    @property
    def _misfit(self) -> str:
        return f"the file does not fit its {self.source}, or is incomplete: fetch both again"

    def _stored_buffer(self, name: str, exact: Tensor) -> Tensor:
        """The file's values of a buffer, say rotary frequencies, which Meta's models have rounded to float16.

        The exact ones if it has none, or has them in a type too coarse for them.
        """
        keys = self._buffer_keys(name)
        if not keys:
            return exact
        stored = self.tensors[keys[0]]
        for key in keys:
            self.check_tensor(key, tuple(exact.shape))
            if not stored.isfinite().all():
                raise CheckpointError(f"{self.tensors.path(key)}: {key} is not finite; fetch the file again")
            if not torch.equal(self.tensors[key], stored):
                raise CheckpointError(
                    f"{self.tensors.path(key)}: {key} differs from {keys[0]}, and one for all layers is supported; "
                    "fetch the file again, or leave these tensors out to have them computed"
                )
        if stored.dtype == torch.bfloat16:
            warnings.warn(
                f"{self.tensors.path(keys[0])}: {keys[0]} is stored in bfloat16, too coarse for positions; computed "
                f"anew{self.model.buffer_origin(name)}",
                ProteaWarning,
                stacklevel=2,
            )
            return exact
        return stored.to(exact.dtype)

    def _buffer_keys(self, name: str) -> list[str]:
        """Where a buffer is stored: where the format keeps it, or, as files differ, under its own name elsewhere."""
        known = self.layout.buffer_keys(name, self.model.config.num_hidden_layers)
        there = sorted(key for key in known if key in self.tensors)
        if there or "." in name:
            return there
        return sorted(key for key in self.tensors if key.rpartition(".")[2] == name)

    def _report_ignored(self) -> None:
        """Name what is stored and the model has no use for; known leftovers are not worth a word."""
        used = {entry.place.key for entry in self.entries}
        used.update(key for name in self.model.stored_buffers for key in self._buffer_keys(name))
        unknown = sorted(
            key
            for key in self.tensors.keys() - used
            if not key.endswith(_NO_PARAMETERS) and not self.layout.leftovers(key)
        )
        if unknown:
            roots = sorted({key.split(".")[0] for key in unknown})
            warnings.warn(
                f"{self.tensors.paths[0]}: {len(unknown)} tensors have no place in the model and were left out: "
                f"{', '.join(f'{root}.*' for root in roots)} (first: {unknown[0]})",
                ProteaWarning,
                stacklevel=2,
            )
