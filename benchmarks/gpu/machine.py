"""The part ``device``: a description of the machine, and the two rates that limit everything else.

It measures a product of square bfloat16 matrices of random numbers, and a copy within the device's memory, counting
bytes read and written. It does not import Protea, because it also reports which of Protea's requirements are missing.

Usage: python benchmarks/gpu/machine.py OUT [--dry-run]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from records import append

NEEDED = ("numpy", "safetensors", "huggingface_hub", "xopen", "h5py", "pyarrow", "pydantic", "yaml", "typer", "rich")
BESIDE = ("backports.zstd", "transformers", "peft", "accelerate", "tensorboard", "pytest", "hypothesis")
SIDE, DRY_SIDE = 8192, 256
COPIED, DRY_COPIED = 4 << 30, 1 << 20


def driver() -> str | None:
    """Return the version of the NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False)
    return told.stdout.strip().splitlines()[0] if told.returncode == 0 and told.stdout.strip() else None


def cudnn() -> int | None:
    """Return the version of cuDNN."""
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def absent(names: tuple[str, ...]) -> list[str]:
    """Return the packages that cannot be imported."""

    def there(name: str) -> bool:
        try:
            return find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in names if not there(name)]


def seconds(call: Callable[[], object], repeats: int, *, on_gpu: bool) -> float:
    """Return the median time of a call, after a warm-up."""
    times = []
    for number in range(repeats + 2):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not given.dry_run
    device = "cuda" if on_gpu else "cpu"
    side, copied = (DRY_SIDE, DRY_COPIED) if given.dry_run else (SIDE, COPIED)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = 2 * side**3 / seconds(lambda: a @ b, 10, on_gpu=on_gpu)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / seconds(lambda: target.copy_(source), 10, on_gpu=on_gpu)
    properties = torch.cuda.get_device_properties(0) if on_gpu else None
    append(
        given.out,
        "device",
        "device",
        device=properties.name if properties else platform.processor() or platform.machine(),
        driver=driver(),
        memory=properties.total_memory if properties else None,
        capability=f"{properties.major}.{properties.minor}" if properties else None,
        multiprocessors=properties.multi_processor_count if properties else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=cudnn() if on_gpu else None,
        python=platform.python_version(),
        cores=os.cpu_count(),
        main_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bfloat16_product_tflops=product / 1e12,
        copy_gb_per_second=copy / 1e9,
        missing=absent(NEEDED),
        missing_beside=absent(BESIDE),
    )
    if not on_gpu and not given.dry_run:
        print("PyTorch sees no GPU here")
        sys.exit(1)


if __name__ == "__main__":
    main()
