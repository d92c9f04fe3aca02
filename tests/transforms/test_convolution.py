"""Convolutions over packed sequences: plain, packed for a CPU, and in training, beside PyTorch's and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from protea import native
from protea.models.convolution import Convolution, ConvolutionContext, reads
from protea.native.products import Packed, linear, supports
from protea.packing import CuSeqlens, PackedBatch
from protea.transforms.cpu import PackedConvolution
from protea.transforms.mixed import PRODUCTS, WideConvolution
from protea.transforms.native_linear import NativeConvolution

PAD = 0
needs_library = pytest.mark.skipif(not supports(torch.float32), reason=f"no native library: {native.reason()}")
cases = given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    width=st.sampled_from([1, 8, 33, 64]),
    kernel=st.sampled_from([1, 3, 5]),
    dilation=st.sampled_from([1, 2, 7, 64]),
    gaps=st.booleans(),
    seed=st.integers(0, 1000),
)


def example(
    lengths: list[int], width: int, kernel: int, dilation: int, gaps: bool, seed: int
) -> tuple[Convolution, Tensor, ConvolutionContext]:
    generator = torch.Generator().manual_seed(seed)
    convolution = Convolution(width, kernel, dilation)
    for parameter in convolution.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    tokens = torch.randint(PAD if gaps else 1, 3, (sum(lengths),), generator=generator)
    batch = PackedBatch(tokens, CuSeqlens.from_lengths(lengths))
    x = torch.randn(len(tokens), width, generator=generator)
    return convolution, x, ConvolutionContext.of(batch, reads(kernel, dilation), PAD)


def pytorchs(convolution: Convolution, x: Tensor, context: ConvolutionContext) -> Tensor:
    """PyTorch's convolution of one sequence after another, in float64."""
    x = (x if context.kept is None else x * context.kept).double()
    weight, bias = convolution.weight.double(), convolution.bias
    assert bias is not None
    padding = (convolution.kernel_size[0] - 1) // 2 * convolution.dilation[0]
    outputs = [
        F.conv1d(x[start:end].T[None], weight, bias.double(), padding=padding, dilation=convolution.dilation)[0].T
        for start, end in context.cu_seqlens.spans()
    ]
    return torch.cat(outputs)


@cases
@settings(max_examples=60, deadline=None)
def test_equals_pytorchs_convolution_of_each_sequence(**case: object) -> None:
    convolution, x, context = example(**case)  # type: ignore[arg-type]
    expected = pytorchs(convolution, x, context)
    torch.testing.assert_close(convolution(x, context).double(), expected, rtol=1e-5, atol=1e-4)


@needs_library
@cases
@settings(max_examples=60, deadline=None)
@torch.inference_mode()
def test_packed(**case: object) -> None:
    convolution, x, context = example(**case)  # type: ignore[arg-type]
    packed = PackedConvolution(convolution)
    found = packed(x, context)
    torch.testing.assert_close(found.double(), pytorchs(convolution, x, context), rtol=1e-5, atol=1e-4)
    assert torch.equal(packed.unpacked("weight"), convolution.weight)
    assert torch.equal(packed.unpacked("bias"), convolution.bias)
    for start, end in context.cu_seqlens.spans():
        kept = None if context.kept is None else context.kept[start:end]
        alone = ConvolutionContext(CuSeqlens.from_lengths([end - start]), kept=kept)
        assert torch.equal(packed(x[start:end], alone), found[start:end])


@needs_library
@cases
@settings(max_examples=40, deadline=None)
def test_gradients_of_the_native_products(**case: object) -> None:
    convolution, x, context = example(**case)  # type: ignore[arg-type]
    gradients = []
    for kind in (Convolution, NativeConvolution):
        convolution.__class__ = kind
        given_x = x.clone().requires_grad_()
        convolution.zero_grad()
        convolution(given_x, context).square().sum().backward()
        gradients.append([given_x.grad, *(parameter.grad.clone() for parameter in convolution.parameters())])
    for plain, natively in zip(*gradients, strict=True):
        scale = float(plain.abs().max()) + 1e-6
        assert float((plain - natively).abs().max()) <= 1e-5 * scale


@cases
@settings(max_examples=30, deadline=None)
@torch.inference_mode()
def test_in_bfloat16_the_sum_is_exact(**case: object) -> None:
    """Inputs and weights are rounded, the sum over the kernel is not."""
    convolution, x, context = example(**case)  # type: ignore[arg-type]
    x = x.to(PRODUCTS).float()
    convolution.to(PRODUCTS)
    expected = pytorchs(convolution, x, context)
    convolution.__class__ = WideConvolution
    found = [convolution(x, context)]
    if supports(PRODUCTS):
        found.append(PackedConvolution(convolution)(x, context))
    for y in found:
        assert y.dtype == torch.float32
    # Each product of a plain one is rounded once, those of the library are not.
    limits = [2**-8 * len(convolution.reads), 1e-5]
    for y, limit in zip(found, limits, strict=False):
        assert float((y.double() - expected).abs().max()) <= limit * (float(expected.abs().max()) + 1) * 4


@needs_library
def test_a_product_into_its_residual() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, y = (torch.randn(shape, generator=generator) for shape in ((7, 24), (40, 24), (9, 40)))
    expected = linear(x, Packed.of(weight), residual=y[1:8])
    before = y.clone()
    linear(x, Packed.of(weight), residual=y[1:8], out=y[1:8])
    assert torch.equal(y[1:8], expected)
    assert torch.equal(y[[0, 8]], before[[0, 8]])
    for wrong in (y[:6], y[1:8].double(), y.T[:7, :9]):
        with pytest.raises((TypeError, ValueError)):
            linear(x, Packed.of(weight), out=wrong)
