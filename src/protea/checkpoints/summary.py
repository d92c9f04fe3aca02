"""Describes a model without loading its weights, and checks that it computes the published numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from protea import bundled
from protea.checkpoints.formats import open_checkpoint, recognised
from protea.checkpoints.hub import architecture, find_local, locate, published, published_models, short_name
from protea.device import DTYPES, MIXED, QUANTIZED, resolve_device
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import Encoder
from protea.output import sha256
from protea.packing import pack
from protea.progress import SILENT, Progress
from protea.transforms.mixed import narrow_weights
from protea.transforms.quantized import bytes_of_weights

TOLERANCE: Final = 1e-4
"""The tolerance that the publisher of the numbers states."""


class Golden(NamedTuple):
    """The first rows and columns of a published model's output for certain tokens, as its ``source`` published them.

    ``what`` is ``logits`` or ``last hidden state``.
    """

    model: str
    what: str
    ids: list[int]
    corner: list[list[float]]
    source: str


GOLDEN: Final = [Golden(**row) for row in json.loads(Path(__file__).with_name("golden.json").read_text("utf-8"))]


def listing() -> list[dict[str, Any]]:
    """One row for every name that Protea knows."""
    return [
        {
            "name": known.name,
            "family": known.config.family,
            "parameters": parameter_count(architecture(known)),
            "licence": known.licence,
            "restriction": known.restriction,
            "contact_head": known.contact_head,
            "format": known.format,
            "place": known.place or "not published; architecture only",
            "sha256": known.sha256,
        }
        for known in published_models().values()
    ]


def describe(model: str, progress: Progress = SILENT) -> dict[str, Any]:
    """Size, memory, alphabet, limits, capabilities, files with their SHA-256; downloads nothing."""
    path = find_local(model)
    if path is None:
        known = published(model)
        described = _architecture(architecture(known))
        checksum = {"published_sha256": known.sha256} if known.sha256 else {}
        licence = {"licence": known.licence, "restriction": known.restriction}
        return {"model": known.name, **described, **licence, "weights": known.place} | checksum
    with open_checkpoint(path) as checkpoint:
        return {
            "model": model,
            **_architecture(checkpoint.model),
            "format": recognised(path).TITLE,
            "stored_as": checkpoint.stored_types,
            "weights": str(path),
            "sha256": {file.name: sha256(file, progress) for file in checkpoint.tensors.paths},
        } | licence_of(model, path, checkpoint.model)


def licence_of(name: str, path: Path, model: Encoder) -> dict[str, str]:
    """The licence of a checkpoint, as far as it is known: that of a published name, or one that forbids a use."""
    named = published_models().get(bundled.NAME if path == bundled.FOLDER else short_name(name))
    if named is not None:
        return {"licence": named.licence, "restriction": named.restriction}
    known = model.restricted
    return {} if known is None else {"licence": f"{known.licence} of {known.name}", "restriction": known.restriction}


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
        "memory_bytes": _memory(module, parameters),
        "alphabet": module.alphabet.name,
        "tokens": len(module.alphabet),
        "residues": module.alphabet.residues,
        "residue_limit": None if module.max_tokens is None else frame.residues(module.max_tokens),
        "trained_residues": frame.residues(module.trained_tokens),
        "capabilities": sorted(module.capabilities),
    }


def _memory(module: Encoder, parameters: int) -> dict[str, int]:
    """Bytes of the weights by the type that a model computes in."""
    memory = {name: parameters * dtype.itemsize for name, dtype in DTYPES.items()}
    with suppress(UsageError):  # a family without such layers
        narrow = narrow_weights(module, resolve_device("auto"))
        halved = sum(parameter.numel() for name, parameter in module.named_parameters() if name in narrow)
        memory[MIXED] = memory["float32"] - 2 * halved
    if (size := bytes_of_weights(module)) is not None:
        memory[QUANTIZED] = size
    return memory


def summarise(description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result of ``describe`` as labelled lines."""
    trained = description["trained_residues"]
    yield "model", description["model"]
    yield "family", description["family"]
    yield "size", "{layers} layers, width {width}, {heads} heads".format(**description)
    yield "parameters", f"{description['parameters']:,}"
    yield "memory", ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in description["memory_bytes"].items())
    yield "alphabet", "{alphabet}, {tokens} tokens, residues {residues}".format(**description)
    full = " or full" if description["residue_limit"] is None else ""
    yield "limit", f"{trained:,} residues; longer sequences are shortened, unless `protea embed --long window`{full}"
    yield "capabilities", ", ".join(["embed", *description["capabilities"]])
    if "licence" in description:
        forbids = f" ({description['restriction']})" if description.get("restriction") else ""
        yield "licence", (description["licence"] or "no published weights") + forbids
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


@dataclass(frozen=True)
class Findings:
    """A checkpoint compared with the numbers that were published for it.

    Attributes:
        title: the title of its format.
        compared_with: the published model; ``None`` where none has its architecture.
        recognised_as: the published file with its SHA-256, if it is one file.
        differences: the published numbers, each with the largest difference from the checkpoint's.
    """

    path: Path
    title: str
    family: str
    compared_with: str | None
    recognised_as: str | None
    differences: list[tuple[Golden, float]]

    @property
    def passed(self) -> bool | None:
        """Whether all differences are within the tolerance; ``None`` if there was nothing to compare with."""
        if not self.differences:
            return None if self.recognised_as is None else True
        return all(difference <= TOLERANCE for _, difference in self.differences)

    def shown(self) -> dict[str, Any]:
        """The findings as plain values."""
        compared = [
            {"model": golden.model, "what": golden.what, "source": golden.source}
            | {"difference": difference, "allowed": TOLERANCE, "passed": difference <= TOLERANCE}
            for golden, difference in self.differences
        ]
        names = ("title", "family", "compared_with", "recognised_as", "passed")
        return {"path": str(self.path), **{name: getattr(self, name) for name in names}, "differences": compared}


def check(model: str, progress: Progress = SILENT) -> Findings:
    """Compare what a checkpoint, or a published name, computes with the numbers that were published for it."""
    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        name = _published_name(model, checkpoint.model)
        family = checkpoint.model.config.family
        differences = []
        if name is not None:
            loaded = checkpoint.load(dtype=torch.float32, device=torch.device("cpu"), progress=progress)
            differences = [(golden, _difference(loaded, golden)) for golden in GOLDEN if golden.model == name]
    digest = sha256(path, progress) if path.is_file() else None
    same = (known.name for known in published_models().values() if known.sha256 == digest)
    return Findings(path, recognised(path).TITLE, family, name, next(same, None), differences)


def _published_name(path: str, model: Encoder) -> str | None:
    """The published model to compare a checkpoint with: the one it is named after, else one of its architecture."""
    base = Path(path).name.split(".")[0]
    models = published_models()
    if base in models:
        config = models[base].config
        if not same_shape(model, architecture(models[base])):
            raise CheckpointError(
                f"{path}: {model.config.num_hidden_layers} layers of width {model.config.hidden_size}, {base} has "
                f"{config.num_hidden_layers} of width {config.hidden_size}"
            )
        return base
    known = dict.fromkeys(golden.model for golden in GOLDEN)
    return next((name for name in known if same_shape(architecture(models[name]), model)), None)


def same_shape(a: Encoder, b: Encoder) -> bool:
    """Whether two models have the same architecture; the padding of the vocabulary does not matter."""
    shapes = (
        (type(config), config.num_hidden_layers, config.hidden_size, config.attention_heads)
        for config in (a.config, b.config)
    )
    return len(set(shapes)) == 1


def _difference(model: Encoder, golden: Golden) -> float:
    batch = pack([torch.tensor(golden.ids, dtype=torch.uint8).numpy()])
    with torch.inference_mode():
        x = model(batch)
        x = model.head(x) if golden.what == "logits" else x
    expected = torch.tensor(golden.corner)
    rows, columns = expected.shape
    return float((x[:rows, :columns].float() - expected).abs().max())
