"""The native library's linear layers, for every instruction set of this processor, beside float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from guarded import guarded, needs_guards
from protea.native.products import GROUP, Packed, Turn, Unpacked, linear, supports

NARROW = torch.bfloat16


@pytest.fixture(scope="module", params=[torch.float32, NARROW, torch.int8], ids=str)
def dtype(request: pytest.FixtureRequest, instruction_set: str) -> torch.dtype:
    """A type that the instruction set multiplies."""
    if not supports(request.param):
        pytest.skip(f"{instruction_set} does not multiply {request.param}")
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module")
def in_bytes(instruction_set: str) -> None:
    """An instruction set that multiplies int8."""
    if not supports(torch.int8):
        pytest.skip(f"{instruction_set} does not multiply int8")


def rounding_of_bytes(x: Tensor, weight: Tensor) -> Tensor:
    """The largest error, ``[T, N]``, of a product of inputs that are rounded to bytes."""
    error = torch.zeros(len(x), len(weight)).double()
    for part, weights in zip(x.split(GROUP, dim=1), weight.abs().double().split(GROUP, dim=1), strict=True):
        group = F.pad(part, (0, GROUP - part.shape[1]))  # what a group lacks is 0
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        scale = torch.maximum((high - low) / 255, torch.maximum(high, -low) / 32000)
        error += 0.51 * scale * weights.sum(1)
    return error


@dataclass
class Case:
    """The arguments of one call, and its result in float64."""

    dtype: torch.dtype
    x: Tensor
    weight: Tensor
    bias: Tensor
    norm: nn.LayerNorm | nn.RMSNorm | None = None
    angles: Tensor | None = None
    turned: int = 0
    activation: str | None = None
    residual: Tensor | None = None
    narrow: bool = False

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        x_dtype: torch.dtype = torch.float32,
        norm: str | None = None,
        head_width: int = 0,
        turned: int = 0,
        activation: str | None = None,
        residual: bool = False,
        narrow: bool = False,
        seed: int = 0,
    ) -> Case:
        """Rows, inputs and outputs; ``norm`` is ``bias`` or ``no bias`` or ``no mean``."""
        rows, inputs, outputs = shape
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.empty(sizes).normal_(generator=generator)

        stored = torch.float32 if dtype == torch.int8 else dtype
        x, weight = normal(rows, inputs).to(x_dtype), normal(outputs, inputs).to(stored)
        case = cls(dtype, x, weight, normal(outputs))
        case.weight = case.weight / inputs**0.5
        if norm is not None:
            kinds = {"bias": nn.LayerNorm(inputs), "no bias": nn.LayerNorm(inputs, bias=False)}
            case.norm = kinds.get(norm, nn.RMSNorm(inputs, eps=1e-6)).requires_grad_(False)
            for parameter in case.norm.parameters():
                parameter.copy_(normal(inputs))
            case.x = case.x * 3 + 5
        if head_width:
            case.angles, case.turned = normal(rows, 1, head_width // 2) * 10, turned
        case.activation, case.narrow = activation, narrow
        case.residual = normal(rows, outputs) if residual else None
        return case

    def run(self, rows: slice = slice(None), where: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """The library's result for some rows; ``where`` moves each tensor in memory."""
        turn = None if self.angles is None else Turn.of(self.angles[rows].cos(), self.angles[rows].sin())
        if turn is not None:
            turn = Turn(where(turn.cosine), where(turn.sine), turn.head_width)
        norm = None if self.norm is None else copy.copy(self.norm)
        if norm is not None:
            moved = {name: where(value) for name, value in norm.named_parameters()}
            norm._parameters = norm._parameters | moved  # type: ignore[operator]
        packed = Packed.of(where(self.weight), self.dtype)
        return linear(
            where(self.x[rows]),
            Packed(where(packed.data), packed.shape, packed.dtype),
            where(self.bias),
            norm=norm,
            turn=turn,
            turned=self.turned,
            activation=self.activation,
            residual=None if self.residual is None else where(self.residual[rows]),
            narrow=self.narrow,
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        """The result in float64 of inputs as the library rounds them, and an error that rounding may make."""
        dtype, in_bytes = self.weight.dtype, self.dtype == torch.int8
        x, lost = self.x.double(), torch.zeros(len(self.x), self.x.shape[1]).double()
        if self.norm is not None:
            # What float32 loses of inputs that lie far from 0 and near one another.
            spread = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True) + self.norm.eps
            lost = 2.0**-22 * x.abs().amax(1, keepdim=True) / spread.sqrt() * self.norm.weight.abs()
            norm = copy.deepcopy(self.norm).double()
            x = norm(x)
        # A number in float32 may lie on the other side of the middle between two of bfloat16.
        unit = 2.0**-21 if dtype == torch.float32 or self.norm is None else 2.0**-8
        x = x.to(dtype).double()
        weight = Packed.of(self.weight, self.dtype).unpacked().double()
        y, size = x @ weight.T + self.bias, (x.abs() + lost / unit) @ weight.abs().T + self.bias.abs()
        if in_bytes:
            size = size + rounding_of_bytes(x, weight) / unit
        if self.angles is not None:
            width = 2 * self.angles.shape[-1]
            pairs = torch.arange(self.turned // 2) % (width // 2)
            turns = torch.polar(torch.ones(()).double(), self.angles[:, 0, pairs].double())
            pair = torch.view_as_complex(y[:, : self.turned].unflatten(1, (-1, 2)).contiguous())
            y = torch.cat((torch.view_as_real(pair * turns).flatten(1), y[:, self.turned :]), dim=1)
            sizes = size[:, : self.turned].unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, dim=1)
            size = torch.cat((sizes, size[:, self.turned :]), dim=1)
        if self.activation is not None:
            ways = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
            y, size = ways[self.activation](y), 1.2 * size + 0.5
        if self.residual is not None:
            y, size = y + self.residual, size + self.residual.abs()
        error = unit * (size + 1e-3)
        return y, error + 2.0**-8 * y.abs() if self.narrow and self.dtype != torch.float32 else error

    def check(self) -> None:
        y = self.run()
        exact, error = self.exact()
        assert y.dtype == (NARROW if self.narrow and self.dtype != torch.float32 else torch.float32)
        assert y.shape == exact.shape
        assert ((y - exact).abs() <= error).all()


@settings(max_examples=40)
@given(
    rows=st.integers(0, 60),
    inputs=st.one_of(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1279, 1300, 2600, 5120])),
    outputs=st.integers(1, 70),
    norm=st.sampled_from([None, "bias", "no bias", "no mean"]),
    head_width=st.sampled_from([0, 2, 4, 6, 10, 16, 20, 30, 48, 64]),
    activation=st.sampled_from([None, "gelu", "gelu_tanh", "relu"]),
    residual=st.booleans(),
    narrow=st.booleans(),
    narrow_x=st.booleans(),
    seed=st.integers(0, 3),
)
@example(12, 1281, 33, None, 0, None, False, False, False, 0)
@example(1, 1, 1, "bias", 0, "gelu", True, True, False, 0)
def test_any_shape(
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    norm: str | None,
    head_width: int,
    activation: str | None,
    residual: bool,
    narrow: bool,
    narrow_x: bool,
    seed: int,
) -> None:
    turned = outputs // max(head_width, 1) * head_width
    Case.random(
        (rows, inputs, outputs),
        dtype,
        x_dtype=NARROW if narrow_x else torch.float32,
        norm=norm,
        head_width=head_width,
        turned=turned,
        activation=activation,
        residual=residual,
        narrow=narrow,
        seed=seed,
    ).check()


@pytest.mark.parametrize("head_width", [2, 6, 8, 14, 16, 18, 24, 32, 62, 64, 100, 128, 254, 256])
def test_rotation_of_every_head_width(dtype: torch.dtype, head_width: int) -> None:
    """What is not turned begins anywhere in a vector."""
    for heads, others in ((1, 0), (1, 5), (3, 17)):
        shape = 5, 24, heads * head_width + others
        Case.random(shape, dtype, head_width=head_width, turned=heads * head_width).check()


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("inputs", [320, 1280, 2601])
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype, inputs: int) -> None:
    """Its bits depend neither on the rows beside it nor on the threads, nor on where it lies in memory."""
    options: list[dict[str, Any]] = [
        {"norm": "bias", "head_width": 20, "turned": 40},
        {"norm": "no bias", "activation": "gelu"},
        {"activation": "gelu_tanh", "residual": True},
        {"x_dtype": NARROW if dtype == torch.int8 else dtype, "activation": "gelu", "narrow": True},
        {"norm": "no mean", "activation": "relu"},
    ]
    for chosen in options:
        case = Case.random((53, inputs, 75), dtype, **chosen)
        expected = case.run()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert case.run().equal(expected)
            for start, size in ((0, 1), (52, 1), (3, 2), (7, 5), (11, 13), (20, 27), (1, 52)):
                rows = slice(start, start + size)
                assert case.run(rows).equal(expected[rows])
        for beside in (1, 2, 32, 64):
            apart = case.run(where=lambda x, beside=beside: rows_apart(x, beside))  # type: ignore[misc]
            assert apart.equal(expected)


def rows_apart(x: Tensor, beside: int) -> Tensor:
    """The same rows with other items between them."""
    return torch.cat((torch.full((len(x), beside), torch.nan).to(x), x), dim=1)[:, beside:] if x.dim() == 2 else x


def test_a_row_of_nan_stays_alone(dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for options in ({"norm": "bias"}, {"residual": True}):
            case = Case.random((29, 40, 50), dtype, **options)  # type: ignore[arg-type]
            clean = case.run()
            case.x[13, 7] = value
            y = case.run()
            assert not y[13].isfinite().any()
            others = torch.arange(29) != 13
            assert y[others].equal(clean[others])


@needs_guards
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (14, 31, 33), (5, 1301, 50)])
def test_no_memory_behind_the_tensors_is_read(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for x_dtype in (torch.float32, NARROW):
        turned = shape[2] // 2 * 2
        case = Case.random(shape, dtype, x_dtype=x_dtype, norm="bias", head_width=2, turned=turned, residual=True)
        assert case.run(where=guarded).equal(case.run())
        case = Case.random(shape, dtype, x_dtype=x_dtype, activation="gelu", narrow=True)
        assert case.run(where=guarded).equal(case.run())


# --- activations ---------------------------------------------------------------------------------------------------


def activated(x: Tensor, activation: str) -> Tensor:
    """An activation alone: a product with 1."""
    one, zero = Packed.of(torch.ones(1, 1)), torch.zeros(1)
    return linear(x[:, None], one, zero, activation=activation)[:, 0]


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
@pytest.mark.usefixtures("instruction_set")
def test_activations_are_accurate(activation: str, approximate: str) -> None:
    x = torch.linspace(-20, 20, 100_001)
    exact = F.gelu(x.double(), approximate=approximate)
    error = (activated(x, activation) - exact).abs()
    # Large results have large last places.
    assert (error <= 2e-7 * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
@pytest.mark.usefixtures("instruction_set")
def test_activations_of_unusual_numbers(activation: str, approximate: str) -> None:
    bits = torch.tensor([0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x3FFFFF], dtype=torch.int64).to(torch.int32)
    x = torch.cat((torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]), bits.view(torch.float32)))
    sizes = torch.logspace(-45, 38.5, 400)
    for values in (x, sizes, -sizes):
        ours, theirs = activated(values, activation), F.gelu(values.double(), approximate=approximate).float()
        torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=2e-7, equal_nan=True)


@pytest.mark.usefixtures("instruction_set")
def test_relu_is_exact() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -1e-45, 2.5, -2.5])
    torch.testing.assert_close(activated(x, "relu"), F.relu(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("instruction_set")
def test_the_constant_of_a_norm() -> None:
    """``RMSNorm`` has one of its own, where none is given; 0 stays 0."""
    x, eye = torch.full((1, 4), 1e-4), Packed.of(torch.eye(4))
    for eps in (None, 0.0, 1e-8):
        norm = nn.RMSNorm(4, eps=eps)
        torch.testing.assert_close(linear(x, eye, norm=norm), norm(x).detach())


# --- packing ------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(outputs=st.integers(1, 130), inputs=st.integers(1, 130))
def test_every_bit_of_a_weight_comes_back(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    if dtype == torch.int8:
        return
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(kind)
    generator = torch.Generator().manual_seed(outputs * 131 + inputs)
    bits = torch.randint(limits.min, limits.max + 1, (outputs, inputs), generator=generator).to(kind)
    bits.view(-1)[0] = 0x7F800001 if kind == torch.int32 else 0x7F81  # a signalling NaN
    packed = Packed.of(bits.view(dtype))
    back = packed.unpacked()
    assert (back.dtype, packed.dtype, packed.shape) == (dtype, dtype, (outputs, inputs))
    assert back.view(kind).equal(bits)
    assert Packed.of(bits.view(dtype).T.contiguous().T).unpacked().view(kind).equal(bits)


@settings(max_examples=30)
@given(outputs=st.integers(1, 70), inputs=st.sampled_from([1, 3, 4, 100, 128, 129, 300]), seed=st.integers(0, 9))
def test_weights_in_int8(in_bytes: None, outputs: int, inputs: int, seed: int) -> None:
    """127 times the scale of a group, a bfloat16, is at least its largest weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator).exp()
    weight[0, : GROUP // 2] = 0
    rounded = Packed.of(weight, torch.int8).unpacked()
    assert rounded.shape == weight.shape
    for part, found in zip(weight.split(GROUP, dim=1), rounded.split(GROUP, dim=1), strict=True):
        least = part.abs().amax(1, keepdim=True) / 127
        scale = (least.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)
        whole = torch.where(scale > 0, found / scale, 0.0)
        assert whole.equal(whole.round())
        assert (whole.abs() <= 127).all()
        assert ((found - part).abs() <= 0.5001 * scale).all()
    assert Packed.of(weight.T.contiguous().T, torch.int8).unpacked().equal(rounded)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    inputs=st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 257, 640, 5119, 5300])),
    outputs=st.integers(1, 70),
    size=st.sampled_from([1.0, 2.0**-40, 2.0**60]),
)
def test_sums_of_bytes_are_exact(in_bytes: None, rows: int, inputs: int, outputs: int, size: float) -> None:
    """Inputs from -127 to 128 times a number lose nothing, so that only float32 rounds."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 129, (rows, inputs), generator=generator).float() * size
    x[:, ::GROUP], x[:, 1::GROUP] = -127 * size, 128 * size
    weight = Packed.of(torch.randn(outputs, inputs, generator=generator), torch.int8)
    exact, magnitude = (f(x.double()) @ f(weight.unpacked().double()).T for f in (Tensor.clone, torch.abs))
    assert ((linear(x, weight) - exact).abs() <= 2.0**-20 * magnitude).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7e5, 3e38, -3e38, 1e-38])
def test_constant_rows_in_int8(in_bytes: None, value: float) -> None:
    x = torch.full((5, 200), value)
    weight = Packed.of(torch.eye(200)[:50], torch.int8)
    y = linear(x, weight)
    assert ((y - x[:, :50] * weight.unpacked().diag()).abs() <= 2e-5 * abs(value) + 1e-30).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_in_int8_that_are_not_finite(in_bytes: None, value: float) -> None:
    weight = torch.randn(40, 300)
    clean = linear(torch.ones(3, 300), Packed.of(weight, torch.int8))
    weight[17, 150] = value
    y = linear(torch.ones(3, 300), Packed.of(weight, torch.int8))
    others = torch.arange(40) != 17
    assert y[:, 17].isnan().all()
    assert y[:, others].equal(clean[:, others])


# --- products of training ------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    rows=st.integers(1, 60),
    inputs=st.one_of(st.integers(1, 70), st.sampled_from([257, 321, 1300])),
    panels=st.integers(1, 3),
    transposed=st.booleans(),
    apart=st.integers(0, 3),
)
@example(1, 1, 1, True, 0)
@example(31, 1, 1, True, 0)
@example(1, 40, 2, True, 3)
@pytest.mark.usefixtures("instruction_set")
def test_tensors_that_are_multiplied_where_they_lie(
    rows: int, inputs: int, panels: int, transposed: bool, apart: int
) -> None:
    """As the gradients of a linear layer are: a weight that is not packed, and inputs that are transposed."""
    generator = torch.Generator().manual_seed(0)
    outputs = panels * 32
    weight = torch.randn(inputs, outputs + apart, generator=generator)[:, :outputs].T
    x = torch.randn(rows, inputs, generator=generator)
    if transposed:
        x = torch.randn(inputs, rows + apart, generator=generator)[:, :rows].T
    columns = Unpacked.of(weight)
    assert isinstance(columns, Unpacked)
    assert columns.shape == (outputs, inputs)
    exact, size = x.double() @ weight.double().T, x.abs().double() @ weight.abs().double().T
    for packed in (columns, Packed.of(weight)):
        assert ((linear(x, packed) - exact).abs() <= 2.0**-21 * size).all()


@pytest.mark.usefixtures("instruction_set", "_threads_as_before")
def test_products_of_training_are_the_same_with_any_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(203, 96, generator=generator), torch.randn(203, 64, generator=generator)
    weight = torch.randn(64, 96, generator=generator)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((linear(dy, Unpacked.of(weight.T)), linear(dy.T, Unpacked.of(x.T))))
    for results in found[1:]:
        assert all(map(torch.equal, results, found[0]))


@needs_guards
@pytest.mark.usefixtures("instruction_set")
def test_no_memory_behind_tensors_that_lie_apart_is_read() -> None:
    for rows in (1, 13, 64):
        x, weight = torch.randn(41, rows), torch.randn(41, 32)
        expected = linear(x.T, Unpacked.of(weight.T))
        assert linear(guarded(x).T, Unpacked.of(guarded(weight).T)).equal(expected)


@pytest.mark.usefixtures("instruction_set")
def test_weights_that_cannot_stay_where_they_are() -> None:
    for weight in (torch.zeros(32, 8), torch.zeros(8, 31).T):
        assert isinstance(Unpacked.of(weight), Packed)
    for wrong in (torch.zeros(8, 32, device="meta").T, torch.zeros(8, 32).double().T):
        with pytest.raises(TypeError):
            Unpacked.of(wrong)
    x = torch.zeros(24, 5).T
    with pytest.raises(ValueError, match="side by side"):
        linear(x, Packed.of(torch.zeros(16, 24)), norm=nn.LayerNorm(24))
    with pytest.raises(ValueError, match="side by side"):
        linear(x.bfloat16(), Packed.of(torch.zeros(16, 24)))


# --- refusals -----------------------------------------------------------------------------------------------------


def changed(**arguments: object) -> Callable[[], Tensor]:
    """A call whose arguments fit, except those given."""
    turn = Turn.of(torch.ones(5, 1, 4), torch.zeros(5, 1, 4))
    fitting: dict[str, Any] = {
        "x": torch.zeros(5, 24),
        "weight": Packed.of(torch.zeros(16, 24)),
        "bias": torch.zeros(16),
    }
    fitting |= {"norm": nn.LayerNorm(24), "turn": turn, "turned": 8, "residual": torch.zeros(5, 16)}
    return lambda: linear(**fitting | arguments)


META = torch.device("meta")
WRONG: list[tuple[type[Exception], dict[str, Any]]] = [
    (TypeError, {"x": torch.zeros(5, 24, dtype=torch.float64)}),
    (TypeError, {"x": torch.zeros(5, 24, dtype=torch.float16)}),
    (TypeError, {"x": torch.zeros(5, 24, device=META)}),
    (ValueError, {"x": torch.zeros(5, 23)}),
    (ValueError, {"x": torch.zeros(24)}),
    (ValueError, {"x": torch.zeros(24, 5).T}),
    (ValueError, {"x": torch.zeros(4, 24)}),
    (TypeError, {"bias": torch.zeros(16, dtype=NARROW)}),
    (ValueError, {"bias": torch.zeros(15)}),
    (ValueError, {"bias": torch.zeros(32)[::2]}),
    (ValueError, {"norm": nn.LayerNorm(23)}),
    (TypeError, {"norm": nn.LayerNorm(24, dtype=torch.float64)}),
    (ValueError, {"norm": nn.LayerNorm(24, elementwise_affine=False)}),
    (ValueError, {"turn": Turn.of(torch.ones(4, 1, 4), torch.zeros(4, 1, 4))}),
    (TypeError, {"turn": Turn.of(torch.ones(5, 1, 4).double(), torch.zeros(5, 1, 4).double())}),
    (ValueError, {"turned": 18}),
    (ValueError, {"turned": 3}),
    (ValueError, {"turned": -2}),
    (ValueError, {"turn": None}),
    (TypeError, {"residual": torch.zeros(5, 16, dtype=NARROW)}),
    (ValueError, {"residual": torch.zeros(5, 15)}),
    (ValueError, {"residual": torch.zeros(1, 16)}),
    (ValueError, {"activation": "silu"}),
    (ValueError, {"norm": nn.RMSNorm(24, elementwise_affine=False)}),
]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("kind", "arguments"), WRONG, ids=[" ".join(wrong) for _, wrong in WRONG])
def test_arguments_that_do_not_fit_are_refused(kind: type[Exception], arguments: dict[str, Any]) -> None:
    changed()()
    with pytest.raises(kind):
        changed(**arguments)()


@pytest.mark.usefixtures("instruction_set")
def test_weights_that_cannot_be_packed_are_refused() -> None:
    for shape in ((0, 4), (4, 0), (4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="weight"):
            Packed.of(torch.zeros(shape))
    others = [torch.zeros(4, 4, dtype=torch.float16), torch.zeros(4, 4, device=META)]
    if not supports(NARROW):
        others.append(torch.zeros(4, 4, dtype=NARROW))
    for weight in others:
        with pytest.raises(TypeError):
            Packed.of(weight)
