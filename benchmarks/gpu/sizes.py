"""The models to measure, the amount of work for each, and their arithmetic.

The forward FLOP per token count the layers and attention: 2 · layers · (4·D² + 2·D·F) + 4 · layers · L · D, with D the
width, F the feed-forward width and L the length of a token's sequence, averaged over tokens. The peak is NVIDIA's for
the SXM boards of H100 and H200: 989 TFLOP/s in bfloat16, 67 in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEAK_FLOPS = {"bf16-mixed": 989e12, "bfloat16": 989e12, "float32": 67e12}
HOPPER = ("H100", "H200")
DONE = "prepare.done"


@dataclass(frozen=True)
class Size:
    """A model and the amount of work to measure it with.

    Attributes:
        name: a published name, which ``protea init`` takes.
        embedded: sequences to embed in bfloat16.
        exact: sequences to embed in float32, which is several times slower.
        pack: tokens that a training step computes at a time.
        step: tokens of a training step.
        every: training steps between two lines of metrics.
    """

    name: str
    embedded: int
    exact: int
    pack: int
    step: int
    every: int


SIZES = {
    "8M": Size("esm2_t6_8M_UR50D", 20_000, 10_000, 32_768, 131_072, 10),
    "150M": Size("esm2_t30_150M_UR50D", 10_000, 2_000, 32_768, 131_072, 5),
    "650M": Size("esm2_t33_650M_UR50D", 5_000, 800, 16_384, 131_072, 2),
    "3B": Size("esm2_t36_3B_UR50D", 800, 100, 16_384, 65_536, 1),
}
TOY = Size("esm2_t6_8M_UR50D", 8, 6, 256, 256, 1)
"""A dry run uses this size instead of the named one, and only the first layer of the model."""


def parser_for_a_size(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a part that measures one size: the folders of results and of files, and the size."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("size")
    parser.add_argument("--dry-run", action="store_true")
    return parser


def size_named(name: str, *, dry: bool) -> Size:
    """Return a size by its name.

    Raises:
        SystemExit: there is no size of that name.
    """
    if name not in SIZES:
        raise SystemExit(f"no size {name!r}; there are {', '.join(SIZES)}")
    return TOY if dry else SIZES[name]


def architecture(folder: Path) -> dict[str, Any]:
    """Read the numbers of a model's ``config.json``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def forward_flops(config: Mapping[str, Any], lengths: Sequence[int]) -> float:
    """Return the forward FLOP per token for sequences of the given lengths in tokens."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    matrices = layers * (4 * width**2 + 2 * width * config["intermediate_size"])
    met = sum(length**2 for length in lengths) / sum(lengths)
    return float(2 * matrices + 4 * layers * met * width)


def training_memory(config: Mapping[str, Any], pack: int) -> float:
    """Estimate the bytes of GPU memory for mixed-precision training without recomputed activations.

    The sum of 18 bytes per parameter for weights, gradients, AdamW's moments and half-precision copies; the activations
    that each layer keeps for the backward pass; and a reserve.
    """
    width, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    parameters = layers * (4 * width**2 + 2 * width * inner)
    return float(18 * parameters + pack * layers * (26 * width + 4 * inner) + 3e9)


def utilisation(flops: float, dtype: str, device: str | None) -> float | None:
    """Return FLOP per second as a fraction of the device's peak, or ``None`` if the peak is not known."""
    if device is None or not any(name in device for name in HOPPER):
        return None
    return flops / PEAK_FLOPS[dtype]


def wait_for(path: Path, work: Path) -> Path:
    """Wait until the part ``prepare``, which runs at the same time, made a path; the caller's time limit applies.

    Raises:
        SystemExit: ``prepare`` ended without making the path.
    """
    while not path.exists():
        if (work / DONE).exists() and not path.exists():
            raise SystemExit(f"{path.name} was not made: see the log of the part prepare")
        time.sleep(0.2)
    return path


def model_folder(work: Path, size: str) -> Path:
    """Return the folder in which ``prepare`` puts a model."""
    return work / "models" / size


def store_folder(work: Path) -> Path:
    """Return the folder in which ``prepare`` puts the training data."""
    return work / "store"


def visible_memory() -> float | None:
    """Return the bytes of the first GPU's memory, from the driver's own tool, which uses none of that memory."""
    told = os.popen("nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null").read().split()
    return float(told[0]) * 2**20 if told else None
