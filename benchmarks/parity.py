"""Measure how far Protea, transformers and fair-esm are from float64, on random weights of both initialisations.

The error of a model is the largest over all layers and logits, each relative to max(1, largest magnitude of the
tensor). Needs the test requirements (transformers, fair-esm), and uses the reference implementations in the tests.

Usage: python benchmarks/parity.py [--large]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "models")]

from test_parity import CONFIGS, SEQUENCES, pack_sequences, random_model, run_ours

from protea.checkpoints import hf
from protea.models.encoder import Encoder
from protea.models.esm1b import ESM1B
from references import Outputs, load_transformers, run_fair_esm, run_float64, run_transformers, to_fair_esm


def errors(model: Encoder, run_reference: Callable[[Tensor], Outputs]) -> tuple[float, float, float]:
    """Return the errors of ours to the reference, ours to float64, and the reference to float64."""
    batch = pack_sequences(model, SEQUENCES)
    states, logits = run_ours(model, batch)
    worst = [0.0, 0.0, 0.0]
    for start, end in batch.cu_seqlens.spans():
        ids = batch.input_ids[start:end]
        their_states, their_logits = run_reference(ids)
        true_states, true_logits = run_float64(model, ids)
        rows = zip([*states, logits], [*their_states, their_logits], [*true_states, true_logits], strict=True)
        for ours, theirs, true in rows:
            scale = max(1.0, theirs.abs().max().item())
            mine, their = ours[start:end].double(), theirs.double()
            for column, difference in enumerate((mine - their, mine - true, their - true)):
                worst[column] = max(worst[column], difference.abs().max().item() / scale)
    return worst[0], worst[1], worst[2]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="include ESM-1b in its published shape (5 GB of weights)")
    configs = CONFIGS | ({"ESM-1b 650M": ESM1B} if parser.parse_args().large else {})
    print("| model | weights | reference | ours - reference | ours - float64 | reference - float64 |")
    print("|---|---|---|---|---|---|")
    for name, config in configs.items():
        for initialisation in ("transformers", "fair-esm"):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                model = random_model(config, initialisation, folder)
                hf.save(model, folder / "saved")
                theirs, fair = load_transformers(folder / "saved"), to_fair_esm(model)
                references: dict[str, Callable[[Tensor], Outputs]] = {
                    "transformers": lambda ids, theirs=theirs: run_transformers(theirs, ids),  # type: ignore[misc]
                    "fair-esm": lambda ids, fair=fair: run_fair_esm(fair, ids),  # type: ignore[misc]
                }
                for reference, run in references.items():
                    cells = " | ".join(f"{error:.1e}" for error in errors(model, run))
                    print(f"| {name} | {initialisation} | {reference} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
