"""``report.html`` of made runs of every task, and of a real one."""

import html
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from protea.finetune import evaluation
from protea.finetune.baselines import BASELINES
from protea.finetune.calibration import calibrate
from protea.finetune.finetune_settings import parse
from protea.finetune.finetuning import finetune
from protea.finetune.heads import Head, HeadConfig
from protea.finetune.measures import measures
from protea.finetune.measuring import calibration_table
from protea.finetune.predictor import Base, Predictor
from protea.finetune.report import PAGE, write_pages
from protea.finetune.report_words import METHODS, WORDS
from protea.finetune.tasks import TASKS, Floats, Labelled, LabelledExample
from protea.plot.charts import Bar, Series, bars, plot
from protea.tables import write_table

ODD = ('a<b>"c"', "x & y", "</title><script>alert(1)</script>", "\x1b[31m")
VOID = {"meta"}


class Page(HTMLParser):
    """A page whose elements are balanced, with its texts, and the elements inside each picture."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.pictures: list[list[str]] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open
        assert all(inside[:2] == ["title", "desc"] for inside in self.pictures)
        assert "http:" not in self.source
        assert "https:" not in self.source

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "img", "link", "iframe", "object")
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "svg":
            self.pictures.append([])
        elif "svg" in self.open:
            self.pictures[-1].append(tag)
        self.open += [tag] if tag not in VOID else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def made_run(folder: Path, name: str, count: int, classes: tuple[str, ...], noise: float = 1.0) -> dict[str, Floats]:
    """A run without training: predictions are the truth with noise."""
    task, generator = TASKS[name], np.random.default_rng(0)
    length = 3 if task.unit == "residue" else 1
    shape = (count, length) if task.kind != "labels" else (count, 1, len(classes))
    truth = generator.normal(size=shape) if task.kind == "value" else generator.integers(0, len(classes) or 1, shape)
    truth = truth if task.kind != "labels" else (truth == 0).astype(float)
    examples = [LabelledExample(f"p<{place}>", ("MKV",), "test", "x") for place in range(count)]
    data = Labelled(task, classes, examples, list(truth))
    flat = truth.reshape(-1, *truth.shape[2:])
    exact = np.eye(len(classes))[flat] if task.kind == "class" else flat
    methods = {}
    for method, scale in (("predictor", noise), ("constant", 0.0), ("composition", 3.0)):
        values = generator.normal(size=exact.shape) * scale + exact * (scale > 0)
        if task.kind == "class":
            values = np.exp(2 * values) / np.exp(2 * values).sum(1, keepdims=True)
        methods[method] = 1 / (1 + np.exp(-values)) if task.kind == "labels" else values
    folder.mkdir(parents=True)
    calibrated = calibrate(task, methods["predictor"], data.all_targets())
    kind = "cnn" if task.unit == "residue" else "linear"
    head = Head(HeadConfig(kind=kind, task=name, width=2, outputs=len(classes) or 1))
    Predictor(head, classes, 1, "truncate", Base("a <model>", {}, ""), "frozen", calibrated, None).save(folder)
    resamples = evaluation.bootstrap(task, methods, data.all_targets(), classes, resamples=20)
    write_table(folder / "metrics.tsv", evaluation.metrics_table(data, "test", methods, resamples))
    write_table(folder / "comparison.tsv", evaluation.comparison_table(resamples))
    identity = np.linspace(0, 1, count)
    write_table(folder / "by_identity.tsv", evaluation.identity_table(data, methods, identity))
    write_table(folder / "predictions.parquet", evaluation.predictions_table(data, "test", methods["predictor"]))
    write_table(folder / "calibration.tsv", calibration_table(data, methods["predictor"], calibrated))
    write_table(folder / "layers.tsv", pa.table({"layer": [0, 1], "validation_loss": [2.0, 1.0]}))
    parts = {"part": ["train", "test"], "examples": [1234, count], "labelled": [1234, count * length]}
    write_table(folder / "parts.tsv", pa.table(parts))
    settings = {"data": ["in/<data>.csv"], "output": "my run", "split": "given", "seeds": 1, "seed": 0}
    run = {"settings": settings | {"target_column": "T<m>"}, "notes": ["a note with <b>"]}
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    return methods


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_page(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    classes = () if task.kind == "value" else tuple(sorted(ODD))
    made_run(tmp_path / "run", name, 60, classes)
    write_pages(tmp_path / "run")
    page = Page(tmp_path / "run" / PAGE)
    rows = [line.split("\t") for line in (tmp_path / "run" / "metrics.tsv").read_text().splitlines()[1:]]
    assert rows
    for _, method, _, value, *_ in rows:
        assert method in page.texts
        assert value in ("", "nan") or any(text.startswith(f"{float(value):.3f}"[:4]) for text in page.texts)
    for told in (
        name,
        "1,234",
        "a note with <b>",
        "<data>.csv",
        "a <model>",
        *measures(task),
    ):
        assert told in page.text
    assert f"protea predict 'my run' {'pairs.csv' if task.unit == 'pair' else 'proteins.fasta'}" in page.text
    for odd in classes[1:] if classes else ("T<m>",):
        assert odd in page.text
    assert "\x1b" not in page.source
    assert not page.links
    assert len(page.pictures) == (5 if classes else 4)


def test_headline_says_whether_the_predictor_is_better(tmp_path: Path) -> None:
    for noise, verdict in ((0.1, "is better than"), (30.0, "is worse than"), (2.3, "is not distinguishable from")):
        run = tmp_path / str(noise)
        made_run(run, "sequence-value", 200, (), noise)
        write_pages(run)
        assert f"The predictor {verdict} the best baseline, composition." in Page(run / PAGE).texts
        assert ("the interval holds 0" in Page(run / PAGE).text) == (noise == 2.3)


def test_many_classes_and_rows_give_a_small_page(tmp_path: Path) -> None:
    classes = tuple(f"class <{place:04}> with a long name, longer than a picture has room for" for place in range(300))
    for name, count in (("sequence-class", 900), ("multilabel", 100)):
        made_run(tmp_path / name, name, count, classes)
        write_pages(tmp_path / name)
        assert "The 30 most frequent of 300" in Page(tmp_path / name / PAGE).text
        assert (tmp_path / name / PAGE).stat().st_size < 500_000


def test_many_points_are_sampled(tmp_path: Path) -> None:
    made_run(tmp_path / "run", "sequence-value", 5_000, ())
    write_pages(tmp_path / "run")
    assert "2,000 of 5,000 points are shown, drawn at random" in Page(tmp_path / "run" / PAGE).text
    assert (tmp_path / "run" / PAGE).stat().st_size < 100_000


def test_a_page_is_made_again_the_same(tmp_path: Path) -> None:
    made_run(tmp_path / "run", "residue-class", 30, ("E", "H"))
    write_pages(tmp_path / "run")
    before = (tmp_path / "run" / PAGE).read_bytes()
    write_pages(tmp_path / "run")
    assert (tmp_path / "run" / PAGE).read_bytes() == before


def test_reliability_in_batches_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(tmp_path / "run", "sequence-class", 60, ("a", "b", "c"))
    write_pages(tmp_path / "run")
    before = (tmp_path / "run" / PAGE).read_text()
    monkeypatch.setattr("protea.finetune.report_pictures._CELLS", 30)
    write_pages(tmp_path / "run")
    assert (tmp_path / "run" / PAGE).read_text() == before


def test_every_number_and_baseline_is_explained() -> None:
    assert {name for task in TASKS.values() for name in measures(task)} <= set(WORDS)
    assert {*BASELINES, "predictor", "random weights", "frozen", "lora", "full"} <= set(METHODS)


def test_charts_of_odd_numbers(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    for values in ([], [nan], [0.0], [5.0, 5.0], [1e300, -1e300, inf, 1.0], [1e-12, 2e-12], [1e15, 1e15 + 1]):
        drawn = plot("t", "x", "y", [Series("s", values, values, "both")], equal=True)
        assert "nan" not in drawn
        assert "inf" not in drawn
    assert "not defined" in bars("t", "x", [Bar("<none>", nan), Bar("low", -2.0, -3.0, -1.0)])
    assert html.escape("<none>") in bars("t", "x", [Bar("<none>", nan)])


def test_pages_of_folds(tmp_path: Path) -> None:
    for fold, noise in ((1, 0.1), (2, 30.0), (10, 0.1)):
        made_run(tmp_path / f"fold-{fold}", "sequence-value", 50, (), noise)
        (tmp_path / f"fold-{fold}" / "run.yaml").rename(tmp_path / "run.yaml")
    write_pages(tmp_path)
    page = Page(tmp_path / PAGE)
    assert page.links == [f"fold-{fold}/{PAGE}" for fold in (1, 2, 10)]
    assert "composition, in 2 of 3 folds: not distinguishable" in page.text
    assert "protea predict 'my run/fold-10'" in Page(tmp_path / page.links[-1]).text


@pytest.mark.parametrize("split", ["random", pytest.param("kfold:2", marks=pytest.mark.long)])
def test_a_run_ends_with_its_page(split: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = ["id,sequence,activity"]
    for place in range(40):
        sequence = "".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 30))
        lines.append(f"p{place},{sequence},{sequence.count('K') + generator.normal() / 10:.3f}")
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    values = {"data": str(tmp_path / "in.csv"), "output": tmp_path / "run", "target_column": "activity"}
    values |= {"split": split, "baselines": split != "random"}
    finished = finetune(parse(values, "test"))
    page = Page(tmp_path / "run" / PAGE)
    for note in finished.measured.notes:
        assert note in page.texts
    assert ("There is no baseline to compare with." in page.texts) == (split == "random")
    for link in page.links or [PAGE]:
        assert {"train", "calibration", "test"} <= set(Page(tmp_path / "run" / link).texts)
