"""What training programs save: wrapped names, state dicts alone, adapters and other additions to the encoder."""

from __future__ import annotations

import io
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import CONFIGS
from hostile import copied, refused
from messages import check_message
from protea.checkpoints import hf
from protea.checkpoints.distcp import DistributedTensors, write_distributed
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.checkpoints.tensors import Planned, StoredTensor, Tensors
from protea.errors import CheckpointError, ProteaWarning
from protea.models.encoder import Encoder
from protea.models.esm2 import SIZES
from protea.models.registry import build
from references import EsmForMaskedLM, hf_name, new_fair_esm, transformers_config

State = dict[str, Tensor]
Change = Callable[[State], State]


def read(path: Path) -> tuple[Encoder, list[str]]:
    """Return a model and the notes about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_checkpoint(locate(path)) as checkpoint:
            model = checkpoint.load(dtype=torch.float32, device=torch.device("cpu"))
    assert all(issubclass(warning.category, ProteaWarning) for warning in caught)
    return model, [str(warning.message) for warning in caught]


def same(model: Encoder, state: State, name: Callable[[str], str] = hf_name) -> None:
    for ours, value in model.named_parameters():
        assert torch.equal(value, state[name(ours)]), ours


def random_transformer(name: str) -> EsmForMaskedLM:
    torch.manual_seed(5)
    return EsmForMaskedLM(transformers_config(build(CONFIGS[name])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model as transformers saves it."""
    path = tmp_path_factory.mktemp("state-dicts") / "model"
    random_transformer("esm2").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def published() -> State:
    """Return a state dict with the shapes of a published model, written as transformers names it."""
    torch.manual_seed(5)
    return EsmForMaskedLM(transformers_config(build(SIZES["8M"]))).state_dict()


# --- names of wrappers -------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    """Wrap a model as ``torch.compile`` does; it compiles only when the model runs."""
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


def fsdp(model: nn.Module) -> State:
    """FSDP around the model and each layer, with recomputation, as its local state dict spells the names."""
    inner = "_fsdp_wrapped_module._checkpoint_wrapped_module."
    items = model.state_dict().items()
    parts = {key: key.split(".", 4) for key, _ in items if ".layer." in key}
    spelt = {key: ".".join([*part[:4], inner + part[4]]) for key, part in parts.items()}
    return {f"_fsdp_wrapped_module.{spelt.get(key, key)}": value for key, value in items}


def prefixed(prefix: str) -> Callable[[nn.Module], State]:
    return lambda model: {f"{prefix}{key}": value for key, value in model.state_dict().items()}


WRAPPERS: dict[str, tuple[Callable[[nn.Module], State], tuple[str, ...]]] = {
    "torch.compile": (lambda model: compiled(model).state_dict(), ("_orig_mod.",)),
    "DataParallel": (lambda model: nn.DataParallel(model).state_dict(), ("module.",)),
    "both": (
        lambda model: nn.DataParallel(compiled(model)).state_dict(),
        ("module.", "_orig_mod."),
    ),
    "FSDP": (fsdp, ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")),
    "Lightning": (prefixed("model."), ("model.",)),
    "peft, merged": (prefixed("base_model.model."), ("base_model.model.",)),
    "a module of one's own": (prefixed("module.net.backbone."), ("module.net.backbone.",)),
}


@pytest.mark.parametrize("place", ["beside config.json", "in the folder"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_names_of_wrappers(tmp_path: Path, folder: Path, name: str, place: str) -> None:
    wrap, removed = WRAPPERS[name]
    model = EsmForMaskedLM.from_pretrained(folder)
    state = wrap(model)
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" if place == "in the folder" else tmp_path / "m" / "trained.pt"
    if path.is_dir():
        save_file({key: value.clone() for key, value in state.items()}, path / "model.safetensors")
    else:
        torch.save({"model_state_dict": state, "epoch": 3}, path)
    loaded, notes = read(path)
    same(loaded, model.state_dict())
    assert len(notes) == 1
    assert all(repr(part) in notes[0] for part in removed)


SEGMENTS = st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), max_size=3)
WRAPPED = st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])


@given(SEGMENTS, st.lists(WRAPPED, max_size=2), st.integers(0, 4))
def test_any_beginning_and_any_wrapper_inside(start: list[str], inside: list[str], at: int) -> None:
    keys = ["esm.embeddings.word_embeddings.weight", "esm.encoder.layer.0.LayerNorm.weight", "lm_head.dense.weight"]
    tensors = Tensors([Path("m.pt")])
    for key in keys:
        parts = key.split(".")
        place = min(at, len(parts) - 1)
        wrapped = ".".join([*start, *parts[:place], *inside, *parts[place:]])
        tensors.add(wrapped, StoredTensor(Path("m.pt"), (1,), "F32", lambda: torch.zeros(1)))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        hf.normalize(tensors)
    assert list(tensors) == keys
    assert bool(notes) == bool(start or inside)


def test_the_note_about_wrappers(tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(WRAPPERS["both"][0](EsmForMaskedLM.from_pretrained(folder)), tmp_path / "m.pt")
    check_message("checkpoints.wrapped-names", read(tmp_path / "m.pt")[1][0], tmp=tmp_path)


def test_a_bare_encoder_in_a_module_of_ones_own(tmp_path: Path, folder: Path) -> None:
    state = EsmForMaskedLM.from_pretrained(folder).state_dict()
    kept = {f"net.{key[4:]}": value for key, value in state.items() if key.startswith("esm.")}
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"state_dict": kept | {"head.weight": torch.zeros(1, 40)}}, tmp_path / "m.ckpt")
    model, notes = read(tmp_path / "m.ckpt")
    same(model, state)
    assert model.capabilities == {"attention", "contacts"}
    assert ["'net.'" in notes[0], "head.weight" in notes[1]] == [True, True]


def test_several_models_in_one_file(tmp_path: Path, folder: Path) -> None:
    state = EsmForMaskedLM.from_pretrained(folder).state_dict()
    shutil.copy(folder / "config.json", tmp_path)
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    torch.save(both, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "m.pt")
    check_message("checkpoints.several-models", caught.value, tmp=tmp_path)


# --- every format ------------------------------------------------------------------------------------------------


def rewritten(path: Path, kind: str, change: Change) -> Path:
    """Change the tensors of a checkpoint of any format."""
    if kind in ("hf", "te"):
        tensors = {key: value.clone() for key, value in load_file(path / "model.safetensors").items()}
        save_file(change(tensors), path / "model.safetensors")
    elif kind == "bin":
        torch.save(change(torch.load(path / "pytorch_model.bin")), path / "pytorch_model.bin")
    elif kind == "fair-esm":
        content = torch.load(path, weights_only=False)
        torch.save(content | {"model": change(content["model"])}, path)
    elif kind == "nemo":
        with tarfile.open(path) as archive:
            files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
        weights = torch.load(io.BytesIO(files["./model_weights.ckpt"]))
        layouts.write_nemo(path, {"./model_weights.ckpt": change(weights)}, files["./model_config.yaml"].decode())
    else:
        stored = {key: value.clone() for key, value in DistributedTensors(path / "weights").items()}
        plan = [Planned(key, tuple(v.shape), v.dtype, v.clone) for key, v in change(stored).items()]
        write_distributed(path / "weights", plan)
    return path


INSIDE = {
    "hf": "esm.encoder.layer.0.attention.self.query.",
    "bin": "esm.encoder.layer.0.attention.self.query.",
    "te": "model.encoder.layers.0.self_attention.layernorm_qkv.",
    "fair-esm": "encoder.sentence_encoder.layers.0.self_attn.q_proj.",
    "nemo": "model.language_model.encoder.layers.0.self_attention.query_key_value.",
    "nemo2": "module.encoder.layers.self_attention.linear_qkv.",
}
ADDED = {"lora_A": "merge", "adapter.down.weight": "merge", "relative.bias": "beside the encoder"}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("kind", INSIDE)
def test_what_changes_the_encoder_is_refused(tmp_path: Path, paths: dict[str, Path], kind: str, added: str) -> None:
    key = INSIDE[kind] + added
    path = rewritten(copied(paths[kind], tmp_path), kind, lambda state: state | {key: torch.ones(2, 16)})
    refused(path, key.removeprefix("encoder.sentence_encoder."), ADDED[added])


OUTSIDE = {
    "hf": "classifier.dense.weight",
    "bin": "qa_outputs.weight",
    "te": "classifier.weight",
    "fair-esm": "classification_heads.a.weight",
    "nemo": "model.binary_head.weight",
    "nemo2": "module.regression_head.weight",
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_heads_are_left_out_with_a_note(tmp_path: Path, paths: dict[str, Path], kind: str) -> None:
    unused = {OUTSIDE[kind]: torch.ones(2, 16), f"{INSIDE[kind]}_extra_state": torch.ones(1)}
    path = rewritten(copied(paths[kind], tmp_path), kind, lambda state: state | unused)
    notes = read(path)[1]
    assert len(notes) == 1
    assert "1 tensor outside the encoder left out" in notes[0]
    assert OUTSIDE[kind] in notes[0]


@pytest.mark.parametrize("kind", ["hf", "bin", "te", "fair-esm", "nemo"])
def test_wrapped_names_in_every_format(tmp_path: Path, paths: dict[str, Path], kind: str) -> None:
    def wrap(state: State) -> State:
        return {f"module.{key.replace('.layers.', '.layers._orig_mod.')}": value for key, value in state.items()}

    expected, notes = read(paths[kind])
    assert not notes
    model, notes = read(rewritten(copied(paths[kind], tmp_path), kind, wrap))
    assert len(notes) == 1
    assert "'module.'" in notes[0]
    for name, value in expected.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


# --- the encoder -------------------------------------------------------------------------------------------------


def extended(folder: Path, target: Path, change: Change) -> Path:
    shutil.copytree(folder, target)
    return rewritten(target, "hf", change)


def refuses(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    return caught.value


def peft_names(state: State) -> State:
    """As peft names an adapted layer, and the adapter beside it."""
    spelt = {key: key.replace("attention.self.query.", "attention.self.query.base_layer.") for key in state}
    query = "base_model.model.esm.encoder.layer.0.attention.self.query.lora_A.default.weight"
    return {f"base_model.model.{spelt[key]}": value for key, value in state.items()} | {query: torch.zeros(2, 40)}


def test_adapters_of_peft(tmp_path: Path, folder: Path) -> None:
    error = refuses(extended(folder, tmp_path / "m", peft_names))
    check_message("checkpoints.adapters", error, tmp=tmp_path)


@pytest.mark.parametrize("layer", ["attention.self.query", "embeddings.word_embeddings"])
def test_adapters_of_peft_without_a_configuration(tmp_path: Path, folder: Path, layer: str) -> None:
    state = EsmForMaskedLM.from_pretrained(folder).state_dict()
    spelt = {key.replace(f"{layer}.", f"{layer}.base_layer."): value for key, value in state.items()}
    torch.save(spelt, tmp_path / "m.pt")
    assert "merge_and_unload" in str(refuses(tmp_path / "m.pt"))


def test_more_layers_than_the_configuration_says(tmp_path: Path, folder: Path) -> None:
    """The layers beyond would be dropped."""
    layer = "esm.encoder.layer."
    state = load_file(folder / "model.safetensors")
    more = {
        key.replace(f"{layer}2.", f"{layer}3."): value.clone() for key, value in state.items() if f"{layer}2." in key
    }
    error = refuses(extended(folder, tmp_path / "m", lambda tensors: tensors | more))
    check_message("checkpoints.beyond-the-encoder", error, tmp=tmp_path)


def test_a_published_model_with_a_classifier(real_classifier: Path) -> None:
    model, notes = read(real_classifier)
    assert model.capabilities == {"attention", "contacts"}
    assert len(notes) == 1
    assert "4 tensors outside the encoder" in notes[0]
    assert "classifier.dense.bias" in notes[0]


@pytest.fixture
def real_classifier() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared/data/real_weights/esm2_8M_finetuned"
    if not path.is_dir():
        pytest.skip(f"{path} is not there; it holds a fine-tuned model as its author published it")
    return path


# --- state dicts alone -------------------------------------------------------------------------------------------


def lightning(state: State) -> dict[str, Any]:
    """The content of a checkpoint of Lightning, with an optimizer's state."""
    return {
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}}],
        "hyper_parameters": {"lr": 0.001},
    }


CONTAINERS: dict[str, Callable[[State], Any]] = {
    "alone": lambda state: state,
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 1, "optimizer": {"state": {}}},
    "state_dict": lambda state: {"state_dict": state},
    "model": lambda state: {"model": state, "loss": torch.tensor(1.0)},
    "lightning": lightning,
    "settings": lambda state: {"model": state, "args": {"lr": 0.001}, "cfg": None, "epoch": 3, "rng": [1, 2.0, None]},
    "a head first": lambda state: {"model_state_dict": {"weight": torch.ones(2)}, "state_dict": state},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_state_dicts_of_published_shapes(tmp_path: Path, published: State, name: str) -> None:
    torch.save(CONTAINERS[name](published), tmp_path / "m.ckpt")
    model, notes = read(tmp_path / "m.ckpt")
    same(model, published)
    assert model.config == SIZES["8M"]
    assert model.capabilities == {"attention", "contacts", "logits"}
    check_message("checkpoints.read-by-shapes", notes[-1], tmp=tmp_path)


@pytest.mark.parametrize("name", CONTAINERS)
def test_state_dicts_in_a_folder(tmp_path: Path, folder: Path, name: str) -> None:
    """A file called as transformers calls it is read as every other file of torch.save."""
    state = EsmForMaskedLM.from_pretrained(folder).state_dict()
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(CONTAINERS[name](state), tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        model, notes = read(path)
        same(model, state)
        assert len(notes) == (name == "lightning")


def test_safetensors_of_published_shapes(tmp_path: Path, published: State) -> None:
    save_file({key: value.clone() for key, value in published.items()}, tmp_path / "model.safetensors")
    model, notes = read(tmp_path / "model.safetensors")
    same(model, published)
    assert "esm2_t6_8M_UR50D" in notes[0]
    check_message("checkpoints.weights-alone", refuses(tmp_path), tmp=tmp_path)


def test_a_state_dict_of_metas_class(tmp_path: Path) -> None:
    theirs = new_fair_esm(build(SIZES["8M"]))
    torch.save({"model": theirs.state_dict()}, tmp_path / "m.pt")
    model, notes = read(tmp_path / "m.pt")
    assert "esm2_t6_8M_UR50D" in notes[0]
    assert model.capabilities == {"attention", "contacts", "logits"}
    meta = {"word_embeddings.weight": "embed_tokens.weight"}
    same(model, theirs.state_dict(), lambda name: meta.get(name, name))


def test_shapes_of_two_published_models(tmp_path: Path, published: State) -> None:
    """Without frequencies and contact head nothing tells the number of heads."""
    kept = {key: value for key, value in published.items() if "inv_freq" not in key and "contact_head" not in key}
    torch.save(kept, tmp_path / "m.pt")
    check_message("checkpoints.shapes-of-two", refuses(tmp_path / "m.pt"), tmp=tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_shapes_of_no_published_model(tmp_path: Path, folder: Path, wrapped: bool) -> None:
    """The way out that the message names works."""
    model = EsmForMaskedLM.from_pretrained(folder)
    torch.save((compiled(model) if wrapped else model).state_dict(), tmp_path / "m.pt")
    check_message("checkpoints.unknown-shapes", refuses(tmp_path / "m.pt"), tmp=tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    same(read(tmp_path / "m.pt")[0], model.state_dict())


def test_another_weight_file_in_a_folder_is_read_itself(tmp_path: Path, folder: Path) -> None:
    """Not the folder's model.safetensors, which it is trained from."""
    shutil.copytree(folder, tmp_path / "m")
    trained = {key: value + 1 for key, value in load_file(folder / "model.safetensors").items()}
    for name in ("trained.safetensors", "trained.bin"):
        path = tmp_path / "m" / name
        torch.save(trained, path) if name.endswith("bin") else save_file(trained, path)
        assert torch.equal(read(path)[0].get_parameter("lm_head.bias"), trained["lm_head.bias"])


def test_a_whole_model_pickled(tmp_path: Path, folder: Path) -> None:
    torch.save(EsmForMaskedLM.from_pretrained(folder), tmp_path / "m.pt")
    check_message("checkpoints.pickled-model", refuses(tmp_path / "m.pt"), tmp=tmp_path)


NO_STATE: dict[str, Any] = {
    "an optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
    "a tensor": torch.zeros(3),
    "other tensors": {"weight": torch.zeros(3)},
    "a number": 3,
}


@pytest.mark.parametrize("name", NO_STATE)
def test_files_without_a_model(tmp_path: Path, name: str) -> None:
    torch.save(NO_STATE[name], tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "save")


def test_a_folder_without_a_state_dict(tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"net": {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "net, epoch", "model_state_dict, state_dict, model")
