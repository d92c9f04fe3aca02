"""Fixtures: small random models on disk, written once per session, and the command line in the test's process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

import protea
from protea import native
from protea.checkpoints import hf
from protea.cli import main
from protea.models.encoder import Encoder
from protea.models.esm1 import ESM1Config
from protea.models.esm1b import ESM1bConfig
from protea.models.esm1nv import ESM1nvConfig
from protea.models.esm2 import ESM2Config
from protea.models.family import EncoderConfig
from protea.models.registry import build
from protea.native.build_library import TARGETS
from protea.native.products import supports
from protea.packing import PackedBatch, pack

if TYPE_CHECKING:
    from serving import Running

# On a shared machine any example can take long, so hypothesis must not check times.
settings.register_profile("protea", deadline=None)
settings.load_profile("protea")

SMALL = {"num_hidden_layers": 3, "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 160}

CONFIGS: dict[str, EncoderConfig] = {
    "esm2": ESM2Config(**SMALL),
    "esm2nv": ESM2Config(**SMALL, vocab_size=128),
    "esm1b": ESM1bConfig(**SMALL, emb_layer_norm_before=True),
    "esm1v": ESM1bConfig(**SMALL, emb_layer_norm_before=False),
    "esm1nv": ESM1nvConfig(**SMALL),
    "esm1": ESM1Config(**SMALL),
}

LoadModel = Callable[..., protea.LanguageModel]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        hf.write_random(root / name, build(config), seed=1, dtype=torch.float32)
    return {name: root / name for name in CONFIGS}


@pytest.fixture
def load_small(model_folders: dict[str, Path]) -> LoadModel:
    """Load one of ``CONFIGS`` and add noise to biases and norms, so that tests notice if one is not used."""

    def load(name: str, *, dtype: str = "float32", device: str = "cpu") -> protea.LanguageModel:
        model = protea.load(model_folders[name], device="cpu", trainable=True)
        disturb(model.module)
        model.module.to(device=device, dtype=getattr(torch, dtype))
        return model

    return load


def batch_of(model: Encoder, *sequences: str) -> PackedBatch:
    """Sequences as a model packs them."""
    frame = model.alphabet.frame
    return pack([frame.around(model.alphabet.encode(sequence)) for sequence in sequences])


def disturb(module: torch.nn.Module, seed: int = 7) -> None:
    """Add noise to every bias and norm weight; initialisation sets them to 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
                parameter.add_(noise.to(parameter))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: tiny tensors lose time when threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=sorted({name for target in TARGETS for name in target.sets}))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """One after another, the instruction sets that the native library and this processor have."""
    found, name = native.library(), request.param
    if found is None:
        pytest.skip(f"there is no native library: {native.reason()}")
    before = native.instruction_set()
    assert before is not None
    if missing := found.protea_use(name.encode()):
        pytest.skip(f"{'the native library' if missing == 1 else 'this processor'} has no {name}")
    yield name
    assert found.protea_use(before.encode()) == 0


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, instruction_set: str) -> torch.dtype:
    """A type that the instruction set multiplies."""
    if not supports(request.param):
        pytest.skip(f"{instruction_set} does not multiply {request.param}")
    found: torch.dtype = request.param
    return found


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


FASTA = ">a first protein\nMKTAYIAKQR\n>b\nG\n>c|3/x\nACDEFGHIKLMNPQRSTVWYX\n"


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["protea", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, captured.out, captured.err)

    return command


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    return path


def fails(result: Result, code: int, *parts: str) -> None:
    """Assert the exit code and that standard error is one line with all the parts, without a traceback."""
    assert result.code == code, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("protea: error: ")
    for part in parts:
        assert part in lines[0]


MEMORY_KB = 300_000
"""Memory that reading a hostile file may take. All hostile files together are smaller, except the sparse ones."""


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a small undamaged checkpoint of every format."""
    from hostile import originals

    return originals(tmp_path_factory.mktemp("good"))


@pytest.fixture
def bounded() -> Iterator[None]:
    """Assert that a test takes at most ``MEMORY_KB``, measured by Linux."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        yield
        return
    forget.write_text("5")  # resets the largest size so far
    before = _peak_kb()
    yield
    assert _peak_kb() - before < MEMORY_KB


def _peak_kb() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0])


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A running service with the bundled model, for all tests of a module."""
    from serving import running

    with running() as one:
        yield one
