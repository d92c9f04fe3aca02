"""scikit-learn's classifier and regressor over sequences, and predictors in Python: beside the commands, to the bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

import protea
from conftest import Run
from messages import check_message
from protea.embed import embeddings
from protea.errors import CheckpointError, DataError, OutputError, ProteaWarning, UsageError
from protea.finetune.splits import validation
from protea.finetune.tasks import TASKS, Labelled, LabelledExample
from protea.sklearn import EmbeddingTransformer, ProteaClassifier, ProteaRegressor

LETTERS = list("ACDEFGHIKLMNPQRSTVWY")
RNG = np.random.default_rng(0)
SEQUENCES = ["".join(RNG.choice(LETTERS, RNG.integers(20, 40))) for _ in range(240)]
VALUES = np.array([20 * (text.count("A") + text.count("W")) / len(text) for text in SEQUENCES])
CLASSES = np.where(np.median(VALUES) < VALUES, "many", "few")
NEW = SEQUENCES[:7]

Make = Callable[..., Any]


@pytest.fixture
def classifier(model_folders: dict[str, Path], one_thread: None) -> Make:
    return lambda **options: ProteaClassifier(model_folders["esm2"], **{"device": "cpu", "layer": 0, **options})


@pytest.fixture
def regressor(model_folders: dict[str, Path], one_thread: None) -> Make:
    return lambda **options: ProteaRegressor(model_folders["esm2"], **{"device": "cpu", "layer": 0, **options})


def write(path: Path) -> Path:
    path.write_text("".join(f">s{number}\n{text}\n" for number, text in enumerate(NEW)))
    return path


CHECKS = [
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_set_params,
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_mixin_order,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_estimator_tags_renamed,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", [ProteaClassifier, ProteaRegressor])
def test_checks_of_scikit_learn(check: Callable[[str, Any], None], kind: type[Any]) -> None:
    check(kind.__name__, kind(device="cpu"))


def test_what_is_learned(classifier: Make, regressor: Make) -> None:
    train, test = slice(0, 200), slice(200, None)
    ours = classifier().fit(SEQUENCES[train], CLASSES[train])
    check_is_fitted(ours)
    assert ours.classes_.tolist() == ["few", "many"]
    assert ours.score(SEQUENCES[test], CLASSES[test]) > 0.8
    probabilities = ours.predict_proba(SEQUENCES[test])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(ours.predict(SEQUENCES[test]), ours.classes_[probabilities.argmax(1)])
    assert "calibration: 9 of 20 validation examples" in ours.notes_
    assert regressor().fit(SEQUENCES[train], VALUES[train]).score(SEQUENCES[test], VALUES[test]) > 0.8


@pytest.mark.parametrize("form", [np.array, pd.Series, pl.Series, lambda x: pd.DataFrame({"s": x}), tuple])
def test_forms_of_columns(classifier: Make, form: Callable[[Any], Any]) -> None:
    expected = classifier().fit(SEQUENCES[:60], CLASSES[:60])
    labels = CLASSES[:60] if form is tuple else form(CLASSES[:60])
    found = classifier().fit(form(SEQUENCES[:60]), labels)
    np.testing.assert_array_equal(found.predict_proba(form(NEW)), expected.predict_proba(NEW))


def test_classes_keep_their_type_and_order(classifier: Make) -> None:
    numbers = np.where(CLASSES == "few", 9, 10)
    ours = classifier().fit(SEQUENCES[:60], numbers[:60])
    assert ours.classes_.tolist() == [9, 10]
    assert ours.predict(NEW).dtype == ours.classes_.dtype
    texts = classifier().fit(SEQUENCES[:60], CLASSES[:60])
    np.testing.assert_array_equal(ours.predict(NEW) == 9, texts.predict(NEW) == "few")


@pytest.mark.parametrize("method", ["frozen", pytest.param("full", marks=pytest.mark.long), "lora"])
def test_folders_are_those_of_the_command(
    classifier: Make, run: Run, tmp_path: Path, method: str, model_folders: dict[str, Path]
) -> None:
    """``protea predict`` gives the estimator's numbers, and so do pickles and folders that are read again."""
    options = {} if method == "frozen" else {"method": method, "epochs": 1, "layer": -1, "lr": 1e-2}
    ours = classifier(**options).fit(SEQUENCES[:80], CLASSES[:80])
    expected = ours.predict_proba(NEW)
    ours.save(tmp_path / "saved")
    assert run("predict", "saved", write(tmp_path / "new.fasta"), "-o", "p.parquet").code == 0
    table = pq.read_table("p.parquet").to_pandas()
    np.testing.assert_allclose(
        table[
            ["probability_few", "probability_many"]
            if "calibrated_few" not in table
            else ["calibrated_few", "calibrated_many"]
        ],
        expected,
        atol=1e-6,
    )
    assert table["predicted"].tolist() == ours.predict(NEW).tolist()
    pickled = pickle.dumps(ours)
    if method == "frozen":
        assert len(pickled) < 40_000
    weights = (model_folders["esm2"] / "model.safetensors").read_bytes()
    assert method == "full" or weights[-400:] not in pickled
    for other in (pickle.loads(pickled), ProteaClassifier.load(tmp_path / "saved", device="cpu")):
        np.testing.assert_allclose(other.predict_proba(NEW), expected, atol=1e-6)
        assert other.predict(NEW).tolist() == ours.predict(NEW).tolist()
        assert other.method == method
    with pytest.raises(OutputError, match="saved: exists already"):
        ours.save(tmp_path / "saved")
    ours.save(tmp_path / "saved", overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    predictor = protea.load_predictor("saved", device="cpu")
    np.testing.assert_allclose(predictor.predict(NEW), expected, atol=1e-6)


def test_the_same_data_and_parts_as_the_command(classifier: Make, run: Run, model_folders: dict[str, Path]) -> None:
    """The head of ``fit`` is that of the command with the same training and validation parts."""
    ours = classifier().fit(SEQUENCES[:80], CLASSES[:80])
    rows = "".join(f"{text},{label},train\n" for text, label in zip(SEQUENCES[:80], CLASSES[:80], strict=True))
    Path("data.csv").write_text("sequence,label,set\n" + rows)
    result = run(
        "finetune", "data.csv", "-m", model_folders["esm2"], "-o", "out", "--layer", 0, "--no-baselines",
        "--device", "cpu",
    )  # fmt: skip
    assert result.code == 0, result
    np.testing.assert_array_equal(protea.load_predictor("out").predict(NEW), ours.predict_proba(NEW))


def test_clone_and_refit(classifier: Make) -> None:
    ours = classifier(pool="max", seed=3).fit(SEQUENCES[:60], CLASSES[:60])
    again = clone(ours)
    assert again.get_params() == ours.get_params()
    with pytest.raises(ValueError, match="not fitted"):
        again.predict(NEW)
    before = ours.predict_proba(NEW)
    np.testing.assert_array_equal(again.fit(SEQUENCES[:60], CLASSES[:60]).predict_proba(NEW), before)
    np.testing.assert_array_equal(ours.fit(SEQUENCES[:60], CLASSES[:60]).predict_proba(NEW), before)


def test_searches_and_folds(classifier: Make, regressor: Make) -> None:
    groups = np.arange(120) // 4
    scores = cross_val_score(
        classifier(), SEQUENCES[:120], CLASSES[:120], groups=groups, cv=GroupKFold(3), error_score="raise"
    )
    assert scores.shape == (3,)
    assert scores.mean() > 0.6
    search = GridSearchCV(regressor(), {"layer": [0, 3], "pool": ["mean", "max"]}, cv=2, error_score="raise")
    search.fit(SEQUENCES[:120], VALUES[:120])
    assert search.best_params_ == {"layer": 0, "pool": "mean"}
    assert classifier(layer="auto").fit(SEQUENCES[:60], CLASSES[:60]).notes_[-2].startswith("layer ")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the sequences that a model computes, one entry for each pass."""
    computed: list[str] = []
    jobs_of = embeddings.jobs_of

    def counted(record: Any, *others: Any) -> Any:
        for job in jobs_of(record, *others):
            computed.append(record.record.sequence)
            yield job

    monkeypatch.setattr(embeddings, "jobs_of", counted)
    return computed


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_a_search_computes_each_sequence_once(
    kind: str, request: pytest.FixtureRequest, passes: list[str], tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    """Over layers, poolings and heads, with predictions; the numbers are those without a cache."""
    make, y = request.getfixturevalue(kind), (CLASSES if kind == "classifier" else VALUES)[:60]
    x = SEQUENCES[:60]
    options = {"layer": [0, 2, "auto"], "pool": ["mean", "max"]}
    search = GridSearchCV(make(cache=tmp_path), options, cv=2, error_score="raise").fit(x, y)
    search.predict(x)
    assert sorted(passes) == sorted(x)
    loaded = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(loaded.predict(x), search.predict(x))
    EmbeddingTransformer(model_folders["esm2"], layer=1, pool="std", device="cpu", cache=tmp_path).transform(x)
    assert len(passes) == len(x)
    without = GridSearchCV(make(), options, cv=2, error_score="raise").fit(x, y)
    assert len(passes) > 10 * len(x)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], without.cv_results_["mean_test_score"], atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"method": "lora", "epochs": 1, "layer": -1}, {"head": "light-attention", "epochs": 1}]
)
def test_a_cache_does_not_serve_what_it_does_not_hold(
    classifier: Make, passes: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    """A trained encoder and vectors of residues: the numbers are those without a cache."""
    x, y = SEQUENCES[:40], CLASSES[:40]
    classifier(layer=-1, cache=tmp_path).fit(x, y)
    passes.clear()
    ours = classifier(cache=tmp_path, **options).fit(x, y)
    assert passes
    passes.clear()
    found = ours.predict_proba(NEW)
    assert sorted(passes) == sorted(NEW)
    np.testing.assert_allclose(found, classifier(**options).fit(x, y).predict_proba(NEW), atol=1e-6)


def test_groups_stay_together(classifier: Make) -> None:
    """In one part lie all sequences of a group, and all equal sequences, whichever groups they are of."""
    texts = [*SEQUENCES[:60], *SEQUENCES[:10]]
    groups = [f"g{number // 3}" for number in range(60)] + ["other"] * 10
    examples = [LabelledExample(str(number), (text,), "", "") for number, text in enumerate(texts)]
    targets: list[Any] = [np.array([float(number)]) for number in range(70)]
    found = validation(Labelled(TASKS["sequence-value"], (), examples, targets), groups, seed=0)
    parts = [example.part for example in found.examples]
    for names in (groups, texts):
        for name in set(names):
            assert len({part for part, other in zip(parts, names, strict=True) if other == name}) == 1
    assert 3 <= parts.count("validation") <= 10
    with pytest.raises(UsageError, match="groups"):
        classifier().fit(SEQUENCES[:60], CLASSES[:60], groups=[1, 2])
    with pytest.raises(DataError, match="too few"):
        classifier().fit(SEQUENCES[:60], CLASSES[:60], groups=[1] * 60)


def test_mistakes(classifier: Make, regressor: Make, tmp_path: Path, model_folders: dict[str, Path]) -> None:
    some, labels, values = SEQUENCES[:60], CLASSES[:60], VALUES[:60]
    for estimator, x, y, words in (
        (classifier(), some, labels[:3], "60 sequences"),
        (classifier(), some, values, "ProteaRegressor"),
        (classifier(), some, [None, *labels[1:]], "value 0 is missing"),
        (classifier(), some, np.zeros((60, 2)), "shape"),
        (regressor(), some, labels, "ProteaClassifier"),
        (classifier(), ["MKJO1", *some[1:]], labels, "sequence 0"),
        (classifier(), "MKT", labels, "give a list"),
        (classifier(layer=9), some, labels, "layer 9"),
        (classifier(method="lora", layer=1), some, labels, "frozen"),
        (classifier(head="cnn"), some, labels, "cnn"),
        (classifier(pool="sum"), some, labels, "pool"),
        (classifier(cache=3), some, labels, "cache"),
    ):
        with pytest.raises(protea.ProteaError, match=words):
            estimator.fit(x, y)
    with pytest.raises(DataError, match="only class"):
        classifier().fit(some, ["a"] * 60)
    with pytest.raises(DataError, match="constant"):
        regressor().fit(some, np.ones(60))
    ours = regressor().fit(some, values)
    ours.save(tmp_path / "saved")
    with pytest.raises(UsageError) as caught:
        ProteaClassifier.load(tmp_path / "saved")
    check_message("estimators.other_task", caught.value, folder=tmp_path / "saved")
    other = ProteaRegressor.load(tmp_path / "saved", model=model_folders["esm2nv"], device="cpu")
    with pytest.raises(CheckpointError, match="other weights"):
        other.predict(NEW)
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="not written by this command"):
        ours.save(tmp_path / "mine", overwrite=True)


def test_a_long_sequence_is_said(model_folders: dict[str, Path], one_thread: None) -> None:
    ours = ProteaRegressor(model_folders["esm1nv"], device="cpu")
    with pytest.warns(ProteaWarning, match="sequence 2 truncated: first 510 of 600"):
        ours.fit([*SEQUENCES[:2], "M" * 600, *SEQUENCES[2:40]], VALUES[:41])
    with pytest.warns(ProteaWarning, match="truncated"):
        ours.predict(["M" * 600])


# ---- protea.load_predictor ----
@pytest.mark.parametrize("task", ["value", "residue"])
def test_predictors_in_python(run: Run, one_thread: None, model_folders: dict[str, Path], task: str) -> None:
    parts = ["train"] * 50 + ["validation"] * 20 + ["test"] * 10
    blocks = []
    for text, value, part in zip(SEQUENCES, VALUES, parts, strict=False):
        target = f"{value:.3f}" if task == "value" else "".join("H" if letter in "AW" else "C" for letter in text)
        blocks.append(f">p{len(blocks)} TARGET={target} SET={part}\n{text}\n")
    Path("data.fasta").write_text("".join(blocks))
    result = run(
        "finetune", "data.fasta", "-m", model_folders["esm2"], "-o", "out", "--no-baselines",
        "--device", "cpu",
    )  # fmt: skip
    assert result.code == 0, result
    assert run("predict", "out", write(Path("new.fasta")), "-o", "p.parquet", "--device", "cpu").code == 0
    theirs = pq.read_table("p.parquet")
    predictor = protea.load_predictor("out", device="cpu")
    named = {f"s{number}": text for number, text in enumerate(NEW)}
    ours = predictor.table(named)
    assert ours.schema.names == theirs.schema.names
    for name in theirs.schema.names:
        if theirs[name].type == "double":
            np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), atol=1e-6)
        else:
            assert ours[name].to_pylist() == theirs[name].to_pylist()
    several, by_name, one = predictor.predict(NEW), predictor.predict(named), predictor.predict(NEW[0])
    assert list(by_name) == list(named)
    np.testing.assert_allclose(by_name["s0"], one, atol=1e-6)
    np.testing.assert_allclose(several[0], one, atol=1e-6)
    if task == "value":
        assert several.shape == (7,)
        assert predictor.predict([]).shape == (0,)
        np.testing.assert_allclose(several, theirs["predicted"].to_numpy(), atol=1e-6)
    else:
        assert predictor.classes == ("C", "H")
        assert several[0].shape == (len(NEW[0]), 2)
        flat = theirs["calibrated_H"].to_numpy()
        np.testing.assert_allclose(np.concatenate(several)[:, 1], flat, atol=1e-6)
        raw = predictor.predict(NEW, calibrated=False)
        np.testing.assert_allclose(np.concatenate(raw)[:, 1], theirs["probability_H"].to_numpy(), atol=1e-6)
    assert predictor.table([]).num_rows == 0
    assert "layer 3" in repr(predictor)
    with pytest.raises(CheckpointError, match=r"predictor\.json"):
        protea.load_predictor(model_folders["esm2"])
