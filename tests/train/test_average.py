"""Models out of a run: read back by PyTorch's and transformers' own readers, and averaged by NumPy."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runs import make_store, recipe
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import protea
from conftest import CONFIGS, Run, disturb, fails
from protea.checkpoints import hf
from protea.checkpoints.convert import convert
from protea.errors import CheckpointError
from protea.models.esm2 import ESM2
from protea.models.layers import BilinearContactHead
from protea.models.registry import build
from protea.text import counted
from protea.train.loop import pretrain
from protea.train.metrics import TrainingProgress
from protea.train.run_export import average, export
from references import from_fair_esm, hf_name, load_transformers, new_fair_esm

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("esm2", "esm1b", "esm1nv")
STEPS = (2, 4, 6, 8, 9)
SEQUENCES = ["MKTAYIAKQR", "GAVLIMFWPSTCYNQDEKRH" * 2]

Weights = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each family with five checkpoints, validated three times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    stores = {name: make_store(root / name, valid=10, alphabet=name) for name in ("esm", "esm-1nv")}
    for family in FAMILIES:
        told = recipe(
            family,
            data={"store": str(stores["esm-1nv" if family == "esm1nv" else "esm"])},
            optimizer={"lr": 1e-2},
            run={"steps": 9},
            save={"every": 2, "newest": 10},
            validation={"every": 4},
        )
        assert pretrain(told, root / f"run-{family}", TrainingProgress()).finished
    torch.set_num_threads(threads)
    return {family: root / f"run-{family}" for family in FAMILIES}


@cache
def stored(run: Path, step: int) -> Weights:
    """A checkpoint's weights by our names, as PyTorch reads them."""
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        dcp_to_torch_save(run / "checkpoints" / f"step-{step:09d}", f"{scratch}/all.pt")
        found: dict[str, Tensor] = torch.load(f"{scratch}/all.pt", weights_only=True)
    return {
        key.removeprefix("model."): value.numpy()
        for key, value in found.items()
        if key.startswith("model.") and not key.endswith("inv_freq")
    }


def written(folder: Path) -> dict[str, Tensor]:
    """A folder's weights by their names in the file, rotary frequencies apart."""
    found = load_file(folder / "model.safetensors")
    return {key: value for key, value in found.items() if not key.endswith("inv_freq")}


@pytest.mark.parametrize("family", FAMILIES)
def test_average(run: Run, finished: dict[str, Path], tmp_path: Path, family: str) -> None:
    for last, dtype in ((3, "float32"), (5, "float16"), (1, "float32")):
        folder = tmp_path / f"{last}"
        result = run("average", finished[family], "--last", last, "-o", folder, "--dtype", dtype)
        assert result.out == f"{folder}: mean of {counted(last, 'checkpoint')}, steps {STEPS[-last]} to 9\n"
        each = [stored(finished[family], step) for step in STEPS[-last:]]
        found = written(folder)
        assert {hf_name(name) for name in each[0]} == found.keys()
        for name in each[0]:
            mean = np.mean(np.stack([one[name] for one in each]).astype(np.float64), axis=0).astype(np.float32)
            np.testing.assert_array_equal(found[hf_name(name)].numpy(), mean.astype(dtype), err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_export(run: Run, finished: dict[str, Path], tmp_path: Path, family: str) -> None:
    result = run("export", finished[family], "-o", tmp_path / "model")
    # It is the last step, too, that is validated.
    assert result.out.startswith(f"{tmp_path / 'model'}: the model after step 9, validation loss ")
    weights = stored(finished[family], 9)
    found = written(tmp_path / "model")
    assert {hf_name(name) for name in weights} == found.keys()
    for name, expected in weights.items():
        np.testing.assert_array_equal(found[hf_name(name)].numpy(), expected, err_msg=name)
    model = protea.load(tmp_path / "model", device="cpu")
    assert model.capabilities == {"attention", "logits"}
    ours = model.logits(SEQUENCES)
    if family == "esm1nv":
        return
    theirs = load_transformers(tmp_path / "model")
    for sequence, logits in zip(SEQUENCES, ours, strict=True):
        ids = torch.tensor([0, *model.alphabet.encode(sequence), 2])[None]
        with torch.no_grad():
            expected_logits = theirs(ids, attention_mask=torch.ones_like(ids)).logits[0, 1:-1]
        np.testing.assert_allclose(logits, expected_logits.numpy(), rtol=1e-4, atol=1e-5)


def test_export_in_another_type(run: Run, finished: dict[str, Path], tmp_path: Path) -> None:
    assert run("export", finished["esm2"], "-o", tmp_path / "model", "--dtype", "bfloat16").code == 0
    weights = stored(finished["esm2"], 9)
    for name, value in weights.items():
        assert torch.equal(written(tmp_path / "model")[hf_name(name)], torch.from_numpy(value).bfloat16()), name


def test_which_checkpoint(run: Run, finished: dict[str, Path], tmp_path: Path) -> None:
    folder = finished["esm2"]
    best = {step: _validation(folder, step) for step in (4, 8, 9)}
    chosen = {"newest": 9, "best": min(best, key=lambda step: best[step]), "2": 2, "8": 8}
    for which, step in chosen.items():
        result = run("export", folder, "-o", tmp_path / which, "--checkpoint", which)
        assert f"the model after step {step}" in result.out
        name = "layers.1.fc1.weight"
        expected = stored(folder, step)[name]
        np.testing.assert_array_equal(written(tmp_path / which)[hf_name(name)].numpy(), expected)


def _validation(folder: Path, step: int) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    (found,) = [line["validation_loss"] for line in lines if line["step"] == step and "validation_loss" in line]
    return float(found)


@pytest.mark.parametrize("kind", ["hf", "fair-esm", "bilinear"])
def test_heads_and_frequencies_of_a_model_gone_on_from(tmp_path: Path, kind: str) -> None:
    """A contact head and frequencies rounded to float16, as Meta's checkpoints have them, stay as they were."""
    model = build(CONFIGS["esm2"])
    from_fair_esm(new_fair_esm(model), model)
    assert isinstance(model, ESM2)
    if kind == "bilinear":
        model.contact_head = BilinearContactHead(40, 3)
    disturb(model)
    exact, model.inv_freq = model.inv_freq, model.inv_freq.half().float()
    assert not torch.equal(exact, model.inv_freq)
    hf.save(model, tmp_path / "hf")
    init = tmp_path / "hf"
    if kind == "fair-esm":
        init = tmp_path / "esm2_t3.pt"
        convert(tmp_path / "hf", init, kind, peers=False)
    store = make_store(tmp_path / "data")
    told = recipe(init=str(init), data={"store": str(store)}, run={"steps": 3}, save={"every": 2})
    run = tmp_path / "run"
    assert pretrain(told, run, TrainingProgress()).finished
    before = load_file(tmp_path / "hf" / "model.safetensors")
    for output, make in (("exported", lambda o: export(run, o)), ("averaged", lambda o: average(run, o, last=2))):
        make(tmp_path / output)
        after = load_file(tmp_path / output / "model.safetensors")
        assert after.keys() == before.keys()
        kept = {key for key in before if torch.equal(before[key], after[key])}
        assert kept == {key for key in before if "inv_freq" in key or "contact_head" in key}
        if kind == "bilinear":
            apart = load_file(tmp_path / output / "extras.safetensors")
            assert len(apart) == 3
            assert all(torch.equal(model.get_parameter(key), value) for key, value in apart.items())
        assert {"attention", "logits", "contacts"} == protea.load(tmp_path / output, device="cpu").capabilities


def test_errors(run: Run, finished: dict[str, Path], tmp_path: Path) -> None:
    folder = finished["esm2"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for command in (("export",), ("average", "--last", 1)):
        fails(run(*command, tmp_path / "empty", "-o", "out"), 1, "empty/checkpoints")
        fails(run(*command, tmp_path / "nowhere", "-o", "out"), 1, "nowhere/checkpoints")
        fails(run(*command, folder, "-o", tmp_path / "full"), 1, "full: exists already")
        fails(run(*command, folder, "-o", "out", "--dtype", "int8"), 2, "unknown dtype 'int8'")
    fails(run("average", folder, "--last", 6, "-o", "out"), 1, "5 checkpoints, not 6", "save.newest", "save.keep_every")
    for which in ("3", "-2", "last"):
        result = run("export", folder, "-o", "out", f"--checkpoint={which}")
        fails(result, 1, repr(which), "newest, best", "2, 4, 6, 8, 9")
    assert not Path("out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_nothing_was_validated(run: Run, tmp_path: Path) -> None:
    told = recipe(data={"store": str(make_store(tmp_path / "data"))}, run={"steps": 1})
    pretrain(told, tmp_path / "run", TrainingProgress())
    result = run("export", tmp_path / "run", "-o", "out", "--checkpoint", "best")
    fails(result, 1, "run: ", "newest")


def test_damaged(finished: dict[str, Path], tmp_path: Path) -> None:
    """A flipped bit in a checkpoint is found by its hash, whichever command reads it, and nothing is written."""
    folder = tmp_path / "run"
    shutil.copytree(finished["esm2"], folder)
    file = folder / "checkpoints" / "step-000000008" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-000000008/__0_0\.distcp: .*SHA-256"):
        export(folder, tmp_path / "out", which="8")
    with pytest.raises(CheckpointError, match=r"step-000000008/__0_0\.distcp: .*SHA-256"):
        average(folder, tmp_path / "out", last=2)
    assert not (tmp_path / "out").exists()
    average(folder, tmp_path / "out", last=1)
    export(folder, tmp_path / "six", which="6")


def test_of_unlike_models(finished: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished["esm2"], folder)
    shutil.rmtree(folder / "checkpoints" / "step-000000006")
    other = finished["esm1nv"] / "checkpoints" / "step-000000006"
    shutil.copytree(other, folder / "checkpoints" / "step-000000006")
    with pytest.raises(CheckpointError, match=r"step-000000006: model\.\S+ "):
        average(folder, tmp_path / "out", last=4)
    assert not (tmp_path / "out").exists()
