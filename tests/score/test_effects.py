"""Scores compared with a slow loop on transformers that masks one residue at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import protea
from conftest import LoadModel, disturb
from messages import check_message
from protea.errors import CapabilityError, SequenceTooLongError, UnknownResidueError, UsageError, VariantError
from protea.models.esm2 import ESM2
from protea.progress import Progress
from protea.score import effects
from protea.score.notation import parse_all
from protea.score.variants import CANONICAL
from references import load_transformers

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQX"
VARIANTS = ["M1V", "K2R:T3S", "X34A", "Q33Q", "A7W"]

LONG_FAMILIES = ["esm1b", "esm1v", "esm2nv"]

LogProbs = Callable[[Tensor], Tensor]


@pytest.fixture
def model(load_small: LoadModel, one_thread: None) -> protea.LanguageModel:
    model = load_small("esm2")
    model.module.contact_head = None
    return model


@pytest.fixture(scope="module")
def theirs(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LogProbs:
    """``[T, V]`` of tokens ``[T]``, by transformers."""
    model = protea.load(model_folders["esm2"], device="cpu", trainable=True)
    disturb(model.module)
    model.module.contact_head = None
    folder = tmp_path_factory.mktemp("theirs") / "model"
    model.save(folder)
    reference = load_transformers(folder)

    def run(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            batch = tokens[None].long()
            return reference(batch, attention_mask=torch.ones_like(batch)).logits[0].log_softmax(-1)

    return run


def tokens_of(model: protea.LanguageModel, sequence: str) -> Tensor:
    return torch.tensor([0, *model.alphabet.encode(sequence).tolist(), 2])


def one_by_one(theirs: LogProbs, tokens: Tensor, size: int | None = None) -> Tensor:
    """``[L, V]``: each residue masked, in ProteinGym's window of a long protein."""
    rows = []
    for place in range(1, len(tokens) - 1):
        masked = tokens.clone()
        masked[place] = 32
        start, end = 0, len(tokens)
        if size is not None and len(tokens) > size:
            start = min(max(place - size // 2, 0), len(tokens) - size)
            end = start + size
        rows.append(theirs(masked[start:end])[place - start])
    return torch.stack(rows)


def ratio(table: Tensor, model: protea.LanguageModel, variant: str) -> float:
    column = model.alphabet.tokens.index
    return sum(
        float(table[int(one[1:-1]) - 1, column(one[-1])] - table[int(one[1:-1]) - 1, column(one[0])])
        for one in variant.split(":")
    )


@pytest.mark.parametrize("budget", [100, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 10_000))])
def test_masked_marginals(model: protea.LanguageModel, theirs: LogProbs, budget: int) -> None:
    table = one_by_one(theirs, tokens_of(model, SEQUENCE))
    expected = [ratio(table, model, variant) for variant in VARIANTS]
    found = model.score(SEQUENCE, VARIANTS, token_budget=budget)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert found[3] == 0


def test_wildtype_marginals(model: protea.LanguageModel, theirs: LogProbs) -> None:
    table = theirs(tokens_of(model, SEQUENCE))[1:-1]
    expected = [ratio(table, model, variant) for variant in VARIANTS]
    found = model.score(SEQUENCE, VARIANTS, method="wildtype-marginals")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def log_likelihood(model: protea.LanguageModel, theirs: LogProbs, sequence: str) -> float:
    tokens = tokens_of(model, sequence)
    return float(one_by_one(theirs, tokens).gather(1, tokens[1:-1, None].long()).sum())


@pytest.mark.filterwarnings("ignore:.*another length:protea.errors.ProteaWarning")
def test_pseudo_likelihoods(model: protea.LanguageModel, theirs: LogProbs) -> None:
    sequence = SEQUENCE[:10]
    changed = {
        "M1V": "V" + sequence[1:],
        "K2del": sequence[0] + sequence[2:],
        "K2_T3insWW": sequence[:2] + "WW" + sequence[2:],
        "K2_A4delinsG:R10Q": sequence[0] + "G" + sequence[4:9] + "Q",
    }
    wild = log_likelihood(model, theirs, sequence)
    sums = [log_likelihood(model, theirs, mutant) for mutant in changed.values()]
    found = model.score(sequence, list(changed), method="pseudo-likelihood-sum")
    np.testing.assert_allclose(found, np.array(sums) - wild, rtol=0, atol=1e-4)
    # As ProteinGym's Tranception, which divides each likelihood by the length of its own sequence.
    means = [value / len(mutant) - wild / len(sequence) for value, mutant in zip(sums, changed.values(), strict=True)]
    by_means = model.score(sequence, list(changed), method="pseudo-likelihood")
    np.testing.assert_allclose(by_means / len(sequence), means, rtol=0, atol=1e-5)
    assert by_means[0] == found[0]  # the same length, the same number


@pytest.mark.filterwarnings("ignore:.*another length:protea.errors.ProteaWarning")
def test_scores_of_deletions_do_not_follow_their_length(model: protea.LanguageModel) -> None:
    seed = 5
    print("seed", seed)
    rng = np.random.default_rng(seed)
    ranks: dict[str, list[float]] = {"pseudo-likelihood": [], "pseudo-likelihood-sum": []}
    for _ in range(12):
        sequence = "".join(rng.choice(list(CANONICAL), 16))
        lengths = rng.integers(1, 13, 10)
        starts = [int(rng.integers(0, 16 - length)) for length in lengths]
        variants = [
            f"{sequence[start]}{start + 1}_{sequence[start + length - 1]}{start + length}del"
            for start, length in zip(starts, lengths.tolist(), strict=True)
        ]
        for method, values in ranks.items():
            values.append(spearmanr(lengths, model.score(sequence, variants, method=method)).statistic)
    print(ranks)
    assert np.mean(ranks["pseudo-likelihood-sum"]) > 0.9
    assert abs(np.mean(ranks["pseudo-likelihood"])) < 0.3


def test_pseudo_perplexity(model: protea.LanguageModel, theirs: LogProbs) -> None:
    sequences = [SEQUENCE[:14], "M", "WW", SEQUENCE[:9]]
    expected = [np.exp(-log_likelihood(model, theirs, sequence) / len(sequence)) for sequence in sequences]
    np.testing.assert_allclose(model.pseudo_perplexity(sequences), expected, rtol=2e-5)
    # Alone, in company, in small packs: the same to rounding.
    np.testing.assert_allclose(model.pseudo_perplexity(sequences, token_budget=5), expected, rtol=2e-5)
    assert model.pseudo_perplexity([]).shape == (0,)


class ShortESM2(ESM2):
    """One that was trained on 12 tokens."""

    trained_tokens = 12


@pytest.fixture
def short(model: protea.LanguageModel) -> protea.LanguageModel:
    model.module.__class__ = ShortESM2
    return model


def test_long_proteins_are_seen_through_windows(short: protea.LanguageModel, theirs: LogProbs) -> None:
    table = one_by_one(theirs, tokens_of(short, SEQUENCE), size=12)
    expected = [ratio(table, short, variant) for variant in VARIANTS]
    np.testing.assert_allclose(short.score(SEQUENCE, VARIANTS), expected, rtol=0, atol=2e-5)
    whole = one_by_one(theirs, tokens_of(short, SEQUENCE))
    np.testing.assert_allclose(
        short.score(SEQUENCE, VARIANTS, long="full"),
        [ratio(whole, short, variant) for variant in VARIANTS],
        rtol=0,
        atol=2e-5,
    )
    with pytest.raises(SequenceTooLongError, match=r"^the sequence: 34 residues .* 10 .*full"):
        short.score(SEQUENCE, VARIANTS, long="error")


def test_overlapping_windows_are_joined_by_weight(short: protea.LanguageModel, theirs: LogProbs) -> None:
    from protea.score.expected import edge_weights, overlapping

    tokens = tokens_of(short, SEQUENCE)
    total, weight = torch.zeros(len(tokens), 33), torch.zeros(len(tokens), 1)
    for start in overlapping(len(tokens), 12):
        weights = torch.tensor(edge_weights(12), dtype=torch.float32)[:, None]
        total[start : start + 12] += theirs(tokens[start : start + 12]) * weights
        weight[start : start + 12] += weights
    table = (total / weight)[1:-1]
    found = short.score(SEQUENCE, VARIANTS, method="wildtype-marginals")
    np.testing.assert_allclose(found, [ratio(table, short, variant) for variant in VARIANTS], rtol=0, atol=2e-5)


class Counting(Progress):
    done = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount


@pytest.mark.parametrize("method", effects.METHODS)
def test_proteins_do_not_see_each_other(model: protea.LanguageModel, method: str) -> None:
    sequences = {"a": SEQUENCE, "b": "WWKKA", "c": "M", "d": SEQUENCE[:20:-1]}
    variants = {"a": ["M1V", "K2R"], "b": ["W1A:A5K"], "c": [], "d": ["X1M"]}
    proteins = [
        effects.Protein(name, one, parse_all(variants[name], one, model.alphabet)) for name, one in sequences.items()
    ]
    progress = Counting()
    how = effects.Scoring(method=method, token_budget=60)
    together = list(effects.score(model.module, proteins, how, progress))
    assert progress.done == how.passes(proteins)
    assert [len(one) for one in together] == [2, 1, 0, 1]
    for name, found in zip(sequences, together, strict=True):
        alone = model.score(sequences[name], variants[name], method=method)
        np.testing.assert_allclose(found, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["esm1nv", *(pytest.param(name, marks=pytest.mark.long) for name in LONG_FAMILIES)])
def test_every_family_scores(load_small: LoadModel, one_thread: None, name: str) -> None:
    model = load_small(name)
    sequence = "MKTAYIAKQR"
    expected = []
    for place, new in ((0, "V"), (4, "W")):
        hidden = sequence[:place] + "<mask>" + sequence[place + 1 :]
        logits = torch.tensor(model.logits([hidden])[0][place]).log_softmax(-1)
        column = model.alphabet.tokens.index
        expected.append(float(logits[column(new)] - logits[column(sequence[place])]))
    np.testing.assert_allclose(model.score(sequence, ["M1V", "Y5W"]), expected, rtol=0, atol=2e-5)
    for method in effects.METHODS:
        assert np.isfinite(model.score(sequence, ["M1V"], method=method)).all()


def test_a_scan_prefers_what_logits_prefer(model: protea.LanguageModel) -> None:
    scan = [f"{wild}{i + 1}{new}" for i, wild in enumerate(SEQUENCE) for new in CANONICAL if new != wild]
    found = model.score(SEQUENCE, scan)
    assert found.shape == (len(scan),)
    assert found.dtype == np.float64


def test_wrong_arguments(model: protea.LanguageModel) -> None:
    with pytest.raises(VariantError, match=r"^K2del: masked-marginals") as caught:
        model.score(SEQUENCE, ["M1V", "K2del"])
    check_message("score.method_of_deletions", caught.value)
    with pytest.raises(VariantError, match=r"^M1_X34del: "):
        model.score(SEQUENCE, ["M1_X34del"], method="pseudo-likelihood")
    with pytest.raises(UsageError, match=r"'masked'.*wildtype-marginals, pseudo-likelihood, pseudo-likelihood-sum"):
        model.score(SEQUENCE, ["M1V"], method="masked")
    with pytest.raises(UsageError, match=r"'cut'.*window, full, error"):
        model.score(SEQUENCE, ["M1V"], long="cut")
    with pytest.raises(UsageError, match=r"'truncate'.*window, full, error"):
        model.pseudo_perplexity([SEQUENCE], long="truncate")
    with pytest.raises(UsageError, match=r"^variants: "):
        model.score(SEQUENCE, "M1V")
    with pytest.raises(UsageError, match=r"^the sequence is empty"):
        model.score("", [])
    with pytest.raises(UsageError, match=r"^sequence 1 is empty"):
        model.pseudo_perplexity(["M", ""])
    with pytest.raises(UsageError, match=r" 0$"):
        model.score("M", ["M1V"], token_budget=0)
    calls: list[Callable[[str], object]] = [
        lambda sequence: model.pseudo_perplexity([sequence]),
        lambda sequence: model.perplexity([sequence]),
        lambda sequence: model.score(sequence, ["M1V"]),
    ]
    for call in calls:
        with pytest.raises(UnknownResidueError, match="<mask> at position 3"):
            call("MK<mask>TA")
    assert model.score(SEQUENCE, []).shape == (0,)
    model.module.lm_head = None
    with pytest.raises(CapabilityError, match="logits"):
        model.score(SEQUENCE, ["M1V"])
