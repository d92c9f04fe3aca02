"""``manifest.json``: what a store holds, how it was made, and the hash of each of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from protea.alphabet import ESM, ESM1NV, Alphabet
from protea.errors import StoreError, UsageError
from protea.output import sha256
from protea.progress import SILENT, Progress

MANIFEST: Final = "manifest.json"
LOG: Final = "mmseqs.log"
"""The output of MMseqs2. It contains times, so it has no hash."""
SPLITS: Final = ("train", "valid", "test")

_FORMAT: Final = "protea training data"
_VERSION: Final = 1

Manifest = dict[str, Any]


def alphabet_named(name: str) -> Alphabet:
    """The alphabet that options call by this name."""
    for alphabet in (ESM, ESM1NV):  # these need no PyTorch
        if name == alphabet.name.lower():
            return alphabet
    from protea.models.registry import alphabets

    known = alphabets()
    if name not in known:
        raise UsageError(f"unknown alphabet {name!r}; use {' or '.join(sorted(known))}")
    return known[name]


def name_of(alphabet: Alphabet) -> str:
    """What options call the alphabet with these tokens; its own name if no family has it."""
    from protea.models.registry import alphabets

    return next((name for name, known in alphabets().items() if known.tokens == alphabet.tokens), alphabet.name)


def is_store(folder: Path) -> bool:
    """Whether a folder has the manifest of a store."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == _FORMAT


def write_manifest(
    folder: Path, alphabet: Alphabet, command: Mapping[str, Any], steps: Sequence[Any], splits: Mapping[str, Any]
) -> None:
    """Describe a folder whose other files are complete. The text does not depend on time or place."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != LOG)
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "alphabet": {"name": alphabet.name, "tokens": list(alphabet.tokens)},
        "command": dict(command),
        "steps": list(steps),
        "splits": dict(splits),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store; all its files exist and have the right size.

    Raises:
        StoreError: the folder is missing or no store, of another version, or incomplete.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; `protea data` makes stores")
    if not is_store(folder):
        raise StoreError(f"{folder}: is not a store of training data; `protea data` makes stores")
    manifest: Manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("version") != _VERSION:
        raise StoreError(
            f"{folder}: has version {manifest.get('version')}, this Protea reads version {_VERSION}; build it again"
        )
    for name, known in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != known["bytes"]:
            fault = "is missing" if size is None else f"has {size:,} bytes, but {known['bytes']:,} in the manifest"
            raise StoreError(f"{path}: {fault}; build the store again")
    return manifest


def check_alphabet(folder: Path, manifest: Manifest, alphabet: Alphabet) -> None:
    """Refuse a store with another alphabet."""
    if tuple(manifest["alphabet"]["tokens"]) != alphabet.tokens:
        raise StoreError(
            f"{folder}: has the {manifest['alphabet']['name']} alphabet, the model has {alphabet.name}; build the "
            f"store again with --alphabet {name_of(alphabet)}"
        )


def verify(folder: Path, manifest: Manifest, progress: Progress = SILENT) -> None:
    """Refuse a store with a file that differs from its hash."""
    progress.begin("verify", sum(known["bytes"] for known in manifest["files"].values()))
    for name, known in manifest["files"].items():
        if (digest := sha256(folder / name)) != known["sha256"]:
            raise StoreError(
                f"{folder / name}: does not match the manifest: SHA-256 {digest[:16]}… instead of "
                f"{known['sha256'][:16]}…; copy or build the store again"
            )
        progress.advance(known["bytes"])
