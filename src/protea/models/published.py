"""Published checkpoints, as the file of each family lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protea.models.config import EncoderConfig

HUB: Final = "https://huggingface.co"
META: Final = "facebook/"
_NGC: Final = "https://catalog.ngc.nvidia.com/orgs/nvidia/teams/clara/models"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint; without published weights, only the first three fields have values.

    Attributes:
        name: what users type.
        licence: an SPDX id.
        format: of the published files, as ``protea convert`` names it.
        repository: on Hugging Face, to download from.
        elsewhere: where users find weights that are not on Hugging Face.
        contact_head: whether the weights include a fitted contact head.
        sha256: of the published file, if its publisher states it.
    """

    name: str
    config: EncoderConfig
    publisher: str
    licence: str = ""
    format: str = ""
    repository: str | None = None
    elsewhere: str = ""
    contact_head: bool = False
    sha256: str = ""

    @property
    def place(self) -> str:
        """Where users find the weights; empty without weights."""
        return self.elsewhere if self.repository is None else f"{HUB}/{self.repository}"


def by_meta(name: str, config: EncoderConfig, *, contact_head: bool = True) -> Published:
    """One of Meta's models on Hugging Face."""
    where = META + name
    return Published(
        name=name,
        config=config,
        publisher="Meta",
        licence="MIT",
        format="hf",
        repository=where,
        contact_head=contact_head,
    )


def te_recipe(name: str, config: EncoderConfig) -> Published:
    """One of Meta's models on Hugging Face in the layout of NVIDIA's TransformerEngine recipe."""
    return Published(name=name, config=config, publisher="NVIDIA", licence="MIT", format="te", repository=name)


def by_nvidia(name: str, config: EncoderConfig, page: str, form: str = "nemo", sha256: str = "") -> Published:
    """One of NVIDIA's models; an architecture alone if its catalogue has no page for it."""
    if not page:
        return Published(name=name, config=config, publisher="NVIDIA")
    place = f"{_NGC}/{page} ({'.nemo' if form == 'nemo' else '.tar.gz'})"
    return Published(
        name=name, config=config, publisher="NVIDIA", licence="Apache-2.0", format=form, elsewhere=place, sha256=sha256
    )
