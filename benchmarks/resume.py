"""Kill and continue a training run at random moments; compare it bit by bit with an undisturbed run.

    python benchmarks/resume.py [--steps 200] [--kills 20] [--precision float32] [--compile] [--threads 1] [--seed N]

Both runs execute ``protea pretrain`` with the same recipe, a small ESM-2 with dropout on random sequences, in separate
processes. The second run receives SIGKILL ``--kills`` times: mostly at a random moment after a random step, sometimes
while a checkpoint is being written, sometimes before training begins. After each kill the same command runs again. The
weights, the optimizer's state and everything else in the last checkpoint must agree, and so must every line of
``metrics.jsonl`` except for the fields of time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from protea.data.build_settings import BuildSettings
from protea.data.from_fasta import build_uniref
from protea.progress import SILENT
from protea.train.run_checkpoints import SavedCheckpoint, choose

TIMES = ("tokens_per_second", "utilisation", "peak_memory")
RECIPE = """
model: {{architecture: esm2_t6_8M_UR50D, num_hidden_layers: 3, hidden_size: 48, num_attention_heads: 3,
  intermediate_size: 192}}
data: {{store: {store}, max_tokens: 128}}
batch: {{tokens: 2048, pack: 512}}
optimizer: {{name: {optimizer}, lr: 2.0e-3}}
schedule: {{warmup: 20}}
run: {{steps: {steps}, precision: {precision}, compile: {compile}, device: cpu, seed: {seed}}}
validation: {{every: 25, tokens: 4096}}
save: {{every: 10}}
log: {{every: 1, tensorboard: false, peak_tflops: 0.1}}
"""


def make_store(folder: Path, rng: random.Random) -> Path:
    def record(name: str) -> str:
        return f">{name}\n{''.join(rng.choices('ACDEFGHIKLMNPQRSTVWY', k=rng.randint(10, 160)))}\n"

    names = range(600)
    (folder / "u50.fasta").write_text("".join(record(f"C{n}") for n in names))
    (folder / "u90.fasta").write_text("".join(record(f"M{n}_{k}") for n in names for k in range(3)))
    (folder / "map.tsv").write_text("".join(f"C{n}\tM{n}_0,M{n}_1,M{n}_2\n" for n in names))
    settings = BuildSettings(output=folder / "store", valid="60", filtered=False)
    build_uniref(settings, [folder / "u50.fasta"], [folder / "u90.fasta"], folder / "map.tsv", SILENT)
    return folder / "store"


class Run:
    """A run that can be killed and started again."""

    def __init__(self, recipe: Path, folder: Path, threads: int) -> None:
        self.folder = folder
        self._command = [sys.executable, "-m", "protea", "pretrain", str(recipe), "-o", str(folder)]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def start(self) -> subprocess.Popen[str]:
        """Start a process that works on the run."""
        return subprocess.Popen(
            self._command, env=self._environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def finish(self) -> None:
        """Run to the end."""
        process = self.start()
        err = process.communicate()[1]
        if process.returncode:
            sys.exit(err)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines of the metrics."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        """Return the last step in the metrics."""
        return max((line["step"] for line in self.metrics()), default=0)

    def saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        return any(self.folder.glob("checkpoints/.step-*"))


def kill_while(process: subprocess.Popen[str], run: Run, kind: str, step: int, rng: random.Random) -> bool:
    """Kill a process at the chosen moment; return whether it was killed before its end."""
    if kind == "starting":
        time.sleep(rng.uniform(0.1, 3))
    while kind != "starting" and process.poll() is None and run.step() < step:
        time.sleep(0.005)
    if kind == "saving":
        while process.poll() is None and not run.saving():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.005))
    if kind == "training":
        time.sleep(rng.uniform(0, 0.2))
    process.kill()
    err = process.communicate()[1]
    if process.returncode > 0:
        sys.exit(err)
    return process.returncode == -signal.SIGKILL


def differences(one: Run, other: Run) -> list[str]:
    """Return the parts that should agree and do not."""
    a, b = (choose(run.folder, "newest") for run in (one, other))
    found = [
        f"{key} of the state" for key in a.values if key not in {"files", "sha256"} and a.values[key] != b.values[key]
    ]
    found += [f"tensor {key}" for key in sorted({*a.tensors()} | {*b.tensors()}) if not same(a, b, key)]
    lines = [[{k: v for k, v in line.items() if k not in TIMES} for line in run.metrics()] for run in (one, other)]
    found += [f"metrics {x} and {y}" for x, y in zip(*lines, strict=False) if x != y]
    return found + ([f"{len(lines[0])} and {len(lines[1])} metrics"] if len(lines[0]) != len(lines[1]) else [])


def same(one: SavedCheckpoint, other: SavedCheckpoint, key: str) -> bool:
    a, b = one.tensors(), other.tensors()
    return key in a and key in b and a[key].dtype == b[key].dtype and torch.equal(a[key], b[key])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16-mixed", "fp16-mixed"])
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        values = {name: str(value).lower() for name, value in vars(options).items()}
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(store=make_store(folder, rng), **values))
        whole, killed = (Run(recipe, folder / name, options.threads) for name in ("whole", "killed"))
        began = time.monotonic()
        whole.finish()
        print(f"undisturbed: {options.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        count = dict.fromkeys(("training", "saving", "starting"), 0)
        for number, step in enumerate(sorted(rng.choices(range(options.steps * 9 // 10), k=options.kills)), 1):
            kind = rng.choices(list(count), weights=(6, 3, 1))[0]
            before = killed.step()
            # Metrics from before the last kill do not show that the new process works.
            hit = kill_while(killed.start(), killed, kind, max(step, before + 1), rng)
            left = sorted(path.name for path in killed.folder.glob("checkpoints/*"))
            print(
                f"kill {number}: {kind}, at step {before} before, {killed.step()} after; {', '.join(left)}", flush=True
            )
            if not hit:
                print("it had ended before; no kill")
            count[kind] += hit
        killed.finish()
        found = differences(whole, killed)
        tensors = len(choose(whole.folder, "newest").tensors())
        torn = ", ".join(f"{many} {kind}" for kind, many in count.items())
        print(
            f"{options.precision}, {options.optimizer}, {'compiled' if options.compile else 'eager'}, "
            f"{options.threads} threads, seed {options.seed}: {sum(count.values())} kills ({torn})"
        )
        print("\n".join(found[:20]) or f"identical: {tensors} tensors, the state and {len(whole.metrics())} metrics")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
