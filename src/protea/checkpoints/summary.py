"""What a model is, without loading its weights."""

from __future__ import annotations

from typing import Any

from protea import bundled
from protea.checkpoints.formats import files_of, open_checkpoint, recognised
from protea.checkpoints.hub import architecture, find_local, published, published_models
from protea.device import DTYPES
from protea.disk import sha256
from protea.models.encoder import Encoder


def listing() -> list[dict[str, Any]]:
    """One row for every name Protea knows: family, parameters, licence, place, contact head."""
    return [
        {
            "name": known.name,
            "family": known.config.family,
            "parameters": parameter_count(architecture(known)),
            "licence": known.licence,
            "contact_head": known.contact_head,
            "format": known.format,
            "place": known.place or "not published; architecture only",
            "sha256": known.sha256,
        }
        for known in published_models().values()
    ]


def describe(model: str) -> dict[str, Any]:
    """Size, memory, alphabet, limits, capabilities, files with their SHA-256; downloads nothing.

    Raises:
        UnknownModelError: no such name.
        CheckpointError: the folder's files are absent, damaged or do not fit together.
    """
    path = find_local(model)
    if path is None:
        known = published(model)
        described = _architecture(architecture(known))
        return {"model": known.name, **described, "licence": known.licence, "weights": known.place} | (
            {"published_sha256": known.sha256} if known.sha256 else {}
        )
    with open_checkpoint(path) as checkpoint:
        return {
            "model": model,
            **_architecture(checkpoint.model),
            "format": recognised(path).TITLE,
            "stored_as": checkpoint.stored_types,
            "weights": str(path),
            "sha256": {file.name: sha256(file) for file in files_of(path, checkpoint)},
        } | ({"licence": published(model).licence} if path == bundled.FOLDER else {})


def parameter_count(module: Encoder) -> int:
    """Parameters, the tied output matrix counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _architecture(module: Encoder) -> dict[str, Any]:
    config, frame = module.config, module.alphabet.frame
    parameters = parameter_count(module)
    return {
        "family": config.family,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": max(config.attention_heads, default=0),
        "parameters": parameters,
        "memory_bytes": {name: parameters * dtype.itemsize for name, dtype in DTYPES.items()},
        "alphabet": module.alphabet.name,
        "tokens": len(module.alphabet),
        "residues": module.alphabet.residues,
        "residue_limit": None if module.max_tokens is None else frame.residues(module.max_tokens),
        "trained_residues": frame.residues(module.trained_tokens),
        "capabilities": sorted(module.capabilities),
    }
