"""What training takes: operations, memory by part, and time on GPUs. ``protea plan`` and ``protea pretrain`` tell it.

Floating-point operations of a token, forward and backward, are three times those of the family's forward pass. Products
that are computed again to save memory do not count.

Bytes: weights, gradients and AdamW's moments in float32 (16 a parameter; Muon's matrices 12; frozen ones 4), copies of
weights and moments in main memory while they are written, weights in the narrow type, and what the family's layers keep
for the backward pass of a pack. Tests compare the sum with PyTorch's ``MemTracker`` for every recipe; it is within a
tenth, compiled or not; in bfloat16 on a CPU without compiled attention PyTorch keeps a quarter more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import torch

from protea.data.sampler import Sampler
from protea.errors import TrainingError
from protea.limits import available_memory
from protea.models.encoder import Encoder
from protea.plan.hardware import PER_NODE, Cluster, gpu_of_device
from protea.plan.rates import Rate, gpu_rate
from protea.text import bytes_text, counted, duration_text
from protea.train.division import Division
from protea.train.model import TYPES, planned_device, settle_precision
from protea.train.optim import is_matrix_of_layer, parameters_to_train
from protea.train.parallel import ALONE, STAGES
from protea.train.recipe import Recipe
from protea.train.step_times import StepTime, step_time

_SAMPLE: Final = 4096
_GATHERED: Final = 3
"""Layers whose weights a process has at a time: the one that computes, the next, and the one before."""

_MASKED: Final = 0.15
"""Share of the tokens that the language-model head is computed for."""


@dataclass(frozen=True)
class Costs:
    """What a run takes: numbers of trained parameters and operations, and bytes of one process."""

    parameters: int
    flops: float  # for a token, forward and backward
    state: int  # weights, gradients and moments
    copies: int  # main memory for saving
    activations: int  # kept for the backward pass
    length: float  # mean of sequences, weighted by tokens
    layers: int  # bytes of the weights of all layers in float32
    layout: Division = ALONE.layout
    parts: Mapping[str, int] = field(default_factory=dict)  # of ``state``

    @property
    def memory(self) -> int:
        """Bytes on the device."""
        return self.state + self.activations

    def lines(self, recipe: Recipe, peak: float | None) -> Iterator[str]:
        """The costs in words; ``peak`` is the devices' operations per second, if they are known."""
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


class RunTime(NamedTuple):
    """The time of a whole run on GPUs, and what it rests on."""

    step: StepTime
    rate: Rate
    seconds: float
    tokens_per_second: float  # of each GPU
    utilisation: float


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
    config, pack = model.config, recipe.batch.pack
    kept = pack * config.activation_bytes(length, mixed=mixed, recompute=run.recompute, on_cpu=on_cpu)
    if not run.recompute and layout.tensor == layout.pipeline == 1:
        kept -= round((1 - _MASKED) * pack * config.chosen_bytes(length, mixed=mixed, on_cpu=on_cpu))
    narrow = 2 * weights if mixed else 0
    parts = {"weights": 4 * weights, "gradients": 4 * count, "moments": moments}
    copies = 4 * weights + moments
    layers = 4 * sum(parameter.numel() for parameter in model.layers.parameters())
    if layout.processes > 1:
        own = layout.tensor * layout.pipeline
        outside = sum(each.numel() for name, each in model.named_parameters() if not name.startswith("layers."))
        few = _GATHERED / len(model.layers)
        gathered = 2 * (layers // own) * (1 if layout.keeps_layers(layers // own) else few)
        if layout.gathers_narrow(model, TYPES[run.precision]):
            gathered *= 3 / 4
            narrow = 0
        # Narrow weights are kept for the backward pass, unless they are made again.
        narrow = round(narrow * (few if run.recompute else 1)) // own
        parts = {name: size // (layout.shard * own) for name, size in parts.items()}
        parts |= {"outside the layers": 16 * outside, "gathered layers": round(gathered)}
        copies //= layout.shard * own
        # The first stage keeps a pack for each stage after it.
        waiting = min(layout.pipeline, max(1, recipe.batch.packs // layout.data))
        kept = kept * waiting // (layout.pipeline * layout.tensor)
    parts |= {"weights in 16 bits": narrow} if narrow else {}
    return Costs(
        parameters=count,
        flops=config.training_flops(length, _MASKED),
        state=sum(parts.values()),
        copies=copies,
        activations=kept,
        length=length,
        layers=layers,
        layout=layout,
        parts=parts,
    )


def run_time(model: Encoder, recipe: Recipe, costs: Costs, cluster: Cluster) -> RunTime:
    """The time of a run on GPUs, in the layout that its costs are of."""
    batch, layout = recipe.batch, costs.layout
    rate = gpu_rate(model.config, cluster.gpu, costs.length, batch.pack)
    # Recomputation is another forward pass.
    rate = rate.times(4 / 3) if recipe.run.recompute else rate
    step = step_time(
        rate,
        model.config,
        layout,
        cluster,
        packs=batch.packs,
        tokens=batch.pack,
        weights=costs.layers,
        narrow=layout.gathers_narrow(model, TYPES[recipe.run.precision]),
        stages=STAGES[recipe.parallel.schedule],
    )
    each = batch.packs * batch.pack / step.total / layout.processes
    return RunTime(step, rate, recipe.run.steps * step.total, each, each * costs.flops / cluster.gpu.flops)


def told_lines(
    model: Encoder, recipe: Recipe, costs: Costs, device: torch.device | None, peak: float | None
) -> Iterator[str]:
    """What a run takes in words, before its first step; ``peak`` is of all processes together."""
    yield from costs.lines(recipe, peak)
    gpu = None
    if device is not None and device.type == "cuda":
        gpu = gpu_of_device(torch.cuda.get_device_name(device))
    if gpu is not None and settle_precision(recipe, device).run.precision != "float32":
        count = costs.layout.processes
        yield time_line(run_time(model, recipe, costs, Cluster(gpu, count, -(-count // PER_NODE))))


def time_line(time: RunTime) -> str:
    """The time of a run in words."""
    return (
        f"about {duration_text(time.seconds)}: {time.tokens_per_second:,.0f} tokens per second and GPU, "
        f"{time.utilisation:.0%} of the peak ({time.rate.label}: {time.rate.source})"
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
