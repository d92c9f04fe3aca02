"""Small models and packs that tests compute in one process and in several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conftest import CONFIGS, disturb
from protea.data.loader import Position, TrainingBatch
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.packing import PackedRows, pack
from protea.train.objective import masked_loss
from protea.train.world import World

SIZE = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = 48


def small(family: str, *, layers: int = 4, dropout: float = 0.0) -> Encoder:
    """A model in training mode, the same in every process, whose biases and norms are not 0 and 1."""
    changes: dict[str, Any] = SIZE | dict.fromkeys(NO_DROPOUT, dropout) | {"num_hidden_layers": layers}
    model = build(replace(CONFIGS[family], **changes))
    model.contact_head = None
    state = {name: initial_value(model, name, 5) * 4 for name, _ in model.named_parameters()}
    model.load_state_dict(state | model.stored_buffers, assign=True)
    model.requires_grad_()
    disturb(model)
    return model.train()


def packs(model: Encoder, number: int, tokens: int = TOKENS) -> list[TrainingBatch]:
    """Packs of one size with sequences of several lengths and unequal numbers of masked tokens."""
    rng = np.random.default_rng(2)
    made = []
    for index in range(number):
        lengths = [7, 7, 11 + index % 3]
        lengths.append(tokens - sum(lengths))
        targets = [rng.integers(4, 24, length) for length in lengths]
        rows = np.sort(rng.choice(tokens, 4 + 3 * (index % 3), replace=False))
        inputs = pack(targets)
        whole = inputs.input_ids.clone()
        inputs.input_ids[rows[1:]] = model.alphabet.mask
        made.append(TrainingBatch(inputs, whole, PackedRows.of(rows, inputs.cu_seqlens), np.arange(4), Position(), 0))
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradients, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return found


def alone(
    model: Encoder, batches: Sequence[TrainingBatch], seeds: Sequence[int] | None = None, *, keep: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one process, and its gradients, which stay in the model with ``keep``."""
    total = torch.zeros(())
    masked = sum(len(batch.rows) for batch in batches)
    for number, batch in enumerate(batches):
        if seeds is not None:
            torch.manual_seed(seeds[number])
        share = masked_loss(model, model(batch.inputs, rows=batch.wanted), batch) / masked
        share.backward()
        total += share.detach()
    found = gradients(model)
    if not keep:
        model.zero_grad()
    return total, found


def sum_shared(world: World, model: nn.Module, tensor: int = 1) -> None:
    """Add up the gradients of what is not in layers. Some stages have none, and ranks that divide layers the same."""
    for name, parameter in model.named_parameters():
        if not name.startswith("layers."):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = world.sum(gradient) / tensor


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Assert that tensors differ by at most a share of the largest value of each."""
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        # Without rotary positions the gradient of a key's bias is 0 but for rounding: softmax ignores what it adds.
        size = expected[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        difference = (tensor - expected[name]).abs().max() / size
        assert difference <= tolerance, f"{name} differs by {difference:.2g}"


def sum_partial_gradients(model: nn.Module) -> None:
    """Add up, over the ranks, gradients of which each rank has the part of its rows: those of the norms.

    In training FSDP2 does this with the gradients that it reduces.
    """
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            parameter.grad = gradient.redistribute(placements=parameter.placements)
