"""What every command tells, and what scripts read: ``--quiet`` and ``--json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import typer.main

from conftest import Result, Run, fails
from protea.cli import application, terminal
from protea.errors import ProteaWarning, warn
from recorded import Recorded

EXAMPLES = Path(__file__).parents[2] / "examples"
LETTERS = ">a\nMKTAYIAKQR\n>b\nMKT*YIAKQRAAA\n"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.fasta").write_text(LETTERS)
    yield
    terminal.be_quiet(False)


def every_command(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command that does something, with its words."""
    commands = getattr(command, "commands", {})
    if not commands:
        yield words, command
    for name, one in commands.items():
        yield from every_command(one, (*words, name))


COMMANDS = dict(every_command(typer.main.get_command(application(None))))


def test_every_command_can_be_quiet() -> None:
    assert len(COMMANDS) > 20
    lacking = [words for words, command in COMMANDS.items() if not any("--quiet" in one.opts for one in command.params)]
    assert not lacking


def test_the_commands_that_scripts_read_have_json() -> None:
    having = {words[:1] for words, command in COMMANDS.items() if any("--json" in one.opts for one in command.params)}
    assert having >= {("info",), ("check",), ("doctor",), ("plan",), ("perplexity",), ("data",), ("evaluate",)}
    assert all("--json" in [*option_names(COMMANDS[words])] for words in COMMANDS if words[0] in ("evaluate", "plan"))


def option_names(command: Any) -> Iterator[str]:
    for one in command.params:
        yield from one.opts


QUIET = [
    ("embed", "odd.fasta", "-o", "out.parquet"),
    ("perplexity", "odd.fasta"),
    ("contacts", "odd.fasta", "-o", "maps.h5"),
]


@pytest.mark.parametrize("words", QUIET, ids=lambda words: words[0])
def test_quiet_leaves_results_alone(run: Run, words: tuple[str, ...]) -> None:
    """The same on standard output; nothing on standard error, where the command else tells of an odd letter."""
    loud = run(*words)
    assert loud.code == 0
    assert "altered" in loud.err
    quiet = run(*words, *(["--overwrite"] if "-o" in words else []), "--quiet")
    assert quiet == Result(0, loud.out, "")
    again = run(*words, "-q")
    assert again.err == ""
    loud = run(*words)  # the command after a quiet one is not quiet
    assert loud.err != ""


def test_quiet_keeps_errors_and_the_reasons_of_failures(run: Run) -> None:
    fails(run("embed", "absent.fasta", "-o", "out.h5", "-q"), 1, "absent.fasta")
    fails(run("embed", "odd.fasta", "-q"), 2, "-o")
    Path("one.fasta").write_text(">a\nMKTAYIAKQR\n")
    scored = run("score", "one.fasta", "-v", "A1C,K2A", "-q")
    assert scored.code == 1
    assert scored.err.startswith("protea: note: row ")
    assert scored.err.count("\n") == 1


def test_quiet_hides_warnings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from protea.checkpoints import summary

    def check(model: str, progress: Any) -> Any:
        warn("an odd thing")
        raise SystemExit(0)

    monkeypatch.setattr(summary, "check", check)
    assert run("check", "-q").err == ""
    assert run("check").err == "protea: note: an odd thing\n"
    assert issubclass(ProteaWarning, UserWarning)


def test_quiet_switches_the_bars_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, any stream is then a terminal
    with terminal.bars() as shown:
        assert not shown._drawn.disable
    terminal.be_quiet(True)
    with terminal.bars() as hidden:
        hidden.note("not shown")
        assert hidden._drawn.disable


def loaded(result: Result, code: int = 0) -> Any:
    """Standard output as strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert result.code == code, result
    return json.loads(result.out, parse_constant=refuse)


def test_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_json({"a": [float("nan"), 1.5, (2, float("inf"))], "b": {"c": None, "d": "x"}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [2, None]], "b": {"c": None, "d": "x"}}


def test_check(run: Run, model_folders: dict[str, Path]) -> None:
    found = loaded(run("check", "--json"))
    assert found["passed"] is True
    assert found["compared_with"] == "protea-mini"
    assert [one["passed"] for one in found["differences"]] == [True] * len(found["differences"])
    assert loaded(run("check", model_folders["esm2"], "--json"), 3)["passed"] is None


def test_perplexity(run: Run) -> None:
    text, found = run("perplexity", "odd.fasta"), loaded(run("perplexity", "odd.fasta", "--json"))
    assert text.out.startswith(f"perplexity {found['perplexity']:.4f}: {found['predicted_residues']} of ")
    assert (found["sequences"], found["residues"]) == (2, 23)
    assert [change["id"] for change in found["changes"]] == ["b"]
    pseudo = loaded(run("perplexity", "odd.fasta", "--pseudo", "-o", "p.csv", "--json"))
    assert pseudo["kind"] == "pseudo-perplexity"
    assert pseudo["predicted_residues"] == 23


def test_evaluate_contacts(run: Run) -> None:
    found = loaded(run("evaluate", "contacts", EXAMPLES / "structures", "--json", "-o", "p.csv"))
    assert len(found["chains"]) == 4
    for name, parts in found["means"].items():
        values = [chain["ranges"][name]["precisions"]["P@L"] for chain in found["chains"]]
        assert parts["P@L"]["value"] == pytest.approx(sum(values) / 4)


def test_evaluate_proteingym(run: Run, tmp_path: Path) -> None:
    sequence = "MKTAYIAKQR"
    table = f"DMS_id,UniProt_ID,target_seq,DMS_binarization_cutoff\nA,P,{sequence},0.5\nB,P,{sequence},0.5\n"
    (tmp_path / "DMS_substitutions.csv").write_text(table)
    (tmp_path / "A.csv").write_text("mutant,DMS_score,DMS_score_bin\nK2A,0.1,0\nT3V,0.9,1\nA4C,0.3,0\nY5F,0.8,1\n")
    found = loaded(run("evaluate", "proteingym", tmp_path, "--json"), 1)  # B's scan is absent
    assert [(row["assay"], row["variants"]) for row in found["assays"]] == [("A", 4), ("B", 0)]
    assert found["assays"][1]["spearman"] is None
    assert found["means"]["spearman"]["assays"] == found["assays"][0]["spearman"]


# ---- progress ----
def test_loading_shows_how_far_it_is(model_folders: dict[str, Path]) -> None:
    """Weights are read, layers prepared and files hashed in tasks with a total, so that the time left is known."""
    from protea.infer.loading import ModelLoader

    recorded = Recorded()
    tasks = recorded.tasks
    loader = ModelLoader("cpu", showing=lambda: nullcontext(recorded))
    loaded = loader(str(model_folders["esm2"]))
    loaded.weights_sha256(recorded)
    assert [task for task, _, _ in tasks][:1] == ["reading weights"]
    assert tasks[-1][0] == "hashing model.safetensors"
    for task, total, done in tasks:
        assert isinstance(done, int)
        assert total == done > 0, task
    assert loader.identities([str(model_folders["esm2"])])
    assert tasks[-1][0] == "hashing model.safetensors"


def test_writing_shows_how_far_it_is(run: Run, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """``protea init`` tells its bar how many bytes are written; given again, how many parameters are compared."""
    shown: list[Recorded] = []

    @contextmanager
    def bars(unit: str = "") -> Iterator[Recorded]:
        shown.append(Recorded())
        yield shown[-1]

    monkeypatch.setattr("protea.cli.model_files.bars", bars)
    for _ in range(2):
        assert run("init", "esm2_t6_8M_UR50D", "-o", "new").code == 0
    (weights,) = Path("new").glob("*.safetensors")
    ((task, total, done),) = shown[0].tasks
    assert (task, total) == ("writing weights", done)
    assert 0 < weights.stat().st_size - int(str(total)) < 1 << 20  # besides the header
    assert shown[1].complete == ["comparing"]


def test_bars_within_bars_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich draws one display at a time; each task keeps the unit of its own bars."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.bars("residues") as outer:
        outer.begin("embedding", 10)
        with terminal.bars("bytes") as inner:
            inner.begin("hashing", 20)
            assert inner._drawn is outer._drawn
            assert [task.fields["unit"] for task in outer._drawn.tasks] == [" bytes"]
        outer.begin("embedding", 10)
        assert [task.fields["unit"] for task in outer._drawn.tasks] == [" residues"]
    with terminal.bars() as another:
        assert another._drawn is not outer._drawn
