"""Where models are found: the published ones by name, others by folder or Hugging Face repository."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from protea import bundled
from protea.checkpoints.files import CONFIG
from protea.checkpoints.formats import checkpoint_path
from protea.checkpoints.safetensors_files import INDEX, WEIGHTS
from protea.errors import CheckpointError, ProteaWarning, UnknownModelError
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
    """A published checkpoint, or an architecture that a name stands for.

    Attributes:
        name: what users type.
        config: its architecture.
        licence: of the weights, an SPDX id; empty where no weights are published.
        format: what the published files are, by the name that ``protea convert`` calls it; empty without any.
        repository: on Hugging Face, where files are fetched from; ``None`` elsewhere.
        place: where the weights are, in words.
        contact_head: whether it was published with a fitted contact head.
        sha256: of the published file, where its publisher states it.
    """

    name: str
    config: EncoderConfig
    licence: str
    format: str
    repository: str | None
    place: str
    contact_head: bool
    sha256: str = ""

    def build(self) -> Encoder:
        """The model on the meta device, with the heads it was published with."""
        model = build(self.config)
        if not self.contact_head:
            model.contact_head = None
        return model


def _on_hub(
    name: str, repository: str, config: EncoderConfig, kind: str = "hf", *, contact_head: bool = True
) -> Published:
    return Published(
        name=name,
        config=config,
        licence="MIT",
        format=kind,
        repository=repository,
        place=f"{_HUB}/{repository}",
        contact_head=contact_head,
    )


def _on_ngc(name: str, config: EncoderConfig, place: str, kind: str = "nemo", sha256: str = "") -> Published:
    return Published(
        name=name,
        config=config,
        licence="Apache-2.0" if place else "",
        format=kind if place else "",
        repository=None,
        place=f"{_NGC}/{place} ({'.nemo' if kind == 'nemo' else '.tar.gz'})" if place else "",
        contact_head=False,
        sha256=sha256,
    )


_LAYERS: Final = {"8M": 6, "35M": 12, "150M": 30, "650M": 33, "3B": 36, "15B": 48}

# BioNeMo framework, bionemo-core/data/resources/esm2.yaml: of the .nemo file, and of archives of directories.
_SHA256: Final = {
    "esm2nv_650M": "1e38063cafa808306329428dd17ea6df78c9e5d6b3d2caf04237c555a1f131b7",
    "esm2nv8m:2.0": "2957b2c36d5978d0f595d6f1b72104b312621cf0329209086537b613c1c96d16",
    "esm2nv650m:2.0": "0798767e843e3d54315aef91934d28ae7d8e93c2849d5fcfbdf5fac242013997",
    "esm2nv3b:2.0": "a2248cfed1ef39f83bd32a0e08b84c0a8f39325d383e2d92767022ff7f5260ed",
    "esm2nv650m:2.1": "b83e9b5d62f1499b443817c5cd0facd3bdd4013a51a897e05e17228bf650befe",
    "esm2nv3b:2.1": "a79327a4054bf8d1d7075e1b3c961dbc503da02d72ed15f707d9cbbd49d181b6",
}


def _published() -> Iterator[Published]:
    yield Published(
        name=bundled.NAME,
        config=replace(SIZES["8M"], num_attention_heads=5),
        licence="Apache-2.0",
        format="hf",
        repository=None,
        place="comes with the package",
        contact_head=True,
    )
    for size, layers in _LAYERS.items():
        name = f"esm2_t{layers}_{size}_UR50D"
        yield _on_hub(name, f"{_META}{name}", SIZES[size])
    yield _on_hub("esm1b_t33_650M_UR50S", f"{_META}esm1b_t33_650M_UR50S", ESM1B)
    for number in range(1, 6):
        name = f"esm1v_t33_650M_UR90S_{number}"
        yield _on_hub(name, f"{_META}{name}", ESM1V, contact_head=False)
    yield _on_ngc("esm1nv", ESM1NV, "esm1nv")
    for size, place in (("650M", "esm2nv650m"), ("3B", "esm2nv3b"), ("15B", ""), ("20B", "")):
        # NVIDIA pads the vocabulary's 33 rows to 128.
        padded = replace(SIZES[size], vocab_size=128)
        yield _on_ngc(f"esm2nv_{size}", padded, place, sha256=_SHA256.get(f"esm2nv_{size}", ""))
    # 2.0 is converted from Meta's weights, 2.1 NVIDIA's own training.
    for size, tag in (("8M", "2.0"), ("650M", "2.0"), ("3B", "2.0"), ("650M", "2.1"), ("3B", "2.1")):
        name = f"esm2nv{size.lower()}:{tag}"
        yield _on_ngc(name, SIZES[size], f"esm2nv{size.lower()}", "nemo2", _SHA256[name])
    for size, layers in _LAYERS.items():
        name = f"nvidia/esm2_t{layers}_{size}_UR50D"
        yield _on_hub(name, name, SIZES[size], "te", contact_head=False)


PUBLISHED: Final = {published.name: published for published in _published()}
"""Every name Protea knows."""


def by_sha256(digest: str) -> str | None:
    """The name of the published file with this SHA-256."""
    return next((known.name for known in PUBLISHED.values() if known.sha256 == digest), None)


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
    known = PUBLISHED.get(_short(model))
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


def _short(name: str) -> str:
    return name.removeprefix(_META)


def _is_published_or_near(name: str) -> bool:
    """Whether a name is in the table or, by its spelling, was meant to be: Meta's models are all there."""
    return _short(name) in PUBLISHED or name.startswith(f"{_META}esm")


def _on_disk(model: str | Path) -> Path | None:
    """The folder that a name stands for; a published model's may be called by its short name alone."""
    if model == "":
        return None
    if _short(str(model)) == bundled.NAME:
        if Path(bundled.NAME).exists():
            message = f"{bundled.NAME} is the model of the package; what is here by that name is ./{bundled.NAME}"
            warnings.warn(message, ProteaWarning, stacklevel=3)
        return bundled.FOLDER
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
        place = _short(repository) if _short(repository) in PUBLISHED else repository
        raise CheckpointError(
            f"{repository} is no folder here, is not in the cache and cannot be downloaded ({reason}); fetch {CONFIG} "
            f"and {WEIGHTS} (for split weights {INDEX} and every shard) from {_HUB}/{repository}/tree/main, put them "
            f"into a folder {place}/ here, and run the same command again"
        ) from error
