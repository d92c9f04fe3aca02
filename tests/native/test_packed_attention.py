"""The native library's attention, for every instruction set of this processor: numbers, bits, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from conftest import LoadModel
from guarded import guarded, needs_guards
from protea.alphabet import ESM
from protea.models import attention as kernels
from protea.models.attention import NATIVE, SDPA, AttentionCall, Kernel, attend, pick_kernel
from protea.native.packed_attention import HEAD_WIDTHS, attention
from protea.native.products import supports
from protea.packing import CuSeqlens, PackedRows, pack
from reference_attention import REFERENCE

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output and the gradients of queries, keys and values."""

NARROW = torch.bfloat16
UNITS = {torch.float32: 2.0**-22, NARROW: 2.0**-9}


def inputs(total_q: int, total_k: int, heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    totals = (total_q, total_k, total_k, total_q)
    return [torch.randn(n, heads, width, generator=generator).to(dtype) for n in totals]


def differentiate(
    kernel: Kernel, tensors: list[Tensor], cu_q: CuSeqlens, scale: float, cu_k: CuSeqlens | None = None
) -> Results:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = kernel.run(AttentionCall(q, k, v, cu_q, cu_k or cu_q, scale))
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3]))


def pytorchs(tensors: list[Tensor], cu_q: CuSeqlens, scale: float, cu_k: CuSeqlens) -> Results:
    """PyTorch's attention in the same type, which rounds in the same places."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_q.spans(), cu_k.spans(), strict=True):
        parts = (x[None, i:j].transpose(1, 2) for x, i, j in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
        outputs.append(F.scaled_dot_product_attention(*parts, scale=scale)[0].transpose(0, 1))
    out = torch.cat(outputs)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3]))


def assert_as_near_as_pytorchs(
    tensors: list[Tensor], cu_q: CuSeqlens, scale: float, cu_k: CuSeqlens | None = None, factor: float = 4.0
) -> None:
    """The error is at most ``factor`` times that of PyTorch's kernel, plus half a unit in the last place.

    A query of one token has a gradient of exactly 0; there, every kernel has the rounding error of float32.
    """
    dtype, cu_k = tensors[0].dtype, cu_k or cu_q
    exact = differentiate(REFERENCE, [x.double() for x in tensors], cu_q, scale, cu_k)
    results = differentiate(NATIVE, tensors, cu_q, scale, cu_k), pytorchs(tensors, cu_q, scale, cu_k), exact
    for ours, theirs, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == truth.shape
        zero = 1e-6 * (tensors[0].shape[-1] * truth.numel()) ** 0.5 * max(1.0, abs(scale))
        assert (ours - truth).norm() <= factor * (theirs - truth).norm() + UNITS[dtype] * truth.norm() + zero


# --- numbers -------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    lengths=st.lists(
        st.one_of(st.integers(1, 70), st.sampled_from([1, 15, 16, 17, 127, 128, 129, 255, 257])), min_size=1, max_size=4
    ),
    heads=st.integers(1, 3),
    width=st.sampled_from(HEAD_WIDTHS),
    scale=st.sampled_from([1.0, 0.25, -0.25, 2.0, -3.0, 0.03, 0.0]),
    seed=st.integers(0, 9),
)
@example(lengths=[700], heads=1, width=24, scale=0.2, seed=0)
@example(lengths=[260, 513], heads=2, width=16, scale=0.25, seed=0)
@example(lengths=[300], heads=1, width=256, scale=0.06, seed=0)
def test_errors_are_no_larger_than_pytorchs(
    dtype: torch.dtype, lengths: list[int], heads: int, width: int, scale: float, seed: int
) -> None:
    total = sum(lengths)
    assert_as_near_as_pytorchs(inputs(total, total, heads, width, dtype, seed), CuSeqlens.from_lengths(lengths), scale)


@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_every_head_width(dtype: torch.dtype, width: int) -> None:
    lengths = [37, 3]
    assert_as_near_as_pytorchs(inputs(40, 40, 2, width, dtype), CuSeqlens.from_lengths(lengths), width**-0.5)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=4),
    width=st.sampled_from([8, 16, 40, 64]),
)
@example([(600, 5), (3, 600)], 16)
def test_queries_and_keys_of_different_lengths(dtype: torch.dtype, lengths: list[tuple[int, int]], width: int) -> None:
    cu_q, cu_k = (CuSeqlens.from_lengths(part) for part in zip(*lengths, strict=True))
    tensors = inputs(*(sum(part) for part in zip(*lengths, strict=True)), 2, width, dtype)  # type: ignore[call-arg]
    assert_as_near_as_pytorchs(tensors, cu_q, 0.25, cu_k)


@pytest.mark.parametrize("largest", [100.0, 1e4, 1e6])
def test_scores_of_any_size(dtype: torch.dtype, largest: float) -> None:
    """Most probabilities are then 0 or 1, and sums of exponentials without a shift would overflow."""
    cu = CuSeqlens.from_lengths([150, 3])
    q, k, v, dout = inputs(153, 153, 2, 32, dtype)
    q = (q.double() * largest / (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())).to(dtype)
    q[0, 0], k[7, 0] = q[0, 0].abs().max() * 8, k[7, 0].abs().max()
    tensors = [q, k, v, dout]
    for result in differentiate(NATIVE, tensors, cu, 1.0):
        assert result.isfinite().all()
    if largest < 1e6:  # where float32 still tells scores apart
        assert_as_near_as_pytorchs(tensors, cu, 1.0, factor=6.0)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    width=st.sampled_from([8, 24, 64, 256]),
    larger=st.integers(0, 3),
)
@pytest.mark.usefixtures("instruction_set")
def test_a_bias(lengths: list[int], width: int, larger: int) -> None:
    """Added to every sequence, from its first token on; it may be larger than the longest, and lie anywhere."""
    cu, total, size = CuSeqlens.from_lengths(lengths), sum(lengths), max(lengths) + larger
    q, k, v, _ = inputs(total, total, 3, width, torch.float32)
    bias = torch.randn(size, size, 3, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0) * 5
    out = NATIVE.run(AttentionCall(q, k, v, cu, cu, 0.3, bias=bias))
    exact = REFERENCE.run(AttentionCall(q.double(), k.double(), v.double(), cu, cu, 0.3, bias=bias.double()))
    theirs = SDPA.run(AttentionCall(q, k, v, cu, cu, 0.3, bias=bias))
    assert (out - exact).norm() <= 1.5 * (theirs - exact).norm() + UNITS[torch.float32] * exact.norm()


@pytest.mark.usefixtures("instruction_set")
def test_a_bias_decides_where_scores_are_far_apart() -> None:
    """The largest score is that with the bias."""
    cu = CuSeqlens.from_lengths([200])
    q, k, v, _ = inputs(200, 200, 1, 16, torch.float32)
    bias = torch.zeros(1, 200, 200)
    bias[:, :, 150], bias[:, :, :100] = 500.0, -500.0
    out = NATIVE.run(AttentionCall(q, k, v, cu, cu, 1.0, bias=bias))
    torch.testing.assert_close(out, v[150].expand(200, 1, 16))
    bias[:, :, :150], bias[:, :, 151:] = -torch.inf, -torch.inf  # more than one block of keys
    out = NATIVE.run(AttentionCall(q, k, v, cu, cu, 1.0, bias=bias))
    torch.testing.assert_close(out, v[150].expand(200, 1, 16))


@settings(max_examples=10)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3),
    larger=st.integers(0, 3),
)
@pytest.mark.usefixtures("instruction_set")
def test_a_relative_bias_is_that_of_the_distances(lengths: list[tuple[int, int]], larger: int) -> None:
    """To the bit."""
    cu_q, cu_k = (CuSeqlens.from_lengths(part) for part in zip(*lengths, strict=True))
    size = max(cu_q.max_length, cu_k.max_length) + larger
    q, k, v, _ = inputs(len_of(cu_q), len_of(cu_k), 3, 16, torch.float32)
    relative = torch.randn(3, 2 * size - 1, generator=torch.Generator().manual_seed(1)) * 5
    rows = torch.arange(size)
    bias = relative[:, size - 1 + rows[:, None] - rows]
    expected = attention(q, k, v, cu_q, cu_k, 0.3, bias)
    assert attention(q, k, v, cu_q, cu_k, 0.3, relative=relative).equal(expected)
    if sys.platform == "linux":
        assert attention(q, k, v, cu_q, cu_k, 0.3, relative=guarded(relative)).equal(expected)


def len_of(cu: CuSeqlens) -> int:
    return int(cu.host_offsets[-1])


# --- NaN and infinity ----------------------------------------------------------------------------------------------


NAN_BITS = {torch.float32: [0x7FC00000, 0x7F800001, 0x7FC00001, 0x7FFFFFFF], NARROW: [0x7FC0, 0x7F81, 0x7FC1, 0x7FFF]}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_infinity_stay_in_their_sequence_and_do_not_vanish(dtype: torch.dtype, which: int) -> None:
    """Whatever the bits of the NaN; the other sequences and heads get the same bits as without it."""
    cu = CuSeqlens.from_lengths([20, 150, 30])
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    unusual = torch.tensor([*NAN_BITS[dtype]], dtype=kind).view(dtype)
    unusual = torch.cat((unusual, -unusual, torch.tensor([torch.inf, -torch.inf]).to(dtype)))
    for width in (8, 16, 40):
        tensors = inputs(200, 200, 2, width, dtype)
        clean = differentiate(NATIVE, tensors, cu, 0.25)
        for value in unusual:
            damaged = [x.clone() for x in tensors]
            damaged[which][25, 1, 3] = value
            found = differentiate(NATIVE, damaged, cu, 0.25)
            exact = differentiate(REFERENCE, [x.double() for x in damaged], cu, 0.25)
            for ours, truth, before in zip(found, exact, clean, strict=True):
                elsewhere = torch.ones(200, 2, dtype=torch.bool)
                elsewhere[20:170, 1] = False
                assert ours[elsewhere].equal(before[elsewhere])
                assert not ours[~elsewhere].isfinite()[~truth[~elsewhere].isfinite()].any()
            assert found[0].isfinite().equal(exact[0].isfinite())


# --- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("width", [8, 24, 64])
def test_bits_depend_on_nothing_else(dtype: torch.dtype, width: int) -> None:
    """The same bits in every run, with any number of threads and in any pack; the work is split differently."""
    lengths = [700, 40, 300, 1, 33]
    cu = CuSeqlens.from_lengths(lengths)
    tensors = inputs(sum(lengths), sum(lengths), 2, width, dtype)
    expected = differentiate(NATIVE, tensors, cu, 0.2)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for values, first in zip(differentiate(NATIVE, tensors, cu, 0.2), expected, strict=True):
            assert values.equal(first)
        for start, end in cu.spans():
            alone = differentiate(NATIVE, [x[start:end] for x in tensors], CuSeqlens.from_lengths([end - start]), 0.2)
            for values, first in zip(alone, expected, strict=True):
                assert values.equal(first[start:end])
    plain = NATIVE.run(AttentionCall(*tensors[:3], cu, cu, 0.2))
    assert plain.equal(expected[0]), "without gradients"


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("width", [8, 24, 64])
def test_some_queries_have_the_bits_of_all(dtype: torch.dtype, width: int) -> None:
    """Whatever other queries there are; the keys of a sequence without queries have gradients of 0."""
    lengths = [700, 40, 300, 1, 33]
    total, cu = sum(lengths), CuSeqlens.from_lengths(lengths)
    tensors = inputs(total, total, 2, width, dtype)
    whole = NATIVE.run(AttentionCall(*tensors[:3], cu, cu, 0.2))
    draw = np.random.default_rng(1)
    for count, threads in ((1, 1), (5, 2), (60, 1), (600, 3), (total, 2)):
        torch.set_num_threads(threads)
        chosen = draw.choice(total, count, replace=False)
        rows = PackedRows.of(np.sort(chosen[(chosen < 700) | (chosen >= 740)]), cu)
        index = rows.index
        out, dq, dk, dv = differentiate(
            NATIVE, [tensors[0][index], *tensors[1:3], tensors[3][index]], rows.cu_seqlens, 0.2, cu
        )
        assert out.equal(whole[index])
        assert not dk[700:740].any()
        assert not dv[700:740].any()
        torch.set_num_threads(1)
        again = differentiate(NATIVE, [tensors[0][index], *tensors[1:3], tensors[3][index]], rows.cu_seqlens, 0.2, cu)
        assert again[1].equal(dq)
        assert again[2].equal(dk)


def test_strided_tensors(dtype: torch.dtype) -> None:
    """Queries, keys and values may be parts of one tensor, or have heads or widths that lie apart."""
    cu = CuSeqlens.from_lengths([9, 30])
    tensors = inputs(39, 39, 2, 16, dtype)
    expected = differentiate(NATIVE, tensors, cu, 1.0)
    together = torch.stack(tensors, dim=1)
    ways: list[list[Tensor]] = [
        list(together.unbind(1)),
        [torch.cat((x, x), dim=1)[:, 2:] for x in tensors],
        [torch.cat((x, x), dim=2)[:, :, 16:] for x in tensors],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors],
        [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in tensors],
    ]
    for strided in ways:
        for values, first in zip(differentiate(NATIVE, strided, cu, 1.0), expected, strict=True):
            assert values.equal(first)
    repeated = tensors[1][:1].expand(39, 2, 16)
    results = (
        NATIVE.run(AttentionCall(tensors[0], x, tensors[2], cu, cu, 1.0)) for x in (repeated, repeated.contiguous())
    )
    assert next(results).equal(next(results))


@needs_guards
@pytest.mark.parametrize("width", [8, 16, 24, 56, 248])
def test_no_memory_behind_the_tensors_is_read(dtype: torch.dtype, width: int) -> None:
    for lengths in ([1], [37], [16, 131]):
        cu = CuSeqlens.from_lengths(lengths)
        tensors = inputs(sum(lengths), sum(lengths), 2, width, dtype)
        expected = differentiate(NATIVE, tensors, cu, 0.2)
        for values, first in zip(differentiate(NATIVE, [guarded(x) for x in tensors], cu, 0.2), expected, strict=True):
            assert values.equal(first)
        if dtype == torch.float32:
            bias = torch.randn(2, max(lengths), max(lengths))
            call = AttentionCall(*tensors[:3], cu, cu, 0.2, bias=bias)
            assert NATIVE.run(replace(call, bias=guarded(bias))).equal(NATIVE.run(call))


# --- in models -----------------------------------------------------------------------------------------------------


def test_a_whole_model(load_small: LoadModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all parameters are as close to float64 as with PyTorch's attention."""
    frame = ESM.frame
    batch = pack([frame.around(np.arange(4, 24, dtype=np.uint8)), frame.around(np.arange(5, 12, dtype=np.uint8))])
    name, always = str(dtype).removeprefix("torch."), list(kernels.KERNELS)
    without = [kernel for kernel in always if kernel is not NATIVE]
    results = []
    for precision, chosen in ((name, always), (name, without), ("float64", without)):
        model = load_small("esm2", dtype=precision).module.requires_grad_(True)
        monkeypatch.setattr(kernels, "KERNELS", chosen)
        model(batch).double().square().mean().backward()
        results.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
    ours, theirs, truth = results
    assert not ours.equal(theirs)
    assert (ours - truth).norm() <= 1.2 * (theirs - truth).norm() + 2 * UNITS[torch.float32] * truth.norm()


def test_recomputed_by_checkpointing(dtype: torch.dtype) -> None:
    cu = CuSeqlens.from_lengths([9, 30])
    tensors = inputs(39, 39, 2, 16, dtype)
    expected = differentiate(NATIVE, tensors, cu, 1.0)
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = checkpoint(lambda *qkv: attend(AttentionCall(*qkv, cu, cu)), q, k, v, use_reentrant=False)
    assert isinstance(out, Tensor)
    for values, first in zip((out, *torch.autograd.grad(out, (q, k, v), tensors[3])), expected, strict=True):
        assert values.equal(first)


def test_the_kernel_is_chosen_for_what_it_supports(dtype: torch.dtype) -> None:
    cu = CuSeqlens.from_lengths([4])

    def call(width: int = 16, requires_grad: bool = False, kind: torch.dtype = dtype) -> AttentionCall:
        q, k, v = (torch.zeros(4, 2, width, dtype=kind, requires_grad=requires_grad) for _ in range(3))
        return AttentionCall(q, k, v, cu, cu)

    bias = torch.zeros(2, 4, 4)
    for width in (8, 16, 256):
        assert pick_kernel(call(width)) is NATIVE
    assert pick_kernel(call(requires_grad=True)) is NATIVE
    assert pick_kernel(replace(call(), bias=bias)) is (NATIVE if dtype == torch.float32 else SDPA)
    assert pick_kernel(replace(call(requires_grad=True), bias=bias)) is SDPA
    assert pick_kernel(replace(call(), bias=bias.clone().requires_grad_())) is SDPA
    with torch.no_grad():
        assert pick_kernel(replace(call(requires_grad=True), bias=bias)) is pick_kernel(replace(call(), bias=bias))
    for other in (replace(call(), dropout=0.1), call(12), call(4), call(264), call(kind=torch.float64)):
        assert pick_kernel(other) is SDPA


@pytest.mark.usefixtures("instruction_set")
def test_a_type_that_the_instruction_set_lacks_goes_to_pytorch() -> None:
    q = torch.zeros(4, 2, 16, dtype=NARROW)
    cu = CuSeqlens.from_lengths([4])
    assert pick_kernel(AttentionCall(q, q, q, cu, cu)) is (NATIVE if supports(NARROW) else SDPA)


# --- refusals ------------------------------------------------------------------------------------------------------


def boundaries(*offsets: int, dtype: torch.dtype = torch.int32) -> CuSeqlens:
    host = torch.tensor(offsets, dtype=dtype)
    return CuSeqlens(host, host, 5)


def changed(**arguments: object) -> Callable[[], Tensor]:
    """A call whose arguments fit, except those given."""
    x, cu = torch.zeros(5, 2, 16), boundaries(0, 3, 5)
    fitting: dict[str, Any] = {"q": x, "k": x, "v": x, "cu_q": cu, "cu_k": cu, "scale": 1.0}
    fitting["bias"] = torch.zeros(2, 5, 5)
    return lambda: attention(**fitting | arguments)


def shaped(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name in "qkv"}


WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "float64": (TypeError, shaped(5, 2, 16, dtype=torch.float64)),
    "float16": (TypeError, shaped(5, 2, 16, dtype=torch.float16)),
    "mixed types": (TypeError, {"k": torch.zeros(5, 2, 16, dtype=NARROW)}),
    "bias in bfloat16": (TypeError, shaped(5, 2, 16, dtype=NARROW)),
    "device": (TypeError, shaped(5, 2, 16, device="meta")),
    "device of values": (TypeError, {"v": torch.zeros(5, 2, 16, device="meta")}),
    "device of bias": (TypeError, {"bias": torch.zeros(2, 5, 5, device="meta")}),
    "head width": (ValueError, shaped(5, 2, 12)),
    "wide heads": (ValueError, shaped(5, 2, 264)),
    "two dimensions": (ValueError, shaped(5, 16)),
    "four dimensions": (ValueError, shaped(5, 2, 16, 1)),
    "fewer heads": (ValueError, {"k": torch.zeros(5, 1, 16), "v": torch.zeros(5, 1, 16)}),
    "fewer values": (ValueError, {"v": torch.zeros(4, 2, 16)}),
    "fewer tokens": (ValueError, shaped(4, 2, 16)),
    "more tokens": (ValueError, shaped(6, 2, 16)),
    "first boundary": (ValueError, {"cu_q": boundaries(1, 3, 5)}),
    "falling boundaries": (ValueError, {"cu_k": boundaries(0, 7, 5)}),
    "empty sequence": (ValueError, {"cu_k": boundaries(0, 5, 5)}),
    "no keys": (ValueError, {"cu_q": boundaries(0, 5, 5), "cu_k": boundaries(0, 5, 5)}),
    "numbers of sequences": (ValueError, {"cu_q": boundaries(0, 5)}),
    "no sequence": (ValueError, {"cu_q": boundaries(0), "cu_k": boundaries(0)} | shaped(0, 2, 16)),
    "boundaries in int64": (TypeError, {"cu_q": boundaries(0, 3, 5, dtype=torch.int64)}),
    "heads of bias": (ValueError, {"bias": torch.zeros(1, 5, 5)}),
    "rows of bias": (ValueError, {"bias": torch.zeros(2, 2, 5)}),
    "columns of bias": (ValueError, {"bias": torch.zeros(2, 5, 2)}),
    "dimensions of bias": (ValueError, {"bias": torch.zeros(5, 5)}),
    "two biases": (TypeError, {"relative": torch.zeros(2, 9)}),
    "columns of relative bias": (ValueError, {"bias": None, "relative": torch.zeros(2, 3)}),
    "even relative bias": (ValueError, {"bias": None, "relative": torch.zeros(2, 10)}),
    "heads of relative bias": (ValueError, {"bias": None, "relative": torch.zeros(1, 9)}),
    "dimensions of relative bias": (ValueError, {"bias": None, "relative": torch.zeros(2, 9, 9)}),
    "gradients of relative bias": (ValueError, {"bias": None, "relative": torch.zeros(2, 9, requires_grad=True)}),
    "gradients with bias": (ValueError, {"q": torch.zeros(5, 2, 16, requires_grad=True)}),
    "gradients of bias": (ValueError, {"bias": torch.zeros(2, 5, 5, requires_grad=True)}),
}


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("kind", "arguments"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_refused(kind: type[Exception], arguments: dict[str, Any]) -> None:
    changed()()
    with pytest.raises(kind):
        changed(**arguments)()


@pytest.mark.usefixtures("instruction_set")
def test_bfloat16_without_its_instructions_is_refused() -> None:
    if supports(NARROW):
        pytest.skip("this instruction set has bfloat16")
    with pytest.raises(TypeError):
        changed(**shaped(5, 2, 16, dtype=NARROW), bias=None)()


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from protea.native import library
from protea.native.packed_attention import attention
from protea.packing import CuSeqlens

assert library().protea_use(sys.argv[1].encode()) == 0
dtype = getattr(torch, sys.argv[2])
keys = 300_000
k = torch.zeros(1, 1, 256, dtype=dtype).expand(keys, 1, 256)
q = torch.zeros(1, 1, 256, dtype=dtype)
one, many = CuSeqlens.from_lengths([1]), CuSeqlens.from_lengths([keys])
attention(q, k[:5], k[:5], one, CuSeqlens.from_lengths([5]), 1.0)
used = 1024 * int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmSize" in x).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        attention(q, k, k, one, many, 1.0)
    except MemoryError as error:
        print(error)
print(float(attention(q, k[:5], k[:5], one, CuSeqlens.from_lengths([5]), 1.0).sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited through Linux")
def test_out_of_memory(instruction_set: str, dtype: torch.dtype) -> None:
    """An error, twice; later calls work."""
    command = [sys.executable, "-c", OUT_OF_MEMORY, instruction_set, str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = "the native library ran out of memory"
    assert done.stdout.splitlines() == [message, message, "0.0"], done.stderr


NO_SECOND_OPENMP = """
import torch
from protea.models.attention import NATIVE, AttentionCall, attend, pick_kernel
from protea.packing import CuSeqlens

torch.set_num_threads(2)
q = torch.zeros(600, 2, 8, requires_grad=True)
cu = CuSeqlens.from_lengths([600])
call = AttentionCall(q, q, q, cu, cu)
assert pick_kernel(call) is NATIVE
attend(call).sum().backward()
paths = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
print(len({path for path in paths if any(name in path for name in ("libgomp", "libomp", "libiomp"))}))
import sys
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists the libraries of a process")
@pytest.mark.usefixtures("instruction_set")
def test_no_second_openmp() -> None:
    """Threads of two OpenMP runtimes would compete. Tested in a process without other libraries."""
    done = subprocess.run([sys.executable, "-c", NO_SECOND_OPENMP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


THREADS = """
import threading, torch
from protea.native.packed_attention import attention
from protea.packing import CuSeqlens

cu_q, cu_k = CuSeqlens.from_lengths([1]), CuSeqlens.from_lengths([4000])
q, k = torch.randn(1, 1, 256), torch.randn(4000, 1, 256)
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4 >> 10
def work():
    attention(q, k, k, cu_q, cu_k, 1.0)
def run(times):
    for _ in range(times):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
run(5)
before = memory()
run(40)
print(memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_that_end_give_back_their_memory() -> None:
    """Each takes 8 MB."""
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert int(done.stdout) < 100
