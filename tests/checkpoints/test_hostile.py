"""Files made to harm: each gives one line that names it, runs nothing, writes nothing, and takes little memory."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from hostile import (
    CONTAINERS,
    DEPTHS,
    NAMES,
    STREAMS,
    TENSORS,
    call,
    copied,
    deep,
    live,
    matrix,
    refused,
    torch_zip,
    whole,
)
from protea.checkpoints.formats import open_checkpoint

MARKER = Path("/nowhere/marker")
LIVE = list(live(MARKER))


def test_the_pickles_would_run(tmp_path: Path) -> None:
    """Python's own unpickler obeys them: what is refused below is not refused for being broken."""
    for name, content in live(tmp_path / "marker").items():
        with suppress(Exception):  # some fail after what they did
            pickle.loads(content)
        assert (tmp_path / "marker").exists(), name
        (tmp_path / "marker").unlink()


@pytest.mark.parametrize(("container", "name"), matrix(CONTAINERS, LIVE))
def test_calls(tmp_path: Path, paths: dict[str, Path], bounded: None, container: str, name: str) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "case").mkdir()
    path = CONTAINERS[container](paths, tmp_path / "case", live(marker)[name])
    refused(path, "hostile")
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_names(tmp_path: Path, paths: dict[str, Path], name: str) -> None:
    content = whole(call(*name.rsplit(".", 1), "x"))
    refused(CONTAINERS["fair_esm"](paths, tmp_path, content), repr(name), "hostile")


@pytest.mark.parametrize(("container", "name"), matrix(CONTAINERS, STREAMS))
def test_streams(tmp_path: Path, paths: dict[str, Path], bounded: None, container: str, name: str) -> None:
    refused(CONTAINERS[container](paths, tmp_path, STREAMS[name]))


@pytest.mark.parametrize("levels", [DEPTHS[0], pytest.param(DEPTHS[1], marks=pytest.mark.long)])
@pytest.mark.parametrize("container", ["metadata", "fair_esm"])
@pytest.mark.parametrize("name", deep(1))
def test_nested_streams(
    tmp_path: Path, paths: dict[str, Path], bounded: None, container: str, name: str, levels: int
) -> None:
    refused(CONTAINERS[container](paths, tmp_path, deep(levels)[name]))


@pytest.mark.parametrize(("container", "name"), matrix(["fair_esm", "fair_esm_legacy", "legacy_bin"], TENSORS))
def test_tensors(tmp_path: Path, paths: dict[str, Path], bounded: None, container: str, name: str) -> None:
    refused(CONTAINERS[container](paths, tmp_path, TENSORS[name]))


def test_what_is_never_read(tmp_path: Path, paths: dict[str, Path]) -> None:
    """``common.pt`` and ``_extra_state`` of BioNeMo 2 hold nothing of the model."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    marker = tmp_path / "marker"
    path = copied(paths["nemo2"], tmp_path / "case")
    content = torch_zip(live(marker)["os.system"])
    (path / "weights/common.pt").write_bytes(content)
    with (path / "weights/__0_0.distcp").open("ab") as stream:
        at = stream.tell()
        stream.write(content)
    described = pickle.loads((path / "weights/.metadata").read_bytes())
    key = "module.encoder.layers.self_attention._extra_state"
    described.state_dict_metadata[key] = BytesStorageMetadata()
    described.storage_data[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", at, len(content))
    (path / "weights/.metadata").write_bytes(pickle.dumps(described))
    with open_checkpoint(path) as checkpoint:
        checkpoint.load(dtype=torch.float32, device=torch.device("cpu"))
    assert not marker.exists()
