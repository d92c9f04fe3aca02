"""``report.html``: what a run of ``protea finetune`` trained and how good it is, on one page that loads nothing.

A page is made of the tables in the folder of a run, so ``write_pages(RUN)`` makes it again. The folds of a run have a
page each, and the page above them shows them side by side.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, nan
from pathlib import Path
from typing import Final

import numpy as np
import yaml

from protea.finetune.evaluation import OURS
from protea.finetune.measures import measures
from protea.finetune.predictor import FILE
from protea.finetune.report_pictures import Numbers, Results, as_number, of_predictions, reliability_diagram
from protea.finetune.report_words import HEADS, KINDS, METHODS, PARTS, TOLD, WORDS
from protea.plot.charts import Bar, Markup, Series, bars, element, number_text, plot
from protea.plot.documents import document, html_table, section
from protea.text import counted

PAGE: Final = "report.html"


def write_pages(run: Path) -> None:
    """Write ``report.html`` into the complete folder of a run, and into those of its folds."""
    described = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    output = Path(described["settings"]["output"])
    folds = sorted((path.parent for path in run.glob(f"fold-*/{FILE}")), key=lambda path: int(path.name[5:]))
    found = [Results.of(folder, described) for folder in folds or [run]]
    for place, results in enumerate(found):
        title = f"{output.name}, fold {place + 1} of {len(folds)}" if folds else output.name
        place_of = output / results.folder.name if folds else output
        text = document(f"{title}: {results.task.name}", [*_sections(results), _use(results, place_of)])
        (results.folder / PAGE).write_text(text, encoding="utf-8")
    if folds:
        sections = [*_overview(found), _use(found[0], output / folds[0].name)]
        text = document(f"{output.name}: {found[0].task.name}, {len(folds)} folds", sections)
        (run / PAGE).write_text(text, encoding="utf-8")


def _sections(results: Results) -> list[Markup | None]:
    title, told, picture = of_predictions(results)
    return [
        _headline(results),
        _trained(results),
        _numbers(results, TOLD["interval"]),
        _differences(results),
        section(title, told, picture),
        _calibration(results),
        _identity(results),
        _training(results),
        _choices([results]),
        _seeds(results),
        _notes(results),
    ]


def _overview(folds: Sequence[Results]) -> list[Markup | None]:
    """A page of all folds: means, with the lowest and the highest."""
    first = folds[0]
    means: Numbers = {
        method: {name: _spread([fold.numbers[method][name][0] for fold in folds]) for name in of_method}
        for method, of_method in first.numbers.items()
    }
    layers = " or ".join(dict.fromkeys(str(fold.predictor["layer"]) for fold in folds))
    whole = replace(first, folder=first.folder.parent, predictor=first.predictor | {"layer": layers}, numbers=means)
    best = _best(whole)
    rows = []
    for place, fold in enumerate(folds):
        link = element("a", f"fold {place + 1}", href=f"{fold.folder.name}/{PAGE}")
        cells = [number_text(*fold.numbers[method][fold.chosen]) for method in (OURS, best) if method]
        rows.append((link, *cells, *([number_text(*_difference(fold, best)[:3])] if best else [])))
    header = ("fold", OURS, *((best, "difference (95 % interval)") if best else ()))
    return [
        _headline_of_folds(folds, whole),
        _trained(whole),
        _numbers(whole, f"Means over {len(folds)} folds, with the lowest and the highest fold in parentheses."),
        section(f"Folds: {first.chosen}", TOLD["folds"], html_table(header, rows)),
        _choices(folds),
        _notes(whole),
    ]


# ---- the answer, in words ----
def _headline(results: Results) -> Markup:
    best = _best(results)
    if best is None:
        return _answer("There is no baseline to compare with.", f"The predictor: {_of(results, OURS)}.")
    value, low, high, _ = _difference(results, best)
    verdict = "is better than" if low > 0 else "is worse than" if high < 0 else "is not distinguishable from"
    told = f"Predictor: {_of(results, OURS)}; {best}: {_of(results, best)}, {results.part} part. Difference: "
    told += (
        number_text(value, low, high)
        + ("" if low > 0 or high < 0 else "; the interval holds 0")
        + ". 95 % intervals in parentheses."
    )
    if not (isfinite(low) and isfinite(high)):
        verdict, told = "cannot be compared with", f"{told.partition(' Difference')[0]} There is no interval."
    return _answer(f"The predictor {verdict} the best baseline, {best}.", told)


def _headline_of_folds(folds: Sequence[Results], whole: Results) -> Markup:
    best = _best(whole)
    ours = f"Predictor: {_of(whole, OURS)}, mean over {len(folds)} folds"
    if best is None:
        return _answer("There is no baseline to compare with.", f"{ours}.")
    above = sum(fold.numbers[OURS][fold.chosen][0] > fold.numbers[best][fold.chosen][0] for fold in folds)
    verdict, end = "is better than", f"in {above} of {len(folds)} folds: not distinguishable"
    if above in (0, len(folds)):
        verdict, end = ("is better than", "in every fold") if above else ("is not better than", "in any fold")
    told = f"{ours}; {best}: {_of(whole, best)}. Lowest and highest fold in parentheses."
    return _answer(f"The predictor {verdict} the best baseline, {best}, {end}.", told)


def _answer(verdict: str, told: str) -> Markup:
    return element("p", element("b", verdict), f" {told}", class_="headline")


def _of(results: Results, method: str) -> str:
    return f"{results.chosen} {number_text(*results.numbers[method][results.chosen])}"


def _best(results: Results) -> str | None:
    """The baseline whose chosen number is highest."""
    found = {method: numbers[results.chosen][0] for method, numbers in results.numbers.items() if method != OURS}
    found = {method: value for method, value in found.items() if isfinite(value)}
    return max(found, key=lambda method: found[method]) if found else None


def _difference(results: Results, method: str) -> tuple[float, ...]:
    """The predictor minus a method in the chosen number, its interval, and flips."""
    for row in results.rows("comparison"):
        if (row["minus"], row["number"]) == (method, results.chosen):
            return tuple(as_number(row[name]) for name in ("difference", "low", "high", "flips"))
    return nan, nan, nan, nan


# ---- what was trained, and the numbers ----
def _trained(results: Results) -> Markup:
    settings, predictor, task = results.run["settings"], results.predictor, results.task
    head, classes = predictor["head"], predictor["classes"]
    pooled = "" if task.unit == "residue" or head["kind"] == "light-attention" else f", on the {head['pool']} vector"
    rows = [
        ("task", f"{task.name}: {KINDS[task.kind]}{f' ({len(classes):,})' if classes else ''}, for each {task.unit}"),
        ("data", ", ".join(Path(path).name for path in settings["data"])),
        ("split", settings["split"]),
        ("model", f"{predictor['base']['name']}, layer {predictor['layer']} (0 is the input embedding)"),
        ("method", f"{predictor['method']}: {METHODS[predictor['method']]}"),
        ("head", f"{head['kind']}: {HEADS[head['kind']]}{pooled}"),
        ("seeds", f"{counted(settings['seeds'], 'seed')}, from {settings['seed']}"),
    ]
    parts = [
        (row["part"], f"{int(row['examples']):,}", f"{int(row['labelled']):,}", PARTS[row["part"]])
        for row in results.rows("parts")
    ]
    header = ("part", "examples", f"labelled {task.unit}s", "used for")
    return section("What was trained", "", html_table((), rows), html_table(header, parts))


def _numbers(results: Results, told: str) -> Markup:
    methods, chosen = results.numbers, results.chosen
    rows = [(_explained(name), *(number_text(*of[name]) for of in methods.values())) for name in measures(results.task)]
    return section(
        f"How good it is: {results.part} part",
        f"{chosen}: {WORDS[chosen]}. {told}",
        bars(
            f"{chosen} of all methods", chosen, [Bar(name, *of[chosen], name == OURS) for name, of in methods.items()]
        ),
        html_table(("number", *methods), rows),
        html_table(("method", "is"), [(method, METHODS[method]) for method in methods]),
    )


def _differences(results: Results) -> Markup | None:
    differences = {method: _difference(results, method) for method in results.numbers if method != OURS}
    rows = [
        (f"{OURS} minus {method}", number_text(value, low, high), number_text(flips))
        for method, (value, low, high, flips) in differences.items()
    ]
    table = html_table((results.chosen, "difference", "flips"), rows)
    return section("Differences", TOLD["difference"], table) if rows else None


def _calibration(results: Results) -> Markup:
    found = {row["number"]: number_text(as_number(row["value"])) for row in results.rows("calibration")}
    if not found:
        return section("How sure it is", TOLD["uncalibrated"])
    table = html_table(("number", "value"), [(_explained(name), value) for name, value in found.items()])
    pictures = [] if results.task.kind == "value" else [reliability_diagram(results)]
    return section("How sure it is", TOLD["reliability"] if pictures else "", *pictures, table)


# ---- tables that some runs have ----
def _identity(results: Results) -> Markup | None:
    drawn: list[Bar] = []
    counts: dict[str, str] = {}
    for row in results.rows("by_identity"):
        if row["number"] == results.chosen and row["method"] in (OURS, _best(results)):
            span = " to ".join(f"{100 * as_number(row[name]):.0f}" for name in ("identity_from", "identity_to")) + " %"
            counts[span] = f"{int(row['examples']):,}"
            drawn.append(Bar(f"{span}, {row['method']}", as_number(row["value"]), ours=row["method"] == OURS))
    picture = bars(f"{results.chosen} by identity", results.chosen, drawn) if drawn else None
    table = html_table(("identity", "examples"), list(counts.items()))
    return section("Likeness of test and training examples", TOLD["identity"], picture, table) if drawn else None


def _training(results: Results) -> Markup | None:
    pictures = []
    if curve := results.rows("curve"):
        step, training, validation, number = ([as_number(row[name]) for row in curve] for name in curve[0])
        losses = [Series("training", step, training, "both"), Series("validation", step, validation, "both")]
        pictures.append(plot("learning curve", "updates", "loss", losses))
        found = [Series("", step, number, "both")]
        pictures.append(plot("chosen number by updates", "updates", f"{results.chosen}, validation", found))
    if layers := results.rows("layers"):
        layer, loss = ([as_number(row[name]) for row in layers] for name in layers[0])
        pictures.append(plot("loss by layer", "layer", "validation loss", [Series("", layer, loss, "both")]))
    return section("Training", TOLD["training"], *pictures) if pictures else None


def _choices(folds: Sequence[Results]) -> Markup | None:
    """All candidates of one fold, or the chosen ones of several."""
    found = [(f"fold {place}", row) for place, fold in enumerate(folds, start=1) for row in fold.rows("choices")]
    if len(folds) > 1:
        found = [(fold, row) for fold, row in found if row["chosen"] == "True"]
    if not found:
        return None
    names = [name for name in found[0][1] if name not in ("choice", "candidate", "number", "chosen")]
    rows = []
    for fold, row in found:
        first = fold if len(folds) > 1 else "chosen" if row["chosen"] == "True" else ""
        numbers = (number_text(as_number(row[name])) for name in names)
        rows.append((first, f"{row['choice']} {row['candidate']}", *numbers))
    header = ("", "candidate", *(name.replace("_", " ") for name in names))
    return section(f"Choices: {folds[0].chosen}", TOLD["choices"], html_table(header, rows))


def _seeds(results: Results) -> Markup | None:
    by_seed: dict[str, dict[str, str]] = {}
    for row in results.rows("seeds"):
        by_seed.setdefault(row["seed"], {})[row["number"]] = number_text(as_number(row["value"]))
    names = measures(results.task)
    rows = [(seed, *(found[name] for name in names)) for seed, found in by_seed.items()]
    return section("Seeds", TOLD["seeds"], html_table(("seed", *names), rows)) if rows else None


def _notes(results: Results) -> Markup:
    return section("Notes", "", element("ul", *(element("li", note) for note in results.run["notes"])))


def _use(results: Results, output: Path) -> Markup:
    unit = results.task.unit
    source, told = ("pairs.csv", TOLD["pairs"]) if unit == "pair" else ("proteins.fasta", TOLD["use"])
    command = f"protea predict {shlex.quote(str(output))} {source} -o predicted.csv"
    return section("How to predict", f"One row for each {unit}. {told}", element("pre", command))


# ---- cells ----
def _explained(number: str) -> Markup:
    return Markup(element("b", number) + element("small", WORDS[number]))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest and highest; not defined if one is not."""
    return (nan, nan, nan) if any(map(np.isnan, values)) else (float(np.mean(values)), min(values), max(values))
