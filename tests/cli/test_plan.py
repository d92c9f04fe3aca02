"""``protea plan`` as users see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run, fails


def test_pretrain(run: Run) -> None:
    result = run("plan", "pretrain", "esm2_650M", "--gpus", "64xH100", "--price", "2")
    assert result.code == 0, result
    for part in (
        "64 x H100 in 8 machines",
        "advice: parallel.replicate=64",
        "calibrated: BioNeMo 2",
        "Megatron",
        "price",
    ):
        assert part in result.out
    told = json.loads(run("plan", "pretrain", "esm2_650M", "--gpus", "64xH100", "--json").out)
    assert told["advised"]["layout"]["replicate"] == 64
    assert told["label"] == "calibrated"
    assert len(told["card"]) == 16
    assert told["advised"]["gpu_hours"] == pytest.approx(64 * 24 * told["advised"]["days"])


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_the_picture(run: Run, suffix: str) -> None:
    result = run("plan", "pretrain", "esm2_8M", "--gpus", "8xA100", "--plot", f"days{suffix}")
    assert result.code == 0, result
    text = Path(f"days{suffix}").read_text()
    assert "days to train" in text
    assert "number of A100" in text


def test_embed_and_finetune(run: Run) -> None:
    result = run("plan", "embed", "-m", "esm2_t33_650M_UR50D", "--residues", "1e11", "--gpus", "8xA100", "--price", "1")
    assert result.code == 0, result
    assert "--shard i/32" in result.out
    told = json.loads(run("plan", "embed", "--residues", "1e9", "--cpus", 64, "--fast", "--json").out)
    assert told["label"] == "interpolated"
    assert "if the output is a folder" in result.out
    result = run("plan", "finetune", "--residues", "1e6", "--method", "lora", "--gpus", "A100")
    assert result.code == 0, result
    assert "if the output is a folder" not in result.out


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("embed", "--residues", "1e9", "--cpus", "4", "--nodes", "3"), "--nodes"),
        (("embed", "--residues", "1e9", "--profile", "--gpu-memory", "3"), "--gpu-memory"),
        (("embed", "--residues", "1e9", "--cpus", "4", "--dtype", "float16"), "--dtype"),
        (("embed", "--residues", "1e9", "--gpus", "A100", "--device", "cuda"), "--device"),
        (("finetune", "--residues", "1e9", "--cpus", "4", "--network", "3"), "--network"),
        (("pretrain", "esm2_8M", "--profile", "--nodes", "3"), "--nodes"),
    ],
)
def test_an_option_without_effect_is_refused(run: Run, arguments: tuple[str, ...], option: str) -> None:
    fails(run("plan", *arguments), 2, option)


def test_profile(run: Run, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protea.plan.measure._SECONDS", 0.2)
    told = json.loads(run("plan", "embed", "-m", model_folders["esm2"], "--residues", "1e6", "--profile", "--json").out)
    assert told["label"] == "measured"
    assert told["seconds"] > 1e6 / told["residues_per_second_and_worker"]  # and the time to load the model
    small = ["model.num_hidden_layers=1", "batch.pack=1024", "batch.tokens=1024", "data.max_tokens=64"]
    monkeypatch.setattr("protea.train.timing._SECONDS", 0.2)
    result = run("plan", "pretrain", "quickstart", *small, "--profile")
    assert result.code == 0, result
    assert "(measured just now)" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("pretrain", "esm2_8M"), 2, ("--gpus", "--profile")),
        (("pretrain", "esm2_8M", "--gpus", "8xH10"), 2, ("H10", "H100")),
        (("pretrain", "esm2_9M", "--gpus", "H100"), 2, ("esm2_9M", "esm2_8M")),
        (("pretrain", "esm2_15B", "--gpus", "A100"), 1, ("no layout fits", "4 GPUs", "shard 4")),
        (("pretrain", "esm2_8M", "--gpus", "7xH100"), 2, ("7 data ranks", "batch.tokens")),
        (("pretrain", "esm2_8M", "parallel.shard=3", "--gpus", "8xH100"), 2, ("makes 3", "--gpus names 8")),
        (("pretrain", "esm2_8M", "parallel.replicate=16", "--gpus", "8xH100"), 2, ("makes 16", "--gpus names 8")),
        (("pretrain", "esm2_8M", "--gpus", "H100", "--plot", "days.txt"), 2, ("days.txt", ".svg")),
        (("embed", "--residues", "1e9"), 2, ("--gpus", "--cpus", "--profile")),
        (("embed", "--residues", "0", "--cpus", 4), 2, ("--residues 0", "1e11")),
        (("embed", "--residues", "nan", "--cpus", 4), 2, ("--residues nan",)),
        (("embed", "--residues", "1e9", "--cpus", 4, "--mean-length", "inf"), 2, ("--mean-length",)),
        (("pretrain", "esm2_8M", "--gpus", "8xMine", "--gpu-tflops", "inf"), 2, ("--gpu-tflops",)),
        (("embed", "--residues", "1e9", "-m", "esm2_nothing", "--cpus", 4), 2, ("esm2_nothing",)),
        (("embed", "--residues", "1e9", "--cpus", 4, "--gpus", "H100"), 2, ("--gpus", "--cpus")),
        (("finetune", "--residues", "1e9", "--method", "half", "--cpus", 4), 2, ("half", "frozen, lora, full")),
        (("finetune", "--residues", "1e9", "--gpus", "8xA100"), 2, ("8xA100", "one GPU", "--gpus A100")),
        (("embed", "-m", "esm2_t48_15B_UR50D", "--residues", "1e9", "--gpus", "8xL4"), 1, ("L4", "A100-40GB")),
    ],
)
def test_wrong_use(run: Run, arguments: tuple[object, ...], code: int, parts: tuple[str, ...]) -> None:
    result = run("plan", *arguments)
    fails(result, code, *parts)
    assert "torchrun" not in result.err
