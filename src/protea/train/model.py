"""The model that a recipe trains: its first weights, transforms, optimizers and precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.device import native_bfloat16, resolve_device
from protea.errors import DeviceError
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.progress import Progress
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.parallel import ALONE, Parallel
from protea.train.recipe import Recipe
from protea.transforms import native
from protea.transforms.training import compile_layers, recompute_layers

TYPES: Final = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16, "float32": torch.float32}
"""The type that products are computed in, by the name of a precision."""


def architecture(recipe: Recipe) -> Encoder:
    """The model that a recipe trains, on the meta device; parameters that are trained require gradients."""
    if recipe.init is None:
        model = build(recipe.config)
        # Contact heads are fitted to structures after training; this one would keep its random weights.
        model.contact_head = None
    else:
        with open_checkpoint(locate(recipe.init)) as checkpoint:
            model = checkpoint.model
        model.require("logits")
    return _freeze_contact_head(model)


def initialise(recipe: Recipe, device: torch.device, parallel: Parallel = ALONE) -> Encoder:
    """The same model with its first weights, in float32, or this process's stage of it."""
    if recipe.init is None:
        model = architecture(recipe)
        parallel.cut(model)
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
    parallel.cut(model)
    return _freeze_contact_head(model)


def _freeze_contact_head(model: Encoder) -> Encoder:
    """Freeze the contact head, which was fitted to structures and has no part in the loss."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("contact_head."))
    return model


def settle_precision(recipe: Recipe, device: torch.device | None) -> Recipe:
    """The recipe with what ``run.precision=auto`` chooses: bfloat16 if the device multiplies it natively, else float32.

    ``None`` is a GPU that this machine lacks; it is taken for one that multiplies bfloat16.
    """
    if recipe.run.precision != "auto":
        return recipe
    precision = automatic_precision(device)
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": precision})})


def automatic_precision(device: torch.device | None) -> str:
    """The precision that ``auto`` means on a device."""
    return "bf16-mixed" if device is None or native_bfloat16(device) else "float32"


def planned_device(recipe: Recipe) -> torch.device | None:
    """The device that a recipe names; ``None`` if this machine lacks it."""
    try:
        return resolve_device(recipe.run.device)
    except DeviceError:
        return None


def memory_of(device: torch.device) -> str:
    """What messages call the memory of a device."""
    return "GPU memory" if device.type == "cuda" else "main memory"


@contextmanager
def explaining_memory(too_large: DeviceError) -> Iterator[None]:
    """Turn what PyTorch and Python raise where memory runs out into an error with advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise too_large from error
    except RuntimeError as error:
        # PyTorch has no error class for main memory or page-locked memory.
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise too_large from error
        raise


class Precision:
    """The type that matrix products are computed in, by the name that a recipe gives.

    ``scaler`` scales the loss so that float16 gradients do not vanish; it is disabled for other types. ``cached`` says
    whether narrow weights are kept until the end of a forward pass.
    """

    def __init__(self, name: str, device: torch.device, packs: int = 1, *, cached: bool = True) -> None:
        self.dtype = TYPES[name]
        self._device, self._cached = device, cached
        # A pack's gradient is a small share of its step's: it must not vanish before the scale has grown.
        scale = 2.0 ** (16 + (packs - 1).bit_length())
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute products in the narrow type; norms and the residual stream stay in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self.dtype, cache_enabled=self._cached)


@dataclass(frozen=True)
class Trainable:
    """A model in training mode, the optimizers of its trained parameters, and its precision."""

    model: Encoder
    optimizers: Optimizers
    precision: Precision
    parallel: Parallel = ALONE


def prepare(model: Encoder, recipe: Recipe, progress: Progress, parallel: Parallel = ALONE) -> Trainable:
    """Make a model ready for training, in place; parameters keep their names, and frozen ones stay frozen."""
    # Keep this order when adding transforms: pipeline stages, LoRA, tensor parallelism, recomputation, compilation,
    # FSDP2. Each must see the modules that those before it leave.
    run = settle_precision(recipe, model.device).run
    parallel.divide(model)
    if run.recompute:
        recompute_layers(model)
    if run.compile:
        try:
            compile_layers(model, fixed=parallel.fixed)
        except DeviceError as error:
            raise DeviceError(f"run.compile: {error}, or set run.compile=false") from error
    if run.precision == "bf16-mixed" and model.device.type == "cpu":
        reason = native.enable()
        if not native_bfloat16(model.device):
            progress.note("this processor has no bfloat16 products, so run.precision=float32 trains many times faster")
        elif reason is not None:
            progress.note(f"attention uses PyTorch's kernel, which trains several times slower than Protea's: {reason}")
    if recipe.optimizer.name == "muon" and not native_bfloat16(model.device):
        progress.note("Muon multiplies in bfloat16, which this processor emulates: optimizer.name=adamw is much faster")
    parallel.apply(model)
    optimizers = Optimizers(parameters_to_train(model), recipe.optimizer, norm=parallel.norm)
    # Narrow weights that are kept until the end of a forward pass would undo what sharding saves.
    cached = parallel.layout.processes == 1
    precision = Precision(run.precision, model.device, recipe.batch.packs, cached=cached)
    return Trainable(model.train(), optimizers, precision, parallel)
