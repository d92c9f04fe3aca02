"""Commands given again after their end: nothing to do, a refusal that names the difference, or an update."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import FASTA, Run, fails
from messages import check_message
from protea.embed.stores import kind_of, read_store

COMPLETE = "complete, nothing to do"
FORMATS = {
    "parquet": ("-o", "s.parquet", "-r", "r.parquet", "--logits", "l.parquet"),
    "h5": ("-o", "s.h5", "-r", "r.h5", "--logits", "l.h5", "--pool", "mean,std"),
    "folder": ("-o", "s", "-r", "s", "--logits", "l"),
    "text": ("-o", "s.csv", "-r", "r.h5"),
    "npz": ("-o", "s.npz", "--logits", "l.h5"),
}


def outputs(options: tuple[str, ...]) -> list[Path]:
    places = zip(options[::2], options[1::2], strict=True)
    return [Path(name) for option, name in dict(places).items() if option in ("-o", "-r", "--logits")]


def contents(path: Path) -> list[object]:
    """All that an output holds of each record, arrays as bytes."""
    records = read_store(path, kind_of(path, "-o")).records
    return [
        (record, {kind: (array.shape, array.tobytes()) for kind, array in arrays.items()}) for record, arrays in records
    ]


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_command_again_does_nothing(
    run: Run, fasta: Path, model_folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], *FORMATS[name])
    assert run(*arguments).code == 0
    before = everything(tmp_path)
    for again in (arguments, (*arguments, "--update")):
        result = run(*again)
        assert result.code == 0, result
        for path in set(outputs(FORMATS[name])):
            assert f"{path}: {COMPLETE}" in result.err
        assert everything(tmp_path) == before
    moved = tmp_path / "moved"
    moved.mkdir()
    fasta.rename(moved / "other.fasta")  # the same records under another name
    assert COMPLETE in run("embed", "moved/other.fasta", *arguments[2:]).err


@pytest.mark.parametrize(
    ("key", "options", "part"),
    [
        ("settings", ("--pool", "max"), "pool mean -> max"),
        ("layers", ("--layers", "0"), "layers -1 -> 0"),
        ("weights", ("-m", "other"), "the weights model.safetensors have changed"),
        ("type", ("--dtype", "bfloat16"), "computed_in float32 -> bfloat16"),
    ],
)
def test_other_settings_are_named(
    run: Run, fasta: Path, model_folders: dict[str, Path], key: str, options: tuple[str, ...], part: str
) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", "s.h5")
    assert run(*arguments).code == 0
    before = Path("s.h5").read_bytes()
    Path("other").symlink_to(model_folders["esm2nv"])
    for command in (arguments, (*arguments, "--update")):
        result = run(*command, *options)
        fails(result, 1, "s.h5: exists already", part, "--overwrite")
    if key == "settings":
        check_message("embed.finished-settings", result.err)
    assert Path("s.h5").read_bytes() == before
    assert run(*arguments, *options, "--overwrite").code == 0


def test_other_input_and_other_arrays_are_refused(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    model = ("-m", model_folders["esm2"])
    assert run("embed", fasta, *model, "-o", "s.h5", "-r", "r.h5").code == 0
    assert COMPLETE in run("embed", fasta, *model, "-r", "r.h5").err  # one of the two
    fails(run("embed", fasta, *model, "-r", "s.h5"), 1, "s.h5: exists already and holds other arrays")
    result = run("embed", fasta, *model, "-o", "s.h5", "-r", "new.h5")
    fails(result, 1, "s.h5: exists already", "new.h5 does not", "--overwrite")
    check_message("embed.finished-beside-new", result.err)
    fasta.write_text(FASTA.replace("GG", "G").replace("MKTAYI", "MKTAYV"))
    result = run("embed", fasta, *model, "-o", "s.h5")
    fails(result, 1, "s.h5: exists already", "input ", "--update")
    assert not Path("new.h5").exists()
    assert not list(Path().glob(".*.partial"))


@pytest.mark.parametrize("beside", ["report.tsv", "run.yaml"])
def test_what_is_missing_or_damaged_is_said(run: Run, fasta: Path, model_folders: dict[str, Path], beside: str) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", "s.h5")
    assert run(*arguments).code == 0
    whole, path = Path("s.h5").read_bytes(), Path(f"s.h5.{beside}")
    kept = path.read_text()
    path.unlink()
    result = run(*arguments)
    fails(result, 1, "s.h5: exists already", path.name, "--overwrite")
    check_message(f"embed.finished-without-{beside.partition('.')[0]}", result.err)
    path.write_text(kept)
    Path("s.h5").write_bytes(whole[:-100])
    fails(run(*arguments), 1, "s.h5: exists already and is damaged", "--overwrite")
    if beside == "run.yaml":
        Path("s.h5").write_bytes(whole)
        path.write_text("[not a mapping")
        fails(run(*arguments), 1, "s.h5.run.yaml", "damaged")


@pytest.mark.parametrize("kind", ["emptied", "cut"])
@pytest.mark.parametrize("name", ["s.h5", "s.parquet", "s.csv", "s.npz", "s"])
def test_a_damaged_output_is_not_complete(
    run: Run, fasta: Path, model_folders: dict[str, Path], name: str, kind: str
) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", name)
    assert run(*arguments).code == 0
    path = Path(name) if Path(name).is_file() else max(Path(name).rglob("*.pt"))
    whole = path.read_bytes()
    path.write_bytes(b"" if kind == "emptied" else whole[: len(whole) - 20])
    for options in ((), ("--update",)):
        fails(run(*arguments, *options), 1, f"{name}: exists already and is damaged", "--overwrite")
    path.unlink() if path != Path(name) else None
    fails(run(*arguments), 1, f"{name}: exists already and is damaged") if path != Path(name) else None
    assert run(*arguments, "--overwrite").code == 0
    assert COMPLETE in run(*arguments).err


def test_an_update_without_new_sequences(run: Run, model_folders: dict[str, Path]) -> None:
    arguments = ("embed", "in.fasta", "-m", model_folders["esm2"], "-o", "s.h5")
    Path("in.fasta").write_text(FASTA)
    assert run(*arguments).code == 0
    Path("in.fasta").write_text(FASTA.replace(">a", ">a described otherwise"))
    assert "update: no new or changed sequences\n" in run(*arguments, "--update").err
    Path("in.fasta").write_text(FASTA.replace("MKTAYI", "MKTAYV", 1))
    result = run(*arguments, "--update")
    assert "update: 1 changed and computed again" in result.err
    assert "0 new" not in result.err


def test_the_note_on_dna_names_records(run: Run, model_folders: dict[str, Path]) -> None:
    Path("in.fasta").write_text(">d\nACGTACGTACGTACGTACGTACGT\n>e\nACGTACGTACGTACGTACGTACGA\n>p\nMKTAYI\n")
    result = run("embed", "in.fasta", "-m", model_folders["esm2"], "-o", "s.h5")
    assert "2 records that look like DNA or RNA: see s.h5.report.tsv" in result.err


def test_a_plain_table_named_as_compressed(run: Run, model_folders: dict[str, Path]) -> None:
    Path("in.csv.gz").write_text("id,sequence\na,MKTAYI\n")
    fails(run("embed", "in.csv.gz", "-m", model_folders["esm2"], "-o", "s.h5"), 1, "in.csv.gz: cannot be read")


def test_a_report_without_its_output_is_replaced_and_named(
    run: Run, fasta: Path, model_folders: dict[str, Path]
) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", "s.h5")
    assert run(*arguments).code == 0
    Path("s.h5").unlink()
    result = run(*arguments)
    assert result.code == 0
    assert "s.h5.report.tsv" in result.err
    assert "s.h5.run.yaml" in result.err


def test_shards_merging_and_devices_again(
    run: Run, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = (
        "embed",
        fasta,
        "-m",
        model_folders["esm2"],
        "-r",
        "r.h5",
        "--logits",
        "l.csv.h5",
        "--token-budget",
        20,
    )
    for _ in range(2):
        for number in (1, 2):
            result = run(*arguments, "--shard", f"{number}/2")
            assert result.code == 0
    assert f"r.shard-2-of-2.h5: {COMPLETE}" in result.err
    assert run("merge", "r.h5").code == 0
    before = Path("r.h5").read_bytes()
    assert f"r.h5: {COMPLETE}" in run("merge", "r.h5").err
    assert Path("r.h5").read_bytes() == before
    fasta.write_text(FASTA + ">d\nMM\n")
    for number in (1, 2):
        assert run(*arguments, "--shard", f"{number}/2", "--overwrite").code == 0
    fails(run("merge", "r.h5"), 1, "r.h5: exists already", "input ")
    shared = (*arguments, "--device", "cpu", "--devices", 2)
    assert run(*shared, "--overwrite").code == 0
    assert f"r.h5: {COMPLETE}" in run(*shared).err
    fails(run(*shared, "--long", "window"), 1, "r.h5: exists already", "long truncate -> window")


def test_input_that_can_be_read_once(
    run: Run, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def given(text: str, *options: str) -> object:
        os.mkfifo("pipe") if not Path("pipe").exists() else None
        import threading

        writer = threading.Thread(target=lambda: Path("pipe").write_text(text))
        writer.start()
        result = run("embed", "pipe", "-m", model_folders["esm2"], "-o", "s.h5", *options)
        writer.join()
        return result

    given(FASTA)
    known = yaml.safe_load(Path("s.h5.run.yaml").read_text())["provenance"]["input"]
    assert known is not None
    assert COMPLETE in given(FASTA).err  # type: ignore[attr-defined]
    fails(given(FASTA + ">d\nM\n"), 1, "s.h5: exists already", "the input has changed")  # type: ignore[arg-type]
    assert given(FASTA + ">d\nM\n", "--update").code == 0  # type: ignore[attr-defined]
    with h5py.File("s.h5") as file:
        assert list(file)[-1] == "d"


# ---- updates: equal to a fresh run on the new input ----
BEFORE = "".join(f">r{number} about {number}\n{'ACDEFGHIKLMNPQRSTVWY'[number:]}MKJ\n" for number in range(12))
AFTER = (
    ">new\nMKWWW\n" + BEFORE.replace(">r3 about 3\nE", ">r3 about 3\nW").replace(">r5 about 5\n", ">r5 otherwise\n")
).replace(">r7 about 7\nIKLMNPQRSTVWYMKJ\n", "") + ">last\nG\n"


@pytest.mark.parametrize("name", FORMATS)
def test_an_update_equals_a_fresh_run(
    run: Run, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, one_thread: None
) -> None:
    from protea.embed import run as module

    computed: list[str] = []
    jobs_of = module.jobs_of

    def counting(record: object, *rest: object) -> object:
        if record.windows:  # type: ignore[attr-defined]
            computed.append(record.record.id)  # type: ignore[attr-defined]
        return jobs_of(record, *rest)  # type: ignore[arg-type]

    Path("in.fasta").write_text(BEFORE)
    arguments = ("embed", "in.fasta", "-m", model_folders["esm2"], *FORMATS[name], "--layers", "0,-1")
    assert run(*arguments, "--update").code == 0  # without an output, an update is a run
    Path("in.fasta").write_text(AFTER)
    fails(run(*arguments), 1, "exists already", "input ")
    monkeypatch.setattr(module, "jobs_of", counting)
    result = run(*arguments, "--update")
    assert result.code == 0, result
    assert computed == ["new", "r3", "last"]
    assert "2 new sequences computed; 1 changed and computed again (r3); 1 no longer in the input (r7)" in result.err
    assert not list(Path().glob(".*"))
    places = set(outputs(FORMATS[name]))
    updated = {path: contents(path) for path in places}
    reports = {path: Path(f"{path}.report.tsv").read_text().splitlines() for path in places}
    recorded = {path: yaml.safe_load(Path(f"{path}.run.yaml").read_text()) for path in places}
    assert COMPLETE in run(*arguments).err
    assert run(*arguments, "--overwrite").code == 0
    for path in places:
        assert updated[path] == contents(path)
        assert recorded[path] == yaml.safe_load(Path(f"{path}.run.yaml").read_text())
        own = {"r3\trecomputed\tits sequence has changed", "r7\tremoved\tno longer in the input"}
        assert own < set(reports[path])
        assert [line for line in reports[path] if line not in own] == (
            Path(f"{path}.report.tsv").read_text().splitlines()
        )


ROWS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 2)), min_size=1, max_size=12, unique_by=lambda row: row[0])


def text_of(rows: list[tuple[int, int]]) -> str:
    return "".join(f">r{number}\n{'ACDEFGHIKLMNPQRSTVWY'[number % 7 :]}{'MKT'[kind:]}\n" for number, kind in rows)


@pytest.mark.parametrize(
    "examples", [pytest.param(6, id="short"), pytest.param(150, id="long", marks=pytest.mark.long)]
)
def test_any_update_equals_a_fresh_run(
    examples: int, run: Run, model_folders: dict[str, Path], one_thread: None
) -> None:
    """Records added, changed, removed and put into another order."""

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(ROWS, ROWS, st.sampled_from(["s.h5", "s.parquet", "s.csv", "s.npz", "s"]))
    def check(before: list[tuple[int, int]], after: list[tuple[int, int]], name: str) -> None:
        arguments = ("embed", "in.fasta", "-m", model_folders["esm2"], "--token-budget", 40, "-o")
        Path("in.fasta").write_text(text_of(before))
        assert run(*arguments, name, "--overwrite").code == 0
        Path("in.fasta").write_text(text_of(after))
        assert run(*arguments, name, "--update").code == 0
        updated = contents(Path(name))
        assert run(*arguments, name, "--overwrite").code == 0
        assert updated == contents(Path(name))

    check()


def test_updates_that_cannot_be(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", "s.h5")
    for option in (("--overwrite",), ("--shard", "1/2"), ("--devices", "2")):
        fails(run(*arguments, "--update", *option), 2, "--update")
    assert run(*arguments).code == 0
    with h5py.File("s.h5", "a") as file:
        del file["b"].attrs["sequence_sha256"]
    fasta.write_text(FASTA + ">d\nMM\n")
    result = run(*arguments, "--update")
    fails(result, 1, "s.h5: an older version wrote it", "--overwrite")
    check_message("embed.update-of-an-older-version", result.err)
    assert not list(Path().glob(".*.partial"))
    fails(run(*arguments, "-r", "r.h5", "--update"), 1, "s.h5: exists already")


def test_arrays_of_other_circumstances_are_recorded(
    run: Run, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import protea

    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", "s.h5")
    version = protea.__version__
    assert run(*arguments).code == 0
    monkeypatch.setattr(protea, "__version__", "99.0")
    for number in range(2):
        fasta.write_text(fasta.read_text() + f">d{number}\nMM\n")
        assert run(*arguments, "--update").code == 0
        provenance = yaml.safe_load(Path("s.h5.run.yaml").read_text())["provenance"]
        assert provenance["version"] == "99.0"
        assert [entry["version"] for entry in provenance["earlier"]] == [version]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_an_interrupted_update_continues(
    run: Run, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, stop: int, one_thread: None
) -> None:
    """Stopped after any commit, or between the two outputs, the same command ends with the same files."""
    from protea.embed import run as module
    from protea.embed.outputs import RunJournal, RunState

    commit, publish = RunJournal.commit, module.publish
    left = [0]

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def limited(*arguments: object) -> None:
            function(*arguments)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        return limited

    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(RunJournal, "commit", counted(commit))
    monkeypatch.setattr(module, "publish", counted(publish))
    assert RunState is not None
    Path("in.fasta").write_text(BEFORE)
    arguments = (
        "embed",
        "in.fasta",
        "-m",
        model_folders["esm2"],
        "-o",
        "s.parquet",
        "-r",
        "r.h5",
        "--token-budget",
        16,
    )
    assert run(*arguments).code == 0
    Path("in.fasta").write_text(AFTER)
    left[0] = stop
    assert run(*arguments, "--update").code == 130
    left[0] = 0
    fails(run(*arguments), 1, "s.parquet: an unfinished run has other settings", "update True -> False")
    result = run(*arguments, "--update")
    assert result.code == 0, result
    updated = [contents(Path(name)) for name in ("s.parquet", "r.h5")]
    report = Path("r.h5.report.tsv").read_text()
    assert (report.count("removed"), report.count("recomputed")) == (1, 1)
    assert run(*arguments, "--overwrite").code == 0
    assert updated == [contents(Path(name)) for name in ("s.parquet", "r.h5")]


def test_kept_records_do_not_wait_for_computed_ones(run: Run, model_folders: dict[str, Path]) -> None:
    """A runner gives an item without jobs at once, though no later item has any."""
    import protea
    from protea.infer.runner import Job, Runner, Wanted

    model = protea.load(model_folders["esm2"], device="cpu")
    taken: list[int] = []

    def items() -> object:
        for number in range(5):
            taken.append(number)
            yield number, ([] if number else [Job(np.array([0, 5, 2], np.uint8), Wanted(), None, "a")])

    results = Runner(model.module, 100).each(items(), apart=True)  # type: ignore[var-annotated, arg-type]
    assert [next(results)[0], next(results)[0], next(results)[0]] == [0, 1, 2]
    assert len(taken) < 5


# ---- predictions ----
@pytest.mark.parametrize("family", ["esm2", "esm1nv"])
def test_logits_are_log_softmax(run: Run, model_folders: dict[str, Path], family: str) -> None:
    import protea

    rng = random.Random(5)
    print("seed 5")
    sequences = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWYX", k=length)) for length in (1, 30, 700)]
    Path("in.fasta").write_text("".join(f">r{n}\n{sequence}\n" for n, sequence in enumerate(sequences)))
    arguments = ("embed", "in.fasta", "-m", model_folders[family], "--long", "window", "--store", "float16")
    assert run(*arguments, "--logits", "l.h5").code == 0
    model = protea.load(model_folders[family], device="cpu")
    letters = model.alphabet.residues
    columns = [model.alphabet.tokens.index(letter) for letter in letters]
    with h5py.File("l.h5") as file:
        assert file.attrs["letters"] == letters
        for number, logits in enumerate(model.logits(sequences, long="window")):
            expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
            values = file[f"r{number}"][:]
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, expected[:, columns], rtol=0, atol=1e-5)
            shares = np.exp(expected[:, columns])
            shares /= shares.sum(1, keepdims=True)
            entropy = -(shares * np.log2(shares)).sum(1)
            np.testing.assert_allclose(file[f"r{number}@entropy"][:], entropy, rtol=0, atol=1e-5)
    # The embeddings of the same pass are those of a run without predictions.
    assert run(*arguments, "-r", "with.h5", "--logits", "l2.h5").code == 0
    assert run(*arguments, "-r", "alone.h5").code == 0
    assert contents(Path("with.h5")) == contents(Path("alone.h5"))
    assert contents(Path("l.h5")) == contents(Path("l2.h5"))


def test_logits_equal_transformers(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    assert run("embed", fasta, "-m", model_folders["esm2"], "--logits", "l").code == 0
    peer = transformers.EsmForMaskedLM.from_pretrained(model_folders["esm2"]).eval()
    import protea

    alphabet = protea.load(model_folders["esm2"], device="cpu").alphabet
    for line in Path("l/index.csv").read_text().splitlines()[1:]:
        contents = torch.load(Path("l") / line.split(",")[1], weights_only=True)
        sequence = dict(zip(["a", "b", "c|3/x"], FASTA.split("\n")[1::2], strict=True))[contents["label"]]
        tokens = torch.from_numpy(alphabet.frame.around(alphabet.encode(sequence)).astype(np.int64))[None]
        with torch.inference_mode():
            logits = peer(tokens, attention_mask=torch.ones_like(tokens)).logits[0, 1:-1].log_softmax(-1)
        columns = [alphabet.tokens.index(letter) for letter in contents["letters"]]
        torch.testing.assert_close(contents["log_probabilities"], logits[:, columns], rtol=1e-4, atol=1e-5)


def test_logits_need_a_head_and_a_place(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "--logits")
    fails(run(*arguments, "l.csv"), 2, "--logits l.csv", ".h5")
    fails(run(*arguments, "l.h5", "-r", "l.h5"), 2, "-r and --logits both name l.h5")
    fails(run(*arguments, "l", "-o", "l"), 2, "-o and --logits both name l")
