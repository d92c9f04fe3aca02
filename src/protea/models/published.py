"""What a family's file says of checkpoints that others published, and of architectures that a name stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protea.models.config import EncoderConfig

HUB: Final = "https://huggingface.co"
META: Final = "facebook/"
"""Meta's organisation there."""

_NGC: Final = "https://catalog.ngc.nvidia.com/orgs/nvidia/teams/clara/models"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint, or an architecture that a name stands for.

    Attributes:
        name: what users type.
        config: its architecture.
        publisher: who published it.
        licence: of the weights, an SPDX id; empty where no weights are published.
        format: what the published files are, by the name that ``protea convert`` calls it; empty without any.
        repository: on Hugging Face, where files are fetched from; ``None`` elsewhere.
        place: where the weights are, in words.
        contact_head: whether it was published with a fitted contact head.
        sha256: of the published file, where its publisher states it.
    """

    name: str
    config: EncoderConfig
    publisher: str
    licence: str
    format: str
    repository: str | None
    place: str
    contact_head: bool
    sha256: str = ""


def by_meta(name: str, config: EncoderConfig, *, contact_head: bool = True) -> Published:
    """One of Meta's models, on Hugging Face under MIT's licence."""
    return Published(
        name=name,
        config=config,
        publisher="Meta",
        licence="MIT",
        format="hf",
        repository=f"{META}{name}",
        place=f"{HUB}/{META}{name}",
        contact_head=contact_head,
    )


def by_nvidia(name: str, config: EncoderConfig, place: str, kind: str = "nemo", sha256: str = "") -> Published:
    """One of NVIDIA's models, in its catalogue, or an architecture alone where it has no place."""
    return Published(
        name=name,
        config=config,
        publisher="NVIDIA",
        licence="Apache-2.0" if place else "",
        format=kind if place else "",
        repository=None,
        place=f"{_NGC}/{place} ({'.nemo' if kind == 'nemo' else '.tar.gz'})" if place else "",
        contact_head=False,
        sha256=sha256,
    )


def te_recipe(name: str, config: EncoderConfig) -> Published:
    """One of Meta's models on Hugging Face in the layout of NVIDIA's TransformerEngine recipe."""
    return Published(
        name=name,
        config=config,
        publisher="NVIDIA",
        licence="MIT",
        format="te",
        repository=name,
        place=f"{HUB}/{name}",
        contact_head=False,
    )
