"""Small training runs: a store of random sequences, recipes of small models, and their parts put together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conftest import SMALL
from protea.data.loader import Loader, Packing, TrainingBatch
from protea.data.sampler import Sampler
from protea.data.training_store import TrainingStore
from protea.models.encoder import Encoder
from protea.settings_errors import validate
from protea.train.loop import train_step
from protea.train.metrics import TrainingProgress
from protea.train.model import Trainable, architecture, prepare
from protea.train.recipe import Recipe
from trials import LETTERS, build_store

CPU = torch.device("cpu")
ARCHITECTURES = {
    "esm2": "esm2_t6_8M_UR50D",
    "esm2nv": "esm2nv_650M",
    "esm1b": "esm1b_t33_650M_UR50S",
    "esm1nv": "esm1nv",
}


def make_store(
    folder: Path, *, sequences: int = 120, low: int = 10, high: int = 70, valid: int = 0, alphabet: str = "esm"
) -> Path:
    """A store of random sequences, each a cluster of its own."""
    rng = random.Random(3)
    letters = ["".join(rng.choices(LETTERS, k=rng.randint(low, high))) for _ in range(sequences)]
    folder.mkdir(exist_ok=True)
    fasta = folder / "in.fasta"
    fasta.write_text("".join(f">r{number}\n{each}\n" for number, each in enumerate(letters)))
    return build_store(fasta, alphabet=alphabet, valid=str(valid))


def recipe(family: str = "esm2", *, model: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe of a small model without dropout, float32 on the CPU, a few steps of two small packs."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    defaults: dict[str, dict[str, Any]] = {
        "model": {"architecture": ARCHITECTURES[family], **SMALL, **none},
        "data": {"max_tokens": 64},
        "batch": {"tokens": 512, "pack": 256},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "constant", "warmup": 1},
        "run": {"steps": 4, "precision": "float32", "device": "cpu", "seed": 3},
        "validation": {"every": None},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }
    values = {name: known | sections.pop(name, {}) for name, known in defaults.items()}
    values["model"] |= model or {}
    if "init" in sections:
        values["model"] = {}
    return validate(Recipe, values | sections, "test")


def trained(recipe: Recipe, model: Encoder | None = None) -> Trainable:
    """What ``pretrain`` makes of a recipe, or of a model without weights by its settings, before the first step."""
    return prepare(model or architecture(recipe), recipe, CPU, TrainingProgress())


def take_step(
    ours: Trainable, recipe: Recipe, packs: Sequence[TrainingBatch], step: int, rate: float
) -> tuple[float, float]:
    """The loss and the gradient's norm of one update."""
    result = train_step(ours, packs, step=step, rate=rate, seed=recipe.run.seed, clip=recipe.optimizer.clip)
    assert result is not None
    return result[0].item(), result[1].item()


def loader(recipe: Recipe, store: TrainingStore, *, block: int = 1 << 15) -> Loader:
    """The batches of a recipe; small blocks make packs of unequal sizes."""
    data = recipe.data
    sampler = Sampler(store.split("train"), seed=recipe.run.seed, max_tokens=data.max_tokens, crop=data.crop)
    packing = Packing(tokens=recipe.batch.pack, block=block)
    return Loader(sampler, masking=data.masking, packing=packing, workers=0)
