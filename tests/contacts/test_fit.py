"""Contact heads fitted: beside scikit-learn itself, beside formulas written out, and on contacts planted by a head."""

from __future__ import annotations

import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from conftest import CONFIGS, LoadModel, disturb
from messages import check_message
from protea.contacts import fit
from protea.contacts.fit import Example, fit_bilinear, fit_regression
from protea.contacts.predict import contacts, features, states
from protea.errors import DataError, DeviceError, MissingExtraError, NonFiniteError, ProteaWarning
from protea.models.encoder import Encoder
from protea.models.layers import BilinearContactHead, ContactHead

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def example(model: Encoder, length: int, seed: int, share: float = 0.05) -> Example:
    """A random sequence, all pairs of it that are 6 or more apart, contacts at random."""
    rng = np.random.default_rng(seed)
    ids = model.alphabet.encode("".join(rng.choice(list(LETTERS), length)))
    rows, columns = np.triu_indices(length, 6)
    return Example(ids, rows, columns, rng.random(len(rows)) < share)


def planted(model: Encoder, one: Example, share: float = 0.05) -> Example:
    """The same, its contacts the pairs that the model's own head finds likeliest."""
    probabilities = contacts(model, one.ids)
    found = probabilities[one.rows, one.columns]
    return one._replace(contacts=found >= np.quantile(found, 1 - share))


def maps(model: Encoder, one: Example) -> np.ndarray:
    return features(model, one.ids, (torch.from_numpy(one.rows), torch.from_numpy(one.columns)))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_regression_is_scikit_learns(load_small: LoadModel, name: str) -> None:
    model = load_small(name).module
    examples = [example(model, 30, 1), example(model, 41, 2)]
    head = fit_regression(model, examples, c=50.0, seed=3)
    x = np.concatenate([maps(model, one) for one in examples])
    y = np.concatenate([one.contacts for one in examples])
    theirs = LogisticRegression(l1_ratio=1, C=50.0, solver="liblinear", random_state=3).fit(x, y)
    np.testing.assert_allclose(head.regression.weight.detach().numpy(), theirs.coef_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.regression.bias.detach().numpy(), theirs.intercept_, rtol=1e-5)
    # And the model with it predicts what scikit-learn does, whatever it had before.
    model.contact_head = head
    probabilities = contacts(model, examples[0].ids)
    found = probabilities[examples[0].rows, examples[0].columns]
    expected = theirs.predict_proba(x[: len(found)])[:, 1]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    assert probabilities.mean() == pytest.approx(y.mean(), abs=0.02)


def test_the_regression_finds_contacts_that_attention_shows(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    assert isinstance(model.contact_head, ContactHead)
    with torch.no_grad():
        model.contact_head.regression.weight.copy_(torch.linspace(-900, 900, 15)[None])
    train, test = ([planted(model, example(model, 60, seed)) for seed in seeds] for seeds in (range(4), range(9, 11)))
    model.contact_head = fit_regression(model, train, c=1000.0)
    for one in test:
        found = contacts(model, one.ids)
        assert roc_auc_score(one.contacts, found[one.rows, one.columns]) > 0.95


def test_more_penalty_keeps_fewer_attention_heads(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    examples = [example(model, 40, 1)]
    kept = [int((fit_regression(model, examples, c=c).regression.weight != 0).sum()) for c in (0.15, 300, 1e5)]
    assert kept[0] == 0  # nothing to be learned from random attention: the bias alone is left
    assert kept == sorted(kept)
    assert kept[2] > kept[1]


@pytest.mark.filterwarnings("always")
def test_a_regression_that_does_not_converge_is_told(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    with pytest.warns(ProteaWarning, match="100 rounds"):
        fit_regression(model, [planted(model, example(model, 20, 1), 0.2)], c=1e12)


def test_what_cannot_be_fitted_is_told(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_small("esm2").module
    one = example(model, 20, 1)
    none, every = (one._replace(contacts=np.full(len(one.rows), value)) for value in (False, True))
    with pytest.raises(DataError) as caught:
        fit_regression(model, [none])
    check_message("contacts.nothing_to_fit", caught.value)
    with pytest.raises(DataError, match=r"^0 of 0 pairs"):
        fit_regression(model, [])
    with pytest.raises(DataError, match=r"^105 of 105 pairs"):
        fit_bilinear(model, [one], [every])
    monkeypatch.setattr(fit, "available_memory", lambda: 1000)
    with pytest.raises(DeviceError, match=r"15 attention maps of 105 pairs .* 0\.0 GB"):
        fit_regression(model, [one])
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match=r"protea\[evaluate\]"):
        fit_regression(model, [one])


def test_a_signal_ends_the_wait_for_a_fit() -> None:
    release = threading.Event()

    def work() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        release.wait(60)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command may have left its own
    with pytest.raises(KeyboardInterrupt):
        fit._in_thread(work)
    release.set()
    with pytest.raises(ZeroDivisionError):
        fit._in_thread(lambda: 1 / 0)


@pytest.mark.parametrize("fitting", [fit_regression, lambda model, examples: fit_bilinear(model, examples, examples)])
def test_a_model_that_gives_nan_is_told(load_small: LoadModel, fitting: Callable[..., object]) -> None:
    model = load_small("esm2").module
    model.word_embeddings.weight.data[:] = math.nan
    with pytest.raises(NonFiniteError, match="infinities or NaN"):
        fitting(model, [example(model, 20, 1)])


def bilinear(model: Encoder, rank: int = 6, seed: int = 1, size: float = 0.3) -> BilinearContactHead:
    head = BilinearContactHead(model.config.hidden_size, rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, size, generator=generator)
    return head


@pytest.mark.parametrize("name", CONFIGS)
def test_bilinear_contacts_are_the_formula(load_small: LoadModel, name: str) -> None:
    model = load_small(name).module
    head = model.contact_head = bilinear(model)
    sequences = [example(model, length, length).ids for length in (7, 1, 19)]
    named = {key: value.double().numpy() for key, value in head.state_dict().items()}
    p, q, b = named["p_proj.weight"], named["q_proj.weight"], named["bias"]
    for ids in sequences:
        found = contacts(model, ids)
        h = states(model, ids).double().numpy()
        assert h.shape == (len(ids), 40)
        expected = np.empty((len(ids), len(ids)))
        for i in range(len(ids)):
            for j in range(len(ids)):
                z = ((p @ h[i]) @ (q @ h[j]) + (p @ h[j]) @ (q @ h[i])) / 2 + b[0]
                expected[i, j] = 1 / (1 + math.exp(-z))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found, found.T)
    assert "contacts" in model.capabilities


def test_a_narrow_model_computes_bilinear_contacts_in_float32(load_small: LoadModel) -> None:
    model = load_small("esm2", dtype="bfloat16").module
    head = model.contact_head = bilinear(model).to(torch.bfloat16)
    ids = example(model, 25, 1).ids
    found = contacts(model, ids)
    expected = head.float()(states(model, ids)).sigmoid().detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("chains", "least"), [(4, 0.7), pytest.param(10, 0.9, marks=pytest.mark.long)])
def test_the_bilinear_head_finds_contacts_that_hidden_states_show(
    load_small: LoadModel, chains: int, least: float
) -> None:
    model = load_small("esm2").module
    model.contact_head = bilinear(model, rank=2)
    length = 50 if chains > 4 else 30
    train = [planted(model, example(model, length, seed)) for seed in range(chains)]
    apart = [planted(model, example(model, length, seed)) for seed in range(20, 23)]
    test = [planted(model, example(model, length, seed)) for seed in range(30, 33)]
    head = fit_bilinear(model, train, apart, rank=4)
    model.contact_head = head
    losses, base = [], 0.05
    for one in test:
        found = contacts(model, one.ids)
        chosen = found[one.rows, one.columns].astype(float)
        assert roc_auc_score(one.contacts, chosen) > least
        losses.append(-np.log(np.where(one.contacts, chosen, 1 - chosen)).mean())
    # Better than the share of contacts, which is what calibration without knowledge would give.
    assert np.mean(losses) < (0.9 if chains > 4 else 1) * -(base * math.log(base) + (1 - base) * math.log(1 - base))


def test_where_there_is_nothing_to_learn_the_bilinear_head_gives_the_share_of_contacts(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    examples = [example(model, 40, seed, share=0.1) for seed in range(6)]
    model.contact_head = fit_bilinear(model, examples[2:], examples[:2], rank=3)
    found = np.concatenate([contacts(model, one.ids)[one.rows, one.columns] for one in examples])
    assert found.mean() == pytest.approx(0.1, abs=0.03)
    assert found.std() < 0.08


def test_the_seed_decides_the_bilinear_head(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    examples = [example(model, 25, seed, share=0.1) for seed in range(4)]
    heads = [fit_bilinear(model, examples[1:], examples[:1], rank=3, seed=seed).state_dict() for seed in (1, 1, 2)]
    for name, value in heads[0].items():
        assert torch.equal(value, heads[1][name])
    assert not torch.equal(heads[0]["p_proj.weight"], heads[2]["p_proj.weight"])


def test_fitting_leaves_the_model_as_it_was(load_small: LoadModel) -> None:
    model = load_small("esm1v").module
    disturb(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = [example(model, 20, seed, share=0.1) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_regression(model, examples)
        fit_bilinear(model, examples[1:], examples[:1])
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
