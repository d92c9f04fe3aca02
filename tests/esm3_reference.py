"""EvolutionaryScale's own code, in a process of its own: it has the name of Meta's package.

``python esm3_reference.py WEIGHTS TOKENS OUT LAYERS WIDTH`` loads a state dict, computes the sequences of ids in TOKENS
(JSON) in float32 and float64, and writes hidden states and logits to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from esm.models.esmc import ESMC


def main(weights: str, tokens: str, out: str, layers: str, width: str) -> None:
    model = ESMC(int(width), int(width) // 64, int(layers), SimpleNamespace(pad_token_id=1), use_flash_attn=False)
    model.load_state_dict(torch.load(weights))
    model.eval()
    arrays = {}
    for kind in (torch.float32, torch.float64):
        model.to(kind)
        for number, ids in enumerate(json.loads(Path(tokens).read_text())):
            row = torch.tensor([ids])
            with torch.no_grad():
                result = model(row)
                states = [model.embed(row), *result.hidden_states[:-1], result.embeddings]
            arrays[f"{kind}/{number}/states"] = torch.stack([state[0] for state in states]).numpy()
            arrays[f"{kind}/{number}/logits"] = result.sequence_logits[0].numpy()
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
