"""The model that a recipe trains: its first weights, its transforms, its optimizers, its precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.errors import DeviceError
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.progress import Progress
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.recipe import BatchSettings, OptimizerSettings, Recipe, RunSettings
from protea.transforms import native
from protea.transforms.compile import compile_layers
from protea.transforms.recompute import recompute_layers

_TYPES: Final = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def architecture(recipe: Recipe) -> Encoder:
    """The model that a recipe trains, on the meta device; parameters that are trained require gradients.

    Raises:
        UsageError: a name is unknown.
        CheckpointError: ``init`` is damaged, or of no known format.
        CapabilityError: ``init`` has no language-model head.
    """
    if recipe.init is None:
        model = build(recipe.config)
        # Contact heads are fitted to structures after training; this one would keep its random weights.
        model.contact_head = None
    else:
        with open_checkpoint(locate(recipe.init)) as checkpoint:
            model = checkpoint.model
        model.require("logits")
    return _freeze_contact_head(model)


def initialise(recipe: Recipe, device: torch.device) -> Encoder:
    """The same model with its first weights, in float32.

    Raises:
        CheckpointError: ``init`` is damaged, or of no known format.
    """
    if recipe.init is None:
        model = architecture(recipe)
        names = [name for name, _ in model.named_parameters()]
        state = {name: initial_value(model, name, recipe.run.seed).to(device) for name in names}
        state |= {name: buffer.to(device) for name, buffer in model.stored_buffers.items()}
        model.load_state_dict(state, assign=True)
        return model
    with open_checkpoint(locate(recipe.init)) as checkpoint:
        model = checkpoint.load(dtype=torch.float32, device=device)
        for parameter in model.parameters():
            # float32 weights are still mapped from the file, which training must not change.
            parameter.data = parameter.data.clone()
    return _freeze_contact_head(model)


def _freeze_contact_head(model: Encoder) -> Encoder:
    """The contact head has no part in the loss: it was fitted to structures."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("contact_head."))
    return model


class Precision:
    """The type that matrix products are computed in, by the name that a recipe gives.

    ``scaler`` scales the loss so that float16 gradients do not vanish; it is disabled for other types.
    """

    def __init__(self, name: str, device: torch.device, packs: int = 1) -> None:
        self.dtype = _TYPES.get(name, torch.float32)
        self._device = device
        # A pack's gradient is a small share of its step's: it must not vanish before the scale has grown.
        scale = 2.0 ** (16 + (packs - 1).bit_length())
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute products in the narrow type; norms and the residual stream stay in float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self._device.type, self.dtype)


@dataclass(frozen=True)
class Trainable:
    """A model in training mode, the optimizers of its trained parameters, and its precision."""

    model: Encoder
    optimizers: Optimizers
    precision: Precision


def prepare(
    model: Encoder, run: RunSettings, optimizer: OptimizerSettings, batch: BatchSettings, progress: Progress
) -> Trainable:
    """Make a model ready for training, in place; parameters keep their names, and frozen ones stay frozen.

    Raises:
        DeviceError: ``run.compile`` is set and there is no compiler.
    """
    # Keep this order when adding transforms: pipeline stages, LoRA, tensor parallelism, recomputation, compilation,
    # FSDP2. Each must see the modules that those before it leave.
    if run.recompute:
        recompute_layers(model)
    if run.compile:
        try:
            compile_layers(model)
        except DeviceError as error:
            raise DeviceError(f"run.compile: {error}, or set run.compile=false") from error
    narrow = run.precision == "bf16-mixed"
    if narrow and model.device.type == "cpu" and (reason := native.enable()) is not None:
        progress.note(f"attention uses PyTorch's kernel, which trains several times slower than Protea's: {reason}")
    optimizers = Optimizers(parameters_to_train(model), optimizer)
    return Trainable(model.train(), optimizers, Precision(run.precision, model.device, batch.packs))
