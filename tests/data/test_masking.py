from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from protea.alphabet import ESM, ESM1NV, Alphabet
from protea.data.draws import fold
from protea.data.masking import VARIANTS, Masker, Masking, masking_named
from protea.errors import UsageError

CANONICAL = "ACDEFGHIKLMNPQRSTVWY"

RATES = {
    "standard": (0.15, 0.8, 0.1),
    "bionemo2": (0.15, 0.8, 0.1),
    "huggingface": (0.15, 0.8, 0.1),
    "bionemo1": (0.15, 0.8, 0.1),
    "bionemo1-esm1nv": (0.15, 0.5, 0.5),
    "bionemo1-esm2nv": (0.10, 0.5, 0.5),
    "bionemo1-80-2-18": (0.15, 0.8, 0.02),
}


def pack(alphabet: Alphabet, length: int = 400, sequences: int = 2000) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    letters = alphabet.encode(CANONICAL + "XBUZO")
    residues = letters[np.random.default_rng(0).integers(0, len(letters), (sequences, length))]
    ends = np.ones((sequences, 1), np.uint8)
    tokens = np.concatenate([ends * alphabet.bos, residues, ends * alphabet.eos], axis=1)
    return tokens.ravel().astype(np.uint8), np.arange(sequences + 1) * (length + 2)


def keys_for(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return fold(seed, np.arange(count, dtype=np.uint64))


def near(count: int, total: int, probability: float) -> bool:
    """Within five standard deviations."""
    return abs(count - total * probability) <= 5 * np.sqrt(total * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("missing", [("eos",), ("bos",), ("bos", "eos")])
def test_alphabets_without_bos_or_eos(name: str, missing: tuple[str, ...]) -> None:
    """Residues are masked as they are in any frame; what is no special token of the alphabet is not spared."""
    alphabet = replace(ESM, **dict.fromkeys(missing))
    sequences, length = 300, 50
    residues = np.random.default_rng(0).integers(4, 24, sequences * length).astype(np.uint8)
    starts, keys = np.arange(sequences + 1) * length, keys_for(sequences)
    masked, hidden = Masker(VARIANTS[name], alphabet)(residues, keys, starts)
    known_masked, known_hidden = Masker(VARIANTS[name], ESM)(residues, keys, starts)
    assert (masked == known_masked).all()
    assert (hidden == known_hidden).all()
    tokens, starts = pack(ESM, sequences=300)
    _, hidden = Masker(VARIANTS[name], alphabet)(tokens, keys_for(300), starts)
    for special in ("bos", "eos"):
        chosen = hidden[tokens == getattr(ESM, special)].any()
        assert chosen == (VARIANTS[name].specials or special in missing)


@pytest.mark.parametrize("alphabet", [ESM, pytest.param(ESM1NV, marks=pytest.mark.long)], ids=["esm", "esm-1nv"])
@pytest.mark.parametrize("name", VARIANTS)
def test_rates(name: str, alphabet: Alphabet) -> None:
    masking = VARIANTS[name]
    select, mask, random = RATES[name]
    tokens, starts = pack(alphabet)
    masker = Masker(masking, alphabet)
    masked, hidden = masker(tokens, keys_for(len(starts) - 1), starts)
    special = (tokens == alphabet.bos) | (tokens == alphabet.eos)
    if masking.specials:
        assert near(int(hidden[special].sum()), int(special.sum()), select)
        assert near(int(hidden.sum()), len(tokens), select)
    else:
        assert not hidden[special].any()
        assert near(int(hidden.sum()), int((~special).sum()), select)
    assert (masked[~hidden] == tokens[~hidden]).all()
    # A random token may be the one it replaces, or <mask>, where the pool has them.
    pool = masker.pool
    same = 0.0 if masking.pool == "other-residues" else float(np.isin(tokens[hidden], pool).mean()) / len(pool)
    drawn_mask = 1 / len(pool) if alphabet.mask in pool else 0.0
    total = int(hidden.sum())
    changed = masked[hidden]
    assert near(int((changed == alphabet.mask).sum()), total, mask + random * drawn_mask)
    assert near(int((changed == tokens[hidden]).sum()), total, 1 - mask - random + random * same)
    replaced = changed[(changed != alphabet.mask) & (changed != tokens[hidden])]
    assert near(len(replaced), total, random * (1 - same - drawn_mask))
    assert np.isin(replaced, pool).all()


@pytest.mark.parametrize(
    ("pool", "letters"), [("canonical", CANONICAL), ("other-residues", ESM.residues), ("all", None)]
)
def test_replacements_are_uniform_over_the_pool(pool: str, letters: str | None) -> None:
    masking = Masking(select=1.0, mask=0.0, random=1.0, pool=pool)  # type: ignore[arg-type]
    tokens = np.full(400_000, ESM.encode("A")[0], np.uint8)
    masked, hidden = Masker(masking, ESM)(tokens, keys_for(1), np.array([0, len(tokens)]))
    assert hidden.all()
    expected = range(len(ESM)) if letters is None else sorted(ESM.encode(letters).tolist())
    if pool == "other-residues":
        expected = [token for token in expected if token != tokens[0]]
    counts = np.bincount(masked, minlength=len(ESM))
    assert np.flatnonzero(counts).tolist() == list(expected)
    assert chisquare(counts[list(expected)]).pvalue > 1e-4


def test_selection_is_uniform_over_positions() -> None:
    tokens, starts = pack(ESM, length=30, sequences=20_000)
    _, hidden = Masker(Masking(), ESM)(tokens, keys_for(20_000), starts)
    counts = hidden.reshape(20_000, 32).sum(axis=0)[1:-1]
    assert chisquare(counts).pvalue > 1e-4


def test_at_least_one_is_uniform_and_forced_only_where_none_is() -> None:
    tokens, starts = pack(ESM, length=4, sequences=60_000)
    keys = keys_for(60_000)
    _, free = Masker(Masking(specials=True), ESM)(tokens, keys, starts)
    _, forced = Masker(Masking(specials=True, at_least_one=True), ESM)(tokens, keys, starts)
    free, forced = free.reshape(-1, 6), forced.reshape(-1, 6)
    bare = ~free.any(axis=1)
    assert (forced[~bare] == free[~bare]).all()
    assert (forced[bare].sum(axis=1) == 1).all()
    assert chisquare(forced[bare].sum(axis=0)).pvalue > 1e-4
    _, inside = Masker(Masking(at_least_one=True), ESM)(tokens, keys, starts)
    assert inside.reshape(-1, 6)[:, 1:-1].any(axis=1).all()
    assert not inside.reshape(-1, 6)[:, [0, -1]].any()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.sampled_from(list(VARIANTS)), st.integers(0, 2**32))
def test_masks_do_not_depend_on_other_sequences(lengths: list[int], name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masker = Masker(VARIANTS[name], ESM)
    parts = [np.concatenate([[0], rng.integers(4, 24, length), [2]]).astype(np.uint8) for length in lengths]
    keys = keys_for(len(parts), seed)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    together = masker(np.concatenate(parts), keys, starts)
    alone = [masker(part, keys[n : n + 1], np.array([0, len(part)])) for n, part in enumerate(parts)]
    for number in (0, 1):
        assert (together[number] == np.concatenate([masked[number] for masked in alone])).all()


def test_invalid_values() -> None:
    with pytest.raises(UsageError, match=r"select must be from 0 to 1, got 1\.5"):
        Masking(select=1.5)
    with pytest.raises(UsageError, match=r"mask 0\.8 and random 0\.3"):
        Masking(mask=0.8, random=0.3)
    with pytest.raises(UsageError, match="unknown pool 'some'"):
        Masking(pool="some")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown masking 'bert'; use standard, bionemo2"):
        masking_named("bert")


def test_nothing_and_everything() -> None:
    tokens, starts = pack(ESM, 50, 20)
    masked, hidden = Masker(Masking(select=0), ESM)(tokens, keys_for(20), starts)
    assert not hidden.any()
    assert (masked == tokens).all()
    masked, hidden = Masker(Masking(select=1, mask=1, random=0, specials=True), ESM)(tokens, keys_for(20), starts)
    assert hidden.all()
    assert (masked == ESM.mask).all()
