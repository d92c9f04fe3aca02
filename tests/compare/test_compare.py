"""Models in one table: its numbers are those of the benchmarks' own commands, and what is finished stays."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import protea
from conftest import FASTA, SMALL, Run, fails
from made_structures import folder_of_snakes
from messages import check_message
from protea.checkpoints import hf
from protea.compare import benchmarks as of_tables
from protea.compare.benchmarks import Contacts, Perplexity, Scans
from protea.compare.compared import Compared
from protea.compare.comparison import Comparison, described
from protea.compare.flip_benchmark import Flip
from protea.compare.measured import ComparedBenchmark, Paired
from protea.compare.views import grid, page, pairs
from protea.contacts.precision import means as means_of_chains
from protea.errors import OutputError, UsageError
from protea.evaluate.proteingym import means
from protea.finetune.bootstrap import Difference
from protea.infer.loading import ModelLoader
from protea.models.carp import CARPConfig
from protea.models.esm1b import ESM1bConfig
from protea.models.esm2 import ESM2Config
from protea.models.registry import build
from protea.progress import Progress
from protea.score.perplexity import measure_perplexity

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
LONG = "".join(random.Random(1).choices(LETTERS, k=90))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, and files of every benchmark."""
    root = tmp_path_factory.mktemp("files")
    small = {**SMALL, "num_hidden_layers": 2}
    configs = {"one": ESM2Config(**small), "two": ESM2Config(**small)}
    for seed, (name, config) in enumerate(configs.items(), start=1):
        hf.write_random(root / name, build(config), seed=seed, dtype=torch.float32)
    carp = CARPConfig(num_hidden_layers=2, hidden_size=40, inner_width=20)
    hf.write_random(root / "conv", build(carp), seed=1, dtype=torch.float32)
    folder_of_snakes(root / "structures", 5)
    (root / "in.fasta").write_text(f"{FASTA}>d\n{LONG}\n>e\n{LONG[::-1]}\n>f\n{WILD}\n")
    scans = root / "scans"
    scans.mkdir()
    lines = ["assay,target_seq,spearman Some (8M)"]
    rng = np.random.default_rng(0)
    for protein in ("P1", "P2", "P3"):
        for assay in ("X_2020", "Y_2021"):
            lines.append(f"{protein}_ORG_{assay},{WILD},{rng.uniform():.3f}")
            rows = [f"{WILD[i]}{i + 1}{new},{rng.normal():.3f}" for i in range(8) for new in "GW" if WILD[i] != new]
            (scans / f"{protein}_ORG_{assay}.csv").write_text("\n".join(["mutant,score", *rows, ""]))
    (scans / "assays.csv").write_text("\n".join([*lines, ""]))
    parts = ["train"] * 12 + ["validation"] * 4 + ["test"] * 8
    records = ""
    for number, part in enumerate(parts):
        sequence = "".join(random.Random(number).choices(LETTERS, k=24))
        kind = "train" if part == "validation" else part
        records += f">s{number} TARGET={sequence.count('A') + number / 50} SET={kind} "
        records += f"VALIDATION={part == 'validation'}\n{sequence}\n"
    (root / "flip" / "gb1").mkdir(parents=True)
    (root / "flip" / "gb1" / "two_vs_rest.fasta").write_text(records)
    return root


def compared(files: Path, output: Path, names: str, *chosen: ComparedBenchmark, overwrite: bool = False) -> Compared:
    return Comparison(
        models=[str(files / name) for name in names.split()],
        benchmarks=chosen,
        output=output,
        load=ModelLoader("cpu"),
        overwrite=overwrite,
    )()


def quick(files: Path) -> tuple[ComparedBenchmark, ...]:
    return Contacts([files / "structures"]), fasta(files)


def fasta(files: Path) -> Perplexity:
    return Perplexity([str(files / "in.fasta")])


@pytest.fixture(scope="module")
def everything(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compared]:
    """All models on all benchmarks, but FLIP for two of them."""
    output, threads = tmp_path_factory.mktemp("everything") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    compared(files, output, "one two", Flip(files / "flip"))
    found = compared(files, output, "one two conv", *quick(files), Scans(files / "scans"))
    torch.set_num_threads(threads)
    return output, found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def numbers(found: Compared, model: str) -> dict[str, tuple[float, float, float]]:
    return {
        number.benchmark: (number.value, number.low, number.high)
        for cell in found.cells
        if cell.model.name == model
        for number in cell.numbers
    }


# ---- the numbers ----
def test_numbers_are_those_of_the_commands(files: Path, everything: tuple[Path, Compared], run: Run) -> None:
    output, found = everything
    model = ("-m", files / "one", "--device", "cpu")
    result = run("evaluate", "contacts", files / "structures", *model, "-o", "contacts.csv")
    assert result.code == 0, result.err
    assert run("evaluate", "proteingym", files / "scans", *model, "-o", "proteingym.csv").code == 0
    assert run("perplexity", files / "in.fasta", *model, "-o", "perplexity.csv").code == 0
    for name in ("contacts.csv", "proteingym.csv", "perplexity.csv"):
        assert (output / "one" / name).read_bytes() == Path(name).read_bytes()
    loaded = protea.load(files / "one", device="cpu")
    chains = means_of_chains(loaded.evaluate_contacts([files / "structures"]))["long"]["P@L"]
    mine = numbers(found, "one")
    assert mine["contacts"] == pytest.approx(chains[:3], abs=1e-6)
    assert mine["proteingym"][0] == pytest.approx(
        means(loaded.evaluate_proteingym(files / "scans"), "spearman")["proteins"]
    )
    assert mine["perplexity"][0] == pytest.approx(float(result_of_perplexity(run, files, model)), abs=1e-4)
    assert all(low < value < high for value, low, high in mine.values())


def result_of_perplexity(run: Run, files: Path, model: tuple[Any, ...]) -> str:
    return str(run("perplexity", files / "in.fasta", *model).out.split()[1].rstrip(":"))


def test_what_a_model_cannot_do_is_a_cell_with_the_reason(everything: tuple[Path, Compared]) -> None:
    output, found = everything
    cell = next(cell for cell in found.cells if (cell.model.name, cell.benchmark) == ("conv", "contacts"))
    assert not cell.numbers
    assert "no contacts" in cell.reason
    assert "fit-contacts" in cell.reason
    assert not found.failed
    assert set(numbers(found, "conv")) == {"proteingym", "perplexity"}
    table = rows(output / "compare.csv")
    assert [row["reason"] for row in table if row["reason"]] == [cell.reason]
    assert {row["parameters"] for row in table if row["model"] == "one"} == {str(found.models[0].parameters)}
    shown = grid(found)
    assert shown.header == ["", "one", "two", "conv"]
    line = next(row for row in shown.rows if row[0].startswith("contacts"))
    assert line[3] == "- [1]"
    assert shown.notes[0] == f"[1] conv: {cell.reason}"


def test_differences_are_of_pairs(everything: tuple[Path, Compared]) -> None:
    output, found = everything
    by_key = {(model, minus, pair.benchmark): pair for model, minus, pair in found.differences}
    assert ("conv", "two", "contacts") not in by_key
    one, two = numbers(found, "one"), numbers(found, "two")
    for benchmark in one:
        pair = by_key["two", "one", benchmark]
        assert pair.difference.value == pytest.approx(two[benchmark][0] - one[benchmark][0], abs=1e-9)
        assert pair.difference.low <= pair.difference.value <= pair.difference.high
    assert by_key["two", "one", "contacts"].size == 5
    assert by_key["two", "one", "proteingym"].size == 3
    # CARP has no token before a sequence, but the same residues are masked.
    assert by_key["conv", "one", "perplexity"].size == 4
    values = [numbers(found, name)["perplexity"][0] for name in ("conv", "one")]
    assert by_key["conv", "one", "perplexity"].difference.value == pytest.approx(values[0] - values[1], abs=1e-9)
    table = rows(output / "differences.csv")
    assert [(row["model"], row["minus"], row["benchmark"]) for row in table] == list(by_key)
    assert len(pairs(found)) == len(table)


def test_the_page_and_the_json_hold_the_numbers(everything: tuple[Path, Compared]) -> None:
    output, found = everything
    text = (output / "compare.html").read_text()
    assert page(found, "out: 3 models") == text
    for outside in ("http://", "https://", "<script", "url("):
        assert outside not in text
    assert text.count("<svg") == 3
    said = json.loads((output / "compare.json").read_text())
    assert [model["name"] for model in said["models"]] == ["one", "two", "conv"]
    assert said["models"][2]["family"] == "CARP"
    contacts = next(row for row in said["numbers"] if row["benchmark"] == "contacts")
    assert contacts["value"] == numbers(found, "one")["contacts"][0]
    assert {row["predicted"] for row in said["numbers"] if row.get("predicted")} == {35}


def test_other_residues_are_told(files: Path, tmp_path: Path) -> None:
    """A model that cuts sequences predicts fewer residues; the difference is over the sequences that both see whole."""
    config = ESM1bConfig(**{**SMALL, "num_hidden_layers": 2}, max_position_embeddings=66, emb_layer_norm_before=True)
    hf.write_random(tmp_path / "short", build(config), seed=1, dtype=torch.float32)
    found = compared(files, tmp_path / "out", f"conv {tmp_path / 'short'}", fasta(files))
    (_, _, pair), (whole, cut) = found.differences[0], [cell.numbers[0] for cell in found.cells]
    assert whole.predicted is not None
    assert cut.predicted is not None
    assert whole.predicted > cut.predicted
    assert pair.size == 2
    shown = grid(found)
    assert shown.rows[2][0].endswith("[1] [2]")
    check_message("compare.few_items", shown.notes[0])
    assert f"{cut.predicted:,} or {whole.predicted:,} residues" in shown.notes[1]
    assert pairs(found)[0][-1].startswith("2 (few")
    fewer = replace(
        found, differences=[("a", "b", Paired("perplexity", "perplexity", Difference(nan, nan, nan, 0, nan), 0))]
    )
    assert pairs(fewer)[0][3] == "nothing that both measured alike"


# ---- FLIP ----
def test_flip_is_that_of_its_command(files: Path, everything: tuple[Path, Compared], tmp_path: Path) -> None:
    output, _ = everything
    found = compared(files, output, "one two", Flip(files / "flip"))
    assert {number.benchmark for cell in found.cells for number in cell.numbers} == {"flip gb1 two_vs_rest"}
    for cell in found.cells:
        with (output / cell.model.name / "flip" / "flip.tsv").open() as stream:
            table = {row["number"]: row for row in csv.DictReader(stream, delimiter="\t")}
        assert {number.name: number.value for number in cell.numbers} == {
            name: float(row["value"]) for name, row in table.items()
        }
        assert {number.size for number in cell.numbers} == {8}
    by_name = {pair.name: pair.difference for _, _, pair in found.differences}
    squares = []
    for name in ("two", "one"):
        path = output / name / "flip" / "gb1" / "two_vs_rest" / "predictions.parquet"
        of_test = [row for row in parquet.read_table(path).to_pylist() if row["part"] == "test"]
        squares.append(np.array([(row["target"] - row["predicted"]) ** 2 for row in of_test]))
    # An own bootstrap, with the same draws: fewer than 20 families, so single examples are drawn.
    draws = np.random.default_rng(0)
    resampled = [(squares[0] - squares[1])[draws.integers(0, 8, 8)].mean() for _ in range(1000)]
    expected = (np.mean(squares[0] - squares[1]), *np.percentile(resampled, (2.5, 97.5)))
    assert by_name["mse"][:3] == pytest.approx(expected, rel=1e-9)


# ---- finished cells ----
class Told(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def stamps(output: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in output.rglob("*.csv") if path.parent != output}


def test_an_interrupted_comparison_continues(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    calls: list[str] = []

    def interrupted(inputs: Any, **options: Any) -> Any:
        calls.append(options["model"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_perplexity(inputs, **options)

    monkeypatch.setattr(of_tables, "measure_perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(files, output, "one two", *quick(files))
    before = stamps(output)
    assert len(before) == 3
    assert not (output / "compare.csv").exists()
    monkeypatch.undo()
    whole = compared(files, output, "one two", *quick(files))
    after = stamps(output)
    assert before.items() <= after.items()
    assert len(after) == 4
    undisturbed = compared(files, tmp_path / "other", "one two", *quick(files))
    assert whole.as_json() == undisturbed.as_json()
    assert not [path for path in output.parent.iterdir() if path.name.endswith(".partial")]
    # Given again, and with one more model, only what is new is computed.
    again = compared(files, output, "one two", *quick(files))
    assert again.as_json() == whole.as_json()
    more = compared(files, output, "one two conv", *quick(files))
    assert after.items() <= stamps(output).items()
    assert numbers(more, "one") == numbers(whole, "one")


def test_finished_cells_of_another_model_are_refused(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "one", tmp_path / "a" / "model")
    chosen = fasta(files)
    first = compared(tmp_path / "a", tmp_path / "out", "model", chosen)
    shutil.rmtree(tmp_path / "a" / "model")
    shutil.copytree(files / "two", tmp_path / "a" / "model")
    with pytest.raises(OutputError, match="weights") as caught:
        compared(tmp_path / "a", tmp_path / "out", "model", chosen)
    check_message("compare.other_weights", caught.value, tmp=tmp_path)
    second = compared(tmp_path / "a", tmp_path / "out", "model", chosen, overwrite=True)
    assert numbers(first, "model") != numbers(second, "model")


def test_a_cell_that_fails_does_not_end_the_comparison(files: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(files / "one", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    name = next(name for name in weights if name.endswith("LayerNorm.weight"))
    weights[name][:] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    command = ("compare", "-m", "broken", "-m", files / "one", "--sequences", files / "in.fasta", "-o", "out")
    result = run(*command, "--device", "cpu")
    assert result.code == 1
    assert "[1] broken: " in result.out
    assert result.out.splitlines()[3].split()[-4] != "-"
    assert (tmp_path / "out" / "compare.csv.report.tsv").read_text().count("broken\tperplexity: not measured") == 1


def test_what_was_left_out_is_told_each_time(files: Path, tmp_path: Path, run: Run) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(files / "scans", scans)
    scan = scans / "P1_ORG_X_2020.csv"
    scan.write_text(scan.read_text() + "W1A,1.0\n")
    command = ("compare", "-m", files / "one", "-m", files / "two", "--proteingym", scans, "-o", "out", "--json")
    for _ in range(2):
        result = run(*command, "--device", "cpu", "--method", "wildtype-marginals")
        assert result.code == 1, result.err
        said = json.loads(result.out)
        assert all("could not be scored; see out" in row["reason"] for row in said["numbers"])
        assert all(row["value"] is not None for row in said["numbers"])


# ---- mistakes ----
def test_mistakes_are_told_before_work(files: Path, run: Run, tmp_path: Path) -> None:
    models = ("-m", files / "one", "-m", files / "two")
    nothing = run("compare", *models, "-o", "out")
    fails(nothing, 2, "--structures", "--proteingym", "--flip", "--sequences")
    check_message("compare.no_benchmark", nothing.err)
    wrong = run("compare", "-m", files / "one", "-m", "esm2_t6_9M", "--sequences", files / "in.fasta", "-o", "out")
    fails(wrong, 2, "esm2_t6_9M", "esm2_t6_8M_UR50D")
    chosen = ("--sequences", files / "in.fasta")
    fails(run("compare", *models, "-m", files / "one", *chosen, "-o", "out"), 2, "named twice")
    fails(run("compare", *models, "--sequences", "absent.fasta", "-o", "out"), 1, "absent.fasta")
    fails(run("compare", *models, "--structures", "absent", "-o", "out"), 1, "absent")
    fails(run("compare", *models, *chosen, "--flip", files / "scans", "-o", "out"), 1, "nothing of FLIP")
    fails(run("compare", *models, "--flip", files / "flip", "--task", "gb2", "-o", "out"), 2, "gb2")
    fails(run("compare", *models, "--proteingym", files / "scans", "--assays", "Z", "-o", "out"), 2, "--assays 'Z'")
    belongs = run("compare", *models, *chosen, "--limit", 3, "-o", "out")
    fails(belongs, 2, "--limit", "--flip")
    check_message("compare.option_without_benchmark", belongs.err)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    fails(run("compare", *models, *chosen, "-o", "mine"), 1, "mine", "not written by this command")
    fails(run("compare", *chosen, "-o", "out"), 2, "-m")


def test_names_of_models(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "one", tmp_path / "two")
    names = [str(files / "two"), str(tmp_path / "two"), str(files / "conv")]
    assert [model.name for model in described(names)] == [*names[:2], "conv"]
    with pytest.raises(UsageError, match="named twice"):
        described([str(files / "two"), f"{files}/../{files.name}/two"])


def test_progress_names_model_and_benchmark(files: Path, tmp_path: Path) -> None:
    told = Told()
    comparison = Comparison(
        models=[str(files / "one")],
        benchmarks=[fasta(files)],
        output=tmp_path / "out",
        load=ModelLoader("cpu"),
        progress=told,
    )
    comparison()
    assert told.notes == ["one: perplexity (1 of 1)"]
    comparison()
    assert told.notes[1:] == ["one: perplexity (1 of 1)", "one: perplexity: computed before"]


def test_published_correlations_stand_beside(
    files: Path, everything: tuple[Path, Compared], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = everything
    monkeypatch.setattr(of_tables, "called", lambda known, table: "Some (8M)")
    found = compared(files, output, "one two", Scans(files / "scans"))
    values: dict[str, list[float]] = {}
    for row in rows(files / "scans" / "assays.csv"):
        values.setdefault(row["assay"][:2], []).append(float(row["spearman Some (8M)"]))
    expected = np.mean([np.mean(of) for of in values.values()])
    figure = found.cells[0].numbers[0].published[0]
    assert figure.value == pytest.approx(expected)
    assert figure == replace_source(figure, "Some (8M) in assays.csv")
    line = next(row for row in grid(found).rows if "published" in row[0])
    assert line == [f"  published: {figure.source}", f"{expected:.3f}", f"{expected:.3f}"]
    assert page(found, "t").count("Some (8M) in assays.csv") > 2


def replace_source(figure: Any, source: str) -> Any:
    return figure._replace(source=source, differs="")
