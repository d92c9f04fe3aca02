"""What a store holds, as JSON, text or a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from protea.data.manifest import Manifest
from protea.errors import UsageError
from protea.optional import extra
from protea.output import write_failure

_BAR_WIDTH: Final = 40
_BINS_JOINED: Final = 4
_FORMATS: Final = (".png", ".svg", ".pdf")
_INDENT: Final = " " * 12


def describe(folder: Path, manifest: Manifest, *, verified: bool) -> dict[str, Any]:
    """What ``protea data info`` shows."""
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


def step_line(step: Mapping[str, Any]) -> str:
    """The numbers of a step, as in ``draw: 12 clusters, 3 valid, 9 train``; zeros are not shown."""
    counts = [f"{value:,} {name.replace('_', ' ')}" for name, value in step.items() if isinstance(value, int) and value]
    return f"{step['step']}: {', '.join(counts) or 'nothing to do'}"


def split_line(split: Mapping[str, Any]) -> str:
    """The size of a split."""
    return ", ".join(f"{split[name]:,} {name}" for name in ("clusters", "sequences", "residues"))


def lines(description: Mapping[str, Any]) -> Iterator[str]:
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


def draw(manifest: Manifest, path: Path) -> None:
    """Draw lengths and composition of every split.

    Raises:
        UsageError: the file's suffix is not that of a picture.
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
