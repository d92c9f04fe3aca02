"""Measure the time to load a model and the peak anonymous memory of a forward pass.

Writes the model with random weights. New processes then measure loading from a warm file cache, and one pack through
all layers and the head. Anonymous memory does not include the file cache.

Usage: python benchmarks/memory.py [--model esm2_t33_650M_UR50D] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """Sample anonymous memory every two milliseconds and keep the largest value."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())


def measure(folder: str, dtype: str, tokens: int) -> None:
    """Measure in this process and print one JSON object."""
    import torch

    import protea
    from protea.packing import pack

    protea.load  # noqa: B018  imports everything, so that loading alone is timed
    before = anonymous_bytes()
    with Peak() as peak:
        start = time.perf_counter()
        model = protea.load(folder, device="cpu", dtype=dtype)
        loaded = time.perf_counter() - start
        after_load = anonymous_bytes()
        lengths = [345] * (tokens // 345) + [tokens % 345]
        frame, ids = model.alphabet.frame, model.alphabet.encode("ACDEFGHIKLMNPQRSTVWY" * 18)
        batch = pack([frame.around(ids[: frame.residues(n)]) for n in lengths if frame.residues(n) > 0])
        with torch.inference_mode():
            model.module.head(model.module(batch))
    row = {
        "load": loaded,
        "before": before,
        "loaded": after_load,
        "peak": peak.bytes,
        "tokens": batch.input_ids.numel(),
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm2_t33_650M_UR50D")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.tokens)
        return
    print("| stored | computed in | load, s | anonymous before, MB | loaded, MB | peak of a forward pass, MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for stored in ("float32", "bfloat16"):
            folder = f"{temporary}/{stored}"
            init = [sys.executable, "-m", "protea", "init", arguments.model, "-o", folder, "--dtype", stored]
            subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
            for dtype in ("float32", "bfloat16"):
                command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--measure", folder, dtype]
                rows = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
                load = min(row["load"] for row in rows)
                before, loaded, peak = (min(row[key] for row in rows) / 1e6 for key in ("before", "loaded", "peak"))
                print(f"| {stored} | {dtype} | {load:.2f} | {before:.0f} | {loaded:.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
