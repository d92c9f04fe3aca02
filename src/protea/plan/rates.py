"""How fast GPUs and CPUs compute a model, from published and measured rates.

A token of a training step takes

    F x / P + c V / B    seconds,

F its floating-point operations, P the GPU's peak, x what one operation takes of it, V the numbers that a forward pass
holds for it, B the GPU's bandwidth, and c bytes. x is fitted for each GPU that has published rates and c for all of
them together, by least squares of relative errors. A pack of T tokens also has to be launched, which takes ``_LAUNCH``
seconds a layer, mostly at the same time: both add up as the sides of a right angle do. Step times of BioNeMo 2 at
micro-batches of 1 to 46 sequences follow this within 5 %.

Labels say what a figure rests on: ``measured`` is a rate of this GPU, this model and packs of this size, published or
measured here; ``calibrated`` is the curve of this GPU, from other models or packs; ``interpolated`` is a GPU without
rates, from its data sheet and the mean of the others, or more cores than were measured.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final, NamedTuple

import numpy as np

from protea.checkpoints.hub import published
from protea.models.family import EncoderConfig
from protea.plan.hardware import GPUS, Gpu

_LAUNCH: Final = 0.199 / 33
"""Seconds that launching a layer's operations takes, forward and backward: BioNeMo 2, one sequence on an A100."""

_PER_DOUBLING: Final = 0.0066
"""Loss of time with each doubling of the number of machines: BioNeMo 2, 3B, 8 to 256 A100."""

_NEAR: Final = 1.25
"""Packs of other sizes up to this factor count as those that were measured."""

_PREDICTED: Final = 0.15
"""Share of the tokens of the published runs that the head predicted."""

MEASURED: Final = "measured"
CALIBRATED: Final = "calibrated"
INTERPOLATED: Final = "interpolated"


class PublishedRate(NamedTuple):
    """A published rate; ``rate`` is in tokens per second and GPU."""

    system: str
    model: str
    gpu: str
    gpus: int
    sequences: int
    length: int
    rate: float
    use: str

    @property
    def config(self) -> EncoderConfig:
        """The model's configuration."""
        return published(self.model).config

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequences * self.length

    @property
    def seconds(self) -> float:
        """Time of a micro-batch, without what many machines lose."""
        return self.tokens / self.rate / scaling_loss(-(-self.gpus // 8))


@dataclass(frozen=True)
class Rate:
    """How long a pack takes: ``token`` seconds for each token, and ``launch`` for the pack, which overlap."""

    token: float
    launch: float
    label: str
    source: str

    def seconds(self, tokens: float, *, parts: int = 1, stages: int = 1) -> float:
        """Time of a pack on one of ``stages`` stages, whose matrices are divided into ``parts``."""
        return math.hypot(self.token * tokens / (parts * stages), self.launch / stages)

    def times(self, factor: float) -> Rate:
        """The rate of other work, which takes ``factor`` times as long; it is not measured."""
        label = CALIBRATED if self.label == MEASURED else self.label
        return Rate(self.token * factor, self.launch * factor, label, self.source)


class Curve(NamedTuple):
    """The fit: time of an operation in units of the peak's, by GPU; bytes for each number that a forward pass holds."""

    slowness: dict[str, float]
    traffic: float

    def token(self, config: EncoderConfig, gpu: Gpu, length: float) -> float:
        """Seconds for each token of a training step."""
        slow = self.slowness.get(gpu.name, math.fsum(self.slowness.values()) / len(self.slowness))
        flops = 3 * config.forward_flops(length, _PREDICTED)
        values = config.num_hidden_layers * config.inference_values
        return slow * flops / gpu.flops + self.traffic * values / gpu.bandwidth

    def rate(self, row: PublishedRate) -> float:
        """Tokens per second and GPU that the curve gives for a published run."""
        token = self.token(row.config, GPUS[row.gpu], row.length)
        seconds = math.hypot(token * row.tokens, launching(row.config))
        return row.tokens / seconds / scaling_loss(-(-row.gpus // 8))


def launching(config: EncoderConfig) -> float:
    """Seconds that launching the operations of a pack takes, forward and backward."""
    return _LAUNCH * config.num_hidden_layers


def scaling_loss(nodes: int) -> float:
    """What a step on several machines takes, in units of one on a single machine, beside exposed traffic."""
    return 1 + _PER_DOUBLING * math.log2(max(1, nodes))


@cache
def published_rates() -> tuple[PublishedRate, ...]:
    """All published rates, in the order of the file."""
    text = files("protea.plan").joinpath("published.tsv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        PublishedRate(
            **{
                name: (float(value) if name == "rate" else int(value) if value.isdecimal() else value)  # type: ignore[arg-type]
                for name, value in row.items()
            }
        )
        for row in csv.DictReader(lines, delimiter="\t")
    )


@cache
def fitted_curve(without: str | None = None) -> Curve:
    """The curve through the fitted rates, or through those of other GPUs than one."""
    rows = [row for row in published_rates() if row.use == "fitted" and row.gpu != without]
    names = list(dict.fromkeys(row.gpu for row in rows))
    matrix = np.zeros((len(rows), len(names) + 1))
    for place, row in enumerate(rows):
        gpu = GPUS[row.gpu]
        computing = math.sqrt(row.seconds**2 - launching(row.config) ** 2) / row.tokens
        matrix[place, names.index(row.gpu)] = (
            3 * row.config.forward_flops(row.length, _PREDICTED) / gpu.flops / computing
        )
        matrix[place, -1] = row.config.num_hidden_layers * row.config.inference_values / gpu.bandwidth / computing
    solved = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)[0].tolist()
    return Curve(dict(zip(names, solved, strict=False)), solved[-1])


def gpu_rate(config: EncoderConfig, gpu: Gpu, length: float, tokens: float) -> Rate:
    """The rate of training steps with packs of ``tokens`` on a GPU. Those of published runs are met exactly.

    It is ``measured`` if a published run had this model, this GPU and packs of about this size.
    """
    curve = fitted_curve()
    token, launch = curve.token(config, gpu, length), launching(config)
    for row in published_rates():
        same = [getattr(row.config, name) == getattr(config, name) for name in ("num_hidden_layers", "hidden_size")]
        if row.use == "fitted" and gpu == GPUS[row.gpu] and all(same):
            computing = math.sqrt(row.seconds**2 - launch**2) / row.tokens
            factor = computing / curve.token(row.config, gpu, row.length)
            near = row.tokens / _NEAR <= tokens <= row.tokens * _NEAR
            packs = "" if near else f", with packs of {row.tokens:,} tokens"
            source = f"{row.system} on {row.gpus} {row.gpu}, published{packs}"
            return Rate(token * factor, launch, MEASURED if near else CALIBRATED, source)
    if gpu.name in curve.slowness and gpu == GPUS[gpu.name]:
        return Rate(token, launch, CALIBRATED, f"BioNeMo 2's published rates of other models on the {gpu.name}")
    names = " and ".join(curve.slowness)
    return Rate(
        token, launch, INTERPOLATED, f"the {gpu.name}'s data sheet, and the mean share of it that {names} reach"
    )


class CpuRow(NamedTuple):
    """Residues per second that Protea embedded, file to file, and on how many cores of which processor."""

    layers: int
    width: int
    float32: float
    fast: float


CPU: Final = "AMD EPYC (Zen 4)"
_CPU_CORES: Final = 2
_CPU_LENGTH: Final = 345
_CPU_ROWS: Final = (CpuRow(6, 320, 6033, 7842), CpuRow(30, 640, 443, 725), CpuRow(33, 1280, 127, 250))
"""``benchmarks/results/amd-epyc-zen4-2-cores.md``."""


def cpu_rate(config: EncoderConfig, cores: int, length: float, *, fast: bool) -> Rate:
    """The rate of forward passes on many cores: operations per second of a core, by the width of the model."""
    widths, reached = [], []
    for row in _CPU_ROWS:
        flops = row.layers * (24 * row.width**2 + 4 * _CPU_LENGTH * row.width)
        widths.append(math.log(row.width))
        reached.append(math.log((row.fast if fast else row.float32) * flops / _CPU_CORES))
    a_core = math.exp(float(np.interp(math.log(config.hidden_size), widths, reached)))
    token = config.forward_flops(length, 0.0) / (a_core * cores)
    return Rate(token, 0.0, INTERPOLATED, f"Protea on {_CPU_CORES} cores of an {CPU}, times {cores / _CPU_CORES:g}")


def errors() -> list[tuple[PublishedRate, float, float | None]]:
    """Each published rate with the relative error of the curve, and of the curve without rates of that GPU."""
    found: list[tuple[PublishedRate, float, float | None]] = []
    for row in published_rates():
        fitted = fitted_curve().rate(row) / row.rate - 1
        without = fitted_curve(row.gpu).rate(row) / row.rate - 1 if row.gpu in fitted_curve().slowness else None
        found.append((row, fitted, without))
    return found
