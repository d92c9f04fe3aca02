"""``protea plan pretrain --profile``: how fast this machine trains, measured by steps of a run on random tokens."""

from __future__ import annotations

import time
from typing import Final

import numpy as np
import torch

from protea.data.loader import Position, TrainingBatch
from protea.device import resolve_device
from protea.models.encoder import Encoder
from protea.packing import CuSeqlens, PackedBatch, PackedRows
from protea.progress import SILENT
from protea.train.loop import train_step
from protea.train.model import architecture, prepare, settle_precision
from protea.train.recipe import Recipe

_SECONDS: Final = 15.0
_MOST_TOKENS: Final = 4_096
"""Tokens of a measured pack, at most: larger ones are about as fast, and take minutes on a CPU."""

_LENGTH: Final = 512
_MASKED: Final = 0.15


def training_rate(recipe: Recipe) -> float:
    """Tokens per second of training in one process, after a first step that is not counted."""
    device = resolve_device(recipe.run.device)
    told = settle_precision(recipe, device)
    trainable = prepare(architecture(told), told, device, SILENT)
    batch = _random_pack(trainable.model, min(recipe.batch.pack, _MOST_TOKENS), recipe.data.max_tokens)

    def step(number: int) -> None:
        result = train_step(trainable, [batch], step=number, rate=1e-5, seed=0, clip=told.optimizer.clip)
        assert result is not None
        result[0].item()  # waits for the device

    step(1)
    done, began = 0, time.perf_counter()
    while not done or time.perf_counter() - began < _SECONDS:
        done += 1
        step(done + 1)
    return done * batch.tokens / (time.perf_counter() - began)


def _random_pack(model: Encoder, tokens: int, longest: int) -> TrainingBatch:
    length = min(_LENGTH, longest, tokens)
    lengths = [length] * (tokens // length)
    draw = np.random.default_rng(0)
    letters = [model.alphabet.tokens.index(letter) for letter in "LAGVSERTIDPKQNFYMHWC"]
    ids = torch.from_numpy(draw.choice(letters, sum(lengths)).astype(np.int64))
    boundaries = CuSeqlens.from_lengths(lengths)
    rows = PackedRows.of(np.flatnonzero(draw.random(len(ids)) < _MASKED), boundaries)
    inputs = PackedBatch(ids.index_fill(0, rows.index, model.alphabet.mask), boundaries)
    return TrainingBatch(inputs, ids, rows, np.arange(len(lengths)), Position(), 0)
