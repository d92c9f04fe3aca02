"""Fixtures: small random models on disk, written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import protea
from protea.checkpoints import hf
from protea.models import build
from protea.models.encoder import EncoderConfig
from protea.models.esm1b import ESM1bConfig
from protea.models.esm1nv import ESM1nvConfig
from protea.models.esm2 import ESM2Config

# A shared machine may take any time for anything.
settings.register_profile("protea", deadline=None)
settings.load_profile("protea")

SMALL = {"num_hidden_layers": 3, "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 160}

CONFIGS: dict[str, EncoderConfig] = {
    "esm2": ESM2Config(**SMALL),
    "esm2nv": ESM2Config(**SMALL, vocab_size=128),
    "esm1b": ESM1bConfig(**SMALL, emb_layer_norm_before=True),
    "esm1v": ESM1bConfig(**SMALL, emb_layer_norm_before=False),
    "esm1nv": ESM1nvConfig(**SMALL),
}

LoadModel = Callable[..., protea.LanguageModel]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        hf.write_random(root / name, build(config), seed=1, dtype=torch.float32)
    return {name: root / name for name in CONFIGS}


@pytest.fixture
def load_small(model_folders: dict[str, Path]) -> LoadModel:
    """Load one of ``CONFIGS``, with biases and norms disturbed so that none hides behind 0 or 1."""

    def load(name: str, *, dtype: str = "float32", device: str = "cpu") -> protea.LanguageModel:
        model = protea.load(model_folders[name], device="cpu")
        disturb(model.module)
        kind = getattr(torch, dtype)
        model.module.to(device=device, dtype=kind)
        return model

    return load


def disturb(module: torch.nn.Module, seed: int = 7) -> None:
    """Add noise to every bias and norm weight, which initialisations leave at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
                parameter.add_(noise.to(parameter))
