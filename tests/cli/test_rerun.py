"""Every command that writes, given again after its end: the same wording, exit code 0, nothing touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from conftest import Run, fails
from made_structures import folder_of_snakes
from messages import check_message
from protea.output import fingerprint
from trials import make_store, recipe

pytestmark = pytest.mark.usefixtures("one_thread")

ESM2, ONE, MANY = "MODEL", "one.fasta", "many.fasta"
COMMANDS: dict[str, tuple[str, str, str]] = {
    "perplexity": (f"perplexity {MANY} -m {ESM2} -o out.csv", "--seed 7", "seed 42 -> 7"),
    "pseudo": (f"perplexity {ONE} -m {ESM2} --pseudo -o out.csv --plot p.html", "--long full", "long window -> full"),
    "table": (f"score {ONE} v.csv -m {ESM2} -o out.csv", "--column x", "column model_score -> x"),
    "names": (f"score {ONE} -m {ESM2} -o out.csv -v M1V", "-v M1A", "variants M1V -> M1A"),
    "scan": (f"score {ONE} --scan -m {ESM2} -o out.csv --plot p.html", "--positions 1", "variants scan -> scan 1"),
    "maps": (f"contacts {MANY} -m {ESM2} -o out.h5", "--dtype bfloat16", "computed_in float32 -> bfloat16"),
    "pairs": (f"contacts {MANY} -m {ESM2} -o out.csv", "--min-separation 3", "min_separation 6 -> 3"),
    "chains": (f"evaluate contacts structures -m {ESM2} -o out.csv", "--exclude s1", "exclude  -> s1"),
    "scans": (f"evaluate proteingym gym -m {ESM2} -o out.csv", "--offset 2", "offset 1 -> 2"),
    "fit": (f"fit-contacts structures -m {ESM2} --count 3 -o out", "--count 4", "settings count 3 -> 4"),
    "convert": (f"convert {ESM2} esm2_x.pt --no-peers", "--dtype bfloat16", "word_embeddings.weight differs"),
    "format": (f"convert {ESM2} out --no-peers --to nemo2", "--to hf", "format nemo2 -> hf"),
    "init": ("init esm2_t6_8M_UR50D -o out", "--seed 3", "word_embeddings.weight differs"),
    "data": (f"data uniref --uniref50 {MANY} --no-filter --valid 2 -o out", "--gaps drop", "gaps keep -> drop"),
    "import": (
        "data import --mapping map.tsv --uniref50 u50 --uniref90 u90 -o out",
        "--unknown skip",
        "unknown x -> skip",
    ),
}


def everything() -> dict[str, tuple[int, bytes]]:
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def inputs(run: Run, model_folders: dict[str, Path]) -> None:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    Path(MANY).write_text("".join(f">r{number}\n{letters[number:]}MKTAYIAKQR\n" for number in range(12)))
    Path(ONE).write_text(">p\nMKTAYI\n")
    Path("v.csv").write_text("mutant\nM1V\n")
    Path(ESM2).symlink_to(model_folders["esm2"])
    Path("gym").mkdir()
    Path("gym/assays.csv").write_text("assay,target_seq\nP1_X,MKTAYI\n")
    Path("gym/P1_X.csv").write_text("mutant,score\nM1V,0.1\nK2R,0.4\nT3S,0.2\nA4V,0.9\n")
    Path("u50").write_text("".join(f">UniRef50_{n}\nMKTAYI{letters[n]}\n" for n in range(4)))
    Path("u90").write_text("".join(f">UniRef90_{n}\nMKTAYI{letters[n]}\n" for n in range(4)))
    Path("map.tsv").write_text("".join(f"UniRef50_{n}\tUniRef90_{n}\n" for n in range(4)))
    folder_of_snakes(Path("structures"), 6)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_finished_command_again(run: Run, inputs: None, name: str) -> None:
    command, option, difference = COMMANDS[name]
    result = run(*command.split())
    assert result.code == 0, result
    before = everything()
    again = run(*command.split())
    output = next(part for part in command.split() if part.startswith(("out", "esm2_x")))
    assert (again.code, again.out, again.err) == (0, "", f"protea: note: {output}: complete, nothing to do\n")
    other = run(*command.split(), *option.split())
    fails(other, 1, f"{output}: exists already, of another run", difference)
    assert everything() == before
    if name in ("table", "init"):
        check_message(f"rerun.other-{name}", other.err)


def test_another_architecture_and_another_file(run: Run, inputs: None, model_folders: dict[str, Path]) -> None:
    assert run("convert", ESM2, "out", "--no-peers").code == 0
    for name in ("esm1b", "esm1nv"):
        fails(run("convert", model_folders[name], "out", "--no-peers"), 1, "out: exists already", "the configuration")
    for text in ("", "mine"):
        Path("esm2_mine.pt").write_text(text)
        fails(
            run("convert", ESM2, "esm2_mine.pt", "--no-peers"), 1, "esm2_mine.pt: exists already, and is no checkpoint"
        )
        assert Path("esm2_mine.pt").read_text() == text


def damage(path: Path, kind: str) -> None:
    """Empty, cut or replace a file, or the largest file in a folder; a replaced one has as many bytes as before."""
    files = (
        [path]
        if path.is_file()
        else [part for part in path.rglob("*") if part.is_file() and part.name != "manifest.json"]
    )
    largest = max(files, key=lambda part: part.stat().st_size)
    content = largest.read_bytes()
    half = len(content) // 2
    largest.write_bytes({"emptied": b"", "cut": content[:half], "replaced": content[::-1]}[kind])


@pytest.mark.parametrize("kind", ["emptied", "cut", "replaced"])
@pytest.mark.parametrize("name", ["perplexity", "table", "maps", "pairs", "chains", "scans", "fit", "convert", "data"])
def test_a_damaged_output_is_not_complete(run: Run, inputs: None, name: str, kind: str) -> None:
    command = COMMANDS[name][0].split()
    assert run(*command).code == 0
    output = next(Path(part) for part in command if part.startswith(("out", "esm2_x")))
    damage(output, kind)
    before = everything()
    result = run(*command)
    fails(result, 1, str(output))
    assert any(fix in result.err for fix in ("remove it", "--overwrite", "build the store again"))
    assert everything() == before
    if name == "table":
        check_message(f"rerun.output-{kind}", result.err)
    if "--overwrite" in result.err:
        assert run(*command, "--overwrite").code == 0
        assert "complete" in run(*command).err


@pytest.mark.parametrize("part", ["vocab.txt", "tokenizer_config.json", "contact-head.json"])
def test_an_incomplete_copy_is_not_complete(run: Run, inputs: None, model_folders: dict[str, Path], part: str) -> None:
    Path(ESM2).unlink()
    shutil.copytree(model_folders["esm2"], ESM2)
    Path(ESM2, "contact-head.json").write_text("{}\n")
    command = ("convert", ESM2, "out", "--no-peers")
    assert run(*command).code == 0
    assert run(*command).err == "protea: note: out: complete, nothing to do\n"
    whole = Path("out", part).read_text()
    for text in (None, "", whole[1:]):
        Path("out", part).unlink() if text is None else Path("out", part).write_text(text)
        result = run(*command)
        fails(result, 1, "out: exists already")
        assert part in result.err or "damaged" in result.err
    Path("out", part).write_text(whole)
    assert run(*command).code == 0


def test_a_head_folder_with_a_missing_file(run: Run, inputs: None) -> None:
    command = COMMANDS["fit"][0].split()
    assert run(*command).code == 0
    Path("out/vocab.txt").unlink()
    result = run(*command)
    fails(result, 1, "out: exists already", "vocab.txt")
    check_message("rerun.part-missing", result.err)


@pytest.mark.parametrize("name", ["perplexity", "table", "scan", "maps", "pairs", "chains", "scans"])
def test_an_output_that_is_gone_is_made_again(run: Run, inputs: None, name: str) -> None:
    command = [part for part in COMMANDS[name][0].split() if part not in ("--plot", "p.html")]
    assert run(*command).code == 0
    output = next(Path(part) for part in command if part.startswith("out"))
    whole = output.read_bytes()
    output.unlink()
    result = run(*command)
    assert result.code == 0, result
    for beside in ("report.tsv", "run.yaml"):
        assert f"{output}.{beside} is of an output that is gone; it will be replaced" in result.err
    assert output.read_bytes() == whole
    assert "complete" in run(*command).err


@pytest.mark.parametrize("name", ["perplexity", "table", "maps", "scans", "data"])
def test_the_same_content_under_another_name_is_the_same_input(run: Run, inputs: None, name: str) -> None:
    command = COMMANDS[name][0].split()
    assert run(*command).code == 0
    for old in (MANY, ONE, "v.csv", "gym"):
        if old in command:
            Path(old).rename(f"other-{old}")
            command[command.index(old)] = f"other-{old}"
    assert "complete, nothing to do" in run(*command).err
    if MANY in COMMANDS[name][0]:  # as many records, in another number of files
        two = command.copy()
        two.insert(two.index(f"other-{MANY}") + 1, "--uniref50" if name == "data" else ONE)
        two.insert(two.index(f"other-{MANY}") + 2, ONE) if name == "data" else None
        fails(run(*two), 1, "of another run (", " 1 -> 2")


def test_files_that_change_their_option_are_other_input(run: Run, inputs: None) -> None:
    Path("a").write_text("".join(f">UniRef90_{n}\nMKTAYI{'ACDEFG'[n]}\n" for n in range(4)))
    shared = ("--no-filter", "--valid", "1", "-o", "out", "--members", "map.tsv")
    assert run("data", "uniref", "--uniref50", "u50", "--uniref90", "u90", "--uniref90", "a2", *shared).code != 0
    Path("a2").write_text(">UniRef90_X\nMKTAYIW\n")
    assert run("data", "uniref", "--uniref50", "u50", "--uniref90", "u90", "--uniref90", "a2", *shared).code == 0
    result = run("data", "uniref", "--uniref50", "u50", "--uniref50", "u90", "--uniref90", "a2", *shared)
    fails(result, 1, "of another run (", "uniref50 1 -> 2", "uniref90 2 -> 1")


def test_only_settings_that_both_have_are_named(run: Run, inputs: None) -> None:
    shared = ("perplexity", ONE, "-m", ESM2, "-o", "out.csv")
    assert run(*shared, "--select", "0.9").code == 0
    result = run(*shared, "--select", "0.9", "--masking", "bionemo1-esm1nv")
    fails(result, 1, "(masking standard -> bionemo1-esm1nv)")
    result = run(*shared, "--pseudo")
    fails(result, 1, "(pseudo False -> True; long truncate -> window)")
    assert run(*shared, "--pseudo", "--overwrite").code == 0
    fails(run(*shared), 1, "(pseudo True -> False; long window -> truncate)")


@pytest.mark.parametrize("name", ["perplexity", "table", "maps", "chains", "scans", "fit", "data"])
def test_other_input_is_named(run: Run, inputs: None, name: str) -> None:
    command = COMMANDS[name][0].split()
    assert run(*command).code == 0
    changed = {"table": "v.csv", "chains": "structures/s1.pdb", "fit": "structures/s1.pdb", "scans": "gym/P1_X.csv"}
    path = Path(changed.get(name, MANY))
    path = path if path.exists() else sorted(Path("structures").iterdir())[0]
    path.write_bytes(path.read_bytes() + b"\n")
    result = run(*command)
    fails(result, 1, ": exists already, of another run (")
    if name == "table":
        check_message("rerun.other-input", result.err)


def test_other_weights_are_named(run: Run, inputs: None, model_folders: dict[str, Path]) -> None:
    command = COMMANDS["table"][0].split()
    assert run(*command).code == 0
    Path(ESM2).unlink()
    Path(ESM2).symlink_to(model_folders["esm2nv"])
    result = run(*command)
    fails(result, 1, "out.csv: exists already, of another run (", "model.safetensors")
    check_message("rerun.other-weights", result.err)


def test_a_picture_that_is_missing(run: Run, inputs: None) -> None:
    command = COMMANDS["scan"][0].split()
    assert run(*command).code == 0
    assert run(*command[:-2]).code == 0  # the table alone
    fails(run(*command[:-1], "other.html"), 1, "other.html: was not drawn with out.csv", "--overwrite")
    run_file = Path("out.csv.run.yaml")
    told = run_file.read_text()
    run_file.write_text(told.replace("plot: p.html", "plot: null"))  # as after a kill before the picture was complete
    fails(run(*command), 1, "p.html: was not drawn with out.csv")
    run_file.write_text(told)
    Path("p.html").unlink()
    result = run(*command)
    fails(result, 1, "p.html: ", "--overwrite")
    check_message("rerun.picture", result.err)
    assert run(*command, "--overwrite").code == 0


def test_what_failed_in_part_fails_again(run: Run, inputs: None) -> None:
    command = f"score {ONE} -m {ESM2} -o out.csv -v M1V,A1V".split()
    assert run(*command).code == 1
    result = run(*command)
    fails(result, 1, "out.csv: ", "1 row could not be scored", "out.csv.report.tsv")
    assert "complete" not in result.err
    check_message("rerun.failed", result.err)


def test_what_cannot_be_compared(run: Run, inputs: None) -> None:
    command = COMMANDS["pairs"][0].split()
    assert run(*command).code == 0
    Path(MANY).unlink()
    result = run(*command)
    fails(result, 1, "out.csv: exists already", "--overwrite")
    check_message("rerun.no-input", result.err)
    assert fingerprint([MANY]) is None


def test_a_finished_training_run(run: Run, tmp_path: Path) -> None:
    told = recipe(make_store(tmp_path / "data")).shown()
    Path("recipe.yaml").write_text(yaml.safe_dump(told))
    assert run("pretrain", "recipe.yaml", "-o", "run").code == 0
    before = {name: kept for name, kept in everything().items() if not name.endswith(".lock")}
    result = run("pretrain", "recipe.yaml", "-o", "run")
    assert (result.code, result.out) == (0, "")
    assert result.err.endswith("protea: note: run: complete, nothing to do\n")
    assert {name: kept for name, kept in everything().items() if not name.endswith(".lock")} == before
    for command in (("export", "run", "-o", "model"), ("average", "run", "--last", "2", "-o", "mean")):
        assert run(*command).code == 0
        again = run(*command)
        assert (again.code, again.err) == (0, f"protea: note: {command[-1]}: complete, nothing to do\n")
    fails(run("export", "run", "-o", "mean"), 1, "mean: exists already, of another run (", " differs); remove it")
    assert run("pretrain", "recipe.yaml", "run.steps=6", "--accept-changes", "-o", "run").code == 0
    fails(run("export", "run", "-o", "model"), 1, "model: exists already")
