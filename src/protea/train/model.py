"""The model that a recipe trains: its first weights, transforms, optimizers and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from protea import native
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.device import keep_freed_memory, native_bfloat16, resolve_device
from protea.errors import DeviceError
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.progress import Progress
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.parallel import ALONE, Parallel
from protea.train.recipe import Recipe
from protea.train.shares import part_of
from protea.train.world import local
from protea.transforms.native_linear import multiply_natively
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


def initialise(model: Encoder, recipe: Recipe, device: torch.device) -> None:
    """Give a model on the meta device its first weights, in float32, in place; it may be transformed already.

    Of each parameter, this process makes room for the part that it holds. It reads that part from the checkpoint, or
    draws the whole, one at a time.
    """
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        model.set_buffer(name, buffer.to(device))
    with _first_values(recipe, model) as value, torch.no_grad():
        for name, parameter in model.named_parameters():
            box = tuple(slice(*axis) for axis in part_of(parameter).box)
            local(parameter).copy_(value(name)[box])


@contextmanager
def _first_values(recipe: Recipe, model: Encoder) -> Iterator[Callable[[str], Tensor]]:
    """Gives the first value of each parameter by its name; values from a checkpoint stay in its files."""
    if recipe.init is None:
        yield partial(initial_value, model, seed=recipe.run.seed)
    else:
        with open_checkpoint(locate(recipe.init)) as checkpoint:
            yield checkpoint.parameter


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


def prepare(
    model: Encoder, recipe: Recipe, device: torch.device, progress: Progress, parallel: Parallel = ALONE
) -> Trainable:
    """Make a model on the meta device ready for training, in place, with its first weights.

    Parameters keep their names, and frozen ones stay frozen.
    """
    # Keep this order when adding transforms: pipeline stages, LoRA, tensor parallelism, recomputation, compilation,
    # FSDP2. Each must see the modules that those before it leave. Weights come last, so that no process holds more of
    # them than its part.
    run = settle_precision(recipe, device).run
    parallel.cut(model)
    parallel.divide(model)
    if run.recompute:
        recompute_layers(model)
    if run.compile:
        try:
            compile_layers(model, device, fixed=parallel.fixed)
        except DeviceError as error:
            raise DeviceError(f"run.compile: {error}, or set run.compile=false") from error
    if device.type == "cpu":
        keep_freed_memory()
        if not run.compile and parallel.layout.tensor == 1:
            multiply_natively(model)
        if run.precision == "bf16-mixed" and not native_bfloat16(device):
            progress.note("this processor has no bfloat16 products, so run.precision=float32 trains many times faster")
        elif (missing := native.reason()) is not None:
            progress.note(
                f"attention uses PyTorch's kernel, which trains several times slower than Protea's: {missing}"
            )
    if recipe.optimizer.name == "muon" and not native_bfloat16(device):
        progress.note("Muon multiplies in bfloat16, which this processor emulates: optimizer.name=adamw is much faster")
    parallel.apply(model, TYPES[run.precision])
    initialise(model, recipe, device)
    optimizers = Optimizers(parameters_to_train(model), recipe.optimizer, norm=parallel.norm)
    # Narrow weights that are kept until the end of a forward pass would undo what sharding saves.
    cached = parallel.layout.processes == 1
    precision = Precision(run.precision, device, recipe.batch.packs, cached=cached)
    return Trainable(model.train(), optimizers, precision, parallel)
