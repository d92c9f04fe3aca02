"""Files of a checkpoint folder: safetensors read through a memory map, and folders that appear only when complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from protea.errors import CheckpointError, OutputError

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder, memory-mapped, each file opened once.

    Args:
        folder: holds ``model.safetensors``, or shards and their index.
        normalize: turns a stored key into the one to look it up by.

    Attributes:
        paths: the files, in order.

    Raises:
        CheckpointError: a file is absent, unreadable, truncated, or lacks what the index promises.
    """

    def __init__(self, folder: Path, normalize: Callable[[str], str] = str) -> None:
        self._files = ExitStack()
        self._keys: dict[str, tuple[Any, str, Path]] = {}
        with self._files:
            shards = _shards(folder)
            self.paths = list(shards)
            for path, listed in shards.items():
                handle = self._open(path)
                stored = set(handle.keys())
                if absent := sorted(listed - stored):
                    raise CheckpointError(
                        f"{path}: lacks {absent[0]}, which {folder / INDEX} says it holds; fetch both again"
                    )
                for key in stored:
                    self._keys[normalize(key)] = (handle, key, path)
            self._files = self._files.pop_all()

    def _open(self, path: Path) -> Any:
        try:
            # safetensors calls every file that it cannot open absent; Python says why.
            path.open("rb").close()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
            ) from error
        try:
            return self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch it again") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def __getitem__(self, key: str) -> Tensor:
        handle, stored, _ = self._keys[key]
        tensor: Tensor = handle.get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        handle, stored, _ = self._keys[key]
        return tuple(handle.get_slice(stored).get_shape())

    def dtype(self, key: str) -> str:
        """A tensor's type in the file, as safetensors names it (``F32``, ``BF16``, ...)."""
        handle, stored, _ = self._keys[key]
        return str(handle.get_slice(stored).get_dtype())

    def path(self, key: str) -> Path:
        """The file a tensor is in."""
        return self._keys[key][2]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order.

    Raises:
        CheckpointError: none are there, or one that the index names is absent.
    """
    return list(_shards(folder))


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The weight files, each with the keys the index expects in it (none without an index)."""
    index = folder / INDEX
    # lexists: a link that leads nowhere is a file that cannot be read, and opening it says why.
    if not os.path.lexists(index):
        if os.path.lexists(folder / WEIGHTS):
            return {folder / WEIGHTS: set()}
        if any(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{folder}: holds pytorch_model.bin only, which this version does not read; save it as {WEIGHTS} "
                "with transformers (save_pretrained)"
            )
        raise CheckpointError(f"{folder}: no {WEIGHTS} and no {INDEX}; put the weights beside {CONFIG}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str]] = {}
        for key, name in weight_map.items():
            shards.setdefault(folder / Path(name).name, set()).add(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: damaged: {error!r}; fetch it again") from error
    if not shards:
        raise CheckpointError(f"{index}: its weight_map names no tensors; fetch it again")
    if absent := sorted(path.name for path in shards if not os.path.lexists(path)):
        raise CheckpointError(
            f"{folder}: {', '.join(absent)} missing of the {len(shards)} shards that {INDEX} names; fetch it"
        )
    return dict(sorted(shards.items()))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is written."""
    try:
        # A link, dangling or not, could not be replaced by the finished folder.
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise OutputError(f"{folder}: exists already; remove it or choose another name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}; choose another place") from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        # Temporary folders and safetensors files are born private; others should be able to read the result.
        temporary.chmod(0o777 & ~umask)
        for path in temporary.iterdir():
            path.chmod(0o666 & ~umask)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Readable JSON, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
