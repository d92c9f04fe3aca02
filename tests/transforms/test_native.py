"""The compiled kernel: its numbers, their independence of threads and packs, and which libraries are loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from messages import check_message
from protea.alphabet import ESM
from protea.models import attention
from protea.models.attention import SDPA, AttentionCall, attend, pick_kernel
from protea.packing import CuSeqlens, pack
from protea.transforms import native
from protea.transforms.native import NATIVE
from reference_attention import REFERENCE

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output and the gradients of queries, keys and values."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for this module."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "protea" / "native"


@pytest.fixture(scope="module")
def _enabled(cache: Path) -> Iterator[None]:
    reason = native.enable()
    if reason is not None:
        pytest.skip(reason)
    yield
    native.disable()


enabled = pytest.mark.usefixtures("_enabled")


@pytest.fixture
def _off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the kernel for one test."""
    monkeypatch.setattr(native, "_used", None)
    monkeypatch.setattr(attention, "KERNELS", [kernel for kernel in attention.KERNELS if kernel is not NATIVE])


off = pytest.mark.usefixtures("_off")


def inputs(total_q: int, total_k: int, heads: int, width: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, width, generator=generator).bfloat16() for n in (total_q, total_k, total_k, total_q)]


def differentiate(kernel: attention.Kernel, tensors: list[Tensor], cu: CuSeqlens, scale: float) -> Results:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = kernel.run(AttentionCall(q, k, v, cu, cu, scale))
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3]))


def pytorchs(tensors: list[Tensor], cu: CuSeqlens, scale: float) -> Results:
    """PyTorch's attention in bfloat16, which rounds in the same places."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    outputs = [
        F.scaled_dot_product_attention(*(x[None, i:j].transpose(1, 2) for x in (q, k, v)), scale=scale)
        for i, j in cu.spans()
    ]
    out = torch.cat([y[0].transpose(0, 1) for y in outputs])
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3]))


def assert_as_near_as_pytorchs(tensors: list[Tensor], cu: CuSeqlens, scale: float) -> None:
    """The error is at most 1.5 times that of PyTorch's bfloat16 kernel, plus half a unit in the last place.

    A query of one token has a gradient of exactly 0; there, every kernel has the rounding error of float32.
    """
    exact = differentiate(REFERENCE, [x.double() for x in tensors], cu, scale)
    results = differentiate(NATIVE, tensors, cu, scale), pytorchs(tensors, cu, scale), exact
    for ours, theirs, truth in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == truth.shape
        rounding = 2**-9 * truth.norm() + 1e-6 * tensors[0].shape[-1] * truth.numel() ** 0.5
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + rounding


@enabled
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 15, 16, 17, 33, 64, 129, 200]), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 16, 24, 32, 40, 56, 64, 72, 128]),
    scale=st.sampled_from([1.0, 0.25, -0.25, 2.0, 0.03]),
    seed=st.integers(0, 9),
)
@example(lengths=[600], heads=1, width=24, scale=0.2, seed=0)
def test_errors_are_no_larger_than_pytorchs(
    lengths: list[int], heads: int, width: int, scale: float, seed: int
) -> None:
    cu = CuSeqlens.from_lengths(lengths)
    tensors = inputs(sum(lengths), sum(lengths), heads, width, seed)
    assert_as_near_as_pytorchs(tensors, cu, scale)


@enabled
def test_queries_and_keys_of_different_lengths() -> None:
    lengths_q, lengths_k = [3, 1, 60], [5, 40, 7]
    cu_q, cu_k = CuSeqlens.from_lengths(lengths_q), CuSeqlens.from_lengths(lengths_k)
    *qkv, dout = inputs(sum(lengths_q), sum(lengths_k), 2, 16)
    results: list[tuple[Tensor, ...]] = []
    for kernel, dtype in ((NATIVE, torch.bfloat16), (REFERENCE, torch.float64)):
        q, k, v = (x.to(dtype).requires_grad_() for x in qkv)
        out = kernel.run(AttentionCall(q, k, v, cu_q, cu_k, 0.25))
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout.to(dtype))))
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).norm() < 5e-3 * truth.norm()


@enabled
@pytest.mark.parametrize("largest", [100.0, 1e4])
def test_scores_of_any_size(largest: float) -> None:
    """Most probabilities are then 0 or 1, and sums of exponentials without a shift would overflow."""
    cu = CuSeqlens.from_lengths([150, 3])
    q, k, v, dout = inputs(153, 153, 2, 32)
    q = (q.double() * largest / (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())).bfloat16()
    q[0, 0], k[7, 0] = q[0, 0].abs().max() * 8, k[7, 0].abs().max()
    tensors = [q, k, v, dout]
    for result in differentiate(NATIVE, tensors, cu, 1.0):
        assert result.isfinite().all()
    assert_as_near_as_pytorchs(tensors, cu, 1.0)


@enabled
def test_nan_stays_and_stays_in_its_sequence() -> None:
    cu = CuSeqlens.from_lengths([20, 30])
    tensors = inputs(50, 50, 1, 16)
    tensors[1][5, 0, 3] = torch.nan
    for result in differentiate(NATIVE, tensors, cu, 0.25):
        assert result[:20].isnan().all(-1).any()
        assert result[20:].isfinite().all()


@enabled
def test_bits_depend_on_nothing_else() -> None:
    """The same bits in every run, with any number of threads and in any pack; the work is split differently."""
    lengths = [700, 40, 300, 1]
    tensors = inputs(sum(lengths), sum(lengths), 2, 24)
    cu = CuSeqlens.from_lengths(lengths)
    before = torch.get_num_threads()
    expected = differentiate(NATIVE, tensors, cu, 0.2)
    try:
        for threads in (1, 2, 2, 7):
            torch.set_num_threads(threads)
            for values, first in zip(differentiate(NATIVE, tensors, cu, 0.2), expected, strict=True):
                assert values.equal(first)
            for start, end in cu.spans():
                alone = differentiate(
                    NATIVE, [x[start:end] for x in tensors], CuSeqlens.from_lengths([end - start]), 0.2
                )
                for values, first in zip(alone, expected, strict=True):
                    assert values.equal(first[start:end])
    finally:
        torch.set_num_threads(before)


@enabled
def test_strided_tensors() -> None:
    cu = CuSeqlens.from_lengths([9, 30])
    tensors = inputs(39, 39, 2, 16)
    strided = [torch.stack((x, x), dim=1)[:, 0] for x in tensors]
    for values, expected in zip(
        differentiate(NATIVE, strided, cu, 1.0), differentiate(NATIVE, tensors, cu, 1.0), strict=True
    ):
        assert values.equal(expected)


def zeros(*, dtype: torch.dtype = torch.bfloat16, width: int = 16, requires_grad: bool = False) -> AttentionCall:
    q, k, v = (torch.zeros(4, 2, width, dtype=dtype, requires_grad=requires_grad) for _ in range(3))
    cu = CuSeqlens.from_lengths([4])
    return AttentionCall(q, k, v, cu, cu)


@off
def test_choice(cache: Path) -> None:
    """Picked for training in bfloat16 once enabled, never for inference."""
    call, trained = zeros(), zeros(requires_grad=True)
    always = list(attention.KERNELS)
    assert pick_kernel(trained) is SDPA
    reason = native.enable()
    if reason is not None:
        pytest.skip(reason)
    assert native.enable() is None
    assert [kernel for kernel in attention.KERNELS if kernel is not NATIVE] == always
    assert len(attention.KERNELS) == len(always) + 1
    assert pick_kernel(trained) is NATIVE
    assert pick_kernel(replace(call, v=trained.v)) is NATIVE
    assert pick_kernel(call) is SDPA
    with torch.no_grad():
        assert pick_kernel(trained) is SDPA
    assert pick_kernel(replace(trained, bias=torch.zeros(2, 4, 4))) is SDPA
    assert pick_kernel(replace(trained, dropout=0.1)) is SDPA
    assert pick_kernel(zeros(dtype=torch.float32, requires_grad=True)) is SDPA
    assert pick_kernel(zeros(width=12, requires_grad=True)) is SDPA
    native.disable()
    assert always == attention.KERNELS
    assert native.compiled() is None


@off
def test_enabled_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a library, the kernel is before PyTorch's, once, until it is disabled."""
    library_, always = ctypes.CDLL(None), list(attention.KERNELS)
    monkeypatch.setattr(native, "load", lambda: library_)
    monkeypatch.setattr(native, "parallel", lambda: None)
    trained = zeros(requires_grad=True)
    for _ in range(2):
        assert native.enable() is None
        assert native.compiled() is library_
        place = always.index(SDPA)
        assert [*always[:place], NATIVE, *always[place:]] == attention.KERNELS
        assert pick_kernel(trained) is NATIVE
        with torch.no_grad():
            assert pick_kernel(trained) is SDPA
    for _ in range(2):
        native.disable()
        assert always == attention.KERNELS
        assert native.compiled() is None

    def not_here() -> ctypes.CDLL:
        raise native.UnavailableError("not here")

    monkeypatch.setattr(native, "load", not_here)
    assert native.enable() == "not here"
    assert always == attention.KERNELS


@enabled
def test_a_whole_model(load_small) -> None:  # type: ignore[no-untyped-def]
    """Gradients of all parameters are as close to float64 as with PyTorch's attention."""
    import numpy as np

    frame = ESM.frame
    batch = pack([frame.around(np.arange(4, 24, dtype=np.uint8)), frame.around(np.arange(5, 12, dtype=np.uint8))])
    results = []
    for dtype, on in (("bfloat16", True), ("bfloat16", False), ("float64", False)):
        model = load_small("esm2", dtype=dtype).module.requires_grad_(True)
        with pytest.MonkeyPatch.context() as patch:
            if not on:
                patch.setattr(attention, "KERNELS", [kernel for kernel in attention.KERNELS if kernel is not NATIVE])
            logits = model(batch)
            logits.double().square().mean().backward()
        results.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
    ours, theirs, truth = results
    assert (ours - truth).norm() <= 1.2 * (theirs - truth).norm()


@enabled
def test_recomputed_by_checkpointing() -> None:
    cu = CuSeqlens.from_lengths([9, 30])
    tensors = inputs(39, 39, 2, 16)
    expected = differentiate(NATIVE, tensors, cu, 1.0)
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = checkpoint(lambda *qkv: attend(AttentionCall(*qkv, cu, cu)), q, k, v, use_reentrant=False)
    assert isinstance(out, Tensor)
    for values, first in zip((out, *torch.autograd.grad(out, (q, k, v), tensors[3])), expected, strict=True):
        assert values.equal(first)


@enabled
def test_no_second_openmp() -> None:
    """Threads of two OpenMP runtimes would compete. Tested in a process without other libraries."""
    code = """
import torch
from protea.models.attention import AttentionCall, attend
from protea.packing import CuSeqlens
from protea.transforms import native
assert native.enable() is None
q = torch.zeros(600, 2, 8, dtype=torch.bfloat16, requires_grad=True)
cu = CuSeqlens.from_lengths([600])
attend(AttentionCall(q, q, q, cu, cu)).sum().backward()
paths = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
print(len(paths & {path for path in paths if any(name in path for name in ("libgomp", "libomp", "libiomp"))}))
import sys
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


# ---- The compiled file ----


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache, on a machine that appears suitable."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {' '.join(native.CPU_FLAGS)}\n")
    if sys.platform != "linux":
        pytest.skip("compiled on Linux alone")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    return tmp_path / "cache" / "protea" / "native"


def compiler(folder: Path, does: str) -> str:
    """A script in the place of a compiler; it should write to ``$out``."""
    path = folder / "compiler"
    path.write_text(
        '#!/bin/sh\nfor out; do :; done\n[ "$out" = --version ] && { echo 1.0; exit; }\n'
        f"echo >> {folder}/runs\n{does}\n"
    )
    path.chmod(0o700)
    return str(path)


def why_not() -> str:
    with pytest.raises(native.UnavailableError) as caught:
        native.load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@off
def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check_message("native.no_compiler", native.enable() or "")
    monkeypatch.setenv("CXX", "missing++ -m64")
    assert "no missing++ on the path" in why_not()
    assert native.compiled() is None


def test_failing_compilers(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(
        "CXX", compiler(tmp_path, "echo warning: hm >&2; echo 'x.cpp:1: error: no such flag' >&2; exit 1")
    )
    assert why_not().endswith("failed: x.cpp:1: error: no such flag")
    monkeypatch.setenv("CXX", compiler(tmp_path, "kill -9 $$"))
    assert why_not().endswith("failed: exit code -9")
    monkeypatch.setattr(native, "_SECONDS", 0.1)
    monkeypatch.setenv("CXX", compiler(tmp_path, "exec sleep 10"))
    assert "timed out" in why_not()
    assert list(empty_cache.iterdir()) == []


def test_a_file_that_is_no_library(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo nonsense > $out"))
    assert why_not().startswith("compiled attention cannot be loaded: ")
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]


def test_unsuitable_machines(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx512f avx512bw avx512dq avx512vl\n")
    assert "avx512_bf16" in why_not()
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    check_message("native.machine", why_not())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "not darwin on" in why_not()
    assert not empty_cache.exists()


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_files_of_others_are_not_loaded(
    mode: int, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder or file that others may write to, a file of another user, and a link."""
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo nonsense > $out"))
    why_not()
    assert empty_cache.stat().st_mode & 0o777 == 0o700
    (built,) = empty_cache.iterdir()
    assert built.stat().st_mode & 0o777 == 0o700
    built.chmod(mode)
    check_message("native.untrusted", why_not(), built=built)
    built.chmod(0o700)
    empty_cache.chmod(mode)
    assert f" {empty_cache};" in why_not()
    empty_cache.chmod(0o700)
    built.rename(tmp_path / "elsewhere.so")
    built.symlink_to(tmp_path / "elsewhere.so")
    assert f" {built};" in why_not()
    built.unlink()
    (tmp_path / "elsewhere.so").rename(built)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: built.stat().st_uid + 1)
        assert f" {empty_cache};" in why_not()
    assert (tmp_path / "runs").read_text() == "\n", "compiled again although the cache held the file"


def test_relative_caches_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native._cache_folder() == tmp_path / ".cache" / "protea" / "native"


@enabled
def test_two_processes_compile_at_once(
    cache: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both may compile; each loads a complete file, and one file remains."""
    (built,) = cache.iterdir()
    monkeypatch.setenv("CXX", compiler(tmp_path, f"head -c 9999 {built} > $out; sleep 0.5; cp {built} $out"))
    code = "from protea.transforms import native; native.load().protea_attention_forward"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(empty_cache.iterdir())) == 1
    key = next(empty_cache.iterdir()).name
    monkeypatch.setenv("CXX", compiler(tmp_path, f"cp {built} $out") + " -mtune=generic")
    assert native.load() is not None
    assert {path.name for path in empty_cache.iterdir()} > {key}, "another command is another file"
