"""Files and folders that are no checkpoint, or part of one: named for what they are, with what to do."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from hostile import TINY, copied, refused
from messages import check_message
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.checkpoints.summary import describe
from protea.errors import CheckpointError, ProteaWarning

Paths = dict[str, Path]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 31000000\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
DENIED = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>\n'

CONTENTS = {
    "pointer": (POINTER, "git lfs pull"),
    "page": (PAGE, "web page"),
    "spaced-page": (f"\n  {PAGE.lower()}", "web page"),
    "denied": (DENIED, "web page"),
    "empty": ("", "is empty"),
}

FILES = {
    "hf": ("model.safetensors", "config.json"),
    "bin": ("pytorch_model.bin",),
    "te": ("model.safetensors",),
    "fair-esm": ("", "esm2_tiny-contact-regression.pt"),
    "nemo": ("", "tiny.nemo.extras.safetensors"),
    "nemo2": ("weights/.metadata", "weights/__0_0.distcp", "context/model.yaml"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_what_was_saved_in_place_of_a_file(tmp_path: Path, paths: Paths, kind: str, file: str, name: str) -> None:
    path = copied(paths[kind], tmp_path)
    changed = path / file if path.is_dir() else path.with_name(file or path.name)
    changed.write_text(CONTENTS[name][0])
    refused(path, f"{changed}: is ", CONTENTS[name][1])


@pytest.mark.parametrize("name", ["pointer", "page", "empty"])
def test_the_messages(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.pt").write_text(CONTENTS[name][0])
    check_message(f"checkpoints.saved-{name}", error_of(tmp_path / "m.pt"), tmp=tmp_path)


def error_of(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("file", ["config.json", "vocab.txt"])
def test_utf_16(tmp_path: Path, paths: Paths, file: str, encoding: str) -> None:
    """As PowerShell writes redirected output. Without its mark the text is only not JSON."""
    path = copied(paths["hf"], tmp_path)
    text = (path / file).read_text()
    (path / file).write_bytes(text.encode(encoding))
    if encoding == "utf-16":
        refused(path, f"{path / file}: is UTF-16 text")
        check_message(f"checkpoints.utf-16-{file}", error_of(path), tmp=tmp_path)
    else:
        refused(path, file)


def test_the_mark_of_utf_8_is_no_content(tmp_path: Path, paths: Paths) -> None:
    """What PowerShell writes when it is told to write UTF-8, as the message above tells users."""
    path = copied(paths["hf"], tmp_path)
    for file in ("config.json", "vocab.txt"):
        (path / file).write_text((path / file).read_text(), encoding="utf-8-sig")
    open_checkpoint(path)


# --- parts of models ---------------------------------------------------------------------------------------------


def deepspeed(path: Path) -> None:
    (path / "global_step500").mkdir(parents=True)
    (path / "global_step500" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (path / "zero_to_fp32.py").write_text("")
    (path / "latest").write_text("global_step500")


def deepspeed_inside(path: Path) -> None:
    path.mkdir()
    (path / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")


def fsdp(path: Path) -> None:
    """As Accelerate saves sharded state dicts."""
    dcp.save({"model": {"esm.x": torch.zeros(2)}}, checkpoint_id=path / "pytorch_model_fsdp_0", no_dist=True)


def trainer(path: Path) -> None:
    """A checkpoint of transformers' Trainer with DeepSpeed, which holds the configuration but no weights."""
    deepspeed(path)
    (path / "config.json").write_text(json.dumps({"model_type": "esm"}))
    torch.save({}, path / "training_args.bin")


def adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"x")


PARTS: dict[str, Callable[[Path], None]] = {
    "deepspeed": deepspeed,
    "deepspeed-inside": deepspeed_inside,
    "fsdp": fsdp,
    "trainer": trainer,
    "adapter": adapter,
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model(tmp_path: Path, name: str) -> None:
    PARTS[name](tmp_path / "m")
    check_message(f"checkpoints.parts-{name}", error_of(tmp_path / "m"), tmp=tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_fsdp_becomes_one_file_as_the_message_says(tmp_path: Path, paths: Paths) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = torch.load(paths["bin"] / "pytorch_model.bin")
    dcp.save({"model": state}, checkpoint_id=tmp_path / "m", no_dist=True)
    check_message("checkpoints.fsdp-weights", error_of(tmp_path / "m"), tmp=tmp_path)
    dcp_to_torch_save(tmp_path / "m", tmp_path / "m.pt")
    shutil.copy(paths["bin"] / "config.json", tmp_path)
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert torch.equal(checkpoint.parameter("lm_head.bias"), state["lm_head.bias"])


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_part_of_deepspeed(tmp_path: Path, name: str) -> None:
    torch.save({"module": {"esm.x": torch.zeros(0)}, "ds_version": "0.15"}, tmp_path / name)
    refused(tmp_path / name, "zero_to_fp32.py")


def test_the_files_of_a_training_stay_readable(tmp_path: Path, paths: Paths) -> None:
    """A Trainer's folder holds weights and parts of DeepSpeed; the weights are whole."""
    shutil.copytree(paths["hf"], tmp_path / "m")
    (tmp_path / "m" / "global_step500").mkdir()
    (tmp_path / "m" / "training_args.bin").write_bytes(pickle.dumps({}))
    open_checkpoint(tmp_path / "m")


# --- weights of any name beside the configuration -----------------------------------------------------------------

State = dict[str, torch.Tensor]


def beside(folder: Path, paths: Paths) -> State:
    """Write a configuration, and what training programs leave beside weights; return a model's tensors."""
    for name in ("config.json", "vocab.txt"):
        shutil.copy(paths["hf"] / name, folder)
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}}, folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "steps.pt")
    torch.save(torch.zeros(3), folder / "mean.pt")
    (folder / "training_args.bin").write_bytes(pickle.dumps({}))
    (folder / "notes.txt").write_text("")
    (folder / "logs").mkdir()
    return load_file(paths["hf"] / "model.safetensors")


@pytest.mark.parametrize("name", ["weights.pt", "model.pt", "last.ckpt", "epoch=3", "model.bin", "best.safetensors"])
def test_the_only_file_of_weights_is_read(tmp_path: Path, paths: Paths, name: str) -> None:
    state = beside(tmp_path, paths)
    content = {"state_dict": state, "epoch": 3} if name == "last.ckpt" else state
    save_file(state, tmp_path / name) if name == "best.safetensors" else torch.save(content, tmp_path / name)
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.warns(ProteaWarning, match=f"read {re.escape(name)}, its only file of weights"):
            found = locate(path)
        with pytest.warns(ProteaWarning):
            assert describe(str(path))["sha256"].keys() == {name}
        assert found == locate(tmp_path / name) == tmp_path / name
        with open_checkpoint(found) as checkpoint:
            assert torch.equal(checkpoint.parameter("lm_head.bias"), state["lm_head.bias"])


def test_several_files_of_weights(tmp_path: Path, paths: Paths) -> None:
    """The way that the message names uses the configuration beside the file."""
    state = beside(tmp_path, paths)
    torch.save(state, tmp_path / "last.pt")
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path)
    check_message("checkpoints.several-files", caught.value, tmp=tmp_path)
    advised = re.search(r"`-m (.*?)`", str(caught.value))
    assert advised
    with open_checkpoint(locate(advised[1])) as checkpoint:
        assert checkpoint.model.config == TINY
        assert torch.equal(checkpoint.parameter("lm_head.bias"), state["lm_head.bias"] + 1)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, paths: Paths) -> None:
    """Unless another one holds weights."""
    state = beside(tmp_path, paths)
    torch.save({"net": state}, tmp_path / "weights.pt")
    with pytest.warns(ProteaWarning):
        refused(locate(tmp_path), "holds net, and no state dict")
    (tmp_path / "weights.pt").write_text(POINTER)
    with pytest.warns(ProteaWarning):
        refused(locate(tmp_path), "weights.pt: is a pointer of Git LFS")
    torch.save(state, tmp_path / "best.pt")
    with pytest.warns(ProteaWarning, match=r"read best\.pt"):
        assert locate(tmp_path) == tmp_path / "best.pt"


def test_usual_names_come_first(tmp_path: Path, paths: Paths) -> None:
    state = beside(tmp_path, paths)
    assert locate(tmp_path) == tmp_path
    assert "no model.safetensors" in str(error_of(tmp_path))
    torch.save(state, tmp_path / "last.pt")
    torch.save(state, tmp_path / "pytorch_model.bin")
    for name in ("", "config.json", "pytorch_model.bin"):
        assert locate(tmp_path / name) == tmp_path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_a_file_that_its_folder_is_not_read_from(tmp_path: Path, paths: Paths, name: str) -> None:
    """Whoever names it means it, and not model.safetensors beside it."""
    path = copied(paths["hf"], tmp_path)
    state = {key: value + 1 for key, value in load_file(path / "model.safetensors").items()}
    torch.save(state, path / name)
    with open_checkpoint(locate(path / name)) as checkpoint:
        assert torch.equal(checkpoint.parameter("lm_head.bias"), state["lm_head.bias"])
    assert locate(path) == path
