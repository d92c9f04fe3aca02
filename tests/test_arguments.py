"""Options of the Python interface, checked against their annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

import protea
from conftest import LoadModel, Run, fails
from messages import check_message
from protea.arguments import check, checked
from protea.data.masking import Masking
from protea.errors import ProteaWarning, UsageError, VariantError

NAMES = {"mean": 0, "max": 1}


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3, 10**30, np.int64(4)], [1.5, True, np.True_, "1", None, np.array(1), 1 + 0j]),
        (float, [0, 1.5, np.float32(2)], [True, "1.5", None, 1j]),
        (bool, [True, False, np.True_], [1, 0, None, "yes"]),
        (str, ["", "a", np.str_("a")], [b"a", None, 3]),
        (Path, ["a", Path("a")], ["a\0b", "\ud800", b"a", 3, None]),
        (int | None, [None, 3], ["None", 1.5]),
        (Literal["a", "b"], ["a", np.str_("b")], ["c", None, ["a"], np.array(["a", "b"])]),
        (Annotated[str, NAMES], ["mean"], ["std", 3, None, ["mean"], {}]),
        (Annotated[int | None, "a number"], [None, 3], ["3"]),
        (
            Annotated[Sequence[int], "numbers"],
            [[], (1, 2), range(3), np.arange(2)],
            [[1.5], [True], 3, "12", b"1", {1}, {1: 2}, iter([1])],
        ),
        (Annotated[Sequence[int], "numbers"], [], [np.array(1), np.ones((2, 2), int), [[1]], None]),
        (Annotated[Collection[str], "names"], [["a"], {"a"}, ()], ["a", [1], None, {"a": 1}]),
        (Masking, [Masking()], ["standard", None, Masking]),
    ],
)
def test_hints(hint: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check("count", value, hint)
    for value in bad:
        with pytest.raises(UsageError, match=r"^count="):
            check("count", value, hint)


def test_only_options_are_checked_and_all_else_stays() -> None:
    @checked
    def double(items: int, *, count: int = 2, kind: Literal["a"] = "a") -> tuple[int, int]:
        """Twice."""
        return items, count

    assert double("text", count=np.int32(3)) == ("text", 3)  # type: ignore[arg-type]
    assert type(double(1, count=np.int32(3))[1]) is int  # type: ignore[arg-type]
    assert double.__doc__ == "Twice."
    assert list(inspect.signature(double).parameters) == ["items", "count", "kind"]
    with pytest.raises(UsageError, match=r"^kind='b': use a$"):
        double(1, kind="b")  # type: ignore[arg-type]


Call = Callable[[protea.LanguageModel, Any], Any]
LONG = "MKTAYIAKQR" * 5
CALLS: dict[str, tuple[Call, list[Any], str]] = {
    "layers": (lambda m, v: m.embed(["M"], layers=v), [[1.5], [True], True, "1", {1}, iter([1]), [[0]], 1j], "0, -1"),
    "pool": (lambda m, v: m.embed(["M"], pool=v), [3, ["mean", 3], {"mean"}, b"mean", True], "mean, max, std, bos"),
    "token_budget": (lambda m, v: m.embed(["M"], token_budget=v), [1.5, "7", True, [4]], "whole number, or None"),
    "long": (lambda m, v: m.embed(["M"], long=v), [3, None, ["full"], "cut"], "truncate, window, full, error"),
    "masking": (lambda m, v: m.perplexity([LONG], masking=v), [None, 3, ["standard"], Masking], "standard, bionemo2"),
    "seed": (lambda m, v: m.perplexity([LONG], seed=v), ["1", None, 1.0], "whole number"),
    "positions": (lambda m, v: m.scan("MKT", positions=v), [1.5, 3, [1.5], {1}, b"1"], "10-40,55"),
    "offset": (lambda m, v: m.score("MKT", ["M1A"], offset=v), ["1", None, 1.0, True], "whole number"),
    "method": (lambda m, v: m.score("MKT", ["M1A"], method=v), [None, 3, [], "best"], "masked-marginals, "),
    "heads": (lambda m, v: m.attention("MKT", layers=[1], heads=v), ["0", [0.5], 1.0, {0}], "whole number"),
    "count": (lambda m, v: m.fit_contacts(["a.pdb"], count=v), ["3", 2.0, None], "whole number"),
    "head": (lambda m, v: m.fit_contacts(["a.pdb"], head=v), [None, 3, "linear"], "regression, bilinear"),
    "c": (lambda m, v: m.fit_contacts(["a.pdb"], c=v), ["0.1", None, True], "a number"),
    "exclude": (lambda m, v: m.evaluate_contacts(["a.pdb"], exclude=v), ["1abc", [5], None], "a list of names"),
    "include_fitted": (lambda m, v: m.evaluate_contacts(["a.pdb"], include_fitted=v), [1, "no"], "True or False"),
    "device": (lambda m, v: protea.load(device=v), [3, None, ["cpu"]], "auto, cpu, cuda, or cuda:N"),
    "dtype": (lambda m, v: protea.load(dtype=v), ["bf17", None, [], torch.float32], "float32, bfloat16, float16"),
    "trainable": (lambda m, v: protea.load(trainable=v), ["no", 1, None], "True or False"),
    "model": (lambda m, v: protea.load(v), [5, None, "\0", b"esm2"], "the name of a model"),
    "folder": (lambda m, v: m.save(v), [5, None, "\0", "\ud800"], "a path"),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_option_names_itself_and_what_it_accepts(load_small: LoadModel, name: str) -> None:
    call, values, accepted = CALLS[name]
    model = load_small("esm2")
    for value in values:
        with pytest.raises(UsageError, match=f"^{name}=.*{accepted}"):
            call(model, value)


def test_every_option_is_checked() -> None:
    """A new option must not pass unchecked, whatever its annotation is."""
    methods = [protea.load, *(value for _, value in inspect.getmembers(protea.LanguageModel, inspect.isfunction))]
    options = {
        name: method
        for method in methods
        if not method.__name__.startswith("_")
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert options.keys() - CALLS.keys() == {"rank"}  # it is checked like count
    for method in set(options.values()):
        assert hasattr(method, "__wrapped__"), method


def test_wording(load_small: LoadModel) -> None:
    model = load_small("esm2")
    for key, call in (
        ("layers", lambda: model.embed(["M"], layers=[1.5])),  # type: ignore[list-item]
        ("pool", lambda: model.embed(["M"], pool=3)),  # type: ignore[call-overload]
        ("dtype", lambda: protea.load(dtype="bf17")),
        ("masking", lambda: model.perplexity(["M"], masking=None)),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError) as caught:
            call()
        check_message(f"arguments.{key}", caught.value)


def test_numbers_and_lists_of_layers_and_poolings(load_small: LoadModel) -> None:
    """A list adds an axis, a number or a name does not, as NumPy indexes."""
    model = load_small("esm2")
    sequences = ["MKTAYIAKQR", "GGG"]
    every = model.embed(sequences, layers=[0, 1, 2, 3])
    pooled = model.embed(sequences, pool=["mean", "max", "bos"], layers=[0, -1])
    assert pooled.shape == (2, 3, 2, 40)
    for layer in (0, 1, np.int64(2), -1):
        for ours, expected in zip(model.embed(sequences, layers=layer), every, strict=True):
            np.testing.assert_array_equal(ours, expected[layer])
    for number, name in enumerate(("mean", "max", "bos")):
        np.testing.assert_array_equal(pooled[:, number], model.embed(sequences, pool=name, layers=[0, -1]))
        np.testing.assert_array_equal(pooled[:, number, 1], model.embed(sequences, pool=name))
        np.testing.assert_array_equal(pooled[:, number, 0], model.embed(sequences, pool=name, layers=0))
    assert model.embed([], pool=["mean", "max"], layers=[0, 1, 2]).shape == (0, 2, 3, 40)
    assert model.embed([], pool=["mean", "max"], layers=1).shape == (0, 2, 40)
    assert model.embed("MKT", pool=["mean"]).shape == (1, 40)
    maps = model.attention("MKT", layers=[1, 2], heads=[0, 4])
    np.testing.assert_array_equal(model.attention("MKT", layers=2, heads=[0, 4]), maps[1])
    np.testing.assert_array_equal(model.attention("MKT", layers=[1, 2], heads=4), maps[:, 1])
    np.testing.assert_array_equal(model.attention("MKT", layers=2, heads=4), maps[1, 1])
    with pytest.raises(UsageError, match=r" 6 .*0 to 3"):
        model.embed(["M"], layers=6)
    with pytest.raises(UsageError, match="pool="):
        model.embed(["M"], pool=[])


def test_numpy_numbers_are_numbers(load_small: LoadModel) -> None:
    model = load_small("esm2")
    assert model.perplexity([LONG], seed=np.int64(3)) == model.perplexity([LONG], seed=3)
    scores = model.score("MKT", ["M5A"], offset=np.int16(5), token_budget=np.int32(50))
    np.testing.assert_allclose(scores, model.score("MKT", ["M1A"]), rtol=1e-5)


def test_fields_of_masking() -> None:
    for wrong in ({"select": "0.1"}, {"mask": None}, {"pool": "some"}, {"specials": 1}):
        with pytest.raises(UsageError, match=rf"^Masking\.{next(iter(wrong))}="):
            Masking(**wrong)


def test_warnings_point_at_the_caller(load_small: LoadModel) -> None:
    model = load_small("esm2")
    for method in (model.embed, model.logits, model.perplexity):
        with pytest.warns(ProteaWarning, match="^sequence 0 truncated: ") as caught:
            method(["M" * 1030])
        assert [warning.filename for warning in caught] == [__file__]


HUGE = 10**5000
"""Python itself refuses to write a number of more than 4,300 digits."""


@pytest.mark.parametrize("value", [HUGE, -HUGE], ids=["above", "below"])
def test_huge_numbers_and_the_names_of_arguments(load_small: LoadModel, tmp_path: Path, value: int) -> None:
    """Messages name the argument, never an option of the command line."""
    model = load_small("esm2")
    calls: dict[str, Callable[[], Any]] = {
        "sequences": lambda: model.embed(value),  # type: ignore[call-overload]
        "layer": lambda: model.embed("MKT", layers=value),
        "attention is in layers": lambda: model.attention("MKT", layers=value),
        "heads": lambda: model.attention("MKT", layers=1, heads=value),
        "a token budget": lambda: model.embed("MKT", token_budget=-abs(value)),
        "offset": lambda: model.score("MKT", ["M1A"], offset=value),
        "positions": lambda: model.scan("MKT", positions=[1, value]),
        "count": lambda: model.fit_contacts([tmp_path], count=-abs(value)),
        "seed": lambda: model.fit_contacts([tmp_path], seed=value),
        "c": lambda: model.fit_contacts([tmp_path], c=value),
        "rank": lambda: model.fit_contacts([tmp_path], rank=-abs(value)),
        "masking": lambda: model.perplexity("MKT", masking=Masking(select=value)),
        "variants": lambda: model.score("MKT", value),  # type: ignore[arg-type]
        "dtype": lambda: protea.load(dtype=value),  # type: ignore[arg-type]
    }
    for name, call in calls.items():
        with pytest.raises(UsageError, match=rf"^{name}\b.*<(int|list) too long to write>") as caught:
            call()
        assert "--" not in str(caught.value)
    with pytest.raises(VariantError, match="int too long"):
        model.score("MKT", [value])  # type: ignore[list-item]


def test_the_command_line_names_the_option(run: Run) -> None:
    fails(run("fit-contacts", "a.pdb", "-o", "out", "--count", 0), 2, "error: --count 0: use at least 1 for a")
