"""``python -m protea.compat.esm.extract``: the arguments and files of fair-esm's ``esm-extract``.

Each sequence gets a file ``OUTPUT_DIR/LABEL.pt`` for ``torch.load``: a dictionary with its ``label`` and, as asked for,
``representations`` ``[L, D]``, ``mean_representations`` ``[D]`` and ``bos_representations`` ``[D]`` by layer, and
``contacts`` ``[L, L]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protea.compat.esm import pretrained
from protea.compat.esm.data import FastaBatchedDataset
from protea.compat.esm.wrapped import EsmModel
from protea.errors import ProteaError, UsageError
from protea.output import staged
from protea.text import counted, shown


def parser() -> argparse.ArgumentParser:
    """The command line of ``esm-extract``."""
    made = argparse.ArgumentParser(
        prog="python -m protea.compat.esm.extract",
        description="Writes a file of representations for each sequence of a FASTA file, as fair-esm's esm-extract.",
    )
    add = made.add_argument
    add("model_location", help="A published name, or a checkpoint: a .pt file or a folder.")
    add("fasta_file", type=Path, help="The sequences.")
    add("output_dir", type=Path, help="Folder that gets a file LABEL.pt for each sequence.")
    add("--toks_per_batch", type=int, default=4096, help="Most tokens of a batch, with padding (default: 4096).")
    layers = "Layers to write; 0 is the embedding, -1 the last (default: -1)."
    add("--repr_layers", type=int, nargs="+", default=[-1], help=layers)
    what = "What to write: the mean over residues, every residue, the BOS token, contact maps."
    add("--include", nargs="+", choices=["mean", "per_tok", "bos", "contacts"], required=True, help=what)
    cut = "Longer sequences are cut to so many residues (default: 1022)."
    add("--truncation_seq_length", type=int, default=1022, help=cut)
    add("--nogpu", action="store_true", help="Compute on the CPU even if there is a GPU.")
    return made


def extract(
    model_location: str,
    fasta_file: Path,
    output_dir: Path,
    *,
    include: Sequence[str],
    toks_per_batch: int = 4096,
    repr_layers: Sequence[int] = (-1,),
    truncation_seq_length: int = 1022,
    nogpu: bool = False,
) -> None:
    """Write the files; existing ones are replaced. Everything is checked before the first is written."""
    for option, value in (("toks_per_batch", toks_per_batch), ("truncation_seq_length", truncation_seq_length)):
        if value < 1:
            raise UsageError(f"--{option} {value}: use a number of at least 1")
    model, alphabet = pretrained.load_model_and_alphabet(model_location)
    model.eval()
    layers = _from_start(repr_layers, model)
    if "contacts" in include:
        model.require("contacts")
    dataset = FastaBatchedDataset.from_file(fasta_file)
    paths = _paths(output_dir, dataset.sequence_labels)
    convert = alphabet.get_batch_converter(truncation_seq_length)
    for pair in zip(dataset.sequence_labels, dataset.sequence_strs, strict=True):
        convert([pair])
    cut = sum(len(text) > truncation_seq_length for text in dataset.sequence_strs)
    if cut:
        print(f"{counted(cut, 'sequence')} cut to {truncation_seq_length:,} residues (--truncation_seq_length)")
    on_gpu = torch.cuda.is_available() and not nogpu
    device = torch.device("cuda" if on_gpu else "cpu")
    model.to(device)
    batches = dataset.get_batch_indices(toks_per_batch, extra_toks_per_seq=1)
    print(f"{counted(len(dataset), 'sequence')} of {fasta_file}; batches: {len(batches)}")
    for number, batch in enumerate(batches):
        print(f"batch {number + 1} of {len(batches)}: {counted(len(batch), 'sequence')}")
        labels, texts, tokens = convert([dataset[i] for i in batch])
        with torch.inference_mode():
            out = model(tokens.to(device), repr_layers=layers, return_contacts="contacts" in include)
        for i, (label, text) in enumerate(zip(labels, texts, strict=True)):
            length = min(truncation_seq_length, len(text))
            with staged(paths[label], overwrite=True) as path:
                torch.save({"label": label} | _content(out, i, length, include), path)


def _from_start(layers: Sequence[int], model: EsmModel) -> list[int]:
    count = model.num_layers
    if wrong := [layer for layer in layers if not -count - 1 <= layer <= count]:
        raise UsageError(f"--repr_layers {wrong[0]}: this model has layers 0 (the embedding) to {count} (-1)")
    return [layer % (count + 1) for layer in layers]


def _paths(folder: Path, labels: Sequence[str]) -> dict[str, Path]:
    """The file of each label; ``UsageError`` if two labels, such as ``a/b`` and ``a//b``, have the same."""
    paths = {label: _path(folder, label) for label in labels}
    owners: dict[Path, str] = {}
    for label, path in paths.items():
        if (other := owners.setdefault(path, label)) != label:
            raise UsageError(f"records {shown(other)} and {shown(label)} would both be written to {path}; rename one")
    return paths


def _path(folder: Path, label: str) -> Path:
    """The file of a label, whose slashes make folders, as in fair-esm, but never lead out of the output."""
    path = folder / f"{label}.pt"
    if Path(label).is_absolute() or ".." in Path(label).parts or "\0" in label:
        raise UsageError(f"record {shown(label)} would be written to {path}; rename it")
    if any(len(part.encode()) > 255 for part in path.parts):
        raise UsageError(f"record {shown(label)} makes too long a name of a file; shorten its header")
    return path


def _content(out: dict[str, Any], i: int, length: int, include: Sequence[str]) -> dict[str, Any]:
    """The entries of one sequence, copied, since torch.save would write the whole batch."""
    states: dict[int, Tensor] = {layer: x[i].cpu() for layer, x in out["representations"].items()}
    residues = {layer: x[1 : length + 1] for layer, x in states.items()}
    entries: dict[str, Any] = {}
    if "per_tok" in include:
        entries["representations"] = {layer: x.clone() for layer, x in residues.items()}
    if "mean" in include:
        entries["mean_representations"] = {layer: x.mean(0).clone() for layer, x in residues.items()}
    if "bos" in include:
        entries["bos_representations"] = {layer: x[0].clone() for layer, x in states.items()}
    if "contacts" in include:
        entries["contacts"] = out["contacts"][i, :length, :length].cpu().clone()
    return entries


def main() -> None:
    """Run the command line."""
    from protea.compat.esm.__main__ import fail

    try:
        extract(**vars(parser().parse_args()))
    except ProteaError as error:
        fail(error)


if __name__ == "__main__":
    main()
