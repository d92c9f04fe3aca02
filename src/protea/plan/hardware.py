"""GPUs by name, with the figures of their data sheets, and groups of them.

Rates are of dense products in bfloat16 with sums in float32. Links are one way, for each GPU: ``link`` between GPUs of
one machine (NVLink, or PCI Express), ``network`` between machines, as in usual systems with that GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Final, NamedTuple

from protea.errors import UsageError
from protea.text import counted

_GIB: Final = 1 << 30
_USABLE: Final = 0.94
"""Share of a GPU's memory that tensors may take; the rest is the driver's, the libraries' and lost between tensors."""

PER_NODE: Final = 8
"""GPUs of a machine, unless the user says how many machines there are."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: operations per second, bytes, and bytes per second."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float

    @property
    def usable(self) -> float:
        """Bytes that tensors may take."""
        return self.memory * _USABLE


def _gpu(name: str, tflops: float, gib: float, bandwidth: float, link: float, network: float) -> Gpu:
    return Gpu(name, tflops * 1e12, gib * _GIB, bandwidth * 1e9, link * 1e9, network * 1e9)


GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100", 312, 80, 2039, 300, 25),
        _gpu("A100-40GB", 312, 40, 1555, 300, 25),
        _gpu("H100", 989, 80, 3350, 450, 50),
        _gpu("H200", 989, 140, 4800, 450, 50),
        _gpu("H20", 148, 96, 4000, 450, 50),
        _gpu("B200", 2250, 180, 8000, 900, 50),
        _gpu("L4", 121, 24, 300, 32, 12.5),
        _gpu("L40S", 362, 48, 864, 32, 25),
        _gpu("A10G", 70, 24, 600, 32, 12.5),
    )
}
"""NVIDIA's GPUs, by the name that users type."""


class Cluster(NamedTuple):
    """Equal machines with equal GPUs."""

    gpu: Gpu
    gpus: int
    nodes: int

    @property
    def per_node(self) -> int:
        """GPUs of a machine."""
        return self.gpus // self.nodes

    def __str__(self) -> str:
        machines = f" in {counted(self.nodes, 'machine')}" if self.nodes > 1 else ""
        return f"{self.gpus} x {self.gpu.name}{machines}"


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that a device's name tells, as in ``NVIDIA H100 80GB HBM3``; ``None`` if it is unknown."""
    words = device_name.replace("-", " ").split()
    if "A100" in words and "40GB" in words:
        return GPUS["A100-40GB"]
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def find_gpu(name: str, figures: Mapping[str, float | None]) -> Gpu:
    """The GPU of a name, with ``figures`` in place of the data sheet's; those of an unknown one must be complete.

    Figures are those that ``Gpu`` has, as users type them: TFLOP/s, GB and GB/s.
    """
    told = {key: value * (1e12 if key == "flops" else 1e9) for key, value in figures.items() if value is not None}
    known = {gpu.lower(): gpu for gpu in GPUS}
    if name.lower() in known:
        return replace(GPUS[known[name.lower()]], **told)  # type: ignore[arg-type]
    if missing := [key for key in ("flops", "memory", "bandwidth") if key not in told]:
        near = [known[each] for each in get_close_matches(name.lower(), known, n=3, cutoff=0.3)] or [*GPUS]
        options = {"flops": "--gpu-tflops", "memory": "--gpu-memory", "bandwidth": "--gpu-bandwidth"}
        raise UsageError(
            f"--gpus {name}: unknown GPU; known ones with near names: {', '.join(near)}; or give its figures: "
            f"{', '.join(options[key] for key in missing)}"
        )
    link = told.get("link", 32e9)
    return Gpu(name, told["flops"], told["memory"], told["bandwidth"], link, told.get("network", 12.5e9))


def parse_gpus(text: str, nodes: int | None, figures: Mapping[str, float | None]) -> Cluster:
    """The GPUs of a text such as ``64xH100``; without a number it is one."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x*]\s*)?([A-Za-z][\w .-]*?)\s*", text)
    if match is None or (match[1] is not None and not 1 <= int(match[1]) <= 1_000_000):
        raise UsageError(f"--gpus {text!r}: expected a number and a name, as in 64xH100")
    count = int(match[1] or 1)
    machines = -(-count // PER_NODE) if nodes is None else nodes
    if count % machines:
        advice = "give --nodes" if nodes is None else f"--nodes {nodes} must divide {count}"
        raise UsageError(
            f"--gpus {text}: {counted(count, 'GPU')} in {counted(machines, 'machine')} are unequal; {advice}"
        )
    return Cluster(find_gpu(match[2], figures), count, machines)
