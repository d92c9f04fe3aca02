"""Every kernel compared with the definition, and the choice between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protea.models.attention import KERNELS, NATIVE, SDPA, VARLEN, AttentionCall, Kernel, attend, pick_kernel
from protea.native.products import supports
from protea.packing import CuSeqlens, PackedRows
from reference_attention import REFERENCE

HEADS = 3


def definition(q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> Tensor:
    """One sequence, one head and one query at a time, in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for (q0, q1), (k0, k1) in zip(cu_q.spans(), cu_k.spans(), strict=True):
        for head in range(q.shape[1]):
            keys, values = k[k0:k1, head].double(), v[k0:k1, head].double()
            for row in range(q0, q1):
                weights = torch.exp(scale * (keys @ q[row, head].double()))
                out[row, head] = (weights / weights.sum()) @ values
    return out


def random_qkv(
    lengths_q: list[int], lengths_k: list[int], width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    totals = (sum(lengths_q), sum(lengths_k), sum(lengths_k))
    q, k, v = (torch.empty(total, HEADS, width).normal_(generator=generator).to(dtype) for total in totals)
    return q, k, v


CPU_KERNELS = [(SDPA, torch.float32, 1e-5), (SDPA, torch.bfloat16, 2e-2)]
if supports(torch.float32):
    CPU_KERNELS.append((NATIVE, torch.float32, 1e-5))
if supports(torch.bfloat16):
    CPU_KERNELS.append((NATIVE, torch.bfloat16, 2e-2))
CPU_KERNELS += [(REFERENCE, torch.float32, 1e-5), (REFERENCE, torch.float64, 1e-12), (SDPA, torch.float16, 3e-3)]


@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"), CPU_KERNELS, ids=lambda value: getattr(value, "name", str(value))
)
@settings(deadline=None, max_examples=8)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 50, 51, 64]), min_size=1, max_size=8),
    width=st.sampled_from([8, 16, 24, 64]),
)
def test_kernel_equals_the_definition(
    kernel: Kernel, dtype: torch.dtype, tolerance: float, lengths: list[int], width: int
) -> None:
    """Any lengths: different and repeated."""
    q, k, v = random_qkv(lengths, lengths, width, dtype)
    cu = CuSeqlens.from_lengths(lengths)
    scale = width**-0.5
    with torch.no_grad():
        out = kernel.run(AttentionCall(q, k, v, cu, cu, scale))
    assert out.dtype == dtype
    expected = definition(q, k, v, cu, cu, scale)
    assert (out.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("kernel", [SDPA, REFERENCE], ids=lambda kernel: kernel.name)
def test_queries_and_keys_of_different_lengths(kernel: Kernel) -> None:
    lengths_q, lengths_k = [3, 3, 60], [5, 5, 70]
    q, k, v = random_qkv(lengths_q, lengths_k, 16, torch.bfloat16)
    cu_q, cu_k = CuSeqlens.from_lengths(lengths_q), CuSeqlens.from_lengths(lengths_k)
    out = kernel.run(AttentionCall(q, k, v, cu_q, cu_k, 0.25))
    assert (out.double() - definition(q, k, v, cu_q, cu_k, 0.25)).abs().max() < 2e-2


@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"), CPU_KERNELS, ids=lambda value: getattr(value, "name", str(value))
)
@settings(max_examples=8)
@given(
    lengths=st.lists(
        st.tuples(st.sampled_from([0, 0, 1, 3, 33]), st.sampled_from([1, 7, 50])), min_size=1, max_size=6
    ).filter(lambda lengths: any(queries for queries, _ in lengths))
)
def test_sequences_without_queries(
    kernel: Kernel, dtype: torch.dtype, tolerance: float, lengths: list[tuple[int, int]]
) -> None:
    """They have no output, and their keys and values no gradient."""
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    q, k, v = (x.requires_grad_() for x in random_qkv(lengths_q, lengths_k, 16, dtype))
    cu_q, cu_k = CuSeqlens.from_offsets(np.cumsum([0, *lengths_q])), CuSeqlens.from_lengths(lengths_k)
    call = AttentionCall(q, k, v, cu_q, cu_k, 0.25)
    out = kernel.run(call)
    assert (out.double() - definition(q, k, v, cu_q, cu_k, 0.25)).abs().max() <= tolerance * 4
    gradients = torch.autograd.grad(out.double().square().sum(), (q, k, v))
    exact = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    truth = REFERENCE.run(AttentionCall(*exact, cu_q, cu_k, 0.25))
    for found, expected in zip(gradients, torch.autograd.grad(truth.square().sum(), exact), strict=True):
        assert (found - expected).abs().max() <= 10 * tolerance * max(1.0, expected.abs().max().item())
    for (start, end), queries in zip(cu_k.spans(), lengths_q, strict=True):
        assert queries or not any(gradient[start:end].any() for gradient in gradients[1:])


@pytest.mark.parametrize("added", ["nothing", "bias", "relative"])
def test_some_queries_are_those_of_all(added: str) -> None:
    lengths = [5, 1, 30, 5]
    q, k, v = random_qkv(lengths, lengths, 16, torch.float32)
    cu = CuSeqlens.from_lengths(lengths)
    generator = torch.Generator().manual_seed(1)
    shape = {"nothing": {}, "bias": {"bias": (HEADS, 30, 30)}, "relative": {"relative": (HEADS, 59)}}[added]
    call = AttentionCall(q, k, v, cu, cu, 0.25, **{n: torch.randn(s, generator=generator) for n, s in shape.items()})
    rows = PackedRows.of(np.array([4, 2, 6, 35, 40]), cu)
    torch.testing.assert_close(attend(call, rows), attend(call)[rows.index], rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 50, 51]), min_size=1, max_size=5),
    longer=st.integers(0, 3),
    both=st.booleans(),
)
def test_scores_by_distance_are_a_bias(lengths: list[int], longer: int, both: bool) -> None:
    """What is added by distance gives the numbers of the same matrix, in outputs, maps and gradients."""
    q, k, v = random_qkv(lengths, lengths, 16, torch.float32)
    cu, most = CuSeqlens.from_lengths(lengths), max(lengths) + longer
    generator = torch.Generator().manual_seed(1)
    relative = torch.randn(HEADS, 2 * most - 1, generator=generator, requires_grad=True)
    bias = torch.randn(HEADS, most, most, generator=generator) if both else None
    places = torch.arange(most)
    matrix = relative[:, most - 1 + places[:, None] - places]
    outputs = []
    for call in (
        AttentionCall(q, k, v, cu, cu, 0.25, bias=bias, relative=relative),
        AttentionCall(q, k, v, cu, cu, 0.25, bias=matrix if bias is None else matrix + bias),
    ):
        assert pick_kernel(call) is SDPA
        out = SDPA.run(call)
        maps = [torch.stack(list(call.maps(number))) for number in range(len(lengths))]
        (gradient,) = torch.autograd.grad(out.square().sum(), relative, retain_graph=True)
        outputs.append((out, *maps, gradient))
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        fast = SDPA.run(AttentionCall(q, k, v, cu, cu, 0.25, bias=bias, relative=relative.detach()))
    torch.testing.assert_close(fast, outputs[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_what_attention_weighs_by(dtype: torch.dtype) -> None:
    lengths = [4, 9]
    q, k, v = random_qkv(lengths, lengths, 8, dtype)
    cu = CuSeqlens.from_lengths(lengths)
    call = AttentionCall(q, k, v, cu, cu)
    out = REFERENCE.run(AttentionCall(q.float(), k.float(), v.float(), cu, cu, 1.0))
    maps = [torch.stack(list(call.maps(sequence))) for sequence in range(2)]
    assert [tuple(probs.shape) for probs in maps] == [(HEADS, 4, 4), (HEADS, 9, 9)]
    for number, ((start, end), probs) in enumerate(zip(cu.spans(), maps, strict=True)):
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:2]))
        torch.testing.assert_close(out[start:end], torch.einsum("hqk,khd->qhd", probs, v[start:end].float()))
        assert torch.equal(call.maps(number)[2], probs[2])


@pytest.mark.parametrize("kernel", [SDPA, REFERENCE], ids=lambda kernel: kernel.name)
def test_bias_is_added_to_every_sequence(kernel: Kernel) -> None:
    lengths = [3, 6]
    q, k, v = random_qkv(lengths, lengths, 8, torch.float32)
    cu = CuSeqlens.from_lengths(lengths)
    bias = torch.randn(HEADS, 7, 7)
    out = kernel.run(AttentionCall(q, k, v, cu, cu, 0.5, bias))
    for start, end in cu.spans():
        size = end - start
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * 0.5 + bias[:, :size, :size]
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end])
        torch.testing.assert_close(out[start:end], expected)


@pytest.mark.parametrize("kernel", [SDPA, REFERENCE], ids=lambda kernel: kernel.name)
def test_dropout_drops_and_rescales(kernel: Kernel) -> None:
    """With values of 1, every output is the sum of the kept and rescaled probabilities, which is 1 on average."""
    torch.manual_seed(0)
    q, k, _ = random_qkv([400], [400], 8, torch.float32)
    cu = CuSeqlens.from_lengths([400])
    out = kernel.run(AttentionCall(q, k, torch.ones_like(k), cu, cu, 0.1, dropout=0.3))
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1) < 0.01


@pytest.mark.parametrize("kernel", [SDPA, REFERENCE], ids=lambda kernel: kernel.name)
def test_gradients_equal_the_definitions(kernel: Kernel) -> None:
    lengths = [2, 5, 5]
    tensors = [x.double().requires_grad_() for x in random_qkv(lengths, lengths, 8, torch.float32)]
    cu = CuSeqlens.from_lengths(lengths)
    assert torch.autograd.gradcheck(
        lambda q, k, v: kernel.run(AttentionCall(q, k, v, cu, cu, 0.4)), tuple(tensors), fast_mode=True
    )


def test_training_in_bfloat16_without_the_native_library() -> None:
    """The kernel computes in float32, so the error is that of one rounding to bfloat16."""
    lengths = [2, 5, 5, 40]
    cu = CuSeqlens.from_lengths(lengths)
    results: list[tuple[Tensor, ...]] = []
    for kernel, dtype in ((SDPA, torch.bfloat16), (REFERENCE, torch.float64)):
        q, k, v = (x.to(dtype).requires_grad_() for x in random_qkv(lengths, lengths, 8, torch.bfloat16))
        out = kernel.run(AttentionCall(q, k, v, cu, cu, 0.4))
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out.double().square().sum(), (q, k, v))))
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).norm() <= 2**-8 * truth.norm()


def test_autocast_leaves_the_wider_type_of_training_alone() -> None:
    lengths = [2, 5, 5, 40]
    cu = CuSeqlens.from_lengths(lengths)
    results: list[tuple[Tensor, ...]] = []
    for autocast in (False, True):
        q, k, v = (x.requires_grad_() for x in random_qkv(lengths, lengths, 8, torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = SDPA.run(AttentionCall(q, k, v, cu, cu, 0.4))
        results.append((out, *torch.autograd.grad(out.double().square().sum(), (q, k, v))))
    assert all(torch.equal(plain, autocast) for plain, autocast in zip(*results, strict=True))


def test_the_last_kernel_takes_everything() -> None:
    last = KERNELS[-1]
    assert last.device is last.dtypes is last.head_widths is None
    assert last.bias
    assert last.dropout
    assert last.gradients


def zeros(dtype: torch.dtype, *, bias: bool = False, dropout: float = 0.0) -> AttentionCall:
    q = torch.zeros(4, HEADS, 16, dtype=dtype)
    cu = CuSeqlens.from_lengths([4])
    return AttentionCall(q, q, q, cu, cu, bias=torch.zeros(HEADS, 4, 4) if bias else None, dropout=dropout)


@pytest.mark.parametrize(
    "call",
    [
        zeros(torch.float16),
        zeros(torch.float64),
        zeros(torch.bfloat16, dropout=0.1),
        zeros(torch.bfloat16, bias=True),
    ],
)
def test_what_only_pytorch_supports(call: AttentionCall) -> None:
    assert pick_kernel(call) is SDPA


@pytest.mark.parametrize("call", [zeros(torch.float32), zeros(torch.bfloat16), zeros(torch.float32, bias=True)])
def test_the_native_kernel_is_preferred(call: AttentionCall) -> None:
    assert pick_kernel(call) is (NATIVE if supports(call.q.dtype) else SDPA)


def test_everything_works_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protea.models.attention.supports", lambda dtype: False)
    for dtype in (torch.float32, torch.bfloat16):
        assert pick_kernel(zeros(dtype)) is SDPA


def test_varlen_declares_its_limits() -> None:
    """Only CUDA, half precision, no bias or dropout; tested without a GPU."""
    assert not VARLEN.supports(zeros(torch.bfloat16))
    assert VARLEN.device == "cuda"
    assert VARLEN.dtypes == {torch.float16, torch.bfloat16}
    assert not any((VARLEN.bias, VARLEN.dropout))
