"""The model that a recipe trains: its first weights, transforms, optimizers and precision, and the costs of training.

Floating-point operations of a token, forward and backward, are three times those of the family's forward pass. Products
that are computed again to save memory do not count.

Bytes: weights, gradients and AdamW's moments in float32 (16 a parameter; Muon's matrices 12; frozen ones 4), copies of
weights and moments in main memory while they are written, weights in the narrow type, and what the family's layers keep
for the backward pass of a pack. The last is within a tenth of what PyTorch keeps, compiled or not; in bfloat16 on a CPU
without compiled attention PyTorch keeps a quarter more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from protea import native
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.data.sampler import Sampler
from protea.device import available_memory, native_bfloat16, resolve_device
from protea.errors import DeviceError, TrainingError
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.progress import Progress
from protea.text import bytes_text, counted, duration_text
from protea.train.division import Division
from protea.train.optim import Optimizers, is_matrix_of_layer, parameters_to_train
from protea.train.parallel import ALONE, Parallel
from protea.train.recipe import Recipe
from protea.train.shares import part_of
from protea.train.world import local
from protea.transforms.native_linear import multiply_natively
from protea.transforms.training import compile_layers, recompute_layers

TYPES: Final = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16, "float32": torch.float32}
"""The type that products are computed in, by the name of a precision."""

_SAMPLE: Final = 4096
_GATHERED: Final = 3
"""Layers whose weights a process has at a time: the one that computes, the next, and the one before."""

_MASKED: Final = 0.15
"""Share of the tokens that the language-model head is computed for."""


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
    if run.precision == "float32" and not run.compile and parallel.layout.tensor == 1 and device.type == "cpu":
        multiply_natively(model)
    if device.type == "cpu":
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


@dataclass(frozen=True)
class Costs:
    """What a run takes: numbers of trained parameters and operations, and bytes."""

    parameters: int
    flops: float  # for a token, forward and backward
    state: int  # weights, gradients and moments
    copies: int  # main memory for saving
    activations: int  # kept for the backward pass of a pack

    def lines(self, recipe: Recipe, peak: float | None) -> Iterator[str]:
        """The costs in words; ``peak`` is the device's operations per second, if they are known."""
        steps, packs, pack = recipe.run.steps, recipe.batch.packs, recipe.batch.pack
        tokens = packs * pack
        yield (
            f"{self.parameters:,} parameters; {counted(steps, 'step')} of {tokens:,} tokens "
            f"({counted(packs, 'pack')} of {pack:,}), {steps * tokens:.3g} tokens in all"
        )
        total = self.flops * tokens * steps
        time = (
            "" if peak is None else f": {duration_text(total / peak)} of matrix products at {peak / 1e12:.3g} TFLOP/s"
        )
        yield f"{self.flops:.3g} FLOP per token, {total:.3g} in all{time}"
        yield (
            f"memory: {bytes_text(self.state)} weights, gradients, moments; {bytes_text(self.activations)} "
            f"activations of a pack; {bytes_text(self.copies)} main memory for checkpoints"
        )


def estimate(model: Encoder, recipe: Recipe, length: float, layout: Division = ALONE.layout) -> Costs:
    """What a recipe takes, with the bytes of one process of a layout.

    ``length`` is the mean length of sequences, weighted by tokens.
    """
    trained = parameters_to_train(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in trained.values())
    matrices = sum(parameter.numel() for name, parameter in trained.items() if is_matrix_of_layer(name, parameter))
    moments = 8 * count - (4 * matrices if recipe.optimizer.name == "muon" else 0)
    device = planned_device(recipe)
    run = settle_precision(recipe, device).run
    mixed, on_cpu = run.precision != "float32", device is not None and device.type == "cpu"
    kept = model.config.activation_bytes(length, mixed=mixed, recompute=run.recompute, on_cpu=on_cpu)
    state, copies = 4 * weights + 4 * count + moments, 4 * weights + moments
    narrow = 2 * weights if mixed else 0
    if layout.processes > 1:
        own = layout.tensor * layout.pipeline
        layers = 4 * sum(parameter.numel() for parameter in model.layers.parameters()) // own
        outside = sum(each.numel() for name, each in model.named_parameters() if not name.startswith("layers."))
        few = _GATHERED / len(model.layers)
        gathered = 2 * layers * (1 if layout.keeps_layers(layers) else few)
        if layout.gathers_narrow(model, TYPES[run.precision]):
            gathered *= 3 / 4
            narrow = 0
        # Narrow weights are kept for the backward pass, unless they are made again.
        narrow = round(narrow * (few if run.recompute else 1)) // own
        state = state // (layout.shard * own) + 16 * outside + round(gathered)
        copies //= layout.shard * own
    return Costs(
        parameters=count,
        flops=3 * model.config.forward_flops(length, _MASKED),
        state=state + narrow,
        copies=copies,
        activations=recipe.batch.pack * kept // layout.tensor,
    )


def mean_length(sampler: Sampler) -> float:
    """Mean length of sequences, weighted by tokens, from a sample of the first epoch."""
    lengths = sampler.draw(0, np.arange(min(_SAMPLE, len(sampler)))).tokens.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def check_memory(costs: Costs, device: torch.device, neighbours: int = 1) -> str:
    """The memory that a run needs and what is free, in words; ``TrainingError`` if it does not fit.

    ``neighbours`` is the number of processes that share the main memory.
    """
    free = available_memory() // neighbours
    if device.type != "cuda":
        return _compare(costs.state + costs.copies, costs.activations, free, "of main memory")
    on_device = _compare(costs.state, costs.activations, torch.cuda.mem_get_info(device)[0], f"on {device}")
    return f"{on_device}; {_compare(costs.copies, 0, free, 'of main memory for checkpoints')}"


def _compare(model: int, activations: int, available: int, place: str) -> str:
    needed = f"about {bytes_text(model + activations)} {place}"
    if model + activations <= available:
        return f"this recipe needs {needed}, and {bytes_text(available)} are free: it fits"
    fix = "lower batch.pack, or set run.recompute=true"
    if model > available:
        fix = f"the model alone needs {bytes_text(model)}: train a smaller model, or use a machine with more memory"
    raise TrainingError(f"this recipe needs {needed}, but only {bytes_text(available)} are free: {fix}")
