"""The parts ``peers-SIZE``: transformers on the same weights and the same sequences as ``embed-SIZE``, in bfloat16.

``EsmModel`` runs with SDPA on sequences sorted by length, longest batch first, in padded batches of at most TOKENS
tokens, padding included. It computes the mean over the residues of each sequence on the GPU and copies the means at the
end of each batch. From file to file it also reads the FASTA file and writes the means with NumPy. Both figures include
the tokenizer.

Usage: python benchmarks/gpu/peers.py OUT WORK SIZE [--dry-run]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from embedding import ENDS, drawn, report
from gpu_tests import SKIPPED
from numpy.typing import NDArray
from sizes import model_folder, parser_for_a_size, size_named, wait_for
from synthetic import read_fasta, write_fasta

TOKENS = 65_536


def batches(found: list[str]) -> Iterator[list[int]]:
    """Return batches of sequence numbers of about the same length, the longest first."""
    order = sorted(range(len(found)), key=lambda n: -len(found[n]))
    first = 0
    while first < len(order):
        count = max(1, TOKENS // (len(found[order[first]]) + ENDS))
        yield order[first : first + count]
        first += count


def means(model: Any, tokenizer: Any, found: list[str], device: str) -> NDArray[np.float32]:
    """Return one vector per sequence."""
    out = np.zeros((len(found), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for numbers in batches(found):
            batch = tokenizer([found[n] for n in numbers], return_tensors="pt", padding=True).to(device)
            states = model(**batch).last_hidden_state
            lengths = batch["attention_mask"].sum(1, keepdim=True)
            places = torch.arange(states.shape[1], device=device)[None]
            residues = ((places >= 1) & (places < lengths - 1)).to(states.dtype)
            summed = torch.einsum("bl,bld->bd", residues, states).float()
            out[numbers] = (summed / (lengths - ENDS)).cpu().numpy()
    return out


def main() -> None:
    given = parser_for_a_size(__doc__).parse_args()
    given.part = f"peers-{given.size}"
    if find_spec("transformers") is None:
        print("no transformers here: carry it in WHEELS")
        sys.exit(SKIPPED)
    from transformers import EsmModel, EsmTokenizer

    size, device = size_named(given.size, dry=given.dry_run), "cpu" if given.dry_run else "cuda"
    folder = wait_for(model_folder(given.work, given.size), given.work)
    found = drawn(size, size.embedded)
    began = time.perf_counter()
    tokenizer = EsmTokenizer.from_pretrained(folder)
    model: Any = EsmModel.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", add_pooling_layer=False
    )
    model.to(device).eval()
    loaded = time.perf_counter() - began
    means(model, tokenizer, found[: max(1, len(found) // 10)], device)
    began = time.perf_counter()
    means(model, tokenizer, found, device)
    alone = time.perf_counter() - began
    fasta = given.work / f"peers-{given.size}.fasta"
    write_fasta(fasta, found)
    began = time.perf_counter()
    np.save(fasta.with_suffix(".npy"), means(model, tokenizer, read_fasta(fasta), device))
    files = time.perf_counter() - began
    times = {"load_seconds": loaded, "overhead_seconds": None, "whole_seconds": None}
    report(given, "transformers", "bfloat16", found, alone, files, **times)


if __name__ == "__main__":
    main()
