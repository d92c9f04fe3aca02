"""Fifty steps beside plain PyTorch: the same masked batches, weights and rates, the loss of every step compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import loader, make_store, recipe, take_step, trained
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import disturb
from protea.checkpoints import hf
from protea.data.loader import TrainingBatch
from protea.data.training_store import TrainingStore
from protea.models.encoder import Encoder
from protea.train.optim import learning_rate
from references import PlainESM1nv, load_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, TOLERANCE = 50, 1e-4
# Gradients are clipped at every step, and decay is strong enough for its absence to show.
RATE, WARMUP, CLIP, DECAY = 2e-3, 10, 0.3, 0.5

Forward = Callable[[Tensor, Tensor], Tensor]
"""Padded ids ``[B, L]`` and which of them are tokens, to logits of the alphabet's tokens."""


def padded(batch: TrainingBatch, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and labels ``[B, L]``, -100 where nothing is to be predicted, and which places are tokens."""
    labels = torch.full_like(batch.targets, -100)
    labels[batch.rows] = batch.targets[batch.rows]
    lengths = batch.inputs.cu_seqlens.lengths.tolist()
    ids, labels = (
        nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True, padding_value=fill)
        for flat, fill in ((batch.inputs.input_ids, pad), (labels, -100))
    )
    return ids, labels, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]


class Plain:
    """A training step as textbooks have it."""

    def __init__(self, model: nn.Module, forward: Forward, pad: int) -> None:
        self.model, self.forward, self.pad = model.train(), forward, pad
        parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": DECAY},
                {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            eps=1e-8,
            foreach=False,
            fused=False,
        )

    def step(self, packs: list[TrainingBatch], rate: float) -> tuple[float, float, float]:
        """The loss of all packs, the norm of its gradient, and the mean of the packs' means."""
        masked = sum(len(pack.rows) for pack in packs)
        self.optimizer.zero_grad()
        sums, means = 0.0, 0.0
        for pack in packs:
            ids, labels, tokens = padded(pack, self.pad)
            total = F.cross_entropy(self.forward(ids, tokens).flatten(0, 1), labels.flatten(), reduction="sum")
            (total / masked).backward()
            sums += total.item()
            means += total.item() / len(pack.rows)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return sums / masked, norm.item(), means / len(packs)


def of_transformers(model: Encoder, folder: Path) -> Plain:
    hf.save(model, folder)
    theirs = load_transformers(folder)
    return Plain(theirs, lambda ids, tokens: theirs(ids, attention_mask=tokens.long()).logits[..., :33], pad=1)


def plain_esm1nv(model: Encoder, folder: Path) -> Plain:
    theirs = PlainESM1nv(model.config).take(model)
    return Plain(theirs, lambda ids, tokens: theirs(ids, ~tokens)[1][..., :30], pad=3)


@pytest.mark.parametrize(
    ("family", "masking", "reference"),
    [
        ("esm2", "standard", of_transformers),
        ("esm2nv", "bionemo2", of_transformers),
        ("esm1b", "standard", of_transformers),
        ("esm1nv", "bionemo1-esm1nv", plain_esm1nv),
    ],
)
def test_losses(family: str, masking: str, reference: Callable[[Encoder, Path], Plain], tmp_path: Path) -> None:
    told = recipe(
        family,
        data={"masking": masking},
        optimizer={"lr": RATE, "clip": CLIP, "weight_decay": DECAY},
        schedule={"warmup": WARMUP},
        run={"steps": STEPS},
    )
    ours = trained(told)
    disturb(ours.model)
    plain = reference(ours.model, tmp_path / "model")
    alphabet = "esm-1nv" if family == "esm1nv" else "esm"
    store = TrainingStore(make_store(tmp_path / "data", alphabet=alphabet), ours.model.alphabet)
    batches = loader(told, store, block=10).batches()
    off = 0.0
    for step in range(1, STEPS + 1):
        packs = [next(batches) for _ in range(2)]
        rate = learning_rate(told.schedule, step, highest=RATE, steps=STEPS)
        found = take_step(ours, told, packs, step, rate)
        loss, norm, mean_of_means = plain.step(packs, RATE * min(1, step / WARMUP))
        assert found[0] == pytest.approx(loss, rel=TOLERANCE), step
        assert found[1] == pytest.approx(norm, rel=10 * TOLERANCE), step
        assert norm > CLIP
        off = max(off, abs(mean_of_means / loss - 1))
    # Packs are so unequal that a mean of their means would have been noticed.
    assert off > 10 * TOLERANCE
