"""A model made ready for training: its weights, and what is applied to it from outside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.errors import DeviceError
from protea.models import build, initial_value, native
from protea.models.encoder import Encoder
from protea.models.esm2 import ESM2
from protea.train.recipe import Recipe
from protea.train.watcher import Watcher

_TYPES: Final = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def architecture(recipe: Recipe) -> Encoder:
    """The model that a recipe trains, on the meta device.

    Raises:
        UsageError: a name is unknown.
        CheckpointError: ``init`` is damaged, or of no known format.
        CapabilityError: ``init`` has no language-model head.
    """
    if recipe.init is None:
        model = build(recipe.config)
        # Contacts are fitted to structures later; random weights would pass for a head.
        model.contact_head = None
        return model
    with open_checkpoint(locate(recipe.init)) as found:
        found.model.require("logits")
        return found.model


def initialise(recipe: Recipe, device: torch.device) -> Encoder:
    """The model with the weights that training begins with, float32.

    Raises:
        CheckpointError: ``init`` is damaged, or of no known format.
    """
    if recipe.init is None:
        model = architecture(recipe)
        names = [name for name, _ in model.named_parameters()]
        state = {name: initial_value(model, name, recipe.run.seed).to(device) for name in names}
        if isinstance(model, ESM2):
            state["inv_freq"] = model.inv_freq.to(device)
        model.load_state_dict(state, assign=True)
    else:
        with open_checkpoint(locate(recipe.init)) as found:
            model = found.load(dtype=torch.float32, device=device)
            for parameter in model.parameters():
                # Weights of this type are still those of the file.
                parameter.data = parameter.data.clone()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("contact_head."))
    return model


class Precision:
    """What products are computed in.

    Args:
        name: ``bf16-mixed``, ``fp16-mixed`` or ``float32``.
        device: where.
        packs: of a step, whose number the first loss scale is in proportion to.

    Attributes:
        dtype: of products.
        scaler: of the loss, for float16, whose gradients would vanish without; switched off otherwise.
    """

    def __init__(self, name: str, device: torch.device, packs: int = 1) -> None:
        self.dtype = _TYPES.get(name, torch.float32)
        self._device = device
        # A pack's gradient is a small share of its step's: it must not vanish before the scale has grown.
        scale = 2.0 ** (16 + (packs - 1).bit_length())
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it, products take and give the narrow type; norms and the residual stream keep float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self._device.type, self.dtype)


def apply(model: Encoder, recipe: Recipe, watcher: Watcher) -> None:
    """Compile and recompute, as a recipe asks for, and have the fastest attention; parameters and their names stay.

    Raises:
        DeviceError: there is nothing to compile with.
    """
    on_cpu = model.word_embeddings.weight.device.type == "cpu"
    if on_cpu and recipe.run.precision == "bf16-mixed" and (reason := native.enable()) is not None:
        watcher.note(f"attention runs PyTorch's own kernel, which trains several times slower: {reason}")
    if recipe.run.compile:
        compile_layers(model)
    if recipe.run.recompute:
        recompute_layers(model)


def compile_layers(model: Encoder) -> None:
    """Have what lies before and after attention fused, once for all layers.

    Raises:
        DeviceError: the CPU's code needs a C++ compiler, and there is none.
    """
    if model.word_embeddings.weight.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError) as error:
            raise DeviceError(
                "run.compile: no C++ compiler was found; install one (g++), or run.compile=false"
            ) from error
    for layer in model.layers:
        for name in ("before", "after"):
            setattr(layer, name, torch.compile(getattr(layer, name), dynamic=True))


def recompute_layers(model: Encoder) -> None:
    """Activation checkpointing: of each layer, only its input is kept for the backward pass."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def masked_logits(model: Encoder, hidden: Tensor, rows: Tensor) -> Tensor:
    """Logits ``[M, V]`` of some rows of ``[T, D]``, float32, without the rows of padding that a vocabulary may have."""
    logits = model.head(hidden.index_select(0, rows))
    return logits[:, : len(model.alphabet)].float()
