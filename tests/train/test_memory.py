"""Our estimate of the memory of a training step against PyTorch's own tracker, which allocates nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from protea.models import attention
from protea.models.carp import CARPConfig
from protea.packing import CuSeqlens, PackedBatch, PackedRows
from protea.train.estimate import estimate
from protea.train.model import architecture
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.recipe import read_recipe, recipe_names
from protea.transforms.training import recompute_layers
from trials import mostly_long

FEW_LAYERS = "model.num_hidden_layers=6"
TWICE = 2  # packs, and steps: moments and gradients exist while the last pack is computed


def tracked(name: str, changes: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Bytes that PyTorch counts at the peak of a step, and ours, for a recipe on GPUs in bfloat16."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    told = read_recipe(name, ["run.device=cuda", "run.precision=bf16-mixed", *changes])
    model = architecture(told)
    model.contact_head = None  # frozen, which the tracker cannot have
    length, count = told.data.max_tokens, told.batch.pack // told.data.max_tokens
    tokens = length * count
    boundaries = CuSeqlens.from_lengths([length] * count)
    rows = PackedRows.of(np.arange(0, tokens, 7), boundaries)
    if isinstance(model.config, CARPConfig):
        # Which rows its convolutions read depends on values, which fake tensors lack.
        context = model.context(PackedBatch(torch.full((tokens,), model.alphabet.mask), boundaries))
        monkeypatch.setattr(model, "context", lambda batch: context)
    # PyTorch's builds for CPUs have no fake GPUs: fake tensors are on the CPU, attention keeps what a GPU's keeps.
    monkeypatch.setattr(
        attention, "KERNELS", [replace(attention.VARLEN, device="cpu", available=lambda _: True), *attention.KERNELS]
    )
    # On GPUs, autocast computes norms in float32.
    norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest, **options: norm(x.float(), *rest, **options))
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)).train()
        if told.run.recompute:
            recompute_layers(model)
        optimizers = Optimizers(parameters_to_train(model), told.optimizer)
        batch = PackedBatch(torch.zeros(tokens, dtype=torch.int64), boundaries)
        tracker: Any = MemTracker()
        tracker.track_external(model, *optimizers.members)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        with tracker:
            for _ in range(TWICE):
                optimizers.zero_grad()
                for _ in range(min(TWICE, told.batch.packs)):
                    tracker.reset_mod_stats()
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = F.cross_entropy(model.head(model(batch, rows=rows)).float(), rows.index)
                    loss.backward()  # type: ignore[no-untyped-call]
                    del loss
                optimizers.clip(scaler, 1.0)
                optimizers.step(scaler, 1e-4)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    costs = estimate(model, told, length)
    return peak, costs.state + costs.activations * tokens / told.batch.pack


NAMES = [name for name in recipe_names() if name not in {"domain-adaptation"}]


@pytest.mark.parametrize("name", mostly_long(NAMES, quick={0, 1, 4, 9}))
def test_memory_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With six layers at most, since each takes the same; the long test takes them all."""
    config = read_recipe(name).config
    changes = [FEW_LAYERS] if config.num_hidden_layers > 6 else []
    if getattr(config, "attention_probs_dropout_prob", 0):
        changes.append("model.attention_probs_dropout_prob=0.0")  # fake tensors have no fused attention with it
    peak, ours = tracked(name, changes, monkeypatch)
    assert ours == pytest.approx(peak, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if read_recipe(name).config.num_hidden_layers > 6])
def test_memory_of_a_step_with_all_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, ours = tracked(name, [], monkeypatch)
    assert ours == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_memory_of_a_model_to_continue(
    recompute: str, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [f"init={model_folders['esm2']}", f"run.recompute={recompute}", "data.max_tokens=512"]
    peak, ours = tracked("domain-adaptation", changes, monkeypatch)
    assert ours == pytest.approx(peak, rel=0.25)  # a tiny model: its vocabulary and norms weigh as much as its layers
