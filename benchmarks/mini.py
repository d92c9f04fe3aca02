"""What Protea-mini learned, beside what nothing but counting knows, random weights, and published models.

Usage: python benchmarks/mini.py perplexity STORE [--model MODEL ...]
       python benchmarks/mini.py structure DIR/flip [--model MODEL ...]
       python benchmarks/mini.py gb1 DIR/flip [--model MODEL ...]

``perplexity`` is that of masked tokens of a store's validation split, 15 % of it, on the same masks for all: with every
selected token hidden (``mask``), and by the published rule, where one in ten is left as it is and one in ten replaced
(``standard``). Counting models see the same masked input: frequencies of letters; of a letter after the two before it;
of a letter between its two neighbours, all three counted on 50 million residues of the training split. Where a letter
stands at the place in question, they know how often it is the true one. Intervals are by bootstrap over sequences.

``structure`` is the accuracy, residue by residue, of logistic regression from one residue's vector to its secondary
structure (FLIP's split, helix, strand, other; resolved residues only), with a 95 % bootstrap interval over proteins.
One-hot is also given its neighbours, seven to either side. ``gb1`` is Spearman's correlation of ridge regression from
the mean vector of the whole construct to the fitness of GB1's mutants. Neither uses the validation rows of a split.

Models are named as everywhere and run on the CPU; ``random`` is the recipe's architecture with random weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import protea
from protea.alphabet import ESM
from protea.checkpoints.hf import write_random
from protea.data.loader import Loader, Packing
from protea.data.masking import Masking
from protea.data.sampler import Sampler
from protea.data.training_store import TrainingStore
from protea.fasta import read_fasta
from protea.models.registry import build
from protea.train.recipe import read_recipe

Array = NDArray[Any]
MASKINGS = {"mask": Masking(mask=1.0, random=0.0), "standard": Masking()}
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
WINDOW = 7
COUNTED = 50_000_000
TRIGRAMS = "trigrams: between two letters"
SMOOTHING = 100.0
"""What a context's letters are counted for besides, dealt by the next simpler model."""


def load(name: str) -> Any:
    """A model by name; ``random`` is the recipe's architecture."""
    if name != "random":
        return protea.load(name, device="cpu")
    folder = Path(tempfile.mkdtemp()) / "random"
    blank = build(read_recipe("protea-mini").config)
    blank.contact_head = None
    write_random(folder, blank, seed=0, dtype=torch.float32)
    return protea.load(folder, device="cpu")


# Perplexity


def validation(sampler: Sampler, masking: Masking, tokens: int) -> Iterator[Any]:
    """Masked packs of a split."""
    seen = 0
    for batch in Loader(sampler, masking=masking, packing=Packing(tokens=8192), workers=0).batches(epochs=1):
        yield batch
        seen += batch.inputs.input_ids.numel()
        if seen >= tokens:
            return


class Counts:
    """Frequencies of letters, alone and in context."""

    def __init__(self, store: TrainingStore) -> None:
        size = len(ESM)
        triples = np.zeros(size**3)
        seen = 0
        loader = Loader(Sampler(store.split("train"), max_tokens=1024), packing=Packing(tokens=1 << 16), workers=1)
        for batch in loader.batches(epochs=1):
            tokens = batch.targets.numpy()
            triples += np.bincount(tokens[:-2] * size**2 + tokens[1:-1] * size + tokens[2:], minlength=size**3)
            seen += len(tokens)
            if seen >= COUNTED:
                break
        triples = triples.reshape(size, size, size)
        single = triples.sum((0, 1)) + 1
        # What is asked for is never an end.
        self.ends = np.isin(np.arange(size), (ESM.bos, ESM.eos))
        single[self.ends] = 0
        self.single = single / single.sum()
        self.after = self._given(triples.sum(2), self.single)
        self.before = self._given(triples.sum(0).T, self.single)
        self.after_two = self._given(triples, self.after[None])
        independent = self.after[:, None] * self.before[None] / np.maximum(self.single, 1e-12)
        independent /= independent.sum(2, keepdims=True)
        self.between = self._given(triples.transpose(0, 2, 1), independent)

    def _given(self, counts: Array, simpler: Array) -> Array:
        smooth = np.where(self.ends, 0, counts) + SMOOTHING * simpler
        return np.asarray(smooth / smooth.sum(-1, keepdims=True))

    def predict(self, batch: Any, masking: Masking) -> dict[str, Array]:
        """Negative log-probabilities of the masked tokens; a neighbour that is masked itself tells nothing."""
        tokens, rows = batch.inputs.input_ids.numpy(), batch.rows.numpy()
        truth = batch.targets.numpy()[rows]
        second, left, right = tokens[rows - 2], tokens[rows - 1], tokens[rows + 1]
        knows_left, knows_right = left != ESM.mask, right != ESM.mask
        # Before the first residue of a sequence is BOS, and before that another sequence.
        knows_two = knows_left & (second != ESM.mask) & (left != ESM.bos)
        single, after, before = self.single[truth], self.after[left, truth], self.before[right, truth]
        one_sided = np.where(knows_left, after, np.where(knows_right, before, single))
        models = {
            "frequencies of letters": single,
            "trigrams: after two letters": np.where(
                knows_two, self.after_two[second, left, truth], np.where(knows_left, after, single)
            ),
            TRIGRAMS: np.where(knows_left & knows_right, self.between[left, right, truth], one_sided),
        }
        # A letter that is shown was left there, or drawn from all of them.
        shown = tokens[rows]
        left_there = (1 - masking.mask - masking.random) * self.single[shown]
        drawn = masking.random / len(LETTERS)
        trust = np.where(shown == ESM.mask, 0, left_there / np.maximum(left_there + drawn, 1e-12))
        return {name: -np.log((1 - trust) * model + trust * (shown == truth)) for name, model in models.items()}


def losses(model: Any, batch: Any) -> Array:
    """Negative log-probabilities of the masked tokens."""
    with torch.inference_mode():
        logits = model.module.head(model.module(batch.inputs)[batch.rows])[:, : len(ESM)].float()
        return np.asarray(torch.nn.functional.cross_entropy(logits, batch.targets[batch.rows], reduction="none"))


def perplexity(options: argparse.Namespace) -> None:
    store = TrainingStore(options.data, ESM)
    valid = store.split("valid")
    sampler = Sampler(valid, seed=42, max_tokens=1024, crop="head")
    places = sampler.draw(0, np.arange(len(sampler)))
    without = set() if options.without is None else set(options.without.read_text().split())
    kept = np.array([name not in without for name in valid.ids(places.sequence)])
    counts = Counts(store)
    models = {name: load(name) for name in options.model}
    print("| | " + " | ".join(MASKINGS) + " |\n|---|" + "---|" * len(MASKINGS))
    found: dict[str, list[str]] = {}
    for masking in MASKINGS.values():
        each: dict[str, list[Array]] = {}
        sequences: list[Array] = []
        for batch in validation(sampler, masking, options.tokens):
            starts = batch.inputs.cu_seqlens.host_offsets.numpy()
            place = batch.index[np.searchsorted(starts, batch.rows.numpy(), side="right") - 1]
            sequences.append(place[kept[place]])
            for name, values in (
                *counts.predict(batch, masking).items(),
                *((name, losses(model, batch)) for name, model in models.items()),
            ):
                each.setdefault(name, []).append(values[kept[place]])
        number = np.unique(np.concatenate(sequences), return_inverse=True)[1]
        sizes = np.bincount(number)
        draws = np.random.default_rng(0).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=2000)
        means = {
            name: (values.mean(), draws @ np.bincount(number, values) / (draws @ sizes))
            for name, parts in each.items()
            for values in [np.concatenate(parts)]
        }
        for name, (mean, drawn) in means.items():
            found.setdefault(name, []).append(interval(mean, drawn, 2))
        for name in models:
            ratio = interval(means[name][0] - means[TRIGRAMS][0], means[name][1] - means[TRIGRAMS][1], 3)
            found.setdefault(f"{name} : {TRIGRAMS}", []).append(ratio)
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n{len(number):,} masked tokens of {len(sizes):,} sequences; 95 % intervals by bootstrap over sequences")


def interval(mean: float, drawn: Array, digits: int) -> str:
    low, high = np.exp(np.percentile(drawn, (2.5, 97.5)))
    return f"{math.exp(mean):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# Probes


def labelled(path: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Id, sequence or labels, and the attributes of the header."""
    for record in read_fasta([path]):
        yield record.id, record.sequence, dict(pair.split("=", 1) for pair in record.description.split() if "=" in pair)


def one_hot(sequence: str) -> Array:
    return np.eye(len(LETTERS) + 1, dtype=np.float32)[[LETTERS.find(letter) for letter in sequence]]


def with_neighbours(sequence: str) -> Array:
    padded = one_hot("-" * WINDOW + sequence + "-" * WINDOW)
    return np.concatenate([padded[i : i + len(sequence)] for i in range(2 * WINDOW + 1)], axis=1)


def residues(which: str, sequences: list[str]) -> list[Array]:
    if which in ENCODINGS:
        return [ENCODINGS[which](each) for each in sequences]
    return load(which).embed(sequences, long="full")


ENCODINGS = {"one-hot": one_hot, f"one-hot with {WINDOW} neighbours to either side": with_neighbours}


class Chain(NamedTuple):
    """A protein whose structure is known: ``resolved`` says of which residues, ``labels`` has theirs."""

    sequence: str
    resolved: Array
    labels: Array


def chains(folder: Path) -> tuple[list[Chain], list[Chain]]:
    """Those to fit on, and those to test on, of a split with nothing for validation."""
    sequences = {name: text for name, text, _ in labelled(folder / "sequences.fasta.gz")}
    masks = {name: text for name, text, _ in labelled(folder / "mask.fasta.gz")}
    train: list[Chain] = []
    test: list[Chain] = []
    for name, labels, attributes in labelled(folder / "sampled.fasta.gz"):
        resolved = np.frombuffer(masks[name].encode(), np.uint8) == ord("1")
        if attributes["VALIDATION"] != "True" and resolved.any():
            chain = Chain(sequences[name], resolved, np.array(list(labels))[resolved])
            (train if attributes["SET"] == "train" else test).append(chain)
    return train, test


def structure(options: argparse.Namespace) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    heads: list[str] = []
    parts: list[tuple[list[Chain], list[Chain]]] = []
    for folder in ("secondary_structure", "secondary_structure_2022-12"):
        train, test = chains(options.data / folder)
        train = [train[i] for i in np.random.default_rng(0).permutation(len(train))[: options.train]]
        parts.append((train, test))
        tested, fitted = (sum(len(one.labels) for one in part) for part in (test, train))
        heads.append(f"{folder}: {tested:,} residues of {len(test)} proteins, fitted on {fitted:,} of {len(train):,}")
    print("| accuracy (95 %) | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
    distinct = sorted({one.sequence for train, test in parts for one in (*train, *test)})
    for which in (*ENCODINGS, *options.model):
        vectors = dict(zip(distinct, residues(which, distinct), strict=True))
        cells = []
        for train, test in parts:
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            x = np.concatenate([vectors[one.sequence][one.resolved] for one in train])
            probe.fit(x, np.concatenate([one.labels for one in train]))
            right = [probe.predict(vectors[one.sequence][one.resolved]) == one.labels for one in test]
            hits, sizes = np.array([each.sum() for each in right]), np.array([len(each) for each in right])
            draws = np.random.default_rng(0).integers(0, len(hits), (2000, len(hits)))
            low, high = np.percentile(hits[draws].sum(1) / sizes[draws].sum(1), (2.5, 97.5))
            cells.append(f"{hits.sum() / sizes.sum():.1%} ({low:.1%} to {high:.1%})")
        print(f"| {which} | {' | '.join(cells)} |", flush=True)


def gb1(options: argparse.Namespace) -> None:
    from scipy.stats import spearmanr
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    splits = ("two_vs_rest", "sampled")
    print("| | " + " | ".join(f"{split}: Spearman (95 %)" for split in splits) + " |\n|---|" + "---|" * len(splits))
    rows: dict[str, list[str]] = {}
    records_of = {
        split: [one for one in labelled(options.data / "gb1" / f"{split}.fasta.gz") if one[2]["VALIDATION"] != "True"]
        for split in splits
    }
    distinct = sorted({text for records in records_of.values() for _, text, _ in records})
    vector_of: dict[str, dict[str, Array]] = {"one-hot": {text: one_hot(text).ravel() for text in distinct}}
    for which in options.model:
        vector_of[which] = dict(zip(distinct, load(which).embed(distinct, pool="mean"), strict=True))
    for split, records in records_of.items():
        sequences = [text for _, text, _ in records]
        target = np.array([float(each["TARGET"]) for *_, each in records])
        train = np.array([each["SET"] == "train" for *_, each in records])
        for which, vector in vector_of.items():
            vectors = np.stack([vector[text] for text in sequences])
            probe = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-1, 5, 13)))
            probe.fit(vectors[train], target[train])
            predicted, truth = probe.predict(vectors[~train]), target[~train]
            rng = np.random.default_rng(0)
            draws = [rng.integers(0, len(truth), len(truth)) for _ in range(1000)]
            low, high = np.percentile([spearmanr(predicted[d], truth[d]).statistic for d in draws], (2.5, 97.5))
            score = f"{spearmanr(predicted, truth).statistic:.3f} ({low:.3f} to {high:.3f})"
            rows.setdefault(which, []).append(score)
            print(f"  {split}, {which}: {score}", file=sys.stderr)
    for which, cells in rows.items():
        print(f"| {which} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("perplexity", "structure", "gb1"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", nargs="+", default=["random", "protea-mini"])
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of the validation split, at most")
    parser.add_argument("--without", type=Path, help="file of ids of validation sequences to leave out")
    parser.add_argument("--train", type=int, default=3000, help="proteins that the structure probe is fitted on")
    options = parser.parse_args()
    {"perplexity": perplexity, "structure": structure, "gb1": gb1}[options.what](options)


if __name__ == "__main__":
    main()
