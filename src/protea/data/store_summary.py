"""What a manifest says, for people: lines, a picture, or JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from protea.data.manifest import Manifest
from protea.errors import OutputError, UsageError
from protea.optional import extra

_WIDTH: Final = 40
_ROWS: Final = 16
_FORMATS: Final = (".png", ".svg", ".pdf")


def describe(folder: Path, manifest: Manifest, *, verified: bool) -> dict[str, Any]:
    """All that ``protea data info`` shows."""
    command = manifest["command"]
    return {
        "store": str(folder),
        "made_by": f"protea data {command['command']}",
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


def lines(description: dict[str, Any]) -> Iterator[str]:
    """The description as text, with a histogram of lengths a split."""
    for name in ("store", "made_by", "alphabet", "hashes"):
        yield f"{name.replace('_', ' '):<12}{description[name]}"
    yield f"{'size':<12}{description['bytes'] / 1e6:,.1f} MB"
    for step in description["steps"]:
        shown = [
            f"{value:,} {key.replace('_', ' ')}" for key, value in step.items() if isinstance(value, int) and value
        ]
        yield f"{'step':<12}{step['step']}: {', '.join(shown) or 'nothing to do'}"
        yield from (f"{'':<12}$ {command}" for command in step.get("commands", ()))
    for name, split in description["splits"].items():
        yield ""
        counts = (f"{split[what]:,} {what}" for what in ("clusters", "sequences", "residues"))
        yield f"{name:<12}{', '.join(counts)}"
        yield (
            f"{'':<12}largest cluster {split['largest_cluster']:,}, of one {split['clusters_of_one']:,}; "
            f"mean length {split['mean_length']:,}, longest {split['longest']:,}"
        )
        yield from _histogram(split["lengths"])
        total = max(1, split["residues"])
        shares = sorted(split["composition"].items(), key=lambda item: -item[1])
        yield f"{'':<12}" + " ".join(f"{letter} {count / total:.2%}" for letter, count in shares)


def draw(manifest: Manifest, path: Path) -> None:
    """Draw lengths and composition of every split.

    Raises:
        UsageError: the suffix names no format of pictures.
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise UsageError(f"--plot {path}: use a name that ends in {', '.join(_FORMATS)}")
    with extra("plot", "--plot needs matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    letters = [token for token in manifest["alphabet"]["tokens"] if len(token) == 1]
    for name, split in manifest["splits"].items():
        width, counts = split["lengths"]["bin"], split["lengths"]["counts"]
        total = max(1, split["sequences"])
        edges = [number * width for number in range(len(counts) + 1)]
        label = f"{name}: {split['sequences']:,} in {split['clusters']:,} clusters"
        left.stairs([count / total for count in counts], edges, label=label)
        shares = [split["composition"].get(letter, 0) / max(1, split["residues"]) for letter in letters]
        right.plot(letters, shares, ".", label=name)
    left.set(xlabel=f"residues (the last bin: {edges[-2]:,} or more)", ylabel="share of sequences")
    right.set(xlabel="residue", ylabel="share of residues")
    left.legend(frameon=False)
    right.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _histogram(lengths: dict[str, Any]) -> Iterator[str]:
    """Bars of text, the bins joined so that there are few."""
    width, counts = lengths["bin"], lengths["counts"]
    *within, beyond = counts
    step = -(-len(within) // _ROWS)
    rows = [(start * width, sum(within[start : start + step])) for start in range(0, len(within), step)]
    rows.append((len(within) * width, beyond))
    most = max(1, *(count for _, count in rows))
    for start, count in rows:
        label = f"{start:,} on" if start == rows[-1][0] else f"{start:,} to {start + step * width - 1:,}"
        yield f"{'':<12}{label:<16}{'#' * -(-count * _WIDTH // most):<{_WIDTH}} {count:,}"
