"""The models that are measured, how much each is given to do, and what their arithmetic is.

FLOP a token, forwards, are those of the layers and of attention: 2 · layers · (4·D² + 2·D·F) + 4 · layers · L · D, with
D the width, F the feed-forward width and L the mean over tokens of the length of the sequence that each is in. The peak
is NVIDIA's for H100 and H200, the SXM boards: 989 TFLOP/s in bfloat16, 67 in float32.
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

PEAK_FLOPS = {"bfloat16": 989e12, "float32": 67e12}
HOPPER = ("H100", "H200")
DONE = "prepare.done"


@dataclass(frozen=True)
class Size:
    """A model and its share of the work.

    Attributes:
        name: a published name, which ``protea init`` takes.
        embedded: sequences to embed in bfloat16.
        exact: sequences to embed in float32, which is several times slower.
        pack: tokens a training step computes at a time.
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
"""A dry run uses this size in place of the one that is named, and only the first layer of the model."""


def parser_for_a_size(description: str | None) -> argparse.ArgumentParser:
    """What every part that measures one size is told: where results go, where its files are, which size."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("size")
    parser.add_argument("--dry-run", action="store_true")
    return parser


def size_named(name: str, *, dry: bool) -> Size:
    """A size by its name.

    Raises:
        SystemExit: there is none of that name.
    """
    if name not in SIZES:
        raise SystemExit(f"no size {name!r}; there are {', '.join(SIZES)}")
    return TOY if dry else SIZES[name]


def architecture(folder: Path) -> dict[str, Any]:
    """The numbers of a model's ``config.json``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def forward_flops(config: Mapping[str, Any], lengths: Sequence[int]) -> float:
    """FLOP a token, forwards, of sequences of so many tokens each."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    matrices = layers * (4 * width**2 + 2 * width * config["intermediate_size"])
    met = sum(length**2 for length in lengths) / sum(lengths)
    return float(2 * matrices + 4 * layers * met * width)


def training_memory(config: Mapping[str, Any], pack: int) -> float:
    """Bytes of GPU memory that mixed-precision training takes, about, if nothing is computed twice.

    18 a parameter for weights, gradients, AdamW's moments and narrow copies; what each layer keeps of a token for the
    backward pass; and some room.
    """
    width, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    parameters = layers * (4 * width**2 + 2 * width * inner)
    return float(18 * parameters + pack * layers * (26 * width + 4 * inner) + 3e9)


def utilisation(flops: float, dtype: str, device: str | None) -> float | None:
    """FLOP a second as a share of the device's peak, where that is known."""
    if device is None or not any(name in device for name in HOPPER):
        return None
    return flops / PEAK_FLOPS[dtype]


def wait_for(path: Path, work: Path) -> Path:
    """Wait until the preparing part, which runs beside the others, made something; the caller is stopped in time.

    Raises:
        SystemExit: that part ended and did not make it.
    """
    while not path.exists():
        if (work / DONE).exists() and not path.exists():
            raise SystemExit(f"{path.name} was not made: see the log of the part prepare")
        time.sleep(0.2)
    return path


def model_folder(work: Path, size: str) -> Path:
    """Where the preparing part puts a model."""
    return work / "models" / size


def store_folder(work: Path) -> Path:
    """Where the preparing part puts the training data."""
    return work / "store"


def visible_memory() -> float | None:
    """Bytes of the first GPU's memory by the driver's own tool, which does not take any of them."""
    told = os.popen("nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null").read().split()
    return float(told[0]) * 2**20 if told else None
