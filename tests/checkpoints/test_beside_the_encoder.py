"""Tensors and models beside an encoder: adapters and prompts, heads by any name, averaged weights."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_state_dicts import INSIDE, Change, State, read, rewritten

from hostile import copied
from hostile import refused as refused_alone
from messages import check_message
from protea.checkpoints.checkpoint import HEAD, refuse_adapters
from protea.checkpoints.tensors import StoredTensor, Tensors
from protea.errors import CheckpointError

ADAPTERS = [
    "adapters.0.down.weight",
    "adapter.layer.3.up.weight",
    "my_adapter_1.weight",
    "BottleneckAdapter.weight",
    "q_adaptors.weight",
    "lora.0.weight",
    "lora_A.default.weight",
    "queryLoRA.weight",
    "qlora.weight",
    "loha.weight",
    "hada_w1_a",
    "lokr_w1",
    "oft_r.weight",
    "vera_lambda_b",
    "ia3_l.weight",
    "prefix_encoder.embedding.weight",
    "prefix_tuning.wte.weight",
    "prompt_embeddings.weight",
    "prompt_encoder.default.embedding.weight",
    "soft_prompt",
    "virtual_tokens.weight",
]
# Where a key can begin: at the top, beside the encoder, in it, in a layer, in a head.
PLACES = {
    "hf": ["", "esm.", INSIDE["hf"], "esm.pooler.", "lm_head.", "classifier."],
    "bin": ["", "esm.", INSIDE["bin"], "esm.contact_head.", "lm_head."],
    "te": ["", "model.", INSIDE["te"], "lm_head."],
    "fair-esm": ["", "encoder.", "encoder.sentence_encoder.", INSIDE["fair-esm"], "encoder.lm_head."],
    "nemo": ["", "model.", "model.language_model.", INSIDE["nemo"], "model.lm_head."],
    "nemo2": ["", "module.", "module.encoder.", INSIDE["nemo2"], "module.output_layer."],
    "lightning": ["", "model.", "model.esm.", "model.esm.encoder.layer.1.", "model.lm_head."],
    "bare": ["", "encoder.", "encoder.layer.1.", "pooler."],
    "wrapped bare": ["", "net.", "net.encoder.layer.1.", "net.pooler."],
    "meta's state dict": ["", "net.", "net.layers.1.", "net.lm_head."],
}
CASES = [(kind, place, adapter) for kind, places in PLACES.items() for place, adapter in product(places, ADAPTERS)]


def bare(state: State, prefix: str) -> State:
    return {prefix + key.removeprefix("esm."): value for key, value in state.items() if key.startswith("esm.")}


def saved(kind: str, paths: dict[str, Path], folder: Path, change: Change) -> Path:
    """Write a changed checkpoint of a format, or a changed state dict beside its configuration."""
    if kind in INSIDE:
        return rewritten(copied(paths[kind], folder), kind, change)
    shutil.copy(paths["hf"] / "config.json", folder)
    state = load_file(paths["hf"] / "model.safetensors")
    if kind == "meta's state dict":
        content = torch.load(paths["fair-esm"], weights_only=False)["model"]
        state = {f"net.{re.sub('^encoder.(sentence_encoder.)?', '', key)}": value for key, value in content.items()}
        torch.save(change(state), folder / "m.pt")
    elif kind == "lightning":
        prefixed = {f"model.{key}": value for key, value in state.items()}
        torch.save({"state_dict": change(prefixed), "pytorch-lightning_version": "2.6.6"}, folder / "m.pt")
    else:
        torch.save(change(bare(state, "net." if "wrapped" in kind else "")), folder / "m.pt")
    return folder / "m.pt"


def refused(path: Path, *messages: str) -> None:
    """Assert the refusal of a checkpoint, after notes about its wrapper."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*removed '")
        refused_alone(path, *messages)


def adds(*keys: str) -> Change:
    return lambda state: state | {key: torch.ones(2, 16) for key in keys}


# --- adapters and prompts ----------------------------------------------------------------------------------------


def check_adapter(tmp_path: Path, paths: dict[str, Path], kind: str, place: str, adapter: str) -> None:
    path = saved(kind, paths, tmp_path, adds(place + adapter))
    refused(path, adapter, "get_base_model" if re.search("prompt|prefix|virtual", adapter) else "merge_and_unload")


@pytest.mark.parametrize(("kind", "place", "adapter"), CASES[:: len(ADAPTERS) + 4])
def test_adapters_anywhere(tmp_path: Path, paths: dict[str, Path], kind: str, place: str, adapter: str) -> None:
    check_adapter(tmp_path, paths, kind, place, adapter)


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in PLACES.items() for place in places])
def test_adapters_in_every_place(tmp_path: Path, paths: dict[str, Path], kind: str, place: str) -> None:
    check_adapter(tmp_path, paths, kind, place, "adapters.0.down.weight")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "place", "adapter"), CASES)
def test_every_adapter_anywhere(tmp_path: Path, paths: dict[str, Path], kind: str, place: str, adapter: str) -> None:
    check_adapter(tmp_path, paths, kind, place, adapter)


def named(*keys: str) -> Tensors:
    tensors = Tensors([Path("m.pt")])
    for key in keys:
        tensors.add(key, StoredTensor(Path("m.pt"), (1,), "F32", lambda: torch.zeros(1)))
    return tensors


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_is_known_by_its_name(adapter: str) -> None:
    for key in (adapter, f"esm.{adapter}", f"a.{adapter}.b"):
        with pytest.raises(CheckpointError, match="adapters or prompts") as caught:
            refuse_adapters(named(key, "esm.x"), [key, "esm.x"])
        assert key in str(caught.value)


WORDS = [
    "classifier",
    "head",
    "explorable",
    "colorant",
    "adapting",
    "soft",
    "often",
    "several",
    "schema",
    "proj",
    "mlp",
]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), st.sampled_from("._"))
def test_other_names_are_no_adapters(words: list[str], sign: str) -> None:
    key = sign.join(words)
    refuse_adapters(named(key), [key])


def test_the_message_lists_adapters(tmp_path: Path, paths: dict[str, Path]) -> None:
    path = saved("hf", paths, tmp_path, adds(*ADAPTERS))
    with pytest.raises(CheckpointError) as caught:
        read(path)
    check_message("checkpoints.adapters-beside", caught.value, tmp=tmp_path)


def test_prompts_alone_are_not_to_be_merged(tmp_path: Path, paths: dict[str, Path]) -> None:
    path = saved("hf", paths, tmp_path, adds("prompt_encoder.default.embedding.weight"))
    with pytest.raises(CheckpointError) as caught:
        read(path)
    check_message("checkpoints.prompts", caught.value, tmp=tmp_path)
    assert "merge_and_unload" not in str(caught.value)


# --- heads -------------------------------------------------------------------------------------------------------

UNKNOWN = {
    "fair-esm": ["my_head.linear.weight", "encoder.mixer.weight", "encoder.sentence_encoder.mixer.weight"],
    "nemo2": ["my_head.linear.weight", "module.my_head.weight", "module.embedding.mixer.weight"],
    "wrapped bare": ["net.my_head.linear.weight", "net.mixer.weight", "net.embeddings.mixer.weight"],
    "bare": ["mixer.weight", "embeddings.mixer.weight"],
    "meta's state dict": ["net.my_head.linear.weight", "net.mixer.weight"],
    "lightning": ["model.esm.mixer.weight"],
}
OUTSIDE = {
    "hf": ["my_head.linear.weight", "mixer.weight", "classifier.dense.weight", "esm.pooler.dense.weight"],
    "te": ["my_head.linear.weight"],
    "nemo": ["model.my_head.linear.weight"],
    "lightning": ["model.my_head.linear.weight", "mixer.weight"],
    "bare": ["my_head.linear.weight", "pooler.dense.weight", "classifier.weight"],
    "wrapped bare": ["my_head.linear.weight", "mixer.weight", "encoder.own.weight", "net.pooler.dense.weight"],
    "meta's state dict": ["mixer.weight", "layers.own.weight", "net.classification_heads.a.dense.weight"],
    "fair-esm": ["classification_heads.a.out_proj.bias", "encoder.regression_head.weight"],
    "nemo2": ["module.classification_head.class_heads.0.weight", "module.binary_head.weight", "module.pooler.weight"],
}


def end_of(key: str) -> str:
    """Return the part of a key that no format takes off."""
    return ".".join(key.split(".")[-2:])


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(kind, key) for kind, keys in table.items() for key in keys]


@pytest.mark.parametrize(("kind", "key"), pairs(UNKNOWN))
def test_what_may_belong_to_the_encoder_is_refused(tmp_path: Path, paths: dict[str, Path], kind: str, key: str) -> None:
    path = saved(kind, paths, tmp_path, adds(key))
    refused(path, end_of(key), "del state[NAME]")


@pytest.mark.parametrize(("kind", "key"), pairs(OUTSIDE))
def test_what_is_outside_is_left_out_with_a_note(tmp_path: Path, paths: dict[str, Path], kind: str, key: str) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    before, notes = read(saved(kind, paths, tmp_path / "before", adds()))
    after, more = read(saved(kind, paths, tmp_path / "after", adds(key)))
    assert len(more) == len(notes) + 1
    assert f"{end_of(key)};" in more[-1]
    for name, value in before.named_parameters():
        assert torch.equal(value, after.get_parameter(name)), name


def test_the_note_about_a_pooler(tmp_path: Path, paths: dict[str, Path]) -> None:
    path = saved("hf", paths, tmp_path, adds("esm.pooler.dense.weight", "esm.pooler.dense.bias"))
    check_message("checkpoints.outside", read(path)[1][0], tmp=tmp_path)


def test_metas_class_as_the_attribute_encoder(tmp_path: Path, paths: dict[str, Path]) -> None:
    """Only then ``encoder.`` is all of the model, and other modules are outside."""

    def change(state: State) -> State:
        encoder = {re.sub(r"^net\.", "encoder.", key): value for key, value in state.items()}
        return encoder | {"mixer.weight": torch.ones(2)}

    notes = read(saved("meta's state dict", paths, tmp_path, change))[1]
    assert "'encoder.'" in notes[0]
    assert "mixer.weight" in notes[1]


@pytest.mark.parametrize("name", ["lm_head", "contact_head", "pooler", "classifier", "qa_outputs", "regression_head"])
def test_names_of_heads(name: str) -> None:
    assert HEAD.match(f"{name}.weight")
    assert not HEAD.match(f"{name}2.weight")
    assert not HEAD.match(f"my_{name}.weight")


def test_the_ways_out_for_a_head(tmp_path: Path, paths: dict[str, Path]) -> None:
    """The commands of docs/checkpoints.md work as they stand there."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    commands = re.findall(r"```python\n(# [^\n]*without a head.*?)```", text, re.DOTALL)
    assert len(commands) == 3
    for command, kind in zip(commands, ("wrapped bare", "hf", "nemo2"), strict=True):
        (tmp_path / kind).mkdir()
        key = {"nemo2": "module.my_head.weight", "hf": "esm.my_head.weight"}.get(kind, "net.my_head.weight")
        path = saved(kind, paths, tmp_path / kind, adds(key))
        refused(path, "my_head.weight")
        names = {"trained.pt": path, "model.safetensors": path / "model.safetensors", "FOLDER": path}
        exec(reduce(lambda text, name: text.replace(name, str(names[name])), names, command), {})
        read(path)


# --- other models in the file ------------------------------------------------------------------------------------


@pytest.fixture
def state(paths: dict[str, Path], tmp_path: Path) -> State:
    shutil.copy(paths["hf"] / "config.json", tmp_path)
    return load_file(paths["hf"] / "model.safetensors")


def averaged(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


BESIDE: dict[str, tuple[Callable[[State], Any], str]] = {
    "ema_state_dict": (lambda s: {"state_dict": s, "ema_state_dict": averaged(s)}, "['ema_state_dict']"),
    "model_ema": (lambda s: {"model": s, "model_ema": averaged(s)}, "['model_ema']"),
    "ema": (lambda s: {"ema": averaged(s), "model_state_dict": s}, "['ema']"),
    "model_ema_state_dict": (lambda s: {"model": s, "model_ema_state_dict": averaged(s)}, "['model_ema_state_dict']"),
    "shadow": (lambda s: {"model": s, "ema": {"decay": 0.9, "shadow": averaged(s)}}, "['ema']['shadow']"),
    "wrapped": (
        lambda s: {"model": s, "teacher": {f"module.{key}": value for key, value in averaged(s).items()}},
        "['teacher']",
    ),
    "callback": (
        lambda s: {"state_dict": s, "callbacks": {"EMA": {"weights": averaged(s)}}},
        "['callbacks']['EMA']['weights']",
    ),
    "a training": (
        lambda s: {
            "model": s,
            "ema": averaged(s),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
            "epoch": 3,
        },
        "['ema']",
    ),
    "at the top": (lambda s: s | {"ema": averaged(s)}, "['ema']"),
    "a list": (
        lambda s: {"model": s, "ema": {"shadow_params": list(averaged(s).values())}},
        "['ema']['shadow_params']",
    ),
}


@pytest.mark.parametrize("file", ["m.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("name", BESIDE)
def test_another_model_is_named(tmp_path: Path, state: State, name: str, file: str) -> None:
    content, place = BESIDE[name]
    torch.save(content(state), tmp_path / file)
    model, notes = read(tmp_path / file)
    assert torch.equal(model.get_parameter("lm_head.bias"), state["lm_head.bias"])
    assert len(notes) == 1
    assert place in notes[0]
    if name == "ema_state_dict":
        check_message("checkpoints.another-model", notes[0].replace(file, "m.pt"), tmp=tmp_path)
    if name != "a list":  # the way that the note names
        command = re.search(r"`(torch.save\(.*\))`", notes[0])
        assert command
        exec(command[1], {"torch": torch, "FILE": tmp_path / file, "NEW_FILE": tmp_path / "n.pt"})
        model, notes = read(tmp_path / "n.pt")
        assert torch.equal(model.get_parameter("lm_head.bias"), state["lm_head.bias"] + 1)
        assert len(notes) == (name == "wrapped")


@pytest.mark.parametrize("file", ["m.pt", "pytorch_model.bin"])
def test_two_usual_names(tmp_path: Path, state: State, file: str) -> None:
    torch.save({"model": state, "state_dict": averaged(state)}, tmp_path / file)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / file)
    check_message("checkpoints.two-usual-names", str(caught.value).replace(file, "m.pt"), tmp=tmp_path)


def test_the_top_and_a_usual_name(tmp_path: Path, state: State) -> None:
    torch.save(state | {"model": averaged(state)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"at \['model'\], and also .* at its top; choose one") as caught:
        read(tmp_path)
    assert "torch.load(FILE)['model']" in str(caught.value)


def test_another_model_in_a_file_of_metas(tmp_path: Path, paths: dict[str, Path]) -> None:
    path = copied(paths["fair-esm"], tmp_path)
    content = torch.load(path, weights_only=False)
    torch.save(content | {"extra_state": {"ema": averaged(content["model"])}}, path)
    notes = read(path)[1]
    assert len(notes) == 1
    assert "['extra_state']['ema']" in notes[0]


ONE: dict[str, Callable[[State], Any]] = {
    "the same twice": lambda s: {"model": s, "state_dict": dict(s)},
    "moments by name": lambda s: {"model": s, "optimizer": {"exp_avg": averaged(s)}},
    "an average of losses": lambda s: {"model": s, "ema": {"loss": torch.ones(1), "step": torch.tensor(3)}},
    "another network": lambda s: {"model": s, "critic": {"weight": torch.ones(3)}},
}


@pytest.mark.parametrize("name", ONE)
def test_what_is_no_other_model(tmp_path: Path, state: State, name: str) -> None:
    torch.save(ONE[name](state), tmp_path / "m.pt")
    assert not read(tmp_path / "m.pt")[1]


def test_a_file_that_holds_itself(tmp_path: Path, state: State) -> None:
    content: dict[str, Any] = {"model": state, "wide": {}}
    content["wide"] |= {f"{number}": content for number in range(50)} | {"x" * 1000: content}
    torch.save(content, tmp_path / "m.pt")
    assert not read(tmp_path / "m.pt")[1]
