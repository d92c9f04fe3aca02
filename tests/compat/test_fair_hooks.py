"""Hooks on parts of the models of protea.compat.esm beside the same hooks in fair-esm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fair_files import PROTEINS, reference, write
from torch import Tensor, nn

import protea.compat.esm as ours
from protea.errors import CapabilityError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["esm2_tiny", "esm1b_tiny", "esm1_tiny"]

Pair = tuple[nn.Module, nn.Module, Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fair")
    return {name: write(folder, name) for name in NAMES}


def both(path: Path) -> Pair:
    model, alphabet = ours.pretrained.load_model_and_alphabet(str(path))
    return model.eval(), reference(path)[0], alphabet.get_batch_converter()(PROTEINS)[2]


def same(mine: Tensor, theirs: Tensor, tokens: Tensor) -> None:
    """The same shape, and numbers within 2e-5 of the largest, but for padding."""
    assert mine.shape == theirs.shape
    present = tokens != 1
    if len(mine) == tokens.shape[1]:
        mine, theirs = mine.transpose(0, 1), theirs.transpose(0, 1)
    assert float((mine - theirs)[present].abs().max()) <= 2e-5 * max(1.0, float(theirs.abs().max()))


def seen(model: nn.Module, tokens: Tensor, kind: str, parts: list[str]) -> dict[str, Tensor]:
    """The tensors that hooks on parts of a model receive."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any = None) -> None:
            value = args if output is None else output
            found[name] = (value[0] if isinstance(value, tuple) else value).clone()

        return keep

    handles = [getattr(model.get_submodule(name), kind)(hook(name)) for name in parts]
    with torch.no_grad():
        # With attention maps fair-esm calls all parts of attention, and without them some.
        model(tokens, need_head_weights=True)
        for handle in handles:
            handle.remove()
        complete = dict(found)
        found.clear()
        model(tokens)
    assert not found
    return complete


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_what_fair_esms_see(files: dict[str, Path], name: str, kind: str) -> None:
    model, theirs, tokens = both(files[name])
    parts = [part for part, _ in model.named_modules() if part.startswith(("layers.", "emb", "lm_head"))]
    parts = [part for part in parts if not part.endswith("self_attn") and (kind, part) != NO_POSITIONS]
    mine, expected = seen(model, tokens, kind, parts), seen(theirs, tokens, kind, parts)
    assert list(mine) == list(expected)
    for part in parts:
        same(mine[part], expected[part], tokens)


NO_POSITIONS = ("register_forward_pre_hook", "embed_positions")


def returned(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 1.5, *output[1:])


def in_place(module: nn.Module, args: Any, output: Any) -> None:
    output[0][:, :, 3] = 2.0


def first(module: nn.Module, args: Any) -> Any:
    return (args[0] + 0.5,)


def alone(module: nn.Module, args: Any) -> Any:
    return args[0] - 0.25


def with_kwargs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] + 0.5,), kwargs


def of_positions(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + torch.arange(output.shape[1])[None, :, None] / 100


@pytest.mark.parametrize(
    ("part", "kind", "hook", "options"),
    [
        ("layers.1", "register_forward_hook", returned, {}),
        ("layers.1", "register_forward_hook", in_place, {"prepend": True}),
        ("layers.1", "register_forward_pre_hook", first, {}),
        ("layers.0", "register_forward_pre_hook", with_kwargs, {"with_kwargs": True}),
        ("layers.1.fc1", "register_forward_pre_hook", alone, {}),
        ("embed_tokens", "register_forward_hook", of_positions, {"always_call": True}),
        ("embed_tokens", "register_forward_pre_hook", lambda module, args: (args[0].clamp(max=20),), {}),
        ("lm_head", "register_forward_hook", of_positions, {}),
    ],
)
def test_hooks_change_what_follows(
    files: dict[str, Path], part: str, kind: str, hook: Callable[..., Any], options: dict[str, bool]
) -> None:
    model, theirs, tokens = both(files["esm2_tiny"])
    with torch.no_grad():
        before = model(tokens)["logits"]
    for one in (model, theirs):
        getattr(one.get_submodule(part), kind)(hook, **options)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        mine, expected = model(tokens, [2, 3]), theirs(tokens, [2, 3])
        assert torch.equal(twin(tokens)["logits"], mine["logits"])
    assert not torch.equal(mine["logits"], before)
    same(mine["logits"], expected["logits"], tokens)
    for layer in (2, 3):
        same(mine["representations"][layer], expected["representations"][layer], tokens)


def test_gradients_through_hooks(files: dict[str, Path]) -> None:
    model, theirs, tokens = both(files["esm2_tiny"])
    gradients = []
    for one in (model, theirs):
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any, kept: list[Tensor] = kept) -> Any:
            output[0].retain_grad()
            kept.append(output[0])
            return output

        one.layers[1].register_forward_hook(keep)
        one(tokens)["logits"][tokens != 1].logsumexp(-1).sum().backward()
        gradients.append(kept[0].grad)
    same(*gradients, tokens)


def test_parts_that_a_script_calls_itself(files: dict[str, Path]) -> None:
    """Also from within a hook, as to read the logits behind each layer."""
    model, theirs, tokens = both(files["esm2_tiny"])
    early = []
    for one in (model, theirs):
        shapes: list[tuple[int, ...]] = []
        one.lm_head.register_forward_hook(lambda module, args, output, shapes=shapes: shapes.append(output.shape))
        found: list[Tensor] = []

        def read(module: nn.Module, args: Any, output: Any, one: nn.Module = one, found: list[Tensor] = found) -> None:
            found.append(one.lm_head(one.emb_layer_norm_after(output[0]).transpose(0, 1)))

        one.layers[0].register_forward_hook(read)
        with torch.no_grad():
            one.lm_head(one(tokens, [3])["representations"][3])
        assert shapes == [(*tokens.shape, 33)] * 3
        early.append(found[0])
    same(*early, tokens)


def test_hooks_that_would_not_run_are_refused(files: dict[str, Path]) -> None:
    model, _, _ = both(files["esm1b_tiny"])
    kinds = ["register_forward_hook", "register_forward_pre_hook", "register_backward_hook"]
    kinds += ["register_full_backward_hook", "register_full_backward_pre_hook"]
    for part in ("layers.1.self_attn", "contact_head", "contact_head.regression"):
        for kind in kinds:
            with pytest.raises(CapabilityError, match=rf"^model\.{part}\.{kind}: .*(attention|contacts).*fair-esm"):
                getattr(model.get_submodule(part), kind)(print)
    for part in ("layers.1", "layers.1.fc2", "embed_tokens", "lm_head"):
        for kind in kinds[2:]:
            with pytest.raises(CapabilityError, match=rf"^model\.{part}\.{kind}: "):
                getattr(model.get_submodule(part), kind)(print)
    with pytest.raises(CapabilityError, match="embed_positions"):
        model.embed_positions.register_forward_pre_hook(print)
    model.register_forward_hook(lambda module, args, output: None)
    model.register_full_backward_hook(lambda module, given, made: None)
