"""Published numbers of published models, and whether a checkpoint computes them."""

from __future__ import annotations

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
    """A corner of the numbers that a model gives for certain tokens.

    Attributes:
        model: the published name.
        what: ``logits`` or ``last hidden state``.
        ids: the tokens, with their frame.
        corner: the first rows and columns.
        source: who published them.
    """

    model: str
    what: str
    ids: tuple[int, ...]
    corner: tuple[tuple[float, ...], ...]
    source: str


_TRANSFORMERS: Final = "transformers' own tests"
_RELEASE: Final = "transformers 5.23.0 on its release"
_COUNTING: Final = (0, 1, 2, 3, 4, 5)
_SEQUENCE: Final = (0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2)

GOLDEN: Final = (
    Golden(
        "esm2_t6_8M_UR50D",
        "logits",
        _COUNTING,
        ((8.9215, -10.5898, -6.4671), (-6.3967, -13.9114, -1.1212), (-7.7812, -13.9516, -3.7406)),
        _TRANSFORMERS,
    ),
    Golden(
        "esm2_t6_8M_UR50D",
        "last hidden state",
        _SEQUENCE,
        ((0.1444, 0.5413, 0.3248), (0.3034, 0.0053, 0.3108), (0.3228, -0.2499, 0.3415)),
        _TRANSFORMERS,
    ),
    Golden(
        "protea-mini",
        "logits",
        _COUNTING,
        ((-6.9899, -9.6985, -9.4972), (-6.6366, -8.5985, -9.3156), (-9.1172, -13.3936, -10.5862)),
        _RELEASE,
    ),
    Golden(
        "protea-mini",
        "last hidden state",
        _SEQUENCE,
        ((0.3542, 1.1853, 0.6898), (0.8195, 0.7500, 1.0385), (-0.3232, -0.1731, -0.4117)),
        _RELEASE,
    ),
)


@dataclass(frozen=True)
class Findings:
    """A checkpoint beside what was published for it.

    Attributes:
        path: the checkpoint.
        title: of its format.
        family: of its model.
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


def _published_name(name: str, model: Encoder) -> str | None:
    """The published model to compare a checkpoint with: the one it is named after, else one of its architecture."""
    base = Path(name).name.split(".")[0]
    models = published_models()
    if base in models:
        config = models[base].config
        if _shape(model) != _shape(architecture(models[base])):
            raise CheckpointError(
                f"{name}: {model.config.num_hidden_layers} layers of width {model.config.hidden_size}, {base} has "
                f"{config.num_hidden_layers} of width {config.hidden_size}"
            )
        return base
    known = dict.fromkeys(golden.model for golden in GOLDEN)
    return next((other for other in known if _shape(architecture(models[other])) == _shape(model)), None)


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
