"""Where models are found: the published ones by name, others by folder or Hugging Face repository."""

from __future__ import annotations

import difflib
import warnings
from functools import cache
from pathlib import Path
from typing import Final

from protea import bundled
from protea.checkpoints.formats import checkpoint_path
from protea.checkpoints.json_files import CONFIG
from protea.checkpoints.safetensors_files import INDEX, WEIGHTS
from protea.errors import CheckpointError, ProteaWarning, UnknownModelError
from protea.models.encoder import Encoder
from protea.models.published import HUB, META, Published
from protea.models.registry import build, families

_ORDER: Final = ("Protea", "Meta", "NVIDIA: ESM-1nv", "NVIDIA")
"""In which publishers are listed, some with a family of theirs."""


def _rank(known: Published) -> int:
    named = (f"{known.publisher}: {known.config.family}", known.publisher)
    return next((_ORDER.index(one) for one in named if one in _ORDER), len(_ORDER))


@cache
def published_models() -> dict[str, Published]:
    """Every name Protea knows, as the families' files say; those of one publisher together."""
    everything = [one for family in families() for one in family.published]
    return {known.name: known for known in sorted(everything, key=_rank)}


def published_as(model: str | Path) -> Published | None:
    """What a name stands for, with or without Meta's organisation; nothing for a path."""
    return published_models().get(short_name(model))


def architecture(known: Published) -> Encoder:
    """A published model on the meta device, with the heads it was published with."""
    model = build(known.config)
    if not known.contact_head:
        model.contact_head = None
    return model


def by_sha256(digest: str) -> str | None:
    """The name of the published file with this SHA-256."""
    return next((known.name for known in published_models().values() if known.sha256 == digest), None)


def published(name: str) -> Published:
    """Look a name up, with or without its organisation.

    Raises:
        UnknownModelError: with the names nearest to it.
    """
    short = short_name(name)
    names = published_models()
    if short in names:
        return names[short]
    lower = {known.lower(): known for known in names}
    begun = [known for known in lower if known.startswith(short.lower())]
    close = difflib.get_close_matches(short.lower(), lower, n=3, cutoff=0.5)
    near = list(dict.fromkeys(begun + close))[:3]
    guess = f"did you mean {', '.join(lower[known] for known in near)}? " if near else ""
    raise UnknownModelError(f"unknown model {name!r}; {guess}`protea info --list` shows all names")


def locate(model: str | Path) -> Path:
    """Where a model's files are: a folder, or a checkpoint file; downloaded if need be.

    Args:
        model: a folder, a checkpoint file, a weight file in a folder, a published name, or a Hugging Face repository.

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
        f"{name} is published at {known.place}, which needs an account there: fetch it and name the file, or the "
        f"folder it unpacks to; or make random weights: `protea init {name} -o DIR`"
    )


def find_local(model: str) -> Path | None:
    """Where a model is if it is on this machine: named, or in Hugging Face's cache.

    Returns:
        ``None`` for a name that is not on this machine, published or not.

    Raises:
        CheckpointError: a path or repository that is not here.
    """
    from huggingface_hub import snapshot_download

    folder = _on_disk(model)
    if folder is not None:
        return folder
    known = published_as(model)
    repository = model if known is None else known.repository
    if repository is not None and _is_repository(repository):
        try:
            folder = Path(snapshot_download(repository, allow_patterns=[CONFIG], local_files_only=True))
        except OSError:
            folder = None
        if folder is not None and _has_weights(folder):
            return folder
    if "/" in model and not _is_published_or_near(model):
        raise CheckpointError(f"{model}: neither a folder nor a repository in Hugging Face's cache")
    return None


def short_name(model: str | Path) -> str:
    """A model's name without Meta's organisation."""
    return str(model).removeprefix(META)


def _is_published_or_near(name: str) -> bool:
    """Whether a name is in the table or, by its spelling, was meant to be: Meta's models are all there."""
    return published_as(name) is not None or name.startswith(f"{META}esm")


def _on_disk(model: str | Path) -> Path | None:
    """The folder that a name stands for; a published model's may be called by its short name alone."""
    if model == "":
        return None
    if short_name(model) == bundled.NAME:
        if Path(bundled.NAME).exists():
            message = f"{bundled.NAME} is the model of the package; what is here by that name is ./{bundled.NAME}"
            warnings.warn(message, ProteaWarning, stacklevel=3)
        return bundled.FOLDER
    folder = _as_folder(Path(model))
    if folder is None and published_as(model) is not None:
        folder = _as_folder(Path(short_name(model)))
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
    return checkpoint_path(path)


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not re-exported

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, "model*.safetensors", INDEX, "vocab.txt"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
        if not _has_weights(folder):  # the largest of Meta's have pickles only
            folder = Path(snapshot_download(repository, allow_patterns=[*wanted, "pytorch_model*.bin*"]))
        return folder
    # Servers and networks fail in more ways than this call has exceptions of its own: its HTTP client's, its JSON
    # parser's, the system's. None is a mistake of ours.
    except Exception as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        place = short_name(repository) if published_as(repository) is not None else repository
        raise CheckpointError(
            f"{repository} is no folder here, is not in the cache and cannot be downloaded ({reason}); fetch {CONFIG} "
            f"and {WEIGHTS} (for split weights {INDEX} and every shard) from {HUB}/{repository}/tree/main, put them "
            f"into a folder {place}/ here, and run the same command again"
        ) from error
