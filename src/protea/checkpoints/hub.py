"""Where models are found: the published ones by name, others by folder or Hugging Face repository."""

from __future__ import annotations

import difflib
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
_META: Final = "facebook/"


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
    repository = f"{_META}{name}"
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
    short = _short(name)
    if short in PUBLISHED:
        return PUBLISHED[short]
    lower = {known.lower(): known for known in PUBLISHED}
    begun = [known for known in lower if known.startswith(short.lower())]
    close = difflib.get_close_matches(short.lower(), lower, n=3, cutoff=0.5)
    near = list(dict.fromkeys(begun + close))[:3]
    guess = f"did you mean {', '.join(lower[known] for known in near)}? " if near else ""
    raise UnknownModelError(f"unknown model {name!r}; {guess}`protea info --list` shows all names")


def locate(model: str | Path) -> Path:
    """The folder that holds a model's files, downloaded if need be.

    Args:
        model: a folder, a weight file within one, a published name, or a Hugging Face repository.

    Raises:
        UnknownModelError: no such name.
        CheckpointError: no such folder, or the download failed; says which files to fetch and where to put them.
    """
    name = str(model)
    folder = _on_disk(model)
    if folder is not None:
        return folder
    if not _is_published_or_near(name):
        if _is_repository(name):
            return _download(name)
        if "/" in name:
            raise CheckpointError(f"{name}: no such folder; `protea info --list` shows the names of published models")
    known = published(name)
    if known.repository is not None:
        return _download(known.repository)
    if not known.place:
        raise CheckpointError(f"{name} has no published weights; `protea init {name}` makes random ones")
    raise CheckpointError(
        f"{name} is published at {known.place}, a format this version does not read; convert it elsewhere to {CONFIG} "
        f"and {WEIGHTS} and name their folder, or make random weights: `protea init {name} -o DIR`"
    )


def find_local(model: str) -> Path | None:
    """The folder of a model if it is on this machine: named, or in Hugging Face's cache.

    Returns:
        ``None`` for a name that is not on this machine, published or not.

    Raises:
        CheckpointError: a path or repository that is not here, or a file of a kind this version does not read.
    """
    from huggingface_hub import snapshot_download

    folder = _on_disk(model)
    if folder is not None:
        return folder
    known = PUBLISHED.get(_short(model))
    repository = model if known is None else known.repository
    if repository is not None and _is_repository(repository):
        try:
            folder = Path(snapshot_download(repository, allow_patterns=[CONFIG], local_files_only=True))
        except OSError:
            folder = None
        if folder is not None and any(folder.glob("*.safetensors")):
            return folder
    if "/" in model and not _is_published_or_near(model):
        raise CheckpointError(f"{model}: neither a folder nor a repository in Hugging Face's cache")
    return None


def _short(name: str) -> str:
    return name.removeprefix(_META)


def _is_published_or_near(name: str) -> bool:
    """Whether a name is in the table or, by its spelling, was meant to be: Meta's models are all there."""
    return _short(name) in PUBLISHED or name.startswith(f"{_META}esm")


def _on_disk(model: str | Path) -> Path | None:
    """The folder that a name stands for; a published model's may be called by its short name alone."""
    if model == "":
        return None
    folder = _as_folder(Path(model))
    if folder is None and _short(str(model)) in PUBLISHED:
        folder = _as_folder(Path(_short(str(model))))
    return folder


def _as_folder(path: Path) -> Path | None:
    try:
        if path.is_dir():
            return path
        if not path.is_file():
            return None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; name a folder that can be, or one of `protea info --list`"
        ) from error
    if path.suffix == ".safetensors" or path.name in (CONFIG, INDEX):
        return path.parent
    raise CheckpointError(
        f"{path}: this version reads folders with {CONFIG} and {WEIGHTS}, not {path.suffix or 'such'} files"
    )


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not re-exported

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, "model*.safetensors", INDEX, "vocab.txt"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    # Servers and networks fail in more ways than this call has exceptions of its own: its HTTP client's, its JSON
    # parser's, the system's. None is a mistake of ours.
    except Exception as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        folder = _short(repository) if _short(repository) in PUBLISHED else repository
        raise CheckpointError(
            f"{repository} is no folder here, is not in the cache and cannot be downloaded ({reason}); fetch {CONFIG} "
            f"and {WEIGHTS} (for split weights {INDEX} and every shard) from {_HUB}/{repository}/tree/main, put them "
            f"into a folder {folder}/ here, and run the same command again"
        ) from error
