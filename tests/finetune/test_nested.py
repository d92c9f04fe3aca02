"""Nested splits: what is chosen, from which examples, beside scikit-learn, and after interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import spearmanr
from sklearn.base import BaseEstimator
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

import protea
from conftest import Run
from messages import check_message
from protea.errors import ResumeError
from protea.finetune import features, frozen, likeness
from protea.finetune.choices import Choice
from protea.finetune.labelled_data import DataFiles, read_labelled
from protea.finetune.linear import RIDGE
from protea.finetune.members import Trainer
from protea.finetune.predictor import read_predictor
from protea.finetune.report import PAGE
from protea.finetune.splits import inner_folds, parse, split
from protea.finetune.tuning import _Tuning
from protea.output import sha256
from protea.progress import SILENT

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
COUNT = 60
QUICK = ("--no-baselines", "--calibration", 0)
TUNED = ("--method", "lora", "--lr", "1e-3,1e-2", "--epochs", 1, "--split", "nested:2:2", *QUICK)


@pytest.fixture(autouse=True)
def alone(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "_PROGRAM", "no-mmseqs")  # which starts a dozen processes for each search


@pytest.fixture
def model(model_folders: dict[str, Path]) -> Path:
    return model_folders["esm2"]


def sequences() -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list(LETTERS), rng.integers(20, 40))) for _ in range(COUNT)]


def write_values(path: Path, values: np.ndarray | None = None) -> Path:
    if values is None:
        noise = np.random.default_rng(1).normal(size=COUNT)
        values = np.array([20 * text.count("A") / len(text) for text in sequences()]) + noise
    rows = [f"p{place},{text},{value}" for place, (text, value) in enumerate(zip(sequences(), values, strict=True))]
    path.write_text("\n".join(["id,sequence,target", *rows]) + "\n")
    return path


def choices(folder: str, fold: int = 1) -> pd.DataFrame:
    table = pd.read_csv(Path(folder) / "choices.tsv", sep="\t")
    return table[table.fold == fold].reset_index(drop=True)


def notes(folder: str) -> list[str]:
    return list(yaml.safe_load((Path(folder) / "run.yaml").read_text())["notes"])


class OfLayer(BaseEstimator):  # type: ignore[misc]
    """Ridge regression on one layer, with every penalty."""

    def __init__(self, layer: int = 0) -> None:
        self.layer = layer

    def fit(self, x: np.ndarray, y: np.ndarray) -> OfLayer:
        self.scaler_ = StandardScaler().fit(x[:, self.layer])
        scaled = self.scaler_.transform(x[:, self.layer])
        self.models_ = [Ridge(penalty * len(x)).fit(scaled, y) for penalty in RIDGE]
        return self

    def best(self, x: np.ndarray, y: np.ndarray) -> Ridge:
        scaled = self.scaler_.transform(x[:, self.layer])
        return min(self.models_, key=lambda model: ((model.predict(scaled) - y) ** 2).mean())

    def score(self, x: np.ndarray, y: np.ndarray) -> float:
        """Spearman at the penalty with the least loss on the same examples, as on a validation part."""
        return float(spearmanr(self.best(x, y).predict(self.scaler_.transform(x[:, self.layer])), y).statistic)


def test_beside_grid_search_of_scikit_learn(run: Run, model: Path) -> None:
    """The same means of each layer on each inner fold, the same layer, and the same number on the outer test part."""
    given = write_values(Path("in.csv"))
    how = ("--split", "nested:3:4", "--layer", "auto", "--seed", 3)
    result = run("finetune", given, "-m", model, "-o", "out", *how, *QUICK)
    assert result.code == 0, result
    x = np.stack(protea.load(model, device="cpu").embed(sequences(), pool="mean", layers=range(4))).astype(np.float64)
    labelled = read_labelled(DataFiles(data=(str(given),)))
    y = labelled.all_targets().values
    metrics = pd.read_csv("out/metrics.tsv", sep="\t")
    for number, fold in enumerate(split(labelled, parse("nested:3:4"), 3), start=1):

        def places(division: Any, part: str) -> list[int]:
            return [place for place, example in enumerate(division.examples) if example.part == part]

        inner = [(places(one, "train"), places(one, "validation")) for one in inner_folds(fold, 4, 3)]
        search = GridSearchCV(OfLayer(), {"layer": list(range(4))}, cv=inner, refit=False).fit(x, y)
        found = choices("out", number)
        np.testing.assert_allclose(found["mean"], search.cv_results_["mean_test_score"], atol=2e-3)
        for place in range(4):
            expected = search.cv_results_[f"split{place}_test_score"]
            np.testing.assert_allclose(found[f"inner_{place + 1}"], expected, atol=5e-3)
        layer = search.best_params_["layer"]
        assert found.candidate[found.chosen].tolist() == [layer]
        assert read_predictor(Path(f"out/fold-{number}")).layer == layer
        train, validation, test = (places(fold, part) for part in ("train", "validation", "test"))
        outer = OfLayer(layer).fit(x[train], y[train])
        predicted = outer.best(x[validation], y[validation]).predict(outer.scaler_.transform(x[test, layer]))
        ours = metrics[(metrics.fold == number) & (metrics.number == "spearman") & (metrics.part == "test")]
        assert ours.value.tolist() == pytest.approx([spearmanr(predicted, y[test]).statistic], abs=5e-3)
    for page, text in (("out", "fold 3"), ("out/fold-3", "chosen")):
        written = (Path(page) / PAGE).read_text()
        assert "Choices: spearman" in written
        assert f"<td>{text}</td><td>layer " in written
    check_message("finetune.nested-chosen", notes("out")[-1])


@pytest.mark.parametrize("how", [("--layer", "auto"), pytest.param(TUNED, marks=pytest.mark.long)], ids=str)
def test_outer_test_labels_choose_nothing(run: Run, model: Path, how: tuple[Any, ...]) -> None:
    """With other labels of the test part of a fold, its choice and its predictor are the same, bit for bit."""
    options = ("-m", model, "--split", "nested:2:2", *QUICK, *how)
    given = write_values(Path("in.csv"))
    assert run("finetune", given, *options, "-o", "one").code == 0
    labelled = read_labelled(DataFiles(data=(str(given),)))
    values = labelled.all_targets().values.copy()
    fold = split(labelled, parse("nested:2:2"), 0)[0]
    tested = [example.part == "test" for example in fold.examples]
    values[tested] = 100 * np.random.default_rng(5).normal(size=sum(tested))
    assert run("finetune", write_values(Path("in2.csv"), values), *options, "-o", "two").code == 0
    pd.testing.assert_frame_equal(choices("one"), choices("two"), check_exact=True)
    assert not choices("one", 2).equals(choices("two", 2))
    heads = [sha256(Path(name) / "fold-1" / "head.safetensors") for name in ("one", "two")]
    assert heads[0] == heads[1]


def test_sequences_are_embedded_once(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    embed = features.embeddings.embed

    def counting(runner: Any, group: Any, asked: Any) -> Any:
        counts.append(len(group))
        return embed(runner, group, asked)

    monkeypatch.setattr(features.embeddings, "embed", counting)
    given = write_values(Path("in.csv"))
    result = run("finetune", given, "-m", model, "-o", "out", "--split", "nested:3:3", "--layer", "auto", *QUICK)
    assert result.code == 0, result
    assert sum(counts) == COUNT


def test_layers_of_residues(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every inner fold is in the sample, however small, and each fold computes one sample."""
    monkeypatch.setattr(frozen, "_PILOT", {"train": 200, "validation": 100})
    samples = []
    pilot = frozen._pilot
    monkeypatch.setattr(frozen, "_pilot", lambda *given: samples.append(pilot(*given)) or samples[-1])
    blocks = [f">p{place} TARGET={text.translate(dict.fromkeys(map(ord, LETTERS[3:]), 'C'))}\n{text}\n"
              for place, text in enumerate(sequences())]  # fmt: skip
    Path("in.fasta").write_text("".join(blocks))
    how = ("--split", "nested:2:3", "--layer", "auto", "--epochs", 1)
    result = run("finetune", "in.fasta", "-m", model, "-o", "out", *how, *QUICK)
    assert result.code == 0, result
    assert len(samples) == 2
    assert all(len(sample) < COUNT / 2 for sample in samples)
    assert np.isfinite(choices("out", 2)[["mean", "loss", "inner_1", "inner_2", "inner_3"]].to_numpy()).all()


def test_nothing_to_choose_is_kfold(run: Run, model: Path) -> None:
    given = write_values(Path("in.csv"))
    for split_name in ("nested:2:3", "kfold:2"):
        result = run("finetune", given, "-m", model, "-o", split_name[:5], "--split", split_name, *QUICK)
        assert result.code == 0, result
    assert sha256(Path("neste/metrics.tsv")) == sha256(Path("kfold/metrics.tsv"))
    assert not Path("neste/choices.tsv").exists()
    check_message("finetune.nested-nothing", next(note for note in notes("neste") if note not in notes("kfold")))


# ---- learning rates ----
def test_scores_of_inner_trainings_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption only what is missing is trained, and finished trainings leave no checkpoints."""
    tuned = []

    def tune(_: Trainer, division: Any, rate: float, seed: int, work: Path) -> SimpleNamespace:
        work.mkdir(exist_ok=True)
        tuned.append(work.name)
        if len(tuned) == 3:
            raise KeyboardInterrupt
        return SimpleNamespace(selected=float("nan") if division else rate, loss=seed + 1 / 3)

    monkeypatch.setattr(Trainer, "_tune", tune)
    settings: Any = SimpleNamespace(seed=7)
    trainer = Trainer(settings, None, tmp_path, "fold-2", {}, SILENT, inner=[0, 1])  # type: ignore[arg-type,list-item]
    with pytest.raises(KeyboardInterrupt):
        trainer._choice([1e-5, 0.3])
    choice = trainer._choice([1e-5, 0.3])
    names = [f"fold-2-inner-{fold}-lr-{rate}" for rate in ("1e-05", "0.3") for fold in (1, 2)]
    assert tuned == [*names[:3], *names[2:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.json" for name in names)
    loss = 7 + 1 / 3
    np.testing.assert_array_equal(choice.scores, [[(r, loss), (np.nan, loss)] for r in (1e-5, 0.3)])
    (tmp_path / f"{names[1]}.json").write_text("[1.0")
    with pytest.raises(ResumeError, match=r"fold-2-inner-2-lr-1e-05\.json: is damaged"):
        trainer._choice([1e-5])


@pytest.mark.long
def test_interrupted_choices_end_with_the_same_bits(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in an inner training, after some, and in the training of a fold; no step is done twice."""
    step, begun, stops = _Tuning._step, list[str](), set[int]()

    def interrupted(self: _Tuning, number: int) -> None:
        begun.append(self.work.name)
        if len(begun) in stops:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(_Tuning, "_step", interrupted)
    monkeypatch.setattr("protea.finetune.tuning_state.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("protea.finetune.tuning_state.SAVE_SHARE", 1e9)
    given = write_values(Path("in.csv"))
    command = ("finetune", given, "-m", model, *TUNED)
    assert run(*command, "-o", "whole").code == 0
    assert choices("whole").candidate.tolist() == [0.001, 0.01]
    steps = begun.copy()
    inner = {name for name in steps if name.startswith("fold-1-inner")}
    assert inner == {f"fold-1-inner-{fold}-lr-{rate}" for fold in (1, 2) for rate in (0.001, 0.01)}
    assert len(set(steps)) == 10  # for each fold two rates on two inner folds, and the training of the fold
    begun.clear()
    stops |= {2, steps.index("fold-1-inner-2-lr-0.01") + 2, steps.index("fold-2-inner-1-lr-0.001") + 3}
    for _ in range(3):
        assert run(*command, "-o", "parts").code == 130
    work = Path(".parts.partial")
    assert {path.stem for path in work.glob("fold-1-inner-*")} == inner
    assert not [path for path in work.glob("fold-1-inner-*") if path.is_dir()]
    assert run(*command, "-o", "parts").code == 0
    assert len(begun) == len(steps) + 3
    for name in ("choices.tsv", "metrics.tsv", "fold-1/head.safetensors", "fold-2/adapter/adapter_model.safetensors"):
        assert sha256(Path("parts") / name) == sha256(Path("whole") / name), name


@pytest.mark.long
def test_killed_choices_end_with_the_same_bits(run: Run, model: Path, tmp_path: Path) -> None:
    given = write_values(Path("in.csv"))
    command = ("finetune", given, "-m", model, *TUNED)
    assert run(*command, "-o", "whole").code == 0
    arguments = [sys.executable, "-m", "protea", *map(str, command), "-o", "killed"]
    for moment in ("fold-1-inner-2-lr-0.001", "fold-2-inner-1-lr-0.01.json"):
        process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not Path(f".killed.partial/{moment}").exists():
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert run(*command, "-o", "killed").code == 0
    for name in ("choices.tsv", "metrics.tsv", "fold-2/head.safetensors"):
        assert sha256(Path("killed") / name) == sha256(Path("whole") / name), name


# ---- the rule ----
def test_the_rule_of_choice() -> None:
    def best(*scores: list[tuple[float, float]]) -> int:
        return Choice("layer", range(len(scores)), np.array(scores)).best

    nan = float("nan")
    assert best([(0.1, 1), (0.9, 1)], [(0.6, 9), (0.6, 9)]) == 1
    assert best([(0.5, 2), (0.5, 1)], [(0.75, 1), (0.25, 1)], [(0.5, 1), (0.5, 1)]) == 1
    assert best([(nan, 2), (0.9, 2)], [(nan, 1), (0.1, 1)]) == 1
    assert best([(nan, 0), (0.9, 0)], [(-0.5, 9), (-0.5, 9)]) == 1
