"""The transformer for scikit-learn, by scikit-learn's own checks and by mirrors of those that it skips for text.

``check_estimator`` stops early for an estimator that takes no table of numbers, so passing it proves little.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

import protea
from messages import check_message
from protea import shared_models
from protea.checkpoints import hf
from protea.cli import main
from protea.embed import embeddings
from protea.errors import CheckpointError, OutputError, ProteaWarning, UnknownResidueError, UsageError
from protea.models.registry import build
from protea.sklearn import EmbeddingTransformer

SEQUENCES = ["MKTAYIAKQR", "GDGTQDNLSGAEK", "ACDEFGHIKL", "MKTAYIAKQR", "W", "LLLLVVVVIIII"]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-6}
"""Sequences that are computed together change the rounding of their numbers."""


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


def transformer(**settings: Any) -> EmbeddingTransformer:
    return EmbeddingTransformer(**{"device": "cpu", **settings})


# ---- scikit-learn's own checks, and mirrors of those that it skips ----
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
def test_checks_of_scikit_learn(check: Callable[[str, Any], None]) -> None:
    check("EmbeddingTransformer", transformer())


def test_check_estimator() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator_checks.check_estimator(transformer())


def test_tags() -> None:
    tags = transformer().__sklearn_tags__()
    assert (tags.input_tags.string, tags.input_tags.one_d_array, tags.input_tags.two_d_array) == (True, True, False)
    assert (tags.requires_fit, tags.transformer_tags.preserves_dtype) == (False, [])
    assert issubclass(EmbeddingTransformer, TransformerMixin)


def test_fit_gives_the_transformer_and_changes_nothing() -> None:
    ours = transformer()
    before = copy.deepcopy(vars(ours))
    unfitted = ours.transform(SEQUENCES)
    assert ours.fit(SEQUENCES) is ours
    assert ours.fit(SEQUENCES, [0] * 6).fit(SEQUENCES) is ours
    np.testing.assert_array_equal(ours.transform(SEQUENCES), unfitted)
    np.testing.assert_array_equal(ours.fit_transform(SEQUENCES, y=[0] * 6), unfitted)
    np.testing.assert_array_equal(clone(ours).transform(SEQUENCES), unfitted)
    assert vars(ours) == before
    check_is_fitted(transformer())


@given(st.lists(st.sampled_from(SEQUENCES), max_size=9))
def test_a_vector_depends_on_its_sequence_alone(some: list[str]) -> None:
    """Whatever subset, order and repetition."""
    whole = dict(zip(SEQUENCES, transformer().transform(SEQUENCES), strict=True))
    vectors = transformer().transform(pd.Series(some, dtype=object))
    assert vectors.shape == (len(some), 320)
    assert vectors.dtype == np.float32
    for sequence, vector in zip(some, vectors, strict=True):
        np.testing.assert_allclose(vector, whole[sequence], **CLOSE)


def test_pickle_holds_no_weights() -> None:
    ours = transformer(layer=2)
    stored = pickle.dumps(ours.fit(SEQUENCES))
    assert len(stored) < 2000
    read = pickle.loads(stored)
    np.testing.assert_array_equal(read.transform(SEQUENCES), ours.transform(SEQUENCES))
    assert read.get_params() == ours.get_params()
    assert pickle.loads(pickle.dumps(read))._pickled == read._pickled


def write_model(folder: Path, seed: int) -> None:
    from conftest import CONFIGS

    for old in folder.glob("*"):
        old.unlink()
    folder.exists() and folder.rmdir()
    hf.write_random(folder, build(CONFIGS["esm2"]), seed=seed, dtype=torch.float32)


def test_a_pickle_refuses_other_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "m", 1)
    ours = transformer(model=tmp_path / "m").fit(SEQUENCES)
    former, stored = ours.transform(SEQUENCES), pickle.dumps(ours)
    write_model(tmp_path / "m", 2)
    assert np.abs(ours.transform(SEQUENCES) - former).max() > 1e-3, "the new weights are used, not those in memory"
    read = pickle.loads(stored)
    for use in (read.fit, read.transform, lambda _: pickle.dumps(read), lambda _: read.get_feature_names_out()):
        with pytest.raises(CheckpointError, match="its weights differ"):
            use(SEQUENCES)
    now, then = (one._pickled[1][0] for one in (pickle.loads(pickle.dumps(ours)), read))
    with pytest.raises(CheckpointError) as caught:
        read.fit(SEQUENCES)
    check_message("sklearn.other_weights", caught.value, path=tmp_path, now=now, then=then)
    read.set_params(model="protea-mini").fit(SEQUENCES)
    write_model(tmp_path / "m", 1)
    np.testing.assert_array_equal(pickle.loads(stored).transform(SEQUENCES), former)


# ---- input and numbers ----
COLUMNS: dict[str, Callable[[], Any]] = {
    "list": lambda: SEQUENCES,
    "tuple": lambda: tuple(SEQUENCES),
    "array": lambda: np.array(SEQUENCES),
    "objects": lambda: np.array(SEQUENCES, object),
    "one column": lambda: np.array(SEQUENCES, object)[:, None],
    "pandas": lambda: pd.Series(SEQUENCES),
    "pandas with labels": lambda: pd.Series(SEQUENCES, index=["a", "b", "sequence", "seq", "d", "e"]),
    "pandas frame": lambda: pd.DataFrame({"x": SEQUENCES}),
    "pandas category": lambda: pd.DataFrame({"x": SEQUENCES}, dtype="category"),
    "polars": lambda: pl.Series(SEQUENCES),
    "polars frame": lambda: pl.DataFrame({"x": SEQUENCES}),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_form_of_a_column(name: str) -> None:
    column = COLUMNS[name]()
    vectors = transformer().fit(column).transform(column)
    np.testing.assert_array_equal(vectors, transformer().transform(SEQUENCES))


@pytest.mark.parametrize("family", ["esm2", "esm1b", "esm1nv"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_numbers_are_those_of_the_model(
    model_folders: dict[str, Path], tmp_path: Path, family: str, cached: bool
) -> None:
    model = protea.load(model_folders[family], device="cpu")
    pools = [name for name in embeddings.POOLINGS if name != "bos" or model.alphabet.frame.bos is not None]
    ours = transformer(model=model_folders[family], cache=tmp_path / "cache" if cached else None)
    for pool in pools:
        for layer in (0, 1, -1):
            ours.set_params(pool=pool, layer=layer)
            theirs = model.embed(SEQUENCES, pool=pool, layers=layer)
            np.testing.assert_allclose(ours.transform(SEQUENCES), theirs, **CLOSE)


def test_duplicates_are_computed_once(passes: list[str]) -> None:
    transformer().fit(SEQUENCES).transform(SEQUENCES)
    assert sorted(passes) == sorted(set(SEQUENCES))


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "one sequence": ("MKT", UsageError, "'MKT'"),
    "generator": (iter(SEQUENCES), UsageError, "iterator"),
    "pieces": (list("MKT"), UsageError, "single letters"),
    "record": (SeqRecord(Seq("MKT")), UsageError, "Seq"),
    "mapping": ({"a": "MKT"}, UsageError, "dict"),
    "two columns": (pd.DataFrame({"x": SEQUENCES, "y": SEQUENCES}), UsageError, r"shape \(6, 2\)"),
    "wide array": (np.array([SEQUENCES]), UsageError, r"shape \(1, 6\)"),
    "cube": (np.array([[SEQUENCES]]), UsageError, r"shape \(1, 1, 6\)"),
    "number": (3, UsageError, "3"),
    "numbers": (np.zeros((2, 1)), UsageError, "sequence 0"),
    "missing": (pd.Series(["MKT", None]), UsageError, "sequence 1"),
    "null": (pl.Series(["MKT", None]), UsageError, "sequence 1"),
    "empty": (["MKT", ""], UsageError, "sequence 1"),
    "letter": (["MKT", "mkt"], UnknownResidueError, "sequence 1"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("method", ["fit", "transform", "fit_transform"])
def test_what_is_no_column_of_sequences(name: str, method: str) -> None:
    value, error, part = WRONG[name]
    with pytest.raises(error, match=part):
        getattr(transformer(), method)(value)


def test_messages_of_columns() -> None:
    for key in ("one sequence", "two columns"):
        with pytest.raises(UsageError) as caught:
            transformer().fit(WRONG[key][0])
        check_message(f"sklearn.{key.replace(' ', '_')}", caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        *({"layer": 7}, {"layer": 1.0}, {"layer": True}, {"pool": "sum"}, {"pool": ["mean"]}, {"dtype": "float8"}),
        *({"device": "tpu"}, {"device": 3}, {"long": "cut"}, {"cache": 3}, {"token_budget": "many"}, {"model": None}),
    ],
    ids=str,
)
def test_a_wrong_setting_is_an_error_of_fit(setting: dict[str, Any]) -> None:
    for use in ("fit", "transform"):
        with pytest.raises(protea.ProteaError):
            getattr(transformer(**setting), use)(SEQUENCES)


def test_numbers_of_numpy_are_settings(tmp_path: Path) -> None:
    ours = transformer(layer=np.int64(2), token_budget=np.int32(20), cache=tmp_path)
    np.testing.assert_allclose(ours.transform(SEQUENCES), transformer(layer=2).transform(SEQUENCES), **CLOSE)


def test_cut_sequences_are_told_once() -> None:
    with pytest.warns(ProteaWarning, match="sequence 1 truncated: first 1022 of 1500") as caught:
        transformer().fit_transform(["MKT", "A" * 1500])
    assert len(caught) == 1
    with pytest.raises(protea.ProteaError, match="1500"):
        transformer(long="error").fit(["MKT", "A" * 1500])


def test_without_scikit_learn_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\nimport protea\nfrom protea.errors import MissingExtraError\n"
        "try: import protea.sklearn\nexcept MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    check_message("sklearn.missing", done.stdout, python=sys.executable)


# ---- within scikit-learn ----
@pytest.mark.parametrize(("library", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)])
def test_set_output(library: str, frame: Any) -> None:
    ours = transformer().set_output(transform=library)
    names = ours.get_feature_names_out().tolist()
    assert names == [f"embeddingtransformer{place}" for place in range(320)]
    for table in (ours.transform(SEQUENCES), ours.fit_transform(pd.DataFrame({"x": SEQUENCES}, list("abcdef")))):
        assert isinstance(table, frame)
        assert list(table.columns) == names
        np.testing.assert_array_equal(table.to_numpy(), transformer().transform(SEQUENCES))
    if library == "pandas":
        assert table.index.tolist() == list("abcdef")


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
@pytest.mark.parametrize("column", ["sequence", ["sequence"]])
def test_column_transformer_and_pipeline(frame: Any, column: Any) -> None:
    table = frame({"sequence": SEQUENCES, "length": [10, 13, 10, 10, 1, 12]})
    columns = ColumnTransformer([("e", transformer(), column), ("n", "passthrough", ["length"])])
    values = columns.fit_transform(table)
    np.testing.assert_array_equal(values[:, :-1], transformer().transform(SEQUENCES))
    assert values[:, -1].tolist() == table["length"].to_list()
    assert columns.get_feature_names_out()[[0, -1]].tolist() == ["e__embeddingtransformer0", "n__length"]
    pipeline = make_pipeline(columns, LogisticRegression()).fit(table, [0, 1, 0, 0, 1, 1])
    assert pipeline.predict(table).tolist() == [0, 1, 0, 0, 1, 1]
    assert pickle.loads(pickle.dumps(pipeline)).predict(table).tolist() == [0, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("jobs", [None, pytest.param(2, marks=pytest.mark.long)])
def test_a_search_over_layers_and_poolings_computes_each_sequence_once(
    passes: list[str], tmp_path: Path, jobs: int | None
) -> None:
    letters = np.random.default_rng(5).choice(list("ACDEFGHIKLMNPQRSTVWY"), (24, 30))
    sequences = ["".join(row) for row in letters]
    search = GridSearchCV(
        make_pipeline(transformer(cache=tmp_path), LogisticRegression()),
        {"embeddingtransformer__layer": [0, 3, -1], "embeddingtransformer__pool": ["mean", "max", "bos"]},
        cv=3,
        n_jobs=jobs,
        error_score="raise",
    )
    labels = [number % 2 for number in range(24)]
    search.fit(sequences, labels)
    if jobs is None:  # otherwise others compute
        assert sorted(passes) == sorted(sequences)
    assert len(list(tmp_path.rglob("*.vectors"))) == 24
    best = search.best_estimator_[0]
    theirs = transformer(layer=best.layer, pool=best.pool).transform(sequences)
    np.testing.assert_allclose(best.transform(sequences), theirs, **CLOSE)
    without = clone(search.estimator).set_params(embeddingtransformer__cache=None)
    scores = GridSearchCV(without, search.param_grid, cv=3).fit(sequences, labels).cv_results_["mean_test_score"]
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], scores)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of ``docs/python.md``, with the model of the package."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page.partition("## In scikit-learn")[2], re.DOTALL)
    embeddings_block, estimators_block, predictors_block, outputs_block = blocks
    table = pd.DataFrame({"sequence": [f"MKT{letter}AYIAK" for letter in "ACDEFGHIKLMN"], "label": [0, 1] * 6})
    table["family"] = [number // 2 for number in range(12)]
    names: dict[str, Any] = {"table": table, "protea": protea}
    exec(embeddings_block.replace("esm2_t6_8M_UR50D", "protea-mini"), names)
    exec(estimators_block.replace("esm2_t6_8M_UR50D", "protea-mini"), names)
    exec(predictors_block, names)
    assert names["predictor"].classes == ("0", "1")
    assert len(list(Path("vectors").rglob("*.vectors"))) == 12
    Path("in.fasta").write_text(">a\nMKT\n")
    monkeypatch.setattr(sys, "argv", ["protea", "embed", "in.fasta", "-o", "proteins.parquet"])
    with pytest.raises(SystemExit):
        main()
    monkeypatch.setitem(sys.modules, "anndata", SimpleNamespace(AnnData=dict))
    exec(outputs_block, names)
    assert names["stored"].vectors.shape == (1, 320)


# ---- the cache and the model in memory ----
def test_a_full_cache_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process fills it; this one reads the same bits and never loads the weights."""
    code = (
        "import sys, numpy as np\nfrom protea.sklearn import EmbeddingTransformer\n"
        f"vectors = EmbeddingTransformer(device='cpu', cache={str(tmp_path / 'c')!r}).transform({SEQUENCES})\n"
        f"np.save({str(tmp_path / 'theirs.npy')!r}, vectors)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(protea.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    shared_models._shared.cache_clear()
    monkeypatch.setattr(shared_models, "load", None)
    ours = transformer(cache=tmp_path / "c")
    np.testing.assert_array_equal(ours.transform(SEQUENCES), np.load(tmp_path / "theirs.npy"))
    ours.set_params(layer=0, pool="std").transform(SEQUENCES)
    assert ours.fit(SEQUENCES).get_feature_names_out().shape == (320,)
    with pytest.raises(TypeError):
        ours.transform(["MKA"])


def test_settings_have_entries_of_their_own(passes: list[str], tmp_path: Path, model_folders: dict[str, Path]) -> None:
    for settings in ({}, {"dtype": "bfloat16"}, {"long": "window"}, {"model": model_folders["esm2"]}):
        transformer(cache=tmp_path, **settings).transform(["MKTAYIAK"])
    assert len(passes) == 4
    for settings in ({"layer": 0}, {"pool": "max"}, {"token_budget": 9}, {"model": model_folders["esm2"]}):
        transformer(cache=str(tmp_path), **settings).transform(["MKTAYIAK"])
    assert len(passes) == 4


def test_a_damaged_entry_is_computed_again(passes: list[str], tmp_path: Path) -> None:
    ours = transformer(cache=tmp_path)
    former = ours.transform(SEQUENCES)
    for path in sorted(tmp_path.rglob("*.vectors"))[:2]:
        path.write_bytes(path.read_bytes()[:-1])
    passes.clear()
    with pytest.warns(ProteaWarning, match="damaged") as caught:
        np.testing.assert_allclose(ours.transform(SEQUENCES), former, **CLOSE)
    assert len(caught) == len(passes) == 2
    ours.transform(SEQUENCES)
    assert len(passes) == 2


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        transformer(cache=tmp_path / "file").transform(SEQUENCES)


def test_threads_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = shared_models.load

    def counted(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return load(*arguments, **options)

    shared_models._shared.cache_clear()
    monkeypatch.setattr(shared_models, "load", counted)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda layer: transformer(layer=layer).transform(SEQUENCES), [1, 2, 3, -1] * 4))
    assert len(loads) == 1
    for layer, result in zip([1, 2, 3, -1] * 4, results, strict=True):
        np.testing.assert_array_equal(result, transformer(layer=layer).transform(SEQUENCES))
