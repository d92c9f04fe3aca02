"""Hidden states of labelled sequences, computed once, kept on disk, and read by heads and baselines.

Each distinct sequence is computed once. The vectors lie one after the other in one file of float32; a killed run
continues from what is written. Packs depend on the sequences alone, so that a continued run has the same bits.

Shapes: S sequences, X rows (residues, or one vector a sequence), N layers, D model width.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.embed import embeddings
from protea.embed.embeddings import Asked
from protea.embed.prepare import EncodedRecord
from protea.errors import ResumeError
from protea.finetune.heads import RESIDUES
from protea.finetune.tasks import Ints
from protea.infer.runner import Runner, default_budget
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.output import check_space, write_durably
from protea.packing import pack_by_budget
from protea.progress import SILENT, Progress
from protea.transforms.cpu import pack_for_cpu

_COMMIT_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Features:
    """Hidden states ``[X, N, D]`` float32 of sequences; rows of sequence i are ``offsets[i]:offsets[i + 1]``."""

    values: NDArray[np.float32]
    offsets: Ints
    layers: tuple[int, ...]

    def rows(self, sequences: Ints) -> Ints:
        """``[X']``: the rows of some sequences, one sequence after the other."""
        if len(self.offsets) == len(self.values) + 1:
            return sequences
        return np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in sequences] or [sequences])

    def of(self, sequences: Ints, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Hidden states ``[X', D]`` of some sequences and their lengths ``[n]``; ``layer`` counts among ``layers``."""
        if len(self.offsets) == len(self.values) + 1:
            x = self.values[sequences, layer]
        else:
            x = np.concatenate([self.values[self.offsets[i] : self.offsets[i + 1], layer] for i in sequences])
        return torch.from_numpy(x), torch.from_numpy(np.diff(self.offsets)[sequences])


def compute(
    folder: Path,
    model: Encoder,
    sequences: Sequence[EncodedRecord],
    *,
    reads: str,
    layers: tuple[int, ...],
    identity: dict[str, Any],
    title: str = "embedding",
    token_budget: int | None = None,
    progress: Progress = SILENT,
) -> Features:
    """Features of ``sequences`` in a folder, which may hold a part of them, or all, from an earlier run.

    Args:
        folder: receives ``values.f32`` and ``done.json``.
        model: the encoder.
        sequences: distinct sequences.
        reads: ``RESIDUES`` or a pooling.
        layers: from ``resolve_layers``.
        identity: what the numbers depend on beside the sequences; a folder of another identity is an error.
        title: what the progress bar says.
        token_budget: tokens of a pack.
        progress: counts residues.
    """
    lengths = np.array([len(record.ids) if reads == RESIDUES else 1 for record in sequences], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    width = len(layers) * model.config.hidden_size
    folder.mkdir(parents=True, exist_ok=True)
    values, note = folder / "values.f32", folder / "done.json"
    done, budget = _done(note, identity)
    budget = token_budget or budget or default_budget(model)
    packs = list(pack_by_budget(sequences, lambda record: record.tokens, budget))
    residues = [len(record.ids) for record in sequences]
    progress.begin(title, sum(residues), done=sum(residues[:done]))
    check_space({values: int(offsets[-1] - offsets[done]) * width * 4}, "free some, or write elsewhere")
    runner: Runner = Runner(model, budget)
    asked = Asked(layers=layers, poolings=() if reads == RESIDUES else (reads,), residues=reads == RESIDUES)
    with values.open("ab") as stream:
        if stream.tell() < (written := int(offsets[done]) * width * 4):
            raise ResumeError(
                f"{values}: is damaged: {stream.tell():,} of {written:,} bytes; pass --overwrite to start again"
            )
        stream.truncate(written)
        saved = time.monotonic()
        start = 0
        for group in packs:
            first, start = start, start + len(group)
            if start <= done:
                continue
            assert first >= done, "commits end with a pack"
            for embedding in embeddings.embed(runner, group, asked):
                array = embedding.residues if reads == RESIDUES else embedding.pooled[reads][:, None]
                assert array is not None
                stream.write(np.ascontiguousarray(array.swapaxes(0, 1)).data)
            progress.advance(sum(residues[first:start]))
            if time.monotonic() - saved > _COMMIT_SECONDS or start == len(sequences):
                stream.flush()
                os.fsync(stream.fileno())
                write_durably(note, json.dumps({"done": start, "budget": budget, "identity": identity}))
                saved = time.monotonic()
    shape = (int(offsets[-1]), len(layers), model.config.hidden_size)
    stored = np.memmap(values, np.float32, "r", shape=shape) if shape[0] else np.empty(shape, np.float32)
    return Features(stored, offsets, layers)


def _done(note: Path, identity: dict[str, Any]) -> tuple[int, int | None]:
    """How many sequences a folder holds, and the token budget of their packs."""
    try:
        stored = json.loads(note.read_text())
        done, budget, of = int(stored["done"]), int(stored["budget"]), stored["identity"]
    except FileNotFoundError:
        return 0, None
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{note}: is damaged ({error}); pass --overwrite to start again") from error
    if of != identity:
        raise ResumeError(f"{note.parent}: was computed with other settings; pass --overwrite to start again")
    return done, budget


def random_twin(model: Encoder, seed: int) -> Encoder:
    """An encoder of the same architecture with the published random initialisation, on the same device."""
    twin = build(model.config)
    twin.contact_head = twin.lm_head = None
    state = {name: initial_value(twin, name, seed).to(model.device) for name, _ in twin.named_parameters()}
    state |= {name: buffer.to(model.device) for name, buffer in twin.stored_buffers.items()}
    twin.load_state_dict(state, assign=True)
    pack_for_cpu(twin)
    return twin
