"""``protea fit-contacts`` and ``protea evaluate contacts``, from files to files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import protea
from conftest import CONFIGS, Run, fails
from made_structures import change, folder_of_snakes, letters, pdb, snake, written
from messages import check_message
from protea.checkpoints import hf
from protea.contacts import fitted_heads as heads
from protea.contacts.precision import means, score
from protea.contacts.predict import contacts
from protea.contacts.structures import pairs, read_chains
from protea.errors import ProteaError, ProteaWarning, UsageError
from protea.models.layers import BilinearContactHead, ContactHead
from protea.models.registry import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def structures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_snakes(tmp_path_factory.mktemp("made") / "structures", 9)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("esm2", "regression"),
        ("esm1nv", "bilinear"),
        pytest.param("esm2", "bilinear", marks=pytest.mark.long),
        pytest.param("esm1nv", "regression", marks=pytest.mark.long),
    ],
)
def test_a_head_is_fitted_and_measured_where_it_was_not(
    run: Run, model_folders: dict[str, Path], structures: Path, tmp_path: Path, name: str, kind: str
) -> None:
    fitted = run("fit-contacts", structures, "-m", model_folders[name], "-o", "out", "--count", 5, "--head", kind)
    assert fitted.code == 0, fitted
    said = json.loads(Path("out/contact-head.json").read_text())
    names = [one["name"] for one in said["structures"]]
    assert len(set(names)) == 5
    assert said["settings"] == {"head": kind, "count": 5, "seed": 0, "c": 0.15, "rank": 32}
    assert {"protea", "torch", "biotite", "scikit-learn"} == said["versions"].keys()
    first, second, *table = fitted.out.splitlines()
    assert first == f"out: {kind} head, fitted on 5 chains: {said['pairs']:,} pairs, {said['contacts']:,} in contact"
    assert second.startswith("precision on 4 chains that it was not fitted on")
    model = protea.load("out", device="cpu")
    assert isinstance(model.module.contact_head, ContactHead if kind == "regression" else BilinearContactHead)
    before = protea.load(model_folders[name], device="cpu")
    np.testing.assert_array_equal(model.embed(["MKT"])[0], before.embed(["MKT"])[0])

    measured = run("evaluate", "contacts", structures, "-m", "out", "-o", "out.csv")
    assert measured.code == 0
    check_message("contacts.left_out", measured.err)
    assert measured.out.splitlines() == ["out.csv: 4 chains", *table]
    found = rows(Path("out.csv"))
    assert not {row["name"] for row in found} & set(names)
    expected = []
    for row in found:
        (chain,) = read_chains(structures / f"{row['name'].partition(':')[0]}.pdb")
        probabilities = contacts(model.module, model.alphabet.encode(chain.sequence))
        expected.append(score(chain, probabilities))
        for part, value in expected[-1].ranges["long"].precisions.items():
            assert float(row[f"long_{part}"]) == pytest.approx(value, abs=1e-6)
        assert (int(row["residues"]), int(row["resolved"])) == (len(chain.sequence), chain.resolved)
    mean = means(expected)["long"]["P@L"]
    assert f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})" in table[1]

    whole = run("evaluate", "contacts", structures, "-m", "out", "--include-fitted")
    assert whole.code == 0
    assert len([line for line in whole.out.splitlines() if line.startswith("s0")]) == 9
    assert "left out" not in whole.err


@pytest.mark.parametrize("head", ["regression", pytest.param("bilinear", marks=pytest.mark.long)])
def test_the_same_in_python(
    run: Run, model_folders: dict[str, Path], structures: Path, tmp_path: Path, head: heads.Head
) -> None:
    assert (
        run("fit-contacts", structures, "-m", model_folders["esm2"], "-o", "out", "--count", 3, "--head", head).code
        == 0
    )
    assert run("evaluate", "contacts", structures, "-m", "out", "-o", "out.csv").code == 0
    model = protea.load(model_folders["esm2"], device="cpu")
    names = model.fit_contacts([structures], count=3, head=head)
    assert names == [one["name"] for one in json.loads(Path("out/contact-head.json").read_text())["structures"]]
    found = model.evaluate_contacts([structures], exclude=names)
    told = rows(Path("out.csv"))
    assert [row.name for row in found] == [row["name"] for row in told]
    for row, line in zip(found, told, strict=True):
        assert row.ranges["long"].precisions["P@L"] == pytest.approx(float(line["long_P@L"]), abs=1e-6)
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    model.save(tmp_path / "saved")
    again = protea.load(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.contacts(sequence), model.contacts(sequence))
    written(tmp_path / "empty.pdb", "")
    with pytest.warns(ProteaWarning, match="empty: skipped: .*empty"):
        assert len(model.evaluate_contacts([structures, "empty.pdb"], include_fitted=True)) == 9
    with pytest.warns(ProteaWarning, match="left out 3 chains: .*include_fitted=True"):
        assert model.evaluate_contacts([structures]) == found
    with pytest.raises(UsageError, match=r"^exclude=absent: "):
        model.evaluate_contacts([structures], exclude=["absent"])
    with pytest.raises(UsageError, match=r"structures: .*give a list of paths"):
        model.evaluate_contacts(str(structures))
    with pytest.raises(UsageError, match="name at least one structure"):
        model.fit_contacts([])


def test_the_seed_and_the_sequences_choose_not_the_order(
    run: Run, model_folders: dict[str, Path], structures: Path
) -> None:
    files = sorted(structures.iterdir())
    heads = {}
    for number, (some, seed) in enumerate([(files, 0), (files[::-1], 0), (files, 1)]):
        done = run("fit-contacts", *some, "-m", model_folders["esm1v"], "-o", number, "--count", 3, "--seed", seed)
        assert done.code == 0
        heads[number] = json.loads(Path(str(number), "contact-head.json").read_text())["structures"]
    assert heads[0] == heads[1] != heads[2]
    for file in ("model.safetensors", "config.json"):
        assert Path("0", file).read_bytes() == Path("1", file).read_bytes()


def test_weights_stay_in_their_type(run: Run, structures: Path) -> None:
    hf.write_random(Path("narrow"), build(CONFIGS["esm2"]), seed=1, dtype=torch.bfloat16)
    some = sorted(structures.iterdir())[:3]
    done = run("fit-contacts", *some, "-m", "narrow", "-o", "out", "--count", 2, "--head", "bilinear", "--rank", 2)
    assert done.code == 0
    assert done.err == "protea: note: this head replaces the one that the model had\n"
    assert json.loads(Path("out/contact-head.json").read_text())["replaced"]
    shown = json.loads(run("info", "out", "--json").out)
    assert shown["stored_as"] == ["BF16"]
    assert set(shown["capabilities"]) == {"attention", "contacts", "logits"}
    assert set(shown["sha256"]) == {"model.safetensors", "extras.safetensors"}
    converted = run("convert", "out", "copy", "--no-peers")
    assert "apart     the contact head, in copy/extras.safetensors" in converted.out
    assert run("convert", "out", "esm2_copy.pt", "--to", "fair-esm", "--no-peers").code == 0
    for copy in ("copy", "esm2_copy.pt"):
        measured = run("evaluate", "contacts", *some, "-m", copy)
        assert "left out 2 chains: the contact head was fitted on them" in measured.err
    (Path("esm2_copy.pt")).unlink()
    Path("esm2_copy-contact-regression.pt").unlink(missing_ok=True)
    Path("esm2_copy.pt.extras.safetensors").unlink()
    fails(
        run("convert", "copy", "esm2_copy.pt", "--to", "fair-esm", "--no-peers"), 1, "contact-head.json: exists already"
    )


def test_what_is_skipped_is_told_and_fails(
    run: Run, model_folders: dict[str, Path], structures: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    written(odd / "empty.pdb", "")
    written(odd / "long.pdb", pdb(snake(letters(515))))
    written(odd / "mse.pdb", pdb(change(snake("A" + letters(39)), 1, name="MSE", hetero=True).without(20, 21)))
    fitted = run("fit-contacts", structures, "-m", model_folders["esm1nv"], "-o", "model", "--count", 3)
    assert fitted.code == 0
    result = run("evaluate", "contacts", odd, structures, "-m", "model", "-o", "out.csv")
    assert result.code == 1
    notes = result.err.splitlines()
    assert notes[0].startswith("protea: note: empty: skipped: ")
    check_message("contacts.skipped", notes[1])
    assert notes[3] == "protea: note: structures: 1 altered, 1 incomplete; see out.csv.report.tsv"
    report = [line.split("\t") for line in Path("out.csv.report.tsv").read_text().splitlines()]
    assert report[0] == ["name", "what", "detail"]
    assert ["mse:A", "altered", "1 MSE read as M"] in report
    assert ["mse:A", "incomplete", "residues missing by number: 2; the model does not see them"] in report
    assert sum(line[1] == "left out" for line in report) == 3
    assert len(rows(Path("out.csv"))) == 7
    again = run("fit-contacts", odd, structures, "-m", model_folders["esm1nv"], "-o", "second", "--count", 3)
    assert again.code == 1
    assert Path("second/model.safetensors").exists()


def test_chains_are_left_out_by_name_file_and_sequence(
    run: Run, model_folders: dict[str, Path], structures: Path, tmp_path: Path
) -> None:
    fitted = run("fit-contacts", structures, "-m", model_folders["esm2"], "-o", "model", "--count", 3)
    assert fitted.code == 0
    said = json.loads(Path("model/contact-head.json").read_text())["structures"]
    copy = tmp_path / "copy.pdb"
    copy.write_bytes((structures / f"{said[0]['name'].partition(':')[0]}.pdb").read_bytes())
    others = sorted({path.stem for path in structures.iterdir()} - {one["name"].partition(":")[0] for one in said})
    exclude = ("--exclude", others[0], "--exclude", f"{others[1]}:A")
    result = run("evaluate", "contacts", copy, structures, "-m", "model", *exclude)
    assert result.code == 0
    assert "left out 4 chains: the contact head was fitted on them" in result.err  # one by its sequence
    assert "left out 2 chains: --exclude" in result.err
    listed = {line.split()[0] for line in result.out.splitlines() if line.startswith("s0")}
    assert listed == {f"{name}:A" for name in others[2:]}
    # Another model's head.
    plain = run("evaluate", "contacts", structures, "-m", model_folders["esm2"], "--exclude", "model/contact-head.json")
    assert "left out 3 chains: --exclude" in plain.err
    nothing = run("evaluate", "contacts", copy, "-m", "model")
    assert (nothing.code, nothing.out) == (1, "")
    nothing = run("evaluate", "contacts", copy, "-m", "model", "-o", "none.csv", "--plot", "x.png")
    assert nothing.code == 1
    assert Path("none.csv").read_text().startswith("name,residues,resolved,long_pairs,")


def test_pictures_show_predictions_and_the_structure(
    run: Run, model_folders: dict[str, Path], structures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, dict[str, object]] = {}

    def draw(path: Path, probabilities: np.ndarray, **rest: object) -> None:
        drawn[path.name] = {"probabilities": probabilities, **rest}

    esm2 = ("-m", model_folders["esm2"])
    files = sorted(structures.iterdir())[:2]
    result = run("evaluate", "contacts", files[0], *esm2, "--plot", "one.svg")
    assert "one.svg: 1 contact map" in result.out.splitlines()
    assert "<svg" in Path("one.svg").read_text()

    def fail(*_: object) -> None:
        raise ProteaError("cannot measure")

    with monkeypatch.context() as broken:
        broken.setattr("protea.contacts.structure_run.measure", fail)
        fails(run("evaluate", "contacts", *files, *esm2, "--plot", "maps"), 1, "cannot measure")
    assert not Path("maps").exists(), "the folder comes with its first picture"
    monkeypatch.setattr("protea.plot.contact_map", draw)
    result = run("evaluate", "contacts", *files, *esm2, "--plot", "maps", "-o", "out.csv", "--dtype", "bfloat16")
    assert result.code == 0, result
    told = yaml.safe_load(Path("out.csv.run.yaml").read_text())
    assert (told["exclude"], told["include_fitted"], told["seed"]) == ([], False, 0)
    (settings,) = told["models"].values()
    assert settings["computed_in"] == "bfloat16"
    assert sorted(drawn) == [f"{file.stem}%3AA.png" for file in files]
    model = protea.load(model_folders["esm2"], device="cpu", dtype="bfloat16")
    for file in files:
        (chain,) = read_chains(file)
        one = drawn[f"{file.stem}%3AA.png"]
        np.testing.assert_allclose(one["probabilities"], model.contacts(chain.sequence), atol=1e-6)  # type: ignore[arg-type]
        found = pairs(chain)
        true = np.zeros((len(chain.sequence),) * 2, bool)
        true[found.rows[found.contacts], found.columns[found.contacts]] = True
        np.testing.assert_array_equal(one["truth"], true | true.T)  # type: ignore[arg-type]
        missing = set(range(len(chain.sequence))) - set(chain.places.tolist())
        assert set(np.flatnonzero(one["missing"]).tolist()) == missing  # type: ignore[arg-type]
    alone = run("evaluate", "contacts", files[0], *esm2, "--plot", "maps", "--overwrite")
    assert alone.code == 0, alone  # a folder of one
    several = run("evaluate", "contacts", *files, *esm2, "--plot", "x.png")
    fails(several, 2, "--plot x.png")
    check_message("contacts.several_maps", several.err)
    fails(run("evaluate", "contacts", files[0], *esm2, "--plot", "x.gif"), 2, "x.gif", ".png")


def test_what_a_fit_cannot_use_is_told(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    written(tmp_path / "long.pdb", pdb(snake(letters(600))))
    written(tmp_path / "short.pdb", pdb(snake(letters(5))))
    result = run("fit-contacts", "long.pdb", "short.pdb", "-m", model_folders["esm1nv"], "-o", "out", "--count", 1)
    assert result.code == 1
    assert "long:A: skipped: 600 residues" in result.err
    check_message("contacts.too_few_chains", result.err.splitlines()[-1])


def test_one_sequence_twice_is_told(run: Run, model_folders: dict[str, Path], structures: Path, tmp_path: Path) -> None:
    one = sorted(structures.iterdir())[0]
    (tmp_path / "copy:1.PDB").write_bytes(one.read_bytes())
    result = run("evaluate", "contacts", one, "copy:1.PDB", "-m", model_folders["esm2"], "-o", "out.csv")
    assert result.code == 0
    assert "copy:1:A\todd\thas the sequence of s00:A; both count" in Path("out.csv.report.tsv").read_text()
    alone = run("evaluate", "contacts", one, "copy:1.PDB", "-m", model_folders["esm2"], "--exclude", "copy:1")
    assert "left out 1 chain: --exclude" in alone.err


def test_a_failed_fit_gives_no_advice_that_does_not_help(
    run: Run, model_folders: dict[str, Path], structures: Path, tmp_path: Path
) -> None:
    """It has -o already, and no report is written."""
    written(tmp_path / "mse.pdb", pdb(change(snake("A" + letters(39)), 1, name="MSE", hetero=True)))
    failed = run("fit-contacts", structures, "mse.pdb", "-m", model_folders["esm2"], "-o", "out")
    assert failed.code == 1
    assert "error: count 20" in failed.err
    assert "structures: 1 altered\n" in failed.err
    assert " -o" not in failed.err


def test_mistakes(run: Run, model_folders: dict[str, Path], structures: Path, tmp_path: Path) -> None:
    esm2 = ("-m", model_folders["esm2"])
    fit = ("fit-contacts", structures, *esm2, "-o", "out")
    fails(run(*fit), 1, "count 20: the model can take 9 chains")
    check_message("contacts.unknown_head", run(*fit, "--head", "cubic").err)
    check_message("contacts.too_few", run(*fit).err)
    fails(run(*fit, "--count", 0), 2, "error: --count 0: use at least 1 for a regression head")
    fails(run(*fit, "--count", 1, "--head", "bilinear"), 2, "--count 1: use at least 2 for a bilinear head")
    for c in ("0.0", "inf", "nan"):
        fails(run(*fit, "--c", c), 2, f"--c {c}: use a finite number above 0")
    for seed in (-1, 2**32):
        fails(run(*fit, "--seed", seed), 2, f"--seed {seed}: use a number from 0 to 4,294,967,295")
    fails(run(*fit, "--rank", 0), 2, "--rank 0: use at least 1")
    fails(run(*fit, "--rank", 10**23, "--count", 3, "--head", "bilinear"), 2, ": use at most 40, the model's")
    fails(run("fit-contacts", "nowhere", *esm2, "-o", "out"), 1, "nowhere: no such file or folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    fails(run("fit-contacts", structures, *esm2, "-o", "full"), 1, "full: exists already; remove it or choose another")
    assert not Path("out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"full"}

    measure = ("evaluate", "contacts", structures)
    fails(run(*measure, "-m", model_folders["esm1nv"]), 1, "ESM-1nv model has no contacts: ", "protea fit-contacts")
    fails(run(*measure, *esm2, "--exclude", "s99"), 2, "--exclude s99: ")
    check_message("contacts.unknown_excluded", run(*measure, *esm2, "--exclude", "s99").err)
    written(tmp_path / "x.json", "{}")
    fails(run(*measure, *esm2, "--exclude", "x.json"), 1, "x.json: does not say what a contact head was fitted on")
    written(tmp_path / "x.csv", "")
    fails(run(*measure, *esm2, "-o", "x.csv"), 1, "x.csv: exists already, without x.csv.report.tsv", "--overwrite")
    assert run(*measure, *esm2, "--seed", -1).code == 2
    fails(run(*measure, *esm2, "-o", "y.json"), 2, "y.json: ")
    fails(run(*measure, *esm2, "-o", "no/x.csv"), 1, "no/x.csv: there is no folder no; create it first")
    fails(run(*measure, *esm2, "-o", "full"), 1, "full: is a folder; name a file")
    written(tmp_path / "e.pdb", "")
    fails(run("evaluate", "contacts", "e.pdb", *esm2), 1, "e.pdb: empty")
    assert run("evaluate").code == 2
    for command in (("fit-contacts",), ("evaluate", "contacts")):
        assert "Examples:" in run(*command, "--help").out


INTERRUPTED = """
import os, signal, sys, threading, time
from sklearn.linear_model import LogisticRegression
from protea.cli import main

def minutes_of_c(self, x, y):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(1000)

LogisticRegression.fit = minutes_of_c
sys.argv[0] = "protea"
main()
"""


@pytest.mark.long
def test_an_interrupt_ends_a_fit_at_once_and_leaves_nothing(
    model_folders: dict[str, Path], structures: Path, tmp_path: Path
) -> None:
    arguments = ["fit-contacts", structures, "-m", model_folders["esm2"], "-o", tmp_path / "out", "--count", 2]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("protea: interrupted")
    assert not list(tmp_path.iterdir())
