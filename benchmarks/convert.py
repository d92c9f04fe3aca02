"""Measure the time and memory of converting a large checkpoint.

    python benchmarks/convert.py [--size 3B] [--shard 1] [--folder DIR] [FORMAT...]

Writes a checkpoint of a published size with random numbers, in shards of ``--shard`` GB, and converts it to each
format. Reports the seconds and the peak of anonymous memory of the converting process; pages of mapped files, which the
system can take back, do not count. The limit is 1.5 times the largest shard plus 1 GB. The benchmark needs about three
times the checkpoint's size on disk.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from protea.checkpoints import hf
from protea.models.esm2 import SIZES
from protea.models.registry import build
from protea.output import staged

NAMES = {"hf": "m-hf", "te": "m-te", "nemo2": "m-nemo2", "nemo": "m.nemo", "fair-esm": "esm2_m.pt"}

CONVERT = """
import sys, threading, time
from pathlib import Path
from protea.checkpoints.convert import convert
peak = 0
def watch():
    global peak
    while True:
        rows = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
        peak = max(peak, int(rows["RssAnon"].split()[0]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
report = convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], peers=False)
print(time.perf_counter() - start, peak * 1024, report.tensors)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT")
    parser.add_argument("--size", default="3B", choices=list(SIZES))
    parser.add_argument("--shard", type=float, default=1.0, help="size of a shard in GB")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="protea-", dir=options.folder))
    try:
        model = build(SIZES[options.size])
        generator = torch.Generator().manual_seed(0)

        def value(name: str) -> torch.Tensor:
            return torch.empty(model.get_parameter(name).shape).normal_(0, 0.02, generator=generator)

        with staged(folder / "source") as place:
            hf.write(place, model, value, torch.float32, max_shard_bytes=int(options.shard * 1e9))
        shards = [path.stat().st_size for path in (folder / "source").glob("*.safetensors")]
        allowed = 1.5 * max(shards) + 1e9
        print(f"{options.size}: {sum(shards) / 1e9:.1f} GB in {len(shards)} shards; allowed {allowed / 1e9:.2f} GB")
        for kind in options.formats or NAMES:
            target = folder / NAMES[kind]
            command = [sys.executable, "-c", CONVERT, str(folder / "source"), str(target), kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds, peak, tensors = map(float, done.stdout.split())
            print(f"hf -> {kind:<9}{seconds:7.0f} s  peak {peak / 1e9:.2f} GB anonymous, {tensors:.0f} tensors")
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            for left in folder.glob(f"{target.stem}*"):
                left.unlink()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
