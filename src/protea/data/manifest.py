"""``manifest.json``: what a store holds, how it was made, and the hash of each of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from protea.alphabet import Alphabet
from protea.errors import StoreError, UsageError
from protea.models.registry import alphabets

MANIFEST: Final = "manifest.json"
LOG: Final = "mmseqs.log"
"""What MMseqs2 printed; it tells times and has no hash."""
SPLITS: Final = ("train", "valid", "test")

_FORMAT: Final = "protea training data"
_VERSION: Final = 1
_CHUNK: Final = 1 << 22

Manifest = dict[str, Any]


def alphabet_named(name: str) -> Alphabet:
    """The alphabet that an option names.

    Raises:
        UsageError: there is none of that name.
    """
    known = alphabets()
    if name not in known:
        raise UsageError(f"unknown alphabet {name!r}; use {' or '.join(sorted(known))}")
    return known[name]


def name_of(alphabet: Alphabet) -> str:
    """What options call the alphabet with these tokens; its own name, if no family has it."""
    return next((name for name, known in alphabets().items() if known.tokens == alphabet.tokens), alphabet.name)


def is_store(folder: Path) -> bool:
    """Whether a folder says of itself that it is a store."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == _FORMAT


def write_manifest(
    folder: Path, alphabet: Alphabet, command: Mapping[str, Any], steps: Sequence[Any], splits: Mapping[str, Any]
) -> None:
    """Describe a folder that is complete but for its manifest; nothing in it depends on time or place."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != LOG)
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "alphabet": {"name": alphabet.name, "tokens": list(alphabet.tokens)},
        "command": dict(command),
        "steps": list(steps),
        "splits": dict(splits),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store whose files are all there and of the right size.

    Raises:
        StoreError: the folder is missing or no store, of a later version, or incomplete.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; `protea data` makes stores")
    if not is_store(folder):
        raise StoreError(f"{folder}: no store of training data: it has no {MANIFEST} of one")
    manifest: Manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("version") != _VERSION:
        raise StoreError(
            f"{folder}: a store of version {manifest.get('version')}, this Protea reads {_VERSION}; build it again"
        )
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path}: is missing, and the manifest lists it; build the store again")
        if (size := path.stat().st_size) != known["bytes"]:
            raise StoreError(f"{path}: has {size:,} bytes, {known['bytes']:,} in the manifest; build the store again")
    return manifest


def check_alphabet(folder: Path, manifest: Manifest, alphabet: Alphabet) -> None:
    """See that token ids mean what the caller thinks.

    Raises:
        StoreError: they were written with another alphabet.
    """
    if tuple(manifest["alphabet"]["tokens"]) != alphabet.tokens:
        raise StoreError(
            f"{folder}: its tokens are of the {manifest['alphabet']['name']} alphabet, not of {alphabet.name}; "
            f"build it again with --alphabet {name_of(alphabet)}"
        )


def verify(folder: Path, manifest: Manifest, advance: Callable[[int], None] | None = None) -> None:
    """Compare every file with its hash.

    Raises:
        StoreError: one differs.
    """
    for name, known in manifest["files"].items():
        if (found := _sha256(folder / name, advance)) != known["sha256"]:
            raise StoreError(
                f"{folder / name}: does not match the manifest: SHA-256 {found[:16]}… instead of "
                f"{known['sha256'][:16]}…; copy or build the store again"
            )


def _sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()
