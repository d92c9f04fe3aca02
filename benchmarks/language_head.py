"""Fit a language-model head on the frozen encoder of a model that has none, and save both.

The published weights that can be had without a network lack the head, and precision must be measured on perplexity and
on scores of variants too. Masked tokens of natural proteins (15 %, as in Meta's training) teach the head; the encoder
stays as it is. Ten minutes on two cores reach a perplexity that serves for comparisons, not for more.

Usage: python benchmarks/language_head.py FASTA... --model FOLDER --output FOLDER [--minutes 10]
"""

from __future__ import annotations

import argparse
import time
import warnings
from itertools import cycle

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import protea
from protea.fasta import read_fasta
from protea.models.layers import LanguageModelHead
from protea.packing import pack

PACK = 4096
LONGEST = 1022
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", protea.ProteaWarning)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    # The frozen encoder computes as inference does; the head is trained beside it.
    encoder = protea.load(arguments.model, device="cpu", dtype="bf16-mixed").module
    alphabet, width = encoder.alphabet, encoder.config.hidden_size
    words = encoder.get_parameter("word_embeddings.weight").detach()
    head = LanguageModelHead(width, len(words), encoder.config.layer_norm_eps)
    nn.init.normal_(head.dense.weight, std=0.02)
    nn.init.zeros_(head.dense.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    began, losses, chosen = time.monotonic(), [], []
    for record in cycle(read_fasta(arguments.fasta)):
        chosen.append(alphabet.frame.around(alphabet.encode(record.sequence[:LONGEST])))
        if sum(map(len, chosen)) < PACK:
            continue
        batch = pack(chosen)
        chosen = []
        truth = batch.input_ids.clone()
        places = torch.from_numpy(rng.random(len(truth)) < 0.15)
        places &= ~torch.isin(truth, torch.tensor(alphabet.frame.specials))
        kind = torch.from_numpy(rng.random(len(truth)))
        batch.input_ids[places & (kind < 0.8)] = alphabet.mask
        other = places & (kind >= 0.9)
        batch.input_ids[other] = torch.from_numpy(rng.integers(4, 24, int(other.sum())))
        with torch.inference_mode():
            states = encoder(batch)[places]
        loss = F.cross_entropy(head(states.clone(), words), truth[places])
        share = (time.monotonic() - began) / 60 / arguments.minutes
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, len(losses) / 100) * max(0.02, 1 - share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 200 == 0:
            print(
                f"{len(losses)} packs, perplexity of masked residues {np.exp(np.mean(losses[-200:])):.2f}", flush=True
            )
        if share >= 1:
            break
    model = protea.load(arguments.model, device="cpu", trainable=True)
    model.module.lm_head = head
    model.save(arguments.output)


if __name__ == "__main__":
    main()
