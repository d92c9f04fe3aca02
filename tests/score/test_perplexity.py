"""Perplexity beside transformers and Meta's package on the same masks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import protea
from conftest import LoadModel
from messages import check_message
from protea.checkpoints.peers import check_peer, load_peer, masked_losses
from protea.data.masking import Masking
from protea.errors import CapabilityError, ProteaWarning, UsageError
from protea.infer.runner import Runner
from protea.models.registry import alphabets
from protea.score import perplexity

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 3, "G", "ACDEFGHIKLMNPQRSTVWY" * 5, "WWWWWWWW"]


LONG_PAIRS = [("transformers", "esm2"), ("transformers", "esm1b"), ("fair-esm", "esm2")]


@pytest.fixture
def model(load_small: LoadModel, one_thread: None) -> protea.LanguageModel:
    return load_small("esm2")


def masked(model: protea.LanguageModel, masking: Masking, seed: int = 42) -> list[perplexity.MaskedJob]:
    named = ((str(number), model.alphabet.encode(sequence)) for number, sequence in enumerate(SEQUENCES))
    return list(perplexity.mask(model.alphabet, named, masking, seed))


@pytest.mark.parametrize(
    ("library", "name"),
    # Meta's package knows no vocabulary with rows of padding.
    [
        ("transformers", "esm2nv"),
        ("fair-esm", "esm1v"),
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG_PAIRS),
    ],
)
def test_other_libraries_agree(
    load_small: LoadModel, one_thread: None, tmp_path: Path, library: str, name: str
) -> None:
    model = load_small(name)
    model.save(tmp_path / "model")
    jobs = masked(model, Masking())
    run = load_peer(library, tmp_path / "model")
    theirs = [masked_losses(run, job.tokens, job.wanted.places, job.tag) for job in jobs]
    ours = list(perplexity.losses(Runner(model.module, 64), jobs))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert abs(perplexity.of_all(ours) - perplexity.of_all(theirs)) < 0.0005
    assert model.perplexity(SEQUENCES) == pytest.approx(perplexity.of_all(ours), rel=1e-6)


def test_it_is_over_tokens_not_a_mean_of_means(model: protea.LanguageModel) -> None:
    losses = list(perplexity.losses(Runner(model.module, 10_000), masked(model, Masking(select=0.5))))
    mean = np.concatenate(losses).astype(np.float64).mean()
    mean_of_means = np.mean([of_sequence.mean() for of_sequence in losses if len(of_sequence)])
    assert perplexity.of_all(losses) == pytest.approx(np.exp(mean))
    assert perplexity.of_all(losses) != pytest.approx(np.exp(mean_of_means), rel=1e-5)


def test_masks_depend_on_the_seed_and_the_number_alone(model: protea.LanguageModel) -> None:
    values = [model.perplexity(SEQUENCES, token_budget=budget) for budget in (1, 50, 10_000)]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    assert model.perplexity(SEQUENCES, seed=1) != values[0]
    for first, second in zip(masked(model, Masking())[:2], masked(model, Masking()), strict=False):
        np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize("other", ["CARP", "ESM-1"])
def test_the_same_residues_are_masked_in_every_alphabet(model: protea.LanguageModel, other: str) -> None:
    alphabet = alphabets()[other.lower()]
    named = [(sequence, alphabet.encode(sequence)) for sequence in SEQUENCES]
    found = list(perplexity.mask(alphabet, named, Masking(select=0.5), seed=42))
    assert alphabet.frame != model.alphabet.frame
    for ours, theirs in zip(masked(model, Masking(select=0.5)), found, strict=True):
        places = [job.wanted.places for job in (ours, theirs)]
        assert places[0] is not None
        assert places[1] is not None
        np.testing.assert_array_equal(places[0] - 1, places[1] - alphabet.frame.before)
        assert model.alphabet.decode(ours.tag) == alphabet.decode(theirs.tag)


def test_masking_is_what_it_says(model: protea.LanguageModel) -> None:
    for job, sequence in zip(masked(model, Masking(select=1.0, mask=1.0, random=0.0)), SEQUENCES, strict=True):
        assert (job.tokens[1:-1] == model.alphabet.mask).all()
        assert model.alphabet.decode(job.tag) == sequence
    assert not any(len(job.tag) for job in masked(model, Masking(select=0.0)))


def test_wrong_arguments(model: protea.LanguageModel) -> None:
    with pytest.raises(UsageError) as caught:
        model.perplexity([])
    check_message("perplexity.nothing_masked", caught.value)
    with pytest.raises(UsageError):
        model.perplexity(["M"], masking=Masking(select=0.0))
    with pytest.raises(UsageError, match="'none'"):
        model.perplexity(SEQUENCES, masking="none")
    with pytest.warns(ProteaWarning, match="1022 of 1500"):
        model.perplexity(["M" * 1500])
    with pytest.raises(UsageError, match=r"tape.*transformers or fair-esm"):
        check_peer("tape")
    model.module.lm_head = None
    with pytest.raises(CapabilityError, match="logits"):
        model.perplexity(SEQUENCES)


def test_a_family_that_others_lack(load_small: LoadModel) -> None:
    with pytest.raises(UsageError, match="ESM-1nv"):
        check_peer("transformers", load_small("esm1nv").module)


def test_beyond_what_a_float_holds_perplexity_is_infinite() -> None:
    assert perplexity.of_all([np.full(3, 800.0)]) == math.inf
    assert perplexity.of_all([np.zeros(3)]) == 1
