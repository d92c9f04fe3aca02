"""Where models are found: the published ones by name, others by folder or Hugging Face repository."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from protea.checkpoints.files import CONFIG, INDEX, WEIGHTS
from protea.errors import CheckpointError, UnknownModelError
from protea.models import build
from protea.models.encoder import Encoder, EncoderConfig
from protea.models.esm1b import ESM1B, ESM1V
from protea.models.esm1nv import ESM1NV
from protea.models.esm2 import SIZES

_HUB: Final = "https://huggingface.co"
_NGC: Final = "https://catalog.ngc.nvidia.com/orgs/nvidia/teams/clara/models"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model, or an architecture that a name stands for.

    Attributes:
        name: what users type.
        config: its architecture.
        licence: of the weights, an SPDX id; empty where no weights are published.
        repository: on Hugging Face, in the layout this version reads; ``None`` elsewhere.
        place: where the weights are, in words.
        contact_head: whether it was published with a fitted contact head.
    """

    name: str
    config: EncoderConfig
    licence: str
    repository: str | None
    place: str
    contact_head: bool

    def build(self) -> Encoder:
        """The model on the meta device, with the heads it was published with."""
        model = build(self.config)
        if not self.contact_head:
            model.contact_head = None
        return model


def _meta(name: str, config: EncoderConfig, *, contact_head: bool = True) -> Published:
    repository = f"facebook/{name}"
    return Published(
        name=name,
        config=config,
        licence="MIT",
        repository=repository,
        place=f"{_HUB}/{repository}",
        contact_head=contact_head,
    )


def _nvidia(name: str, config: EncoderConfig, place: str | None) -> Published:
    return Published(
        name=name,
        config=config,
        licence="Apache-2.0" if place else "",
        repository=None,
        place=f"{_NGC}/{place} (.nemo)" if place else "",
        contact_head=False,
    )


def _published() -> Iterator[Published]:
    for layers, size in ((6, "8M"), (12, "35M"), (30, "150M"), (33, "650M"), (36, "3B"), (48, "15B")):
        yield _meta(f"esm2_t{layers}_{size}_UR50D", SIZES[size])
    yield _meta("esm1b_t33_650M_UR50S", ESM1B)
    for number in range(1, 6):
        yield _meta(f"esm1v_t33_650M_UR90S_{number}", ESM1V, contact_head=False)
    yield _nvidia("esm1nv", ESM1NV, "esm1nv")
    for size, place in (("650M", "esm2nv650m"), ("3B", "esm2nv3b"), ("15B", None), ("20B", None)):
        # NVIDIA pads the vocabulary's 33 rows to 128.
        yield _nvidia(f"esm2nv_{size}", replace(SIZES[size], vocab_size=128), place)


PUBLISHED: Final = {published.name: published for published in _published()}
"""Every name Protea knows."""


def published(name: str) -> Published:
    """Look a name up, with or without its organisation.

    Raises:
        UnknownModelError: with the names nearest to it.
    """
    short = name.removeprefix("facebook/")
    if short in PUBLISHED:
        return PUBLISHED[short]
    lower = {name.lower(): name for name in PUBLISHED}
    near = difflib.get_close_matches(short.lower(), lower, n=3, cutoff=0.5)
    advice = (
        f"did you mean {', '.join(lower[name] for name in near)}?" if near else "`protea info --list` shows all names"
    )
    raise UnknownModelError(f"unknown model {name!r}; {advice}")


def locate(model: str | Path) -> Path:
    """The folder that holds a model's files, downloaded if need be.

    Args:
        model: a folder, a weight file within one, a published name, or a Hugging Face repository.

    Raises:
        UnknownModelError: no such name.
        CheckpointError: no such folder, or the download failed; says which files to fetch and where to put them.
    """
    folder = _as_folder(Path(model))
    if folder is not None:
        return folder
    name = str(model)
    if name.removeprefix("facebook/") not in PUBLISHED:
        if _is_repository(name):
            return _download(name)
        if "/" in name:
            raise CheckpointError(f"{name}: no such folder")
    known = published(name)
    if known.repository is not None:
        return _download(known.repository)
    if not known.place:
        raise CheckpointError(f"{name} has no published weights; `protea init {name}` makes random ones")
    raise CheckpointError(f"{name} is published at {known.place}, a format this version does not read")


def find_local(model: str) -> Path | None:
    """The folder of a model if it is on this machine: named, or in Hugging Face's cache.

    Returns:
        ``None`` for a name without a path in it that is not on this machine, published or not.

    Raises:
        CheckpointError: a path or repository that is not here, or a file of a kind this version does not read.
    """
    from huggingface_hub import snapshot_download

    folder = _as_folder(Path(model))
    if folder is not None:
        return folder
    known = PUBLISHED.get(model.removeprefix("facebook/"))
    if known is None and "/" not in model:
        return None
    repository = model if known is None else known.repository
    if repository is not None and _is_repository(repository):
        try:
            folder = Path(snapshot_download(repository, allow_patterns=[CONFIG], local_files_only=True))
        except OSError:
            folder = None
        if folder is not None and any(folder.glob("*.safetensors")):
            return folder
    if known is None:
        raise CheckpointError(f"{model}: neither a folder nor a repository in Hugging Face's cache")
    return None


def _as_folder(path: Path) -> Path | None:
    if path.is_dir():
        return path
    if not path.is_file():
        return None
    if path.suffix == ".safetensors" or path.name in (CONFIG, INDEX):
        return path.parent
    raise CheckpointError(
        f"{path}: this version reads folders with {CONFIG} and {WEIGHTS}, not {path.suffix or 'such'} files"
    )


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = [CONFIG, "model*.safetensors", INDEX, "vocab.txt"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        folder = repository.split("/")[1]
        raise CheckpointError(
            f"{repository} is not in the cache and cannot be downloaded ({reason}); fetch {CONFIG} and {WEIGHTS} (for "
            f"split weights {INDEX} and every shard) from {_HUB}/{repository}/tree/main, put them into a folder "
            f"{folder}/ here, and run the same command again"
        ) from error
