"""Measure how far each precision is from float32 on a model's weights: embeddings, logits, and contacts.

Usage: python benchmarks/precision.py FASTA [--model MODEL] [--random] [--sequences 20] [--longest 400]
                                      [--structures DIR --chains 20]

Random weights say little about this: their residual stream does not grow and their attention is nearly uniform. Give a
trained model, by its name, folder or file; ``--random`` takes its architecture with random weights, to show the
difference. Rows of the table:

    bfloat16, float16    the whole model (``--dtype bfloat16``, ``--dtype float16``)
    bf16-mixed           ``--dtype bf16-mixed``, which ``--fast`` takes where hardware multiplies bfloat16
    bf16-mixed, GPU      the same with queries, keys and values rounded for attention in bfloat16, as on GPUs
    transformers ...     ``EsmModel`` with SDPA on the same weights, if transformers is installed

Columns: quantiles over residues of 1 - cosine between an embedding and float32's; the same for the mean vector of each
sequence; the largest difference of logits, and the largest logit; long-range P@L with a 95 % interval over chains.
Wherever the hardware does not multiply bfloat16, PyTorch computes the same roundings in software, slowly.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import protea
from protea.checkpoints import hf
from protea.contacts.precision import means
from protea.fasta import read_fasta
from protea.models.layers import Rotary
from protea.models.registry import build
from protea.models.transformer import SelfAttention
from protea.transforms.mixed import PRODUCTS, mix, mixed_attention

Arrays = list[NDArray[np.float32]]


class Measured(NamedTuple):
    """Embeddings ``[L, D]`` and logits ``[L, V]`` of each sequence, and the precision of contacts as text."""

    states: Arrays
    logits: Arrays
    contacts: str


class RoundedLinear(nn.Linear):
    """Multiplies in bfloat16 and returns float32 on a CPU, as queries and keys do on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, N]``."""
        return F.linear(*(value.to(PRODUCTS).float() for value in (x, self.weight, self.bias)))


class RoundedSelfAttention(mixed_attention(SelfAttention)):  # type: ignore[misc]
    """Rounds on a CPU where a GPU rounds."""

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, rounded to bfloat16."""
        q, k, v = super().project(x, rotary)
        return q.to(PRODUCTS), k.to(PRODUCTS), v.to(PRODUCTS)


def measured(model: protea.LanguageModel, sequences: list[str], structures: list[Path]) -> Measured:
    logits = model.logits(sequences) if "logits" in model.capabilities else []
    contacts = ""
    if structures and "contacts" in model.capabilities:
        found = means(model.evaluate_contacts(structures))["long"]["P@L"]
        contacts = f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"
    return Measured(model.embed(sequences), logits, contacts)


def variants(
    folder: Path, sequences: list[str], structures: list[Path]
) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """The rows of the table, and functions that compute them."""

    def ours(dtype: str) -> Measured:
        return measured(protea.load(folder, device="cpu", dtype=dtype), sequences, structures)

    def rounded() -> Measured:
        model = protea.load(folder, device="cpu", trainable=True)
        mix(model.module)
        for layer in model.module.layers:
            layer.self_attn.__class__ = RoundedSelfAttention
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.__class__ = RoundedLinear
        return measured(model, sequences, structures)

    yield "float32", lambda: ours("float32")
    yield "bfloat16", lambda: ours("bfloat16")
    yield "bf16-mixed", lambda: ours("bf16-mixed")
    yield "bf16-mixed, GPU", rounded
    yield "float16", lambda: ours("float16")
    try:
        from transformers import EsmModel, logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    alphabet = protea.load(folder, device="cpu").alphabet

    def theirs(dtype: torch.dtype) -> Measured:
        model = EsmModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", add_pooling_layer=False)
        states = []
        with torch.inference_mode():
            for sequence in sequences:
                ids = torch.from_numpy(alphabet.frame.around(alphabet.encode(sequence))).long()[None]
                result = model.eval()(ids, attention_mask=torch.ones_like(ids))
                states.append(result.last_hidden_state[0, 1:-1].float().numpy())
        return Measured(states, [], "")

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"transformers {str(dtype).removeprefix('torch.')}", lambda dtype=dtype: theirs(dtype)  # type: ignore[misc]


def distances(ours: Arrays, exact: Arrays) -> NDArray[np.float64]:
    """1 - cosine of each pair of rows."""
    pairs = zip(ours, exact, strict=True)
    rows = [(np.atleast_2d(a).astype(np.float64), np.atleast_2d(b).astype(np.float64)) for a, b in pairs]
    lengths = [np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1) for a, b in rows]
    return 1 - np.concatenate([(a * b).sum(1) / n for (a, b), n in zip(rows, lengths, strict=True)])


def row(name: str, found: Measured, exact: Measured) -> str:
    residues = distances(found.states, exact.states)
    pooled = distances(*([state.mean(0) for state in states] for states in (found.states, exact.states)))
    cells = [f"{np.quantile(residues, share):.1e}" for share in (1, 0.999, 0.99, 0.5)]
    cells += [f"{np.quantile(pooled, share):.1e}" for share in (1, 0.5)]
    logits = zip(found.logits, exact.logits, strict=True) if found.logits else ()
    largest = max((float(np.abs(a - b).max()) for a, b in logits), default=None)
    scale = max((float(np.abs(a).max()) for a in exact.logits), default=0.0)
    cells.append("" if largest is None else f"{largest:.1e} of {scale:.0f}")
    return f"| {name} | {' | '.join([*cells, found.contacts])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta")
    parser.add_argument("--model", default="protea-mini")
    parser.add_argument("--random", action="store_true", help="random weights in the model's architecture")
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--longest", type=int, default=400, help="residues of the longest sequence")
    parser.add_argument("--structures", type=Path, help="a folder of structures to measure contacts on")
    parser.add_argument("--chains", type=int, default=20, help="how many of its files, in the order of their names")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", protea.ProteaWarning)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model: Any = protea.load(arguments.model, device="cpu")
        if arguments.random:
            hf.write_random(folder, build(model.config), seed=0, dtype=torch.float32)
        else:
            model.save(folder)
        letters = set(model.alphabet.tokens)
        records = (record.sequence for record in read_fasta([arguments.fasta]))
        fitting = (text for text in records if len(text) <= arguments.longest and set(text) <= letters)
        sequences = list(islice(fitting, arguments.sequences))
        structures = sorted(arguments.structures.iterdir())[: arguments.chains] if arguments.structures else []
        print(f"{arguments.model}{' (random weights)' * arguments.random}: {len(sequences)} sequences, ", end="")
        print(f"{sum(map(len, sequences)):,} residues; contacts on {len(structures)} structures\n")
        print("| precision | largest | 99.9 % | 99 % | median | pooled, largest | median | logits | long P@L |")
        print("|---|---|---|---|---|---|---|---|---|")
        exact: Measured | None = None
        for name, compute in variants(folder, sequences, structures):
            found = compute()
            exact = exact or found
            print(row(name, found, exact), flush=True)


if __name__ == "__main__":
    main()
