"""The part ``train`` of mini.sh: Protea-mini's recipe for a given time, in one call or several.

The recipe's learning rate is constant and then falls linearly to the last step, so the number of steps must be known.
The first call trains for a while, measures the tokens per second, and chooses as many steps as all calls have time for
(``--calls``). It then continues to that number of steps, and so do later calls. When the time is over, SIGTERM makes
the run save its last complete step.

A step is larger than on two CPU cores (65,536 tokens instead of 8,192), and so is the learning rate (0.004 instead of
0.002). Further KEY=VALUE arguments override keys of the recipe.

Usage: python benchmarks/gpu/mini_train.py OUT WORK RUN [KEY=VALUE ...] --seconds N [--calls N] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from records import append
from sizes import store_folder

SETTINGS = {
    "batch.tokens": "65536",
    "batch.pack": "65536",
    "optimizer.lr": "4.0e-3",
    "run.workers": "2",
    "validation.every": "1000",
    "save.every": "1000",
    "save.newest": "1",
    "log.every": "50",
}
DRY_SETTINGS = {
    "model.num_hidden_layers": "1",
    "model.hidden_size": "64",
    "model.num_attention_heads": "1",
    "model.intermediate_size": "128",
    "data.max_tokens": "256",
    "batch.tokens": "256",
    "batch.pack": "256",
    "run.precision": "float32",
    "run.compile": "false",
    "validation.every": "40",
    "schedule.warmup": "5",
    "validation.tokens": "1024",
    "save.every": "40",
    "log.every": "1",
}
PLENTY = 1_000_000
WARM, SEEN = 3, 6
"""Lines of metrics before the rate is taken, and those that it is taken of."""
STOPPING, RESTARTING, SAFETY = 15.0, 25.0, 0.92
"""Seconds that saving takes, and starting again; and the share of the time that is counted on."""
DRY_STEPS, DRY_SEEN = 40, 10
"""In a dry run each call has so many steps; all calls but the last end after so many lines of metrics."""
INTERRUPTED = 130


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rates(run: Path) -> list[float]:
    """Return the tokens per second of each line."""
    return [line["tokens_per_second"] for line in metrics(run) if line.get("tokens_per_second")]


def planned(run: Path) -> int | None:
    """Return the number of steps of a run that has begun."""
    import yaml

    known = run / "recipe.yaml"
    if not any((run / "checkpoints").glob("step-*")):
        return None
    steps: int = yaml.safe_load(known.read_text(encoding="utf-8"))["run"]["steps"]
    return steps


def pretrain(given: argparse.Namespace, steps: int, until: float, *, enough: int | None = None) -> int:
    """Train until a given time, or until there are enough lines of metrics.

    Returns:
        The exit code of ``protea pretrain``.
    """
    settings = {"data.store": str(store_folder(given.work)), **SETTINGS, **(DRY_SETTINGS if given.dry_run else {})}
    told = [f"{key}={value}" for key, value in settings.items()] + given.settings + [f"run.steps={steps}"]
    command = [sys.executable, "-m", "protea", "pretrain", "protea-mini", *told, "-o", str(given.run)]
    child = subprocess.Popen([*command, "--accept-changes"])
    try:
        while child.poll() is None:
            if time.monotonic() >= until or (enough is not None and len(rates(given.run)) >= enough):
                child.send_signal(signal.SIGTERM)
                child.wait(timeout=2 * STOPPING)
            time.sleep(0.1)
    finally:
        child.kill()
    return child.wait()


def plan(given: argparse.Namespace, until: float) -> int:
    """Train for a while and return how many steps there is time for.

    Raises:
        SystemExit: training failed, or the time was over before its rate was known.
    """
    code = pretrain(given, PLENTY, until, enough=WARM + SEEN)
    lines = [line for line in metrics(given.run) if "tokens_per_second" in line]
    if code != INTERRUPTED or len(lines) <= WARM:
        raise SystemExit(f"protea pretrain ended with exit code {code} before its rate was known")
    rate, done = median(line["tokens_per_second"] for line in lines[WARM:]), lines[-1]
    if given.dry_run:
        more = DRY_STEPS * given.calls
    else:
        left = until - time.monotonic() - RESTARTING + (given.calls - 1) * (given.seconds - STOPPING - RESTARTING)
        more = max(1, int(SAFETY * rate * left * done["step"] / done["tokens"]))
    print(f"{rate:,.0f} tokens a second: {done['step'] + more:,} steps", flush=True)
    return int(done["step"] + more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument(
        "--seconds", type=float, required=True, help="time for everything, the last checkpoint included"
    )
    parser.add_argument("--calls", type=int, default=1, help="number of calls that share the run")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_intermixed_args()
    began = time.monotonic()
    until = began + given.seconds - STOPPING
    steps, enough = planned(given.run), None
    resumed = steps is not None
    if steps is None:
        steps = plan(given, until)
        enough = len(rates(given.run)) + DRY_SEEN if given.dry_run and given.calls > 1 else None
    code = pretrain(given, steps, until, enough=enough)
    if code not in (0, INTERRUPTED):
        raise SystemExit(f"protea pretrain ended with exit code {code}")
    lines = metrics(given.run)
    trained = [line for line in lines if "tokens_per_second" in line]
    validated = [line for line in lines if "validation_loss" in line]
    append(
        given.out,
        "train",
        "mini",
        resumed=resumed,
        finished=code == 0,
        steps=steps,
        step=trained[-1]["step"],
        tokens=trained[-1]["tokens"],
        epoch=trained[-1]["epoch"],
        tokens_per_second=median(rates(given.run)[-2 * SEEN :]),
        utilisation=trained[-1].get("utilisation"),
        peak_memory=trained[-1]["peak_memory"],
        loss=trained[-1]["loss"],
        validation_perplexity=validated[-1]["validation_perplexity"] if validated else None,
        seconds=time.monotonic() - began,
    )


if __name__ == "__main__":
    main()
