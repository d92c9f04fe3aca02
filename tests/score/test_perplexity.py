"""Perplexity beside transformers and Meta's package on the same masks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import protea
from conftest import LoadModel
from messages import check_message
from protea.data.masking import Masking
from protea.errors import CapabilityError, ProteaWarning, UsageError
from protea.infer.runner import Runner
from protea.score import perplexity, twin

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 3, "G", "ACDEFGHIKLMNPQRSTVWY" * 5, "WWWWWWWW"]


LONG_PAIRS = [("transformers", "esm2"), ("transformers", "esm1b"), ("fair-esm", "esm2")]


@pytest.fixture
def model(load_small: LoadModel, one_thread: None) -> protea.LanguageModel:
    return load_small("esm2")


def masked(model: protea.LanguageModel, masking: Masking, seed: int = 42) -> list[perplexity.Masked]:
    named = ((str(i), model.alphabet.encode(one)) for i, one in enumerate(SEQUENCES))
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
    questions = masked(model, Masking())
    run = twin.load_twin(library, tmp_path / "model")
    theirs = list(twin.losses(run, questions))
    ours = list(perplexity.losses(Runner(model.module, 64), questions))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert abs(perplexity.of_all(ours) - perplexity.of_all(theirs)) < 0.0005
    assert model.perplexity(SEQUENCES) == pytest.approx(perplexity.of_all(ours), rel=1e-6)


def test_it_is_over_tokens_not_a_mean_of_means(model: protea.LanguageModel) -> None:
    found = list(perplexity.losses(Runner(model.module, 10_000), masked(model, Masking(select=0.5))))
    every = np.concatenate(found).astype(np.float64)
    assert perplexity.of_all(found) == pytest.approx(np.exp(every.mean()))
    assert perplexity.of_all(found) != pytest.approx(
        np.exp(np.mean([one.mean() for one in found if len(one)])), rel=1e-5
    )


def test_masks_depend_on_the_seed_and_the_number_alone(model: protea.LanguageModel) -> None:
    values = [model.perplexity(SEQUENCES, token_budget=budget) for budget in (1, 50, 10_000)]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    assert model.perplexity(SEQUENCES, seed=1) != values[0]
    first, again = masked(model, Masking())[:2], masked(model, Masking())
    for one, other in zip(first, again, strict=False):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_masking_is_what_it_says(model: protea.LanguageModel) -> None:
    everything = masked(model, Masking(select=1.0, mask=1.0, random=0.0))
    for one, sequence in zip(everything, SEQUENCES, strict=True):
        assert len(one.truth) == len(sequence)
        assert (one.tokens[1:-1] == model.alphabet.mask).all()
        assert model.alphabet.decode(one.truth) == sequence
    nothing = masked(model, Masking(select=0.0))
    assert not any(len(one.truth) for one in nothing)


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
        twin.load_twin("tape", Path("x"))
    model.module.lm_head = None
    with pytest.raises(CapabilityError, match="logits"):
        model.perplexity(SEQUENCES)


def test_a_family_that_others_lack(load_small: LoadModel, tmp_path: Path) -> None:
    load_small("esm1nv").save(tmp_path / "model")
    with pytest.raises(UsageError, match="ESM-1nv"):
        twin.load_twin("transformers", tmp_path / "model")


def test_beyond_what_a_float_holds_perplexity_is_infinite() -> None:
    assert perplexity.of_all([np.full(3, 800.0)]) == math.inf
    assert perplexity.of_all([np.zeros(3)]) == 1
