"""Published numbers of published models, and whether a checkpoint computes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from protea.checkpoints.hub import architecture, published_models
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.packing import pack

TOLERANCE: Final = 1e-4
"""What the numbers' publisher allows."""


@dataclass(frozen=True)
class Golden:
    """A corner of the numbers that a model gives for some tokens.

    Attributes:
        model: the published name.
        what: ``logits`` or ``last hidden state``.
        ids: the tokens, as they are.
        corner: the first rows and columns.
        source: who published it.
    """

    model: str
    what: str
    ids: tuple[int, ...]
    corner: tuple[tuple[float, ...], ...]
    source: str


_TRANSFORMERS: Final = "transformers' own tests"
_RELEASE: Final = "transformers 5.23.0 on its release"

GOLDEN: Final = (
    Golden(
        "esm2_t6_8M_UR50D",
        "logits",
        (0, 1, 2, 3, 4, 5),
        ((8.9215, -10.5898, -6.4671), (-6.3967, -13.9114, -1.1212), (-7.7812, -13.9516, -3.7406)),
        _TRANSFORMERS,
    ),
    Golden(
        "esm2_t6_8M_UR50D",
        "last hidden state",
        (0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2),
        ((0.1444, 0.5413, 0.3248), (0.3034, 0.0053, 0.3108), (0.3228, -0.2499, 0.3415)),
        _TRANSFORMERS,
    ),
    Golden(
        "protea-mini",
        "logits",
        (0, 1, 2, 3, 4, 5),
        ((-6.9899, -9.6985, -9.4972), (-6.6366, -8.5985, -9.3156), (-9.1172, -13.3936, -10.5862)),
        _RELEASE,
    ),
    Golden(
        "protea-mini",
        "last hidden state",
        (0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2),
        ((0.3542, 1.1853, 0.6898), (0.8195, 0.7500, 1.0385), (-0.3232, -0.1731, -0.4117)),
        _RELEASE,
    ),
)


@dataclass(frozen=True)
class Finding:
    """A published corner beside what a checkpoint gives.

    Attributes:
        golden: what was published.
        difference: the largest.
    """

    golden: Golden
    difference: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within what the publisher allows."""
        return self.difference <= TOLERANCE


def meant(name: str, model: Encoder) -> str | None:
    """The published model that a checkpoint is to be compared with: by its name, else by its architecture.

    Raises:
        CheckpointError: the name is a published model's, and the architecture is not that model's.
    """
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
    return next((one for one in known if _shape(architecture(models[one])) == _shape(model)), None)


def _shape(model: Encoder) -> tuple[object, ...]:
    """What two models must share to be comparable; padding of the vocabulary is not among it."""
    config = model.config
    return (type(config), config.num_hidden_layers, config.hidden_size, config.attention_heads)


def compare(model: Encoder, name: str) -> list[Finding]:
    """A model's numbers beside a published model's; empty where none are known.

    Args:
        model: float32, on the CPU.
        name: the published model.

    Raises:
        CapabilityError: logits are wanted of a checkpoint without a language-model head.
    """
    findings: list[Finding] = []
    for golden in GOLDEN:
        if golden.model != name:
            continue
        batch = pack([torch.tensor(golden.ids, dtype=torch.uint8).numpy()])
        with torch.inference_mode():
            x = model(batch)
            x = model.head(x) if golden.what == "logits" else x
        expected = torch.tensor(golden.corner)
        rows, columns = expected.shape
        findings.append(Finding(golden, float((x[:rows, :columns].float() - expected).abs().max())))
    return findings
