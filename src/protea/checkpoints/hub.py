"""Finds models: published ones by name, others by folder or Hugging Face repository."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from protea import bundled
from protea.checkpoints.formats import checkpoint_path, has_weights, parts_of
from protea.checkpoints.settings_files import CONFIG
from protea.checkpoints.tensors import INDEX, WEIGHTS
from protea.checkpoints.vocabulary import FILES as VOCABULARY_FILES
from protea.errors import CheckpointError, ProteaWarning, UnknownModelError
from protea.models.encoder import Encoder
from protea.models.family import HUB, META, Published
from protea.models.registry import build, families

SECONDS: Final = 10.0
"""Longest wait for an answer of Hugging Face's hub, whose library would wait without end."""

_ORDER: Final = ("Protea", "Meta", "NVIDIA ESM-1nv", "NVIDIA")
"""Publishers, or one of their families, in the order of the list of models; others follow."""

_PATH: Final = re.compile(
    r"[./~].*|.*[/\\]|.*[/\\].*[/\\].*|.*\.(pt|pth|ckpt|bin|safetensors|nemo|json|h5|tar|gz)", re.IGNORECASE
)
"""Names that can only be paths; a repository has one slash, and no suffix of a file."""


@cache
def published_models() -> dict[str, Published]:
    """Every name that Protea knows, from the families' files, in the order of their publishers."""

    def rank(known: Published) -> int:
        names = (f"{known.publisher} {known.config.family}", known.publisher)
        return next((_ORDER.index(name) for name in names if name in _ORDER), len(_ORDER))

    everything = [known for family in families() for known in family.published]
    return {known.name: known for known in sorted(everything, key=rank)}


def architecture(known: Published) -> Encoder:
    """A published model on the meta device, with the heads that it was published with."""
    model = build(known.config)
    if not known.contact_head:
        model.contact_head = None
    return model


def short_name(model: str | Path) -> str:
    """A model's name without Meta's organisation."""
    return str(model).removeprefix(META)


def published(name: str) -> Published:
    """Look up a published model by its name, with or without Meta's organisation."""
    short, names = short_name(name), published_models()
    if short in names:
        return names[short]
    from protea.checkpoints.near_names import near_models

    near = near_models(short, names.values())
    guess = f"did you mean {', '.join(near)}? " if near else ""
    raise UnknownModelError(f"unknown model {name!r}; {guess}`protea info --list` shows all names")


def locate(model: str | Path) -> Path:
    """The folder or the checkpoint file of a model. Downloads the files if necessary.

    ``model`` is a folder, a checkpoint file, a weight file in a folder, a published name, or a Hugging Face repository.
    """
    name = str(model)
    if (path := _on_disk(model)) is not None:
        return path
    if (repository := _repository(name)) is not None:
        return _download(repository)
    known = published(name)
    if not known.place:
        raise CheckpointError(f"{name} has no published weights; `protea init {name}` makes random ones")
    account = ", which needs an account there" if known.account else ""
    raise CheckpointError(
        f"{name} is published at {known.place}{account}: fetch it and name the file, or the folder it "
        f"unpacks to; or make random weights: `protea init {name} -o DIR`"
    )


def find_local(model: str) -> Path | None:
    """The path of a model on this machine; ``None`` for a name whose files are not here."""
    from huggingface_hub import snapshot_download

    if (path := _on_disk(model)) is not None:
        return path
    repository = _repository(model)
    if repository is None:
        return None
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[CONFIG], local_files_only=True))
        if has_weights(folder):
            return folder
    except OSError:
        pass  # it is not in the cache
    if short_name(model) in published_models():
        return None
    raise CheckpointError(f"{model}: neither a folder{_near(model)} nor a repository in Hugging Face's cache")


def _repository(name: str) -> str | None:
    """The Hugging Face repository that a name means; ``None`` if it means none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not re-exported

    if known := published_models().get(short_name(name)):
        return known.repository
    if _PATH.fullmatch(name):
        raise _no_path(name)
    if "/" not in name or name.startswith(f"{META}esm"):  # a misspelt name: the list has all of Meta's models
        return None
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise _no_path(name) from error
    return name


def _no_path(name: str) -> CheckpointError:
    """The error for a path that leads nowhere."""
    from protea.checkpoints.near_names import near_paths

    path, known = Path(name), published_models()
    if not _PATH.fullmatch(name):
        return CheckpointError(f"{name}: no such folder or file{_near(name)}; `protea info --list` shows all models")
    if path.name == name and path.stem in known:
        return CheckpointError(f"{name}: no such folder or file{_near(name)}; {path.stem} is the published model")
    absent = [folder for folder in path.parents if not folder.exists()]
    where = f"; there is no folder {absent[-1]}" if absent else ""
    return CheckpointError(f"{name}: no such folder or file{where}; {near_paths(path) or 'check the path'}")


def _near(name: str) -> str:
    """Existing names similar to a path, in parentheses; empty if there are none."""
    from protea.checkpoints.near_names import near_paths

    near = near_paths(Path(name))
    return f" ({near})" if near else ""


def _on_disk(model: str | Path) -> Path | None:
    """The folder or file that a name stands for; a published model's folder may have its short name."""
    if model == "":
        return None
    short = short_name(model)
    if short == bundled.NAME:
        if Path(bundled.NAME).exists():
            message = f"{bundled.NAME} is the model in the package; the one in this folder is ./{bundled.NAME}"
            warnings.warn(message, ProteaWarning, stacklevel=3)
        return bundled.FOLDER
    others = [Path(short)] if short != str(model) and short in published_models() else []
    for path in (Path(model), *others):
        try:
            if path.is_dir() or path.is_file():
                return _only_file(checkpoint_path(path))
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}; name another folder, or one of `protea info --list`"
            ) from error
    return None


def _only_file(path: Path) -> Path:
    """The only file of weights beside ``config.json`` in a folder where none has a usual name; else the path."""
    if not (path / CONFIG).is_file() or has_weights(path) or parts_of(path):
        return path
    from protea.checkpoints.state_dict import only_file

    return only_file(path) or path


def _download(repository: str) -> Path:
    """Fetch what is not in Hugging Face's cache; the cache alone is used where the hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download

    patterns = [CONFIG, "model*.safetensors", INDEX, *VOCABULARY_FILES]
    unreachable: Exception | None = None
    with _plain_telling() as bar:
        # Networks fail with exceptions of the HTTP client, of the JSON parser and of the system. None is our mistake.
        try:
            HfApi().model_info(repository, timeout=SECONDS)
        except Exception as error:
            unreachable = error
        options: dict[str, Any] = {"local_files_only": unreachable is not None, "tqdm_class": bar}
        try:
            folder = Path(snapshot_download(repository, allow_patterns=patterns, **options))
            if not has_weights(folder):  # Meta published its largest models as pickles only
                patterns.append("pytorch_model*.bin*")
                folder = Path(snapshot_download(repository, allow_patterns=patterns, **options))
            return folder
        except Exception as error:
            raise _not_downloaded(repository, unreachable or error) from error


@contextmanager
def _plain_telling() -> Iterator[Any]:
    """Let Hugging Face's library tell nothing but its progress; gives bars that show the time left, unlike its own."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import tqdm

    class TimeLeft(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("bar_format", None)
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield TimeLeft
    finally:
        logging.set_verbosity(before)


def _not_downloaded(repository: str, error: Exception) -> CheckpointError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    cause = error.__cause__ or error
    reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
    if HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE forbids it"
    short = short_name(repository)
    place = short if short in published_models() else repository
    return CheckpointError(
        f"{repository} is no folder here{_near(repository)}, is not in the cache and cannot be downloaded "
        f"({reason}); fetch {CONFIG} and {WEIGHTS} (for split weights {INDEX} and every shard) from "
        f"{HUB}/{repository}/tree/main, put them into a folder {place}/ here, and run the same command again"
    )
