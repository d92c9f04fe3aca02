"""Measure residues per second of ProtT5's and CARP's shapes from file to file, beside the packages of their authors.

ProtT5-XL with 2 layers runs beside transformers' ``T5EncoderModel``, CARP 640M with 4 layers beside Microsoft's
sequence-models; with ``--esm-3``, ESM C 300M with 6 layers beside EvolutionaryScale's esm. Both programs get the same
random weights, with noise in norms and biases, and the same FASTA file: 60 sequences of log-normal lengths (mean about
300, 30 to 1,022). Each reads it, computes the last hidden state of every residue, averages it over each sequence and
writes the averages; start-up does not count. The others compute padded batches of 8 sequences sorted by length. Every
program has a process of its own; in each round both run in turn.

Before they are timed, the averages are compared: they must be within 2e-5 of the largest, or of 1.

Usage: python benchmarks/families.py [--only prot-t5,carp] [--rounds 3] [--sequences 60] [--fast]
                                     [--sequence-models FOLDER] [--esm-3 FOLDER]
       where the FOLDERs are those that ``make test`` installs: .venv/sequence-models and .venv/esm3
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from embed import out_name, protea_job, repeat, run_in_turn, write_fasta
from peers import BATCH, Job, read_records

TOLERANCE = 2e-5
FARTHEST = {"float32": TOLERANCE, "bf16-mixed": 0.02}

Means = Callable[[list[str]], list[Any]]  # some sequences to the averages of their residues, NumPy arrays


def in_batches(fasta: Path, out: Path, means: Means) -> Job:
    """A job that computes batches of sequences sorted by length."""
    import numpy as np
    import torch

    def job() -> None:
        sequences = [sequence for _, sequence in read_records(fasta)]
        order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]))
        found: dict[int, Any] = {}
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                numbers = order[start : start + BATCH]
                found.update(zip(numbers, means([sequences[n] for n in numbers]), strict=True))
        np.save(out.with_suffix(".npy"), np.stack([found[n] for n in range(len(sequences))]))

    return job


def transformers_job(model: Path, fasta: Path, out: Path) -> Job:
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = T5EncoderModel.from_pretrained(model).eval()

    def means(sequences: list[str]) -> list[Any]:
        batch = tokenizer([" ".join(sequence) for sequence in sequences], return_tensors="pt", padding=True)
        states = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return [state[: len(sequence)].mean(0).numpy() for state, sequence in zip(states, sequences, strict=True)]

    return in_batches(fasta, out, means)


def sequence_models_job(model: Path, fasta: Path, out: Path) -> Job:
    from sequence_models.pretrained import load_model_and_alphabet

    loaded, collater = load_model_and_alphabet(str(model.with_suffix(".pt")))

    def means(sequences: list[str]) -> list[Any]:
        (tokens,) = collater([[sequence] for sequence in sequences])
        (states,) = loaded(tokens, repr_layers=[-1])["representations"].values()
        return [state[: len(sequence)].mean(0).numpy() for state, sequence in zip(states, sequences, strict=True)]

    return in_batches(fasta, out, means)


def esm_job(model: Path, fasta: Path, out: Path) -> Job:
    import torch
    from esm.models.esmc import ESMC
    from esm.tokenization import EsmSequenceTokenizer

    weights = torch.load(model.with_suffix(".pt"))
    width = weights["embed.weight"].shape[1]
    layers = len([name for name in weights if name.endswith("attn.out_proj.weight")])
    tokenizer = EsmSequenceTokenizer()
    loaded = ESMC(width, width // 64, layers, tokenizer, use_flash_attn=False).eval()
    loaded.load_state_dict(weights)

    def means(sequences: list[str]) -> list[Any]:
        tokens = tokenizer(sequences, return_tensors="pt", padding=True)["input_ids"]
        states = loaded(tokens).embeddings
        return [state[1 : len(sequence) + 1].mean(0).numpy() for state, sequence in zip(states, sequences, strict=True)]

    return in_batches(fasta, out, means)


SHAPES = {
    "prot-t5": ("prot_t5_xl_uniref50", 2, "", transformers_job),
    "carp": ("carp_640M", 4, "sequence-models", sequence_models_job),
    "esm-c": ("esmc_300m", 6, "evolutionaryscale", esm_job),
}
"""Published name, layers, the other program's format, if it is not Hugging Face's, and that program."""


def write_model(shape: str, folder: Path) -> int:
    """Write random weights as both programs read them; return the number of parameters."""
    import torch

    import protea
    from protea.checkpoints import hf
    from protea.checkpoints.convert import convert
    from protea.checkpoints.hub import published
    from protea.models.registry import build

    name, layers, form, _ = SHAPES[shape]
    config = replace(published(name).config, num_hidden_layers=layers)
    hf.write_random(folder / "initial", build(config), seed=0, dtype=torch.float32)
    model = protea.load(folder / "initial", device="cpu", trainable=True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.module.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save(folder / "model")
    if form:
        convert(folder / "model", folder / "model.pt", form, peers=False)
    return sum(parameter.numel() for parameter in model.module.parameters())


def work(name: str, folder: Path) -> None:
    """Be one program: "protea float32", or the name of a shape for the other program."""
    model, fasta, out = folder / "model", folder / "in.fasta", folder / out_name(name)
    if name.startswith("protea"):
        repeat(protea_job(model, fasta, out, name.split()[1], "cpu"))
    else:
        repeat(SHAPES[name][-1](model, fasta, out))


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    """Start a program, which is ready when it has run once."""
    log = folder / f"{out_name(name)}.log"
    command = [sys.executable, __file__, *sys.argv[1:], "--work", name, str(folder)]
    with log.open("w") as errors:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    while (line := worker.stdout.readline()) and line.strip() != "ready":
        pass
    if not line:
        raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}")
    return worker


def agreement(folder: Path, name: str, other: str) -> float:
    """The largest difference of averages, relative to the largest average if that is above 1."""
    import numpy as np
    import pyarrow.parquet

    theirs = np.load(folder / f"{other}.npy")
    table = pyarrow.parquet.read_table(folder / f"{out_name(name)}.parquet")
    return float(np.abs(np.stack(table["embedding"].to_numpy()) - theirs).max() / max(1, np.abs(theirs).max()))


def measure(shape: str, precisions: list[str], sequences: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = write_model(shape, folder)
        residues = write_fasta(folder / "in.fasta", sequences, mean=300)
        names = [*(f"protea {precision}" for precision in precisions), shape]
        workers = {name: start(name, folder) for name in names}
        differences = {name: agreement(folder, name, shape) for name in names[:-1]}
        for name, found in differences.items():
            if not found <= FARTHEST[name.split()[1]]:
                raise SystemExit(f"{name} differs from the other program by {found:.1e}")
        seconds = run_in_turn(workers, rounds)
    for name in names:
        rates = sorted(residues / one for one in seconds[name])
        ratios = sorted(theirs / ours for ours, theirs in zip(seconds[name], seconds[shape], strict=True))
        cells = [f"{shape}, {parameters / 1e6:,.0f} million parameters" if name == names[0] else ""]
        cells.append("the authors' package" if name == shape else name)
        cells.append(f"{statistics.median(rates):,.0f} ({rates[-1]:,.0f}, {rates[0]:,.0f})")
        cells.append("" if name == shape else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        cells.append(f"{differences[name]:.0e}" if name in differences else "")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAMES", help=f"by comma: {', '.join(SHAPES)}")
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="also measure bf16-mixed")
    parser.add_argument("--sequence-models", default=".venv/sequence-models", metavar="FOLDER")
    parser.add_argument("--esm-3", metavar="FOLDER")
    parser.add_argument("--work", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, folder = arguments.work
        beside = {"carp": arguments.sequence_models, "esm-c": arguments.esm_3}.get(name)
        # EvolutionaryScale's package has the name of Meta's.
        sys.path[:0] = [] if beside is None else [beside]
        work(name, Path(folder))
        return
    chosen = arguments.only.split(",") if arguments.only else list(SHAPES)
    print("| shape | | residues/s | of the authors' package | difference |\n|---|---|---|---|---|")
    for shape in chosen:
        if shape != "esm-c" or arguments.esm_3:
            measure(
                shape, ["float32", *(["bf16-mixed"] if arguments.fast else [])], arguments.sequences, arguments.rounds
            )


if __name__ == "__main__":
    main()
