"""Dry runs on the CPU of the scripts for a GPU: every part reports its results, and none stops the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
PARTS = ("device", "prepare", "gradients", "tests", "train-8M", "embed-8M", "lora-8M")
KEYS = {
    "device": {"device", "driver", "memory", "torch", "capability", "bfloat16_product_tflops", "missing"},
    "prepared": {"what", "seconds"},
    "gradients": {"kernel", "dtype", "width", "right"}
    | {f"{name}_{kind}" for name in ("output", "dq", "dk", "dv") for kind in ("error", "error_sdpa", "largest")},
    "tests": {"file", "passed", "failed", "skipped"},
    "training": {"size", "tokens_per_second", "utilisation", "peak_memory", "compiled", "pack", "steps"},
    "embedding": {"size", "program", "dtype", "residues_per_second_files", "tokens_per_second_files"}
    | {"residues_per_second", "tokens_per_second", "utilisation", "peak_memory", "load_seconds"},
    "lora": {
        "size",
        "pack",
        "recomputed",
        "batch",
        "tokens_per_second",
        "goal",
        "utilisation",
        "peak_memory",
        "reason",
    },
}
FLIP_KEYS = {
    "flip": {"task", "split", "seed", "epochs", "batch", "seconds", "stages", "peak_memory", "reason"}
    | {"tested", "spearman", "mse"},
}
MINI_KEYS = {
    "corpus": {"sequences", "residues", "held_out", "held_out_is_apart"},
    "mini": {"resumed", "finished", "steps", "step", "tokens_per_second", "utilisation", "peak_memory"},
    "held-out perplexity": {"model", "mask", "standard"},
    "verdict": {"perplexity_improved", "contacts_improved", "scans_improved", "replace_the_weights", "rule"},
    "carried": {"what", "bytes", "pieces", "within_limit"},
}

Row = dict[str, Any]


def run(script: str, out: Path, *arguments: str, **surroundings: object) -> tuple[int, dict[str, Row], list[Row]]:
    """Run a script dry; return its exit code, the status of each part, and the rows that it wrote."""
    environment = os.environ | {name: str(value) for name, value in surroundings.items()}
    environment |= {"OUT": str(out), "PYTHON": sys.executable, "TMPDIR": str(out.parent)}
    command = ["bash", str(FOLDER / script), "--dry-run", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    ended = {row["part"]: row for row in rows if row["kind"] == "status"}
    assert list(out.parent.glob("protea-gpu.*")) == [], done.stderr
    return done.returncode, ended, [row for row in rows if row["kind"] != "status"]


def has(rows: list[Row], keys: dict[str, set[str]]) -> None:
    """Assert that every table exists and has its columns."""
    assert {row["kind"] for row in rows} == set(keys)
    for row in rows:
        assert keys[row["kind"]] <= set(row)


def test_one_part_of_a_dry_run(tmp_path: Path) -> None:
    code, ended, rows = run("run.sh", tmp_path / "out", "--parts", "device")
    assert code == 0
    assert ended["device"]["status"] == "ok", ended
    has(rows, {"device": KEYS["device"]})


@pytest.mark.long
def test_every_part_of_a_dry_run_is_ok(tmp_path: Path) -> None:
    code, ended, rows = run("run.sh", tmp_path / "out")
    assert {part: row["status"] for part, row in ended.items()} == dict.fromkeys(PARTS, "ok"), ended
    assert code == 0
    has(rows, KEYS)
    assert {(row["dtype"], row["width"]) for row in rows if row["kind"] == "gradients"} == {
        (dtype, width) for dtype in ("float16", "bfloat16") for width in (16, 32, 64, 128)
    }
    assert {row["dtype"] for row in rows if row["kind"] == "embedding"} == {"float32", "bf16-mixed"}
    tuned = [row for row in rows if row["kind"] == "lora"]
    assert [row["recomputed"] for row in tuned] == [False, True]
    assert all(row["tokens_per_second"] > 0 and row["reason"] is None for row in tuned)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert all(f"## {kind}" in summary for kind in (*KEYS, "status"))
    assert "=== embed-8M: exit code 0" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.long
def test_a_part_that_ends_badly_does_not_stop_the_others(tmp_path: Path) -> None:
    """One part has too little time, one has a model that does not exist, and one needs more time than remains."""
    parts = "device gradients tests train-9B"
    bounds = ["--bound", "device=0.2", "--bound", "tests=100000"]
    code, ended, rows = run("run.sh", tmp_path / "out", "--parts", parts, *bounds, SIZES="9B")
    assert code == 1
    assert {part: row["status"] for part, row in ended.items()} == {
        "device": "out of time",
        "prepare": "failed",
        "gradients": "ok",
        "train-9B": "failed",
        "tests": "skipped",
    }
    assert "9B" in ended["prepare"]["reason"]
    assert "no size '9B'" in ended["train-9B"]["reason"]
    assert "less than its bound of 100000" in ended["tests"]["reason"]
    assert [row["width"] for row in rows if row["kind"] == "gradients"] == [16, 32, 64, 128] * 2


def test_lora_without_peft_is_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("raise ImportError('no accelerate')")
    search = os.pathsep.join([str(tmp_path), str(FOLDER.parents[1] / "src")])
    command = [sys.executable, str(FOLDER / "lora.py"), str(tmp_path), str(tmp_path), "8M", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": search}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 77, done.stderr
    assert "peft" in done.stdout
    assert "no accelerate" in done.stdout


def test_flip_without_its_files_is_skipped_with_the_reason(tmp_path: Path) -> None:
    code, ended, _ = run("run.sh", tmp_path / "out", "--parts", "flip-lora", FLIP=tmp_path, FLIP_MODEL="")
    assert code == 0
    assert ended["flip-lora"]["status"] == "skipped"
    assert "FLIP_MODEL" in ended["flip-lora"]["reason"]


@pytest.mark.long
def test_flip_has_a_row_for_each_task_and_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "flip" / "gb1").mkdir(parents=True)
    records = [
        f">v{number} TARGET={rng.normal():.3f} SET={'test' if number >= 16 else 'train'} VALIDATION={number < 4}\n"
        f"MQYKLILNGKTLKGETTTEA{''.join(rng.choice(list('ACDEFGHIKLMNPQRSTVWY'), 4))}\n"
        for number in range(24)
    ]
    (tmp_path / "flip" / "gb1" / "two_vs_rest.fasta").write_text("".join(records))
    given = {"FLIP": tmp_path / "flip", "FLIP_MODEL": "protea-mini", "FLIP_SEEDS": "0 1"}
    code, ended, rows = run("run.sh", tmp_path / "out", "--parts", "flip-lora", **given)
    assert ended["flip-lora"]["status"] == "ok", ended
    assert code == 0
    assert {row["task"] for row in rows if "lacks its files" in (row["reason"] or "")} == {
        "secondary_structure", "scl", "meltome", "conservation"
    }  # fmt: skip
    rows = [row for row in rows if row["task"] == "gb1"]
    has(rows, FLIP_KEYS)
    assert [(row["task"], row["split"], row["seed"], row["tested"]) for row in rows] == [
        ("gb1", "two_vs_rest", seed, 8) for seed in (0, 1)
    ]
    assert rows[0]["mse"] != rows[1]["mse"]


@pytest.mark.long
def test_mini_trains_exports_and_compares(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, count in (("part-0", 60), ("part-1", 60), ("valid", 8)):
        drawn = ("".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(40, 120))) for _ in range(count))
        text = "".join(f">{name}.{number}\n{one}\n" for number, one in enumerate(drawn))
        (corpus / f"{name}.fasta.zst").write_bytes(zstd.compress(text.encode()))
    code, ended, rows = run("mini.sh", tmp_path / "out", CORPUS=corpus, RUN=tmp_path / "run")
    assert {row["status"] for row in ended.values()} == {"ok"}, ended
    assert tuple(ended) == ("store", "train", "export", "perplexity", "pack")
    assert code == 0
    has(rows, MINI_KEYS)
    by_kind = {row["kind"]: row for row in rows}
    assert by_kind["corpus"]["sequences"] == 120
    assert by_kind["corpus"]["held_out"] == 8
    assert by_kind["mini"]["finished"]
    assert by_kind["carried"]["what"] == "the exported model"
    assert "only if held-out perplexity, contacts and scans all improve" in by_kind["verdict"]["rule"]
    assert (tmp_path / "out" / "run.tar.zst.0").exists()


def test_a_run_is_carried_whole(tmp_path: Path) -> None:
    newest = "checkpoints/step-000000020"
    tensors = np.random.default_rng(0).normal(size=5_000_000).astype(np.float32).tobytes() + b"end"
    files = {"recipe.yaml": b"name: x", "metrics.jsonl": b"{}\n", f"{newest}/__0_0.distcp": tensors}
    files |= {f"{newest}/.metadata": b"\x80", f"{newest}/state.json": b"{}"}
    for name, content in {**files, "checkpoints/step-000000010/state.json": b"old"}.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    out = tmp_path / "out"
    out.mkdir()
    for what, one, other in (("pack", out, tmp_path / "run"), ("unpack", out, tmp_path / "again")):
        command = [sys.executable, str(FOLDER / "mini_state.py"), what, str(one), str(other)]
        subprocess.run(command, check=True, capture_output=True)
    pieces = sorted(out.glob("run.tar.zst.*"))
    assert len(pieces) == 2
    assert sum(path.stat().st_size for path in pieces) < 0.9 * len(tensors)
    again = tmp_path / "again"
    carried = {str(path.relative_to(again)): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    assert carried == {**files, ".lock": b""}
