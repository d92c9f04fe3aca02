"""The parts ``lora-SIZE``: tokens per second and peak memory of ``protea finetune --method lora``, without the command.

``protea.finetune.tuning.tune`` trains adapters of rank 8 on query, key, value, attention output and both dense layers,
and a linear head, in bf16-mixed. The labels are random classes of residues: only the work counts. Each way to train is
a row: the tokens of a pack, whether activations are computed twice, and the proteins of an update. The first four have
STEP packs' worth of proteins in an update; the last has the default, 8 proteins, which fill no pack.

Tokens are those of the proteins, BOS and EOS included; packs have no padding. The time is that of whole updates after
the first WARM: packing, copies to the GPU, forward, backward, clipping, AdamW. ``tune`` reads the loss at the end of
every update, which waits for the GPU, so that the clock needs no further synchronisation. ``utilisation`` counts two
forward passes per token: the frozen weights need no gradients. GOAL is what the 650M model shall reach on an H100.

Usage: python benchmarks/gpu/lora.py OUT WORK SIZE [--seconds N] [--dry-run]
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding import ENDS, drawn
from gpu_tests import SKIPPED
from records import append
from sizes import Size, architecture, forward_flops, model_folder, parser_for_a_size, size_named, utilisation, wait_for

import protea
from protea.checkpoints.formats import open_checkpoint
from protea.errors import DeviceError
from protea.finetune.examples import EncodedExamples, prepare
from protea.finetune.heads import HeadConfig
from protea.finetune.tasks import TASKS, Labelled, LabelledExample
from protea.finetune.tuning import TuneSettings, tune
from protea.finetune.updates import Updates
from protea.models.encoder import Encoder
from protea.progress import Progress

GOAL = {"650M": 80_000}
WARM = 2
UPDATES = 24
FEWEST = 3
STEP = 4
"""Packs of ``Size.pack`` tokens in an update."""
FULL = 0.95
"""Share of STEP packs that an update fills on average, so that it seldom needs one more."""
HELD_OUT = 8
CLASSES = 3


@dataclass(frozen=True)
class Way:
    """A way to train: tokens of a pack, whether activations are computed twice, and proteins of an update."""

    pack: int
    recompute: bool
    batch: int


def ways(size: Size, mean: float) -> Iterator[Way]:
    """All ways for a size, the most important first; ``mean`` is the tokens of a protein."""
    many = max(1, int(FULL * STEP * size.pack / mean))
    yield Way(size.pack, recompute=False, batch=many)
    yield Way(size.pack, recompute=True, batch=many)
    yield Way(size.pack // 2, recompute=False, batch=many)
    yield Way(2 * size.pack, recompute=True, batch=many)
    yield Way(size.pack // 2, recompute=False, batch=TuneSettings.batch)


class EnoughError(Exception):
    """There are enough updates: ends ``tune``, which has no limit of time of its own."""


class Watch(Progress):
    """Notes when each update ended, and ends training."""

    def __init__(self, seconds: float) -> None:
        self.ends: list[float] = []
        self.seconds = seconds

    def advance(self, amount: int = 1) -> None:
        """Called by ``tune`` after each update."""
        self.ends.append(time.perf_counter())
        counted = len(self.ends) - WARM
        late = counted > 0 and self.ends[-1] - self.ends[WARM - 1] > self.seconds
        if counted == UPDATES or (late and counted >= FEWEST):
            raise EnoughError


def labelled(folder: Path, found: list[str]) -> EncodedExamples:
    """The proteins with random classes; the last are for validation, which does not take place."""
    rng = np.random.default_rng(0)
    last = len(found) - HELD_OUT
    examples = [
        LabelledExample(f"s{number}", (one,), "train" if number < last else "validation", f"protein {number}")
        for number, one in enumerate(found)
    ]
    targets = [rng.integers(0, CLASSES, len(one)) for one in found]
    with open_checkpoint(folder) as checkpoint:
        return prepare(
            Labelled(TASKS["residue-class"], tuple("HEC"), examples, list(targets)), checkpoint.model, "truncate", []
        )


def train(given: argparse.Namespace, way: Way, data: EncodedExamples) -> tuple[list[int], list[float]]:
    """Train for a while; returns the tokens of each update, and when it ended."""
    folder, watch = model_folder(given.work, given.size), Watch(given.seconds)
    config = architecture(folder)
    head = HeadConfig(kind="linear", task="residue-class", width=config["hidden_size"], outputs=CLASSES)
    settings = TuneSettings(
        method="lora",
        rank=8,
        batch=way.batch,
        steps=1_000_000,
        validations=1,  # at the end of an epoch, which does not come
        token_budget=way.pack,
        precision=given.precision,
        recompute=way.recompute,
    )

    def load() -> Encoder:
        return protea.load(folder, device=given.device, trainable=True).module

    with tempfile.TemporaryDirectory(dir=given.work) as work, suppress(EnoughError):
        tune(load, data, head, settings, Path(work), identity={}, seed=0, progress=watch)
    places = data.places("train")
    updates = Updates(len(places), way.batch, settings.steps or 0, settings.validations, settings.apart, 0)
    groups = [places[updates[step]] for step in range(1, len(watch.ends) + 1)]
    return [sum(data.sequences[data.which[place, 0]].tokens for place in group) for group in groups], watch.ends


def measure(given: argparse.Namespace, way: Way, found: list[str]) -> bool:
    """Measure one way to train and add its row, with the reason if there are no numbers; returns whether there are."""
    chosen = found[: way.batch * (WARM + UPDATES + 1) + HELD_OUT]
    data = labelled(model_folder(given.work, given.size), chosen)
    if not given.dry_run:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    reason, began = None, time.perf_counter()
    tokens: list[int] = []
    ends: list[float] = []
    try:
        tokens, ends = train(given, way, data)
    except DeviceError as error:
        reason = str(error)
    values: dict[str, Any] = dict.fromkeys(
        ("tokens_per_second", "goal", "utilisation", "updates", "update_tokens", "slowest_update", "seconds_to_first")
    )
    if reason is None:
        rate = sum(tokens[WARM:]) / (ends[-1] - ends[WARM - 1])
        lengths = [len(one) + ENDS for one in chosen]
        flops = 2 * rate * forward_flops(architecture(model_folder(given.work, given.size)), lengths)
        name = None if given.dry_run else torch.cuda.get_device_name()
        values |= {
            "tokens_per_second": rate,
            "utilisation": utilisation(flops, given.precision, name),
            "updates": len(tokens) - WARM,
            "update_tokens": sum(tokens[WARM:]) / (len(tokens) - WARM),
            "slowest_update": max(np.diff(ends[WARM - 1 :]).tolist()),
            "seconds_to_first": ends[0] - began,
        }
    append(
        given.out,
        f"lora-{given.size}",
        "lora",
        size=given.size,
        precision=given.precision,
        pack=way.pack,
        recomputed=way.recompute,
        batch=way.batch,
        **values | {"goal": GOAL.get(given.size)},
        peak_memory=None if given.dry_run else torch.cuda.max_memory_allocated(),
        reason=reason,
    )
    return reason is None


def main() -> None:
    parser = parser_for_a_size(__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="most seconds of counted updates for a row")
    given = parser.parse_args()
    try:
        import peft  # noqa: F401
    except ImportError as error:
        print(f"peft cannot be imported: carry it and what it needs in WHEELS ({error})")
        sys.exit(SKIPPED)
    size = size_named(given.size, dry=given.dry_run)
    given.device, given.precision = ("cpu", "float32") if given.dry_run else ("cuda", "bf16-mixed")
    if given.dry_run:
        given.seconds = 0.0
    wait_for(model_folder(given.work, given.size), given.work)
    sample = drawn(size, 1000)
    mean = sum(len(one) + ENDS for one in sample) / len(sample)
    planned = list(ways(size, mean))[: 2 if given.dry_run else None]
    found = drawn(size, max(way.batch for way in planned) * (WARM + UPDATES + 1) + HELD_OUT)
    measured = [measure(given, way, found) for way in planned]
    if not any(measured):
        print("no way to train gave numbers: see the reasons in results.jsonl")
        sys.exit(1)


if __name__ == "__main__":
    main()
