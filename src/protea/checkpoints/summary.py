"""What a model is, without loading its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from protea import bundled
from protea.checkpoints.formats import files_of, open_checkpoint, recognised
from protea.checkpoints.hub import architecture, find_local, published, published_models
from protea.device import DTYPES
from protea.models.encoder import Encoder
from protea.output import sha256


def listing() -> list[dict[str, Any]]:
    """One row for every name that Protea knows."""
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
        UnknownModelError: there is no such name.
        CheckpointError: the folder's files are absent, damaged or do not fit.
    """
    path = find_local(model)
    if path is None:
        known = published(model)
        described = _architecture(architecture(known))
        checksum = {"published_sha256": known.sha256} if known.sha256 else {}
        return {"model": known.name, **described, "licence": known.licence, "weights": known.place} | checksum
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
    """The number of parameters, with the tied output matrix counted once."""
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


def summarise(description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What ``describe`` returns as labelled lines."""
    limit, trained = description["residue_limit"], description["trained_residues"]
    yield "model", description["model"]
    yield "family", description["family"]
    yield "size", "{layers} layers, width {width}, {heads} heads".format(**description)
    yield "parameters", f"{description['parameters']:,}"
    yield "memory", ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in description["memory_bytes"].items())
    yield "alphabet", "{alphabet}, {tokens} tokens, residues {residues}".format(**description)
    yield "limit", f"none; the family was trained on {trained:,} residues" if limit is None else f"{limit:,} residues"
    yield "capabilities", ", ".join(["embed", *description["capabilities"]])
    if "licence" in description:
        yield "licence", description["licence"] or "no published weights"
    yield "weights", description["weights"] or "none"
    if description.get("published_sha256"):
        yield "sha256", f"{description['published_sha256']} (as published)"
    if "format" in description:
        yield "format", description["format"]
    if "sha256" not in description:
        yield "", "not on this machine"
        return
    yield "stored as", ", ".join(description["stored_as"])
    for name, digest in description["sha256"].items():
        yield "sha256", f"{digest}  {name}"
