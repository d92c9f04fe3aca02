"""The report of ``protea doctor``: the machine, what Protea uses of it, and commands that install the rest."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

import protea
from protea import limits, native
from protea.device import MIXED, native_bfloat16, resolve_device
from protea.errors import ProteaError
from protea.native import build_library
from protea.native.products import TYPES, supports
from protea.optional import install
from protea.text import bytes_text, counted

# What a processor can do that matters to Protea, as PyTorch spells it, the best last.
_ABILITIES: Final = ("avx2", "fma3", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon", "sve", "bf16")
_SECONDS: Final = 10.0  # limit for a compiler that tells its version


def examine() -> dict[str, Any]:
    """Everything that the report holds, as plain values."""
    report: dict[str, Any] = {
        "protea": {"version": protea.__version__, "place": str(Path(protea.__file__).parent)},
        "python": {"version": platform.python_version(), "program": sys.executable, "system": platform.platform()},
        "pytorch": _pytorch(),
        "processor": _processor(),
        "memory": {"available": limits.available_memory(), "limit": limits.memory_limit()},
        "gpus": _gpus(),
        "native": _native(),
        "fast": _fast(),
        "compilers": _compilers(),
        "programs": {"mmseqs": shutil.which("mmseqs")},
        "extras": _extras(),
    }
    return report | {"advice": [{"what": what, "command": command} for what, command in _advice(report)]}


def _pytorch() -> dict[str, Any]:
    limits.limit_threads()
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> dict[str, Any]:
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    cpus = limits.cpus()
    return {
        "name": _name(),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in _ABILITIES if able.get(name)],
        "cores": {"installed": cpus.installed, "allowed": cpus.allowed, "quota": cpus.quota, "usable": cpus.usable},
    }


def _name() -> str:
    """The name of the processor, as the system tells it."""
    try:
        if sys.platform == "darwin":
            return _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        return found[1] if found else platform.machine()
    except (OSError, UnicodeDecodeError, subprocess.SubprocessError):
        return platform.machine()


def _gpus() -> list[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = (torch.cuda.get_device_properties(number) for number in range(count))
    return [{"name": found.name, "memory": found.total_memory} for found in properties]


def _native() -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is part of the report
            native.library()
            facts, reason = native.facts(), native.reason()
    except ProteaError as error:  # a wrong choice of an instruction set
        facts, reason = None, str(error)
    return {
        "used": None if facts is None else native.instruction_set(),
        "multiplies": [str(dtype).removeprefix("torch.") for dtype in TYPES if facts is not None and supports(dtype)],
        "compiled": [] if facts is None else facts.sets,
        "left_out": {} if facts is None else facts.left_out,
        "compiler": None if facts is None else facts.compiler,
        "reason": reason,
    }


def _fast() -> dict[str, Any]:
    device = resolve_device("auto")
    able = native_bfloat16(device)
    return {"device": device.type, "computes_in": MIXED if able else "float32", "faster": able}


def _compilers() -> dict[str, str]:
    """The commands that could build the library, with what each says of its version."""
    try:
        wanted = build_library.wanted_compiler()
        if wanted:
            build_library.find_compiler()
    except build_library.BuildError as error:
        return {"CXX": str(error)}
    found = {}
    for command in [wanted] if wanted else [[name] for name in build_library.COMPILERS]:
        try:
            if program := shutil.which(command[0]):
                found[program] = _output([program, *command[1:], "--version"]).partition("\n")[0]
        except (OSError, subprocess.SubprocessError) as error:
            found[program or command[0]] = f"does not run: {error}"
    if wanted:
        return found
    with suppress(metadata.PackageNotFoundError):
        found[f"{sys.executable} -m ziglang"] = metadata.version("ziglang")
    return found


def _output(command: list[str]) -> str:
    nothing = subprocess.DEVNULL
    return subprocess.run(
        command, stdin=nothing, capture_output=True, errors="replace", timeout=_SECONDS, check=True
    ).stdout.strip()


def _extras() -> dict[str, dict[str, str | None]]:
    """The packages of each optional part, with the installed version."""
    extras: dict[str, dict[str, str | None]] = {}
    try:
        requirements = metadata.requires("protea") or []
    except metadata.PackageNotFoundError:  # run from its sources
        return extras
    for requirement in requirements:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra[1] not in ("all", "test"):
            try:
                version = metadata.version(name[0])
            except metadata.PackageNotFoundError:
                version = None
            extras.setdefault(extra[1], {})[name[0]] = version
    return extras


def _advice(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each missing part, and the command that installs it."""
    if report["native"]["used"] is None and report["native"]["reason"].startswith(native.CHOICE):
        yield f"{native.CHOICE} keeps the native library from being used", f"unset {native.CHOICE}"
    elif report["native"]["used"] is None and _can_build():
        if "CXX" in report["compilers"]:
            yield "CXX names no compiler", "unset CXX"
        elif not report["compilers"]:
            yield "there is no C++ compiler", install("ziglang")
        yield "the native library is not used: computing is slower", native.BUILD
    cores = report["processor"]["cores"]["usable"]
    if report["pytorch"]["threads"] < cores and os.environ.get("OMP_NUM_THREADS"):
        yield f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves cores unused", "unset OMP_NUM_THREADS"
    if report["pytorch"]["cuda"] is None and shutil.which("nvidia-smi"):
        again = f"{install('torch')} --force-reinstall --index-url https://download.pytorch.org/whl/cu130"
        yield "there is an NVIDIA driver, but this PyTorch is for CPUs", again
    for extra, packages in report["extras"].items():
        if missing := [name for name, version in packages.items() if version is None]:
            yield f"the part {extra} lacks {', '.join(missing)}", install(f"protea[{extra}]")
    if report["programs"]["mmseqs"] is None:
        way = "brew install mmseqs2" if sys.platform == "darwin" else "apt-get install mmseqs2"
        yield "MMseqs2 is missing: training data and splits by clusters need it", way


def _can_build() -> bool:
    try:
        build_library.find_target()
    except build_library.BuildError:
        return False
    return True


def summarise(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the report, each with its label."""
    python, torch_, processor, kernels = (report[name] for name in ("python", "pytorch", "processor", "native"))
    build = "for CPUs" if torch_["cuda"] is None else f"for CUDA {torch_['cuda']}"
    lines = [
        ("protea", f"{report['protea']['version']}, {report['protea']['place']}"),
        ("python", f"{python['version']}, {python['program']}, {python['system']}"),
        ("pytorch", f"{torch_['version']}, {build}, {torch_['vectors']}, {counted(torch_['threads'], 'thread')}"),
        ("processor", f"{processor['name']}: {', '.join(processor['instruction_sets']) or processor['architecture']}"),
        ("cores", _cores(processor["cores"])),
        ("memory", _memory(report["memory"])),
    ]
    lines += [("gpu", f"{gpu['name']}, {bytes_text(gpu['memory'])}") for gpu in report["gpus"]] or [("gpu", "none")]
    if kernels["used"] is None:
        lines.append(("native library", f"not used: {kernels['reason']}"))
    else:
        others = f"compiled for {', '.join(kernels['compiled'])} by {kernels['compiler']}"
        lines.append(("native library", f"uses {kernels['used']} for {', '.join(kernels['multiplies'])}; {others}"))
        lines += [("", f"lacks {name}: {why}") for name, why in kernels["left_out"].items()]
    fast = report["fast"]
    does = "multiplies in bfloat16" if fast["faster"] else "changes nothing: this hardware does not multiply bfloat16"
    lines.append(("--fast", f"{does} ({fast['computes_in']}, {fast['device']})"))
    lines += [("compiler", f"{name}: {version}") for name, version in report["compilers"].items()]
    lines.append(("mmseqs", report["programs"]["mmseqs"] or "missing"))
    for extra, packages in report["extras"].items():
        lines.append(
            (f"[{extra}]", ", ".join(f"{name} {version or '(missing)'}" for name, version in packages.items()))
        )
    return lines


def _cores(cores: dict[str, Any]) -> str:
    parts = [f"{counted(cores['usable'], 'core')} for this process", f"{cores['installed']} in the machine"]
    if cores["allowed"] < cores["installed"]:
        parts.append(f"{cores['allowed']} by affinity")
    if cores["quota"] is not None:
        parts.append(f"{cores['quota']:g} by the container's quota")
    return ", ".join(parts)


def _memory(memory: dict[str, Any]) -> str:
    limit = "" if memory["limit"] is None else f", the container's limit is {bytes_text(memory['limit'])}"
    return f"{bytes_text(memory['available'])} available{limit}"
