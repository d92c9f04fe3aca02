"""Any format to any other and back, bit for bit; what cannot be held stays beside it; failures leave nothing."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import protea
from conftest import CONFIGS, Run, disturb, fails
from messages import check_message
from protea.checkpoints import hf, nemo, peers, summary
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.convert import convert
from protea.checkpoints.formats import EXTRAS, format_named, open_checkpoint
from protea.checkpoints.summary import Golden
from protea.checkpoints.tensors import same_bits
from protea.errors import CheckpointError, OutputError, UsageError
from protea.models.encoder import Encoder
from protea.models.esm2 import ESM2, ESM2Config
from protea.models.registry import build
from protea.progress import Progress
from references import load_transformers, run_transformers

CPU = torch.device("cpu")

HELD = {
    "hf": ("esm2", "esm2nv", "esm1b", "esm1v", "esm1nv"),
    "fair-esm": ("esm2", "esm2nv", "esm1b", "esm1v"),
    "nemo": ("esm2", "esm2nv", "esm1nv"),
    "nemo2": ("esm2", "esm2nv"),
    "te": ("esm2", "esm2nv"),
}
PAIRS = [
    (name, a, b) if a == "hf" else pytest.param(name, a, b, marks=pytest.mark.long)
    for a, names in HELD.items()
    for b in HELD
    for name in names
    if name in HELD[b]
]


def file_name(name: str, kind: str) -> str:
    """A name that the format's library takes."""
    return {"fair-esm": f"{'esm2' if name.startswith('esm2') else 'esm1'}_{name}.pt", "nemo": f"{name}.nemo"}.get(
        kind, f"{name}-{kind}"
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every family in every format, all numbers random, frequencies rounded as Meta's are; made from the first."""
    root = tmp_path_factory.mktemp("sources")
    found: dict[tuple[str, str], Path] = {}
    for name, config in CONFIGS.items():
        config = replace(config, hidden_dropout_prob=0.05, initializer_range=0.03)  # noqa: PLW2901
        hf.write_random(root / f"{name}-random", build(config), seed=4, dtype=torch.float32)
        model = hf.open_checkpoint(root / f"{name}-random").load(dtype=torch.float32, device=CPU)
        disturb(model)
        if isinstance(model, ESM2):
            model.inv_freq = model.inv_freq.half().float()
        hf.save(model, root / f"{name}-hf")
        for kind, names in HELD.items():
            if name in names:
                found[name, kind] = root / file_name(name, kind)
                if kind != "hf":
                    convert(root / f"{name}-hf", found[name, kind], kind, peers=False)
    return found


def identical(a: Checkpoint, b: Checkpoint) -> None:
    assert a.model.config == b.model.config
    assert a.model.capabilities == b.model.capabilities
    for name, _ in a.model.named_parameters():
        assert same_bits(a.parameter(name), b.parameter(name)), name
    if isinstance(a.model, ESM2) and isinstance(b.model, ESM2):
        assert torch.equal(a.model.inv_freq, b.model.inv_freq)


@pytest.mark.parametrize(("name", "a", "b"), PAIRS)
def test_every_pair_there_and_back(
    sources: dict[tuple[str, str], Path], tmp_path: Path, name: str, a: str, b: str
) -> None:
    there, back = tmp_path / file_name(name, b), tmp_path / "back" / file_name(name, a)
    report = convert(sources[name, a], there, b, peers=False)
    assert report.checks == ["logits of 3 sequences identical to the source's"]
    convert(there, back, a, peers=False)
    with open_checkpoint(sources[name, "hf"]) as first, open_checkpoint(there) as other, open_checkpoint(back) as last:
        identical(first, other)
        identical(first, last)


@pytest.mark.parametrize(("kind", "library"), [("hf", "transformers"), ("fair-esm", "Meta's esm")])
@pytest.mark.parametrize("name", ["esm2", "esm2nv", "esm1b", "esm1v"])
def test_the_library_of_a_format_agrees(
    sources: dict[tuple[str, str], Path], tmp_path: Path, name: str, kind: str, library: str
) -> None:
    report = convert(sources[name, "hf"], tmp_path / file_name(name, kind), kind)
    (line,) = [line for line in report.checks if library in line]
    assert line.startswith("logits within ")
    assert float(line.split()[2]) < 2e-5


@pytest.mark.parametrize("kind", [kind for kind in HELD if kind != "hf"])
def test_contacts_and_logits_survive(sources: dict[tuple[str, str], Path], tmp_path: Path, kind: str) -> None:
    """Transformers' own numbers before and after a detour through every other format."""
    convert(sources["esm2", kind], tmp_path / "back", "hf", peers=False)
    before, after = (load_transformers(path) for path in (sources["esm2", "hf"], tmp_path / "back"))
    ids = torch.tensor([0, 20, 15, 11, 5, 32, 24, 30, 19, 4, 2])
    with torch.inference_mode():
        assert torch.equal(run_transformers(before, ids)[1], run_transformers(after, ids)[1])
        mask = torch.ones(1, len(ids), dtype=torch.long)
        contacts = [model.predict_contacts(ids[None], mask) for model in (before, after)]
    assert torch.equal(*contacts)


def test_fair_esm_predicts_the_same_contacts(sources: dict[tuple[str, str], Path]) -> None:
    """Its own loader takes the files we wrote, regression included."""
    import esm

    path = sources["esm2", "fair-esm"]
    content = torch.load(path, weights_only=False)
    regression = torch.load(path.with_name(f"{path.stem}-contact-regression.pt"), weights_only=True)
    theirs, _ = esm.pretrained.load_model_and_alphabet_core(path.stem, content, regression)
    ids = torch.tensor([[0, 20, 15, 11, 5, 24, 30, 19, 4, 2]])
    with torch.inference_mode():
        contacts = theirs.eval().predict_contacts(ids)
        ours = load_transformers(sources["esm2", "hf"]).predict_contacts(ids, torch.ones_like(ids))
    assert float((contacts - ours).abs().max()) < 2e-5


def test_what_a_format_has_no_room_for(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    report = convert(sources["esm2", "hf"], path, "nemo", peers=False)
    assert report.apart == [f"the contact head, in {path}.{EXTRAS}"]
    beside = path.with_name(f"m.nemo.{EXTRAS}")
    assert set(load_file(beside)) == {"contact_head.regression.weight", "contact_head.regression.bias"}
    assert protea.load(path, device="cpu").capabilities == {"attention", "logits", "contacts"}
    assert len(protea.load(path, device="cpu").weights_sha256()) == 2
    beside.unlink()
    assert protea.load(path, device="cpu").capabilities == {"attention", "logits"}
    report = convert(sources["esm2", "hf"], tmp_path / "te", "te", peers=False)
    assert [line.split(",")[0] for line in report.apart] == ["the contact head", "the stored rotary frequencies"]


def test_extras_of_another_checkpoint(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    convert(sources["esm2", "hf"], path, "nemo", peers=False)
    hf.write_random(
        tmp_path / "other",
        build(replace(CONFIGS["esm2"], num_hidden_layers=2)),
        seed=0,
        dtype=torch.float32,
    )
    convert(tmp_path / "other", tmp_path / "o.nemo", "nemo", peers=False)
    (tmp_path / f"o.nemo.{EXTRAS}").replace(tmp_path / f"m.nemo.{EXTRAS}")
    with pytest.raises(CheckpointError, match=r"m\.nemo\.extras\.safetensors"):
        protea.load(path)
    hf.write_random(tmp_path / "twin", build(CONFIGS["esm2"]), seed=9, dtype=torch.float32)
    convert(tmp_path / "twin", tmp_path / "t.nemo", "nemo", peers=False)
    (tmp_path / f"t.nemo.{EXTRAS}").replace(tmp_path / f"m.nemo.{EXTRAS}")
    with pytest.raises(CheckpointError) as caught:
        protea.load(path)
    check_message("checkpoints.extras-of-other-weights", caught.value, tmp=tmp_path)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_another_type(sources: dict[tuple[str, str], Path], tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    path = tmp_path / file_name("esm2", kind)
    report = convert(sources["esm2", "hf"], path, kind, dtype=dtype, peers=False)
    assert " within " in report.checks[0]
    with open_checkpoint(sources["esm2", "hf"]) as source, open_checkpoint(path) as copy:
        for name, _ in source.model.named_parameters():
            assert torch.equal(source.parameter(name).to(dtype), copy.parameter(name))
        assert isinstance(source.model, ESM2)
        assert isinstance(copy.model, ESM2)
        assert torch.equal(source.model.inv_freq, copy.model.inv_freq)


def changed(source: Path, target: Path, change: dict[str, torch.Tensor]) -> Path:
    with open_checkpoint(source) as checkpoint:
        dtype = next(iter(change.values())).dtype
        hf.write(target, checkpoint.model, lambda name: change.get(name, checkpoint.parameter(name)).to(dtype), dtype)
    return target


def test_numbers_that_a_type_cannot_hold(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    large = changed(sources["esm2", "hf"], tmp_path / "large", {"lm_head.bias": torch.full((33,), 1e6)})
    with pytest.raises(CheckpointError) as caught:
        convert(large, tmp_path / "half", "hf", dtype=torch.float16, peers=False)
    check_message("checkpoints.value-beyond-type", caught.value, tmp=tmp_path)
    assert not (tmp_path / "half").exists()
    convert(large, tmp_path / "brain", "hf", dtype=torch.bfloat16, peers=False)


def test_nan_and_double_precision_keep_their_bits(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    bias = torch.full((33,), float("nan"), dtype=torch.float64)
    bias[0] = 0.1
    source = changed(sources["esm2", "hf"], tmp_path / "double", {"lm_head.bias": bias})
    for kind in HELD:
        path = tmp_path / file_name("double", kind)
        if kind == "fair-esm":
            path = path.with_name("esm2_double.pt")
        convert(source, path, kind, peers=False)
        with open_checkpoint(path) as copy:
            assert same_bits(copy.parameter("lm_head.bias"), bias)


def test_a_bare_encoder(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    with open_checkpoint(sources["esm2", "hf"]) as checkpoint:
        checkpoint.model.lm_head = None
        hf.write(tmp_path / "bare", checkpoint.model, checkpoint.parameter, torch.float32)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "bare", tmp_path / "esm2_bare.pt", "fair-esm", peers=False)
    check_message("checkpoints.format-needs-head", caught.value, tmp=tmp_path)
    for kind in ("nemo", "nemo2", "te"):
        path = tmp_path / file_name("bare", kind)
        report = convert(tmp_path / "bare", path, kind)
        assert report.checks == ["last hidden states of 3 sequences identical to the source's"]
        assert "logits" not in protea.load(path, device="cpu").capabilities


@pytest.mark.parametrize(
    ("name", "kind", "family"),
    [
        ("esm1nv", "te", "ESM-1nv"),
        ("esm1nv", "fair-esm", "ESM-1nv"),
        ("esm1b", "nemo", "ESM-1b"),
        ("esm1v", "nemo2", "ESM-1v"),
    ],
)
def test_formats_that_lack_a_family(
    sources: dict[tuple[str, str], Path], tmp_path: Path, name: str, kind: str, family: str
) -> None:
    source = sources[name, "hf"]
    with pytest.raises(CheckpointError, match=f"{format_named(kind).TITLE}.*{family}") as caught:
        convert(source, tmp_path / file_name(name, kind), kind)
    assert list(tmp_path.iterdir()) == []
    if kind == "te":
        check_message("checkpoints.format-lacks-family", caught.value, source=source)


@pytest.mark.parametrize(("version", "name"), [("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.0.0rc1", "dtype")])
def test_what_transformers_calls_the_type(monkeypatch: pytest.MonkeyPatch, version: str, name: str) -> None:
    """Transformers 4.56 renamed an argument; the smoke run with the oldest dependencies brings an older one."""
    given: dict[str, object] = {}

    def from_pretrained(_: Path, **options: object) -> None:
        given.update(options)
        raise ValueError("that was all")

    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(transformers.EsmForMaskedLM, "from_pretrained", from_pretrained)
    path = Path(protea.__file__).parent / "bundled"
    with open_checkpoint(path) as checkpoint, pytest.raises(ValueError, match="that was all"):
        peers._transformers(path, checkpoint)
    assert given == {"attn_implementation": "eager", name: torch.float32}


def test_targets_that_are_refused(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = sources["esm2", "hf"]
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "m.pt", "fair-esm")
    check_message("checkpoints.name-misleads-meta", caught.value)
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "m", "zip")
    check_message("checkpoints.unknown-format", caught.value)
    (tmp_path / "esm2_m-contact-regression.pt").write_text("mine")
    with pytest.raises(OutputError) as beside:
        convert(source, tmp_path / "esm2_m.pt", "fair-esm", peers=False)
    check_message("checkpoints.file-beside-target", beside.value, tmp=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["esm2_m-contact-regression.pt"]
    assert (tmp_path / "esm2_m-contact-regression.pt").read_text() == "mine"
    with pytest.raises(OutputError, match=re.escape(str(source))):
        convert(source, source, "hf", dtype=torch.float16, peers=False)


def test_a_copy_that_differs_is_not_kept(
    sources: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof can fail: a writer that changes one number in one tensor is found out."""
    write = nemo.write

    def wrong(path: Path, model: Encoder, parameter: object, dtype: torch.dtype) -> None:
        def change(name: str) -> torch.Tensor:
            value = parameter(name).clone()  # type: ignore[operator]
            if name == "layers.1.fc1.bias":
                value[3] = torch.nextafter(value[3], torch.tensor(9.0))
            return value

        write(path, model, change, dtype)

    monkeypatch.setattr(format_named("nemo"), "write", wrong)
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.bias.*m\.nemo"):
        convert(sources["esm2", "hf"], tmp_path / "m.nemo", "nemo")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    class Interrupting(Progress):
        def advance(self, amount: int = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sources["esm2", "hf"], tmp_path / "m.nemo", progress=Interrupting())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    hf.write_random(
        tmp_path / "m",
        build(replace(CONFIGS["esm2"], num_hidden_layers=400)),
        seed=0,
        dtype=torch.float32,
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "protea", "convert", str(tmp_path / "m"), str(tmp_path / "out" / "m.nemo")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not any((tmp_path / "out").iterdir()) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", HELD)
def test_writers_hold_few_tensors(tmp_path: Path, kind: str) -> None:
    """At most query, key and value of one layer, and one tensor that is made of them."""
    model = build(CONFIGS["esm2"])
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts: list[int] = []

    def parameter(name: str) -> torch.Tensor:
        value = torch.zeros(model.get_parameter(name).shape)
        alive.add(value)
        counts.append(len(alive))
        return value

    format_named(kind).write(tmp_path / file_name("esm2", kind), model, parameter, torch.float32)
    assert len(counts) >= len(list(model.parameters())) - 2  # without the contact head
    assert max(counts) <= 4


@pytest.mark.long
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Sixty megabytes of weights pass through with a few of them in memory at a time."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    config = ESM2Config(num_hidden_layers=24, hidden_size=240, num_attention_heads=12, intermediate_size=960)
    hf.write_random(tmp_path / "m", build(config), seed=0, dtype=torch.float32)
    hf.write_random(tmp_path / "small", build(replace(config, num_hidden_layers=2)), seed=0, dtype=torch.float32)
    code = (
        "import sys, threading, time, torch, pathlib\n"
        "from protea.checkpoints.convert import convert\n"
        "torch.set_num_threads(1)\n"
        "peak = 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        rows = dict(line.split(':') for line in open('/proc/self/status') if ':' in line)\n"
        "        peak = max(peak, int(rows['RssAnon'].split()[0]))\n"
        "        time.sleep(0.002)\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "kinds = {f'esm2_{kind}.pt': kind for kind in sys.argv[2:]}\n"
        "for name, kind in kinds.items():\n"
        "    convert(folder / 'small', folder / 'a' / name, kind, peers=False)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "time.sleep(0.1)\n"
        "before = peak\n"
        "for name, kind in kinds.items():\n"
        "    convert(folder / 'm', folder / 'b' / name, kind, peers=False)\n"
        "print(peak - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *HELD], capture_output=True, text=True, check=True
    )
    grown = int(done.stdout)
    assert grown < 30_000, f"{grown} kB of memory for 67 MB of weights of which a layer has 2.8"


# --- the commands ------------------------------------------------------------------------------------------------


def test_the_command(run: Run, sources: dict[tuple[str, str], Path]) -> None:
    source = sources["esm2", "hf"]
    result = run("convert", source, "esm2_8M.pt")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == f"read      {source}: a Hugging Face folder, ESM-2, 62,329 parameters"
    assert lines[1] == "wrote     esm2_8M.pt: a file of Meta's esm package, float32"
    assert "checked   58 tensors read back and compared bit for bit" in lines
    assert run("convert", "esm2_8M.pt", "again", "--no-peers").code == 0
    assert run("embed", "--help").code == 0
    Path("in.fasta").write_text(">a\nMKT\n")
    for number, model in enumerate(["esm2_8M.pt", "again", source]):
        assert run("embed", "in.fasta", "-m", model, "-o", f"{number}.h5").code == 0
    assert "a file of Meta's esm package" in run("info", "esm2_8M.pt", "--json").out
    assert "esm2_8M.pt: complete, nothing to do" in run("convert", "again", "esm2_8M.pt").err
    fails(run("convert", "again", "esm2_8M.pt", "--dtype", "float16"), 1, "esm2_8M.pt: exists already")
    fails(run("convert", "again", "b", "--to", "zip"), 2, "unknown format 'zip'")
    fails(run("convert", "again", "b", "--dtype", "int8"), 2, "unknown dtype 'int8'")
    fails(run("convert", "absent.pt", "b"), 1, "absent.pt: no such folder or file")


def test_check(run: Run, sources: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numbers that transformers computes from the same weights, standing for published ones."""
    source = sources["esm2", "hf"]
    result = run("check", source)
    assert result.code == 3
    assert "nothing could be checked: no published numbers are known for this architecture" in result.out
    ids = (0, 20, 15, 11, 5, 4, 2)
    with torch.inference_mode():
        states, logits = run_transformers(load_transformers(source), torch.tensor(ids))
    corners = {"logits": logits, "last hidden state": states[-1]}
    known = replace(summary.published_models()["esm2_t6_8M_UR50D"], name="esm2_small", config=CONFIGS["esm2"])
    monkeypatch.setitem(summary.published_models(), "esm2_small", known)
    published = [
        Golden("esm2_small", what, ids, tuple(tuple(row) for row in rows[:3, :3].tolist()), "transformers")
        for what, rows in corners.items()
    ]
    monkeypatch.setattr(summary, "GOLDEN", tuple(published))
    result = run("check", source)
    assert result.code == 0, result.out
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == ["pass", "pass"]
    other = changed(source, Path("esm2_small").absolute(), {"lm_head.dense.bias": torch.ones(40)})
    result = run("check", other)
    assert result.code == 1
    assert [line.split()[0] for line in result.out.splitlines()[1:3]] == ["fail", "pass"]
    assert "these are not esm2_small's weights" in result.out
    monkeypatch.setitem(
        summary.published_models(), "esm2_small", replace(known, config=replace(CONFIGS["esm2"], num_hidden_layers=9))
    )
    fails(run("check", other), 1, "3 layers of width 40, esm2_small has 9 of width 40")


def test_a_published_file_is_recognised(
    run: Run, sources: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sources["esm2", "nemo"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    models = summary.published_models()
    monkeypatch.setitem(models, "esm2nv_650M", replace(models["esm2nv_650M"], sha256=digest))
    result = run("check", path)
    assert result.code == 0, result.out
    assert result.out.splitlines()[1] == "pass  the file's SHA-256 is the one published for esm2nv_650M"
