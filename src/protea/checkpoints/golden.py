"""Published numbers of published models, and whether a checkpoint computes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch

from protea.checkpoints.formats import open_checkpoint, recognised
from protea.checkpoints.hub import architecture, locate, published_models
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.output import sha256
from protea.packing import pack

TOLERANCE: Final = 1e-4
"""What the publisher of the numbers allows."""


class Golden(NamedTuple):
    """The first rows and columns of what a published model gives for certain tokens, as its ``source`` published them.

    ``what`` is ``logits`` or ``last hidden state``.
    """

    model: str
    what: str
    ids: list[int]
    corner: list[list[float]]
    source: str


GOLDEN: Final = [Golden(**row) for row in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Findings:
    """A checkpoint beside what was published for it.

    Attributes:
        title: of its format.
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
        """Whether all differences are allowed; ``None`` where there was nothing to compare with."""
        if not self.differences:
            return None if self.recognised_as is None else True
        return all(difference <= TOLERANCE for _, difference in self.differences)


def check(model: str) -> Findings:
    """Compare what a checkpoint computes with the numbers that were published for it.

    Args:
        model: a published name, or a checkpoint of any format.

    Raises:
        UnknownModelError: there is no such name.
        CheckpointError: the checkpoint is damaged, or has the name of a model of another architecture.
        CapabilityError: it has no language-model head, and its logits were published.
    """
    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        name = _published_name(model, checkpoint.model)
        family = checkpoint.model.config.family
        differences = []
        if name is not None:
            loaded = checkpoint.load(dtype=torch.float32, device=torch.device("cpu"))
            differences = [(golden, _difference(loaded, golden)) for golden in GOLDEN if golden.model == name]
    digest = sha256(path) if path.is_file() else None
    same = (known.name for known in published_models().values() if known.sha256 == digest)
    return Findings(path, recognised(path).TITLE, family, name, next(same, None), differences)


def _published_name(path: str, model: Encoder) -> str | None:
    """The published model to compare a checkpoint with: the one it is named after, else one of its architecture."""
    base = Path(path).name.split(".")[0]
    models = published_models()
    if base in models:
        config = models[base].config
        if _shape(model) != _shape(architecture(models[base])):
            raise CheckpointError(
                f"{path}: {model.config.num_hidden_layers} layers of width {model.config.hidden_size}, {base} has "
                f"{config.num_hidden_layers} of width {config.hidden_size}"
            )
        return base
    known = dict.fromkeys(golden.model for golden in GOLDEN)
    return next((name for name in known if _shape(architecture(models[name])) == _shape(model)), None)


def _shape(model: Encoder) -> tuple[object, ...]:
    """What two models must share to be comparable. The padding of the vocabulary does not matter."""
    config = model.config
    return (type(config), config.num_hidden_layers, config.hidden_size, config.attention_heads)


def _difference(model: Encoder, golden: Golden) -> float:
    batch = pack([torch.tensor(golden.ids, dtype=torch.uint8).numpy()])
    with torch.inference_mode():
        x = model(batch)
        x = model.head(x) if golden.what == "logits" else x
    expected = torch.tensor(golden.corner)
    rows, columns = expected.shape
    return float((x[:rows, :columns].float() - expected).abs().max())
