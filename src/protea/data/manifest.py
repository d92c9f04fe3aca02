"""``manifest.json``: what a store holds, how it was made, and the hash of each file. Shown as text or a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from protea.alphabet import ESM, ESM1NV, Alphabet
from protea.errors import StoreError, UsageError
from protea.optional import extra
from protea.output import measured, sha256, write_failure
from protea.progress import Progress

MANIFEST: Final = "manifest.json"
PRETRAIN: Final = "pretrain"
"""The command of a store that a run made for itself; other commands are those of ``protea data``."""
LOG: Final = "mmseqs.log"
"""The output of MMseqs2. It contains times, so it has no hash."""
SPLITS: Final = ("train", "valid", "test")

_FORMAT: Final = "protea training data"
_VERSION: Final = 1
_BAR_WIDTH: Final = 40
_BINS_JOINED: Final = 4
_PICTURES: Final = (".png", ".svg", ".pdf")
_INDENT: Final = " " * 12

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
    """The name of the alphabet with these tokens in options; its own name if no family has it."""
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
    """Write the manifest of a folder whose other files are complete. It does not depend on the time or the path."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != LOG)
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "alphabet": {"name": alphabet.name, "tokens": list(alphabet.tokens)},
        "command": dict(command),
        "steps": list(steps),
        "splits": dict(splits),
        "files": {name: measured(folder / name) for name in names},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store; a ``StoreError`` if a file is missing or has another size."""
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


def verify(folder: Path, manifest: Manifest, progress: Progress) -> None:
    """Refuse a store if a file does not match its hash."""
    progress.begin("verify", sum(known["bytes"] for known in manifest["files"].values()))
    for name, known in manifest["files"].items():
        if (digest := sha256(folder / name)) != known["sha256"]:
            raise StoreError(
                f"{folder / name}: does not match the manifest: SHA-256 {digest[:16]}… instead of "
                f"{known['sha256'][:16]}…; copy or build the store again"
            )
        progress.advance(known["bytes"])


def describe(folder: Path, manifest: Manifest, *, verified: bool) -> dict[str, Any]:
    """The description that ``protea data info`` shows."""
    command = manifest["command"]
    return {
        "store": str(folder),
        "made_by": f"protea {PRETRAIN}" if command["command"] == PRETRAIN else f"protea data {command['command']}",
        "alphabet": manifest["alphabet"]["name"],
        "bytes": sum(known["bytes"] for known in manifest["files"].values()),
        "hashes": "verified" if verified else "not compared",
        "command": command,
        "steps": manifest["steps"],
        "splits": {
            name: {**split, "mean_length": round(split["residues"] / max(1, split["sequences"]), 1)}
            for name, split in manifest["splits"].items()
        },
    }


def step_line(step: Mapping[str, Any]) -> str:
    """The numbers of a step, as in ``draw: 12 clusters, 3 valid, 9 train``; zeros are not shown."""
    counts = [_count(value, name) for name, value in step.items() if isinstance(value, int) and value]
    return f"{step['step']}: {', '.join(counts) or 'nothing to do'}"


def split_line(split: Mapping[str, Any]) -> str:
    """The size of a split."""
    return ", ".join(_count(split[name], name) for name in ("clusters", "sequences", "residues"))


def _count(value: int, name: str) -> str:
    """A count with its name in the manifest, which is a plural, or a word such as ``removed``."""
    if value == 1:
        name = {"searches": "search", "entries": "entry"}.get(name, name.removesuffix("s"))
    return f"{value:,} {name.replace('_', ' ')}"


def description_lines(description: Mapping[str, Any]) -> Iterator[str]:
    """The description as text, with a histogram of lengths for each split."""
    for name in ("store", "made_by", "alphabet", "hashes"):
        yield f"{name.replace('_', ' '):<12}{description[name]}"
    yield f"{'size':<12}{description['bytes'] / 1e6:,.1f} MB"
    for step in description["steps"]:
        yield f"{'step':<12}{step_line(step)}"
        yield from (f"{_INDENT}$ {command}" for command in step.get("commands", ()))
    for name, split in description["splits"].items():
        yield ""
        yield f"{name:<12}{split_line(split)}"
        yield (
            f"{_INDENT}largest cluster {split['largest_cluster']:,}, of one {split['clusters_of_one']:,}; "
            f"mean length {split['mean_length']:,}, longest {split['longest']:,}"
        )
        yield from _histogram(split["lengths"])
        shares = sorted(split["composition"].items(), key=lambda item: -item[1])
        yield _INDENT + " ".join(f"{letter} {count / max(1, split['residues']):.2%}" for letter, count in shares)


def _histogram(lengths: Mapping[str, Any]) -> Iterator[str]:
    """Bars of text, each of several bins of the manifest."""
    *within, beyond = lengths["counts"]
    width = lengths["bin"] * _BINS_JOINED
    counts = [sum(within[start : start + _BINS_JOINED]) for start in range(0, len(within), _BINS_JOINED)]
    labels = [f"{start * width:,} to {(start + 1) * width - 1:,}" for start in range(len(counts))]
    longest = max(1, beyond, *counts)
    for label, count in zip([*labels, f"{len(counts) * width:,} on"], [*counts, beyond], strict=True):
        yield f"{_INDENT}{label:<16}{'#' * -(-count * _BAR_WIDTH // longest):<{_BAR_WIDTH}} {count:,}"


def draw_splits(manifest: Manifest, path: Path) -> None:
    """Draw lengths and composition of every split."""
    if path.suffix not in _PICTURES:
        raise UsageError(f"--plot {path}: use a name that ends in {', '.join(_PICTURES)}")
    with extra("plot", "--plot needs matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    letters = [token for token in manifest["alphabet"]["tokens"] if len(token) == 1]
    for name, split in manifest["splits"].items():
        width, counts = split["lengths"]["bin"], split["lengths"]["counts"]
        edges = [number * width for number in range(len(counts) + 1)]
        label = f"{name}: {split['sequences']:,} in {split['clusters']:,} clusters"
        left.stairs([count / max(1, split["sequences"]) for count in counts], edges, label=label)
        shares = [split["composition"].get(letter, 0) / max(1, split["residues"]) for letter in letters]
        right.plot(letters, shares, ".", label=name)
    left.set(xlabel=f"residues (the last bin: {edges[-2]:,} or more)", ylabel="share of sequences")
    right.set(xlabel="residue", ylabel="share of residues")
    left.legend(frameon=False)
    right.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise write_failure(error, path) from error
