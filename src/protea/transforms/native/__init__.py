"""Attention for training in bfloat16 on CPUs, in C++, compiled on the machine that runs it.

PyTorch's attention gains nothing from a CPU's bfloat16 instructions. This kernel uses them; it needs a C++ compiler and
a processor with AVX-512 BF16. After ``enable``, ``protea.models.attention`` picks it for calls that need gradients. The
library lies in the user's cache, and is loaded only if no other user could have written it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protea.models.attention import AttentionCall, Kernel, add_kernel, remove_kernel
from protea.packing import CuSeqlens

SOURCE: Final = Path(__file__).with_name("attention.cpp")
# The instructions that the source uses, as /proc/cpuinfo spells them; the compiler omits "_".
CPU_FLAGS: Final = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
# No -march=native, so that machines that share a home folder can share the file.
FLAGS: Final = (
    *("-std=c++17", "-O2", "-fno-tree-vectorize", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-w", "-mfma"),
    *(f"-m{flag.replace('_', '')}" for flag in CPU_FLAGS),
)
COMPILERS: Final = ("c++", "g++", "clang++")
_SECONDS: Final = 300.0  # limit for the compiler, which usually takes three seconds
_CPU_INFO: Final = Path("/proc/cpuinfo")


class UnavailableError(Exception):
    """The reason why there is no library, in one line."""


def load() -> ctypes.CDLL:
    """The library, compiled if it is not in the cache; ``UnavailableError`` if this machine cannot."""
    _check_machine()
    command = _compiler()
    try:
        folder = _cache_folder()
        key = hashlib.sha256(SOURCE.read_bytes())
        key.update("\0".join((*command, _output([*command, "--version"]), *FLAGS)).encode())
        path = folder / f"attention-{key.hexdigest()[:32]}.so"
        if not path.exists():
            _compile(command, path)
        return _trusted(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        raise UnavailableError(f"compiled attention cannot be loaded: {error}") from error


def _check_machine() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"compiled attention is for Linux on x86-64, not {sys.platform} on {platform.machine()}")
    lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    present = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set[str]())
    missing = [flag for flag in CPU_FLAGS if flag not in present]
    if missing:
        raise UnavailableError(f"this processor lacks {', '.join(missing)}")


def _compiler() -> list[str]:
    """The command in ``$CXX``, or the first compiler on the path."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name, *arguments in [wanted] if wanted else [[name] for name in COMPILERS]:
        program = shutil.which(name)
        if program is not None:
            return [program, *arguments]
    names = wanted[0] if wanted else ", ".join(COMPILERS)
    raise UnavailableError(f"there is no C++ compiler: no {names} on the path")


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says to ignore relative paths.
    cache = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    folder = cache / "protea" / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _compile(command: list[str], path: Path) -> None:
    """Compile under a temporary name and rename, so that several processes may compile at once."""
    handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".so.part", dir=path.parent)
    os.close(handle)
    try:
        _output([*command, *FLAGS, str(SOURCE), "-lm", "-o", name])
        Path(name).chmod(0o700)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _output(command: list[str]) -> str:
    """The output of a compiler; ``UnavailableError`` if it does not start, fails or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the C++ compiler {command[0]} does not run: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise UnavailableError(f"the C++ compiler {command[0]} failed: {first.strip()}")
    return done.stdout


def _trusted(path: Path) -> ctypes.CDLL:
    """Load a library, after a check that no other user could have written the file or its folder.

    The path to load leads through the opened folder, so nobody can swap the folder after the check. It ends in the
    file's name because the loader treats libraries with equal names as one.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for checked, status in ((path.parent, os.fstat(folder)), (path, os.lstat(path.name, dir_fd=folder))):
            ours = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not ours or stat.S_ISLNK(status.st_mode):
                raise UnavailableError(f"another user could have written {checked}; delete it")
        return ctypes.CDLL(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


_used: ctypes.CDLL | None = None


def compiled() -> ctypes.CDLL | None:
    """The library that attention uses, if any."""
    return _used


def attention(call: AttentionCall) -> Tensor:
    """Softmax attention within each sequence, in bfloat16."""
    out = _Attention.apply(call.q, call.k, call.v, call.cu_q, call.cu_k, call.scale)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        _call("protea_attention_forward", (q, k, v, out, lse), cu_q, cu_k, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = cu_q, cu_k, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _call("protea_attention_backward", (q, k, v, out, lse, dout.contiguous(), dq, dk, dv), *ctx.rest)
        return dq, dk, dv, None, None, None


def _call(name: str, tensors: tuple[Tensor, ...], cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> None:
    assert _used is not None, "native attention called without being enabled"
    q, k = tensors[:2]
    offsets_q, offsets_k = cu_q.host_offsets, cu_k.host_offsets
    _check(q, offsets_q)
    _check(k, offsets_k)
    # Longest first: otherwise one thread could begin a long sequence when the others are done.
    order = (offsets_q.diff() * offsets_k.diff().long()).argsort(descending=True, stable=True).int()
    pointers = [x.data_ptr() for x in (*tensors, offsets_q, offsets_k, order)]
    function = _function(_used, name, len(pointers))
    if function(*pointers, len(order), *q.shape[1:], scale, torch.get_num_threads(), parallel()):
        raise MemoryError("attention ran out of memory")


@cache
def _function(library: ctypes.CDLL, name: str, pointers: int) -> Callable[..., int]:
    function = getattr(library, name)
    sizes = [ctypes.c_int64] * 3
    function.argtypes = [*[ctypes.c_void_p] * pointers, *sizes, ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
    return cast("Callable[..., int]", function)


def _check(x: Tensor, offsets: Tensor) -> None:
    """Refuse tensors for which the compiled code would read outside their memory."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        raise TypeError(f"the compiled attention needs bfloat16 on the CPU, got {x.dtype} on {x.device}")
    if offsets.dtype != torch.int32 or not offsets.is_contiguous() or int(offsets[-1]) != len(x):
        raise ValueError(f"the boundaries do not fit {len(x)} tokens")


@cache
def parallel() -> int | None:
    """The address of ``GOMP_parallel`` in PyTorch's OpenMP; threads of a second OpenMP would compete with PyTorch's."""
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value


_BFLOAT16: Final = frozenset({torch.bfloat16})
NATIVE: Final = Kernel(
    "native", attention, device="cpu", dtypes=_BFLOAT16, head_widths=range(8, 129, 8), gradients=True, inference=False
)


def enable() -> str | None:
    """Compile the kernel or load it from the user's cache, and use it; returns the reason if that is impossible."""
    global _used  # noqa: PLW0603  the process has one list of kernels
    try:
        loaded = load()
        parallel()  # fails here instead of at the first step
    except UnavailableError as error:
        return str(error)
    except (OSError, AttributeError) as error:  # PyTorch's wheels have it elsewhere, or it is another OpenMP
        return f"PyTorch's own OpenMP was not found: {error}"
    _used = loaded
    add_kernel(NATIVE)
    return None


def disable() -> None:
    """Undo ``enable``."""
    global _used  # noqa: PLW0603
    remove_kernel(NATIVE)
    _used = None
