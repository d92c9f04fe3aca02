"""``report.html``: what a run of ``protea finetune`` trained and how good it is, on one page that loads nothing.

A page is made of the tables in the folder of a run, so ``write_pages(RUN)`` makes it again. The folds of a run have a
page each, and the page above them shows them side by side.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from pyarrow import compute, parquet

from protea.evaluate.ranking import Ranking
from protea.finetune.calibration import Calibration
from protea.finetune.evaluation import OURS
from protea.finetune.measures import SELECTED, measures, reliability
from protea.finetune.predictor import FILE
from protea.finetune.report_words import HEADS, KINDS, METHODS, PARTS, STYLE, WORDS
from protea.finetune.tasks import MISSING, TASKS, Floats, Targets, Task
from protea.plot.charts import STYLE as CHARTS
from protea.plot.charts import Bar, Markup, Series, bars, element, number_text, plot, shades
from protea.tables import read_table
from protea.text import counted

PAGE: Final = "report.html"
MOST_CLASSES: Final = 30
MOST_POINTS: Final = 2_000
_CELLS: Final = 1 << 22  # probabilities that are in memory at once
_NUMBERS: Final = ("value", "low", "high")

Numbers = dict[str, dict[str, tuple[float, float, float]]]
"""By method and number: the value and its interval."""


@dataclass(frozen=True)
class _Results:
    """A predictor's folder: ``predictor.json``, what ``run.yaml`` says, and the tables."""

    folder: Path
    run: dict[str, Any]
    predictor: dict[str, Any]
    part: str
    numbers: Numbers

    @classmethod
    def of(cls, folder: Path, run: dict[str, Any]) -> _Results:
        rows = _rows(folder / "metrics.tsv")
        part = rows[-1]["part"]
        shown = [row for row in rows if row["part"] == part]
        predictor = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(folder, run, predictor, part, _by_method(shown))

    @property
    def task(self) -> Task:
        return TASKS[self.predictor["task"]]

    @property
    def chosen(self) -> str:
        """The number that chooses between models."""
        return SELECTED[self.task.name][0]

    @property
    def best(self) -> str | None:
        """The baseline whose chosen number is highest."""
        return _best(self.numbers, self.chosen)

    def rows(self, name: str) -> list[dict[str, str]]:
        return _rows(self.folder / f"{name}.tsv")

    def difference(self, method: str) -> tuple[float, float, float]:
        """The predictor minus a method, with its interval."""
        for row in self.rows("comparison"):
            if (row["minus"], row["number"]) == (method, self.chosen):
                return _float(row["difference"]), _float(row["low"]), _float(row["high"])
        return nan, nan, nan

    def predictions(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Some columns of the predictions of the shown part."""
        table = parquet.read_table(self.folder / "predictions.parquet", columns=["part", *columns])
        table = table.filter(compute.equal(table["part"], self.part))
        return {name: table[name].to_pylist() for name in columns}


def write_pages(run: Path) -> None:
    """Write ``report.html`` into the complete folder of a run, and into those of its folds."""
    described = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    name = Path(described["settings"]["output"]).name
    folds = sorted((path.parent for path in run.glob(f"fold-*/{FILE}")), key=lambda path: int(path.name[5:]))
    found = [_Results.of(folder, described) for folder in folds or [run]]
    for place, results in enumerate(found):
        title = f"{name}, fold {place + 1} of {len(folds)}" if folds else name
        _write(results.folder, f"{title}: {results.task.name}", _sections(results))
    if folds:
        _write(run, f"{name}: {found[0].task.name}, {len(folds)} folds", _overview(found))


def _write(folder: Path, title: str, sections: Sequence[Markup | None]) -> None:
    head = element("head", Markup(_HEAD), element("title", title), element("style", Markup(CHARTS + STYLE)))
    body = element("body", element("h1", title), *(section for section in sections if section is not None))
    text = "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"
    (folder / PAGE).write_text(text.replace("</section>", "</section>\n"), encoding="utf-8")


_HEAD: Final = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


def _sections(results: _Results) -> list[Markup | None]:
    return [
        element("p", *_headline(results), class_="headline"),
        _trained(results),
        _numbers(results, "95 % intervals in parentheses: what another draw of test proteins could have given."),
        _differences(results),
        {"class": _confusion, "value": _scatter, "labels": _labels}[results.task.kind](results),
        _calibration(results),
        _identity(results),
        _learning(results),
        _seeds(results),
        _notes(results.run["notes"]),
        _use(
            results,
            Path(results.run["settings"]["output"]) / results.folder.name
            if "fold" in results.folder.name
            else Path(results.run["settings"]["output"]),
        ),
    ]


def _overview(found: Sequence[_Results]) -> list[Markup | None]:
    """A page of all folds: means, with the lowest and the highest."""
    first = found[0]
    means: Numbers = {
        method: {number: _spread([fold.numbers[method][number][0] for fold in found]) for number in of_method}
        for method, of_method in first.numbers.items()
    }
    whole = _Results(first.folder.parent, first.run, first.predictor, first.part, means)
    rows = []
    for place, fold in enumerate(found):
        ours = fold.numbers[OURS][fold.chosen]
        other = (
            ("-", "-")
            if whole.best is None
            else (number_text(fold.numbers[whole.best][fold.chosen][0]), number_text(*fold.difference(whole.best)))
        )
        link = element("a", f"fold {place + 1}", href=f"{fold.folder.name}/{PAGE}")
        rows.append((link, number_text(*ours), *other))
    header = ("fold", f"{whole.chosen} (95 % interval)", whole.best or "no baseline", "difference (95 % interval)")
    return [
        element("p", *_headline_of_folds(found, whole), class_="headline"),
        _trained(whole),
        _numbers(whole, f"Means over {len(found)} folds, with the lowest and the highest fold in parentheses."),
        _section("Folds", "Each fold was tested on other examples. Its page says more.", _table(header, rows)),
        _notes(first.run["notes"]),
        _use(first, Path(first.run["settings"]["output"]) / first.folder.name),
    ]


# ---- the answer, in words ----
def _headline(results: _Results) -> tuple[Markup, str]:
    chosen, best = results.chosen, results.best
    ours = f"{chosen} {number_text(*results.numbers[OURS][chosen])} on the {results.part} part"
    if best is None:
        return element("b", "No baseline to compare with."), f" The predictor: {ours}."
    value, low, high = results.difference(best)
    against = f"{ours}, {best} {number_text(*results.numbers[best][chosen])}"
    if not (isfinite(low) and isfinite(high)):
        return element(
            "b", f"No interval says whether the predictor is better than {best}"
        ), f", the best baseline. Predictor: {against}."
    verdict = "is better than" if low > 0 else "is worse than" if high < 0 else "is not distinguishable from"
    holds = "" if low > 0 or high < 0 else "; the interval holds 0"
    told = f"Predictor: {against}. Difference: {number_text(value, low, high)}{holds}."
    return element("b", f"The predictor {verdict} the best baseline, {best}."), f" {told}"


def _headline_of_folds(found: Sequence[_Results], whole: _Results) -> tuple[Markup, str]:
    chosen, best = whole.chosen, whole.best
    ours = f"{chosen} {number_text(*whole.numbers[OURS][chosen])}, mean over {len(found)} folds"
    if best is None:
        return element("b", "No baseline to compare with."), f" The predictor: {ours}."
    better = sum(fold.numbers[OURS][chosen][0] > fold.numbers[best][chosen][0] for fold in found)
    verdict = f"The predictor is better than the best baseline, {best}, in {better} of {len(found)} folds"
    end = "." if better == len(found) else ": not distinguishable." if better else "."
    return element("b", verdict + end), f" Predictor: {ours}; {best} {number_text(*whole.numbers[best][chosen])}."


# ---- what was trained ----
def _trained(results: _Results) -> Markup:
    settings, predictor = results.run["settings"], results.predictor
    head, classes = predictor["head"], predictor["classes"]
    pooled = (
        ""
        if results.task.unit == "residue" or head["kind"] == "light-attention"
        else f" of the {head['pool']} over residues"
    )
    what = KINDS[results.task.kind] + (f" ({counted(len(classes), 'name')})" if classes else "")
    rows = [
        ("task", f"{results.task.name}: {what} for each {results.task.unit}"),
        ("data", ", ".join(Path(path).name for path in settings["data"])),
        ("split", settings["split"]),
        ("model", f"{predictor['base']['name']}, layer {predictor['layer']} (0 is the input embedding)"),
        ("method", f"{predictor['method']}: {METHODS[predictor['method']]}"),
        ("head", f"{head['kind']}: {HEADS[head['kind']]}{pooled}"),
        ("seeds", f"{settings['seeds']}, from {settings['seed']}"),
    ]
    counts = [
        (row["part"], f"{int(row['examples']):,}", f"{int(row['labelled']):,}", PARTS[row["part"]])
        for row in results.rows("parts")
    ]
    header = ("part", "examples", f"labelled {results.task.unit}s", "used for")
    return _section("What was trained", None, _table((), rows), _table(header, counts) if counts else None)


# ---- the numbers ----
def _numbers(results: _Results, intervals: str) -> Markup:
    methods = list(results.numbers)
    rows = []
    for name in measures(results.task):
        cells = [number_text(*results.numbers[method][name]) for method in methods]
        rows.append((Markup(element("b", name) + element("small", WORDS[name])), *cells))
    drawn = [Bar(method, *of[results.chosen], method == OURS) for method, of in results.numbers.items()]
    explained = [(method, METHODS[method]) for method in methods]
    return _section(
        f"How good it is: {results.part} part",
        f"{results.chosen}: {WORDS[results.chosen]}. {intervals}",
        bars(f"{results.chosen} of all methods", results.chosen, drawn),
        _table(("number", *methods), rows),
        _table(("method", "is"), explained),
    )


def _differences(results: _Results) -> Markup | None:
    rows = []
    for row in results.rows("comparison"):
        if row["number"] == results.chosen:
            found = number_text(*(_float(row[name]) for name in ("difference", "low", "high")))
            rows.append((f"{OURS} minus {row['minus']}", found, number_text(_float(row["flips"]))))
    told = "Both methods are measured on the same 1,000 resamples of test proteins. An interval without 0 is a difference. Flips: share of resamples in which the difference is 0 or has the other sign."
    return (
        _section("Differences", told, _table((results.chosen, "difference (95 % interval)", "flips"), rows))
        if rows
        else None
    )


# ---- pictures of predictions ----
def _confusion(results: _Results) -> Markup:
    columns = results.predictions(["target", "predicted"])
    pairs = Counter((a, b) for a, b in zip(columns["target"], columns["predicted"], strict=True) if a is not None)
    of_class = Counter[str]()
    for (truth, _), count in pairs.items():
        of_class[truth] += count
    names = sorted(sorted(results.predictor["classes"]), key=lambda name: -of_class[name])[:MOST_CLASSES]
    counts = [[pairs[truth, predicted] for predicted in names] for truth in names]
    told = f"Rows are true classes, columns are predicted ones; a darker square is a larger share of its row. {_most(results, 'classes')}"
    return _section(
        "Which classes are confused", told, shades("confusion matrix", "true class", "predicted class", names, counts)
    )


def _most(results: _Results, noun: str) -> str:
    count = len(results.predictor["classes"])
    return f"The {MOST_CLASSES} most frequent of {count:,} {noun} are shown." if count > MOST_CLASSES else ""


def _scatter(results: _Results) -> Markup:
    columns = results.predictions(["target", "predicted"])
    both = np.array([columns["target"], columns["predicted"]], np.float64)
    both = both[:, np.isfinite(both).all(0)]
    count, told = both.shape[1], "Points on the dashed line are right."
    if count > MOST_POINTS:
        both = both[:, np.sort(np.random.default_rng(0).choice(count, MOST_POINTS, replace=False))]
        told += f" {MOST_POINTS:,} of {count:,} points are shown, drawn at random."
    ends = np.array([both.min(), both.max()] if count else [0.0, 1.0])
    series = [Series("", *both.tolist(), "dots"), Series("", ends, ends, "guide")]
    threshold = results.predictor["calibration"]["threshold"]
    if threshold is not None:
        series += [Series("", ends, ends + threshold), Series("", ends, ends - threshold)]
        told += (
            f" Between the outer lines, the interval (prediction ± {number_text(threshold)}) holds the measured value."
        )
    unit = results.run["settings"]["target_column"] or "units of the target"
    picture = plot("predicted against measured", f"measured ({unit})", f"predicted ({unit})", series, equal=True)
    return _section("Predicted against measured", told, picture)


def _labels(results: _Results) -> Markup:
    names = results.predictor["classes"]
    counts = {name: 0.0 for name in names}
    table = results.predictions([f"target_{name}" for name in names])
    for name in names:
        counts[name] = float(np.nansum(np.array(table[f"target_{name}"], np.float64)))
    shown = sorted(names, key=lambda name: -counts[name])[:MOST_CLASSES]
    scores = results.predictions([f"probability_{name}" for name in shown])
    drawn = []
    for name in shown:
        truth = np.array(table[f"target_{name}"], np.float64)
        known = ~np.isnan(truth)
        score = np.array(scores[f"probability_{name}"], np.float64)[known]
        area = Ranking(score).areas(np.ones(len(score)), truth[known] == 1)[0] if len(score) else nan
        drawn.append(Bar(f"{name} ({counts[name]:,.0f})", area, ours=True))
    told = f"auroc of each label: {WORDS['auroc']}. In parentheses: how many have the label. {_most(results, 'labels')}"
    return _section("Each label", told, bars("auroc of each label", "auroc", drawn))


# ---- how sure predictions are ----
def _calibration(results: _Results) -> Markup:
    rows = [
        (
            Markup(element("b", row["number"]) + element("small", WORDS[row["number"]])),
            number_text(_float(row["value"])),
        )
        for row in results.rows("calibration")
    ]
    picture = None
    told = f"Measured on the {results.part} part."
    if results.task.kind != "value":
        told += " On the dashed line, a probability of 0.7 is right 7 times in 10. Below it, the predictor is too sure."
        drawn = [Series(when, *_reliability(results, when), "both") for when in ("before", "after")]
        series = [*drawn, Series("", (0, 1), (0, 1), "guide")]
        picture = plot("reliability before and after temperature", "probability", "share that is right", series)
    return _section("How sure it is", told, picture, _table(("number", "value"), rows))


def _reliability(results: _Results, when: str) -> tuple[list[float], list[float]]:
    """Mean probabilities and shares that are right, of bins that are not empty, before or after temperature."""
    task, classes = results.task, results.predictor["classes"]
    calibrated = Calibration.from_numbers(task, results.predictor["calibration"])
    places = {name: place for place, name in enumerate(classes)}
    sums = np.zeros((3, 10))
    with parquet.ParquetFile(results.folder / "predictions.parquet") as file:
        for batch in file.iter_batches(max(1, _CELLS // len(classes))):
            batch = batch.filter(compute.equal(batch["part"], results.part))
            if task.kind == "class":
                truth = np.array([places.get(name, MISSING) for name in batch["target"].to_pylist()], np.int64)
            else:
                truth = _columns(batch, "target", classes)
            values = _columns(batch, "probability", classes)
            values = calibrated.probabilities(values) if when == "after" else values
            found = reliability(values, Targets(truth, np.arange(len(truth) + 1)))
            sums += [found.rows, *(np.nan_to_num(of) * found.rows for of in (found.probability, found.right))]
    rows, probability, right = sums[:, sums[0] > 0]
    return (probability / rows).tolist(), (right / rows).tolist()


def _columns(batch: Any, what: str, classes: Sequence[str]) -> Floats:
    return np.stack([batch[f"{what}_{name}"].to_numpy(zero_copy_only=False) for name in classes], 1)


# ---- tables that some runs have ----
def _identity(results: _Results) -> Markup | None:
    shown = [OURS, *([results.best] if results.best else [])]
    drawn, counts = [], {}
    for row in results.rows("by_identity"):
        if row["number"] == results.chosen and row["method"] in shown:
            start, end = (f"{100 * _float(row[name]):.0f}" for name in ("identity_from", "identity_to"))
            span = f"{start} to {end} %"
            counts[span] = f"{int(row['examples']):,}"
            drawn.append((span, Bar(f"{span}, {row['method']}", _float(row["value"]), ours=row["method"] == OURS)))
    if not drawn:
        return None
    told = "Test examples by the identity to the most similar training sequence. A predictor that only remembers is good at high identity alone. Few examples give unsure numbers."
    picture = bars(f"{results.chosen} by identity", results.chosen, [bar for _, bar in drawn])
    return _section(
        "How similar test and training examples are",
        told,
        picture,
        _table(("identity", "examples"), list(counts.items())),
    )


def _learning(results: _Results) -> Markup | None:
    curve, layers = results.rows("curve"), results.rows("layers")
    pictures = []
    if curve:
        columns = {name: [_float(row[name]) for row in curve] for name in curve[0]}
        losses = [Series(what, columns["step"], columns[f"{what}_loss"], "both") for what in ("training", "validation")]
        chosen = [Series("", columns["step"], columns["validation_number"], "both")]
        pictures.append(plot("learning curve", "step (updates)", "loss (lower is better)", losses))
        pictures.append(plot("chosen number by step", "step (updates)", f"{results.chosen}, validation", chosen))
    if layers:
        points = [[_float(row[name]) for row in layers] for name in ("layer", "validation_loss")]
        pictures.append(
            plot("loss by layer", "layer (0 is the input)", "validation loss", [Series("", *points, "both")])
        )
    told = "Training keeps the head with the best number on the validation part, or the layer with the least loss."
    return _section("Training", told, *pictures) if pictures else None


def _seeds(results: _Results) -> Markup | None:
    rows = results.rows("seeds")
    names = [name for name in measures(results.task) if any(row["number"] == name for row in rows)]
    found = {(row["seed"], row["number"]): _float(row["value"]) for row in rows}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    cells = [(seed, *(number_text(found[seed, name]) for name in names)) for seed in seeds]
    spread = [number_text(*_spread([found[seed, name] for seed in seeds])) for name in names]
    told = "The same training from other random numbers; the seed that is best on the validation part was kept. Last row: mean, lowest and highest."
    return _section("Seeds", told, _table(("seed", *names), [*cells, ("mean", *spread)])) if rows else None


def _notes(notes: Sequence[str]) -> Markup:
    return _section("Notes", None, element("ul", *(element("li", note) for note in notes)))


def _use(results: _Results, output: Path) -> Markup:
    inputs = "proteins.fasta"
    command = f"protea predict {shlex.quote(str(output))} {inputs} -o predicted.csv"
    told = (
        "The table holds a row for each residue."
        if results.task.unit == "residue"
        else "The table holds a row for each sequence."
    )
    told += " Its column far is true for proteins that are unlike the training data: trust those predictions less."
    return _section("How to predict", told, element("pre", command))


# ---- parts of a page ----
def _section(title: str, told: str | None, *parts: Markup | None) -> Markup:
    inside = [element("h2", title), *([element("p", told)] if told else [])]
    return element("section", *inside, *(part for part in parts if part is not None))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    lines = [element("tr", *(element("th", name) for name in header))] if header else []
    lines += [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("div", element("table", *lines), class_="wide")


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no table."""
    return read_table(path).to_pylist() if path.exists() else []


def _float(text: str) -> float:
    return float(text) if text else nan


def _by_method(rows: Sequence[dict[str, str]]) -> Numbers:
    found: Numbers = {}
    for row in rows:
        value, low, high = (_float(row[name]) for name in _NUMBERS)
        found.setdefault(row["method"], {})[row["number"]] = value, low, high
    return found


def _best(numbers: Numbers, chosen: str) -> str | None:
    others = {method: of[chosen][0] for method, of in numbers.items() if method != OURS and isfinite(of[chosen][0])}
    return max(others, key=lambda method: others[method]) if others else None


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest and highest; not defined if one is not."""
    return (nan, nan, nan) if any(map(np.isnan, values)) else (float(np.mean(values)), min(values), max(values))
