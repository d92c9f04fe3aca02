"""Archives, headers and descriptions made to harm, files cut short, and whole ones that do not fit together."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hostile import copied, live, mapping, matrix, refused, tensor, torch_zip, whole
from protea.checkpoints.convert import convert
from protea.checkpoints.formats import format_named, open_checkpoint
from protea.checkpoints.tensors import same_bits
from protea.errors import CheckpointError, OutputError, ProteaWarning

Paths = dict[str, Path]

# --- tar ---------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax
    return info


TAR_MEMBERS = {
    "an absolute path": member("/tmp/model_weights.ckpt"),
    "a parent path": member("../../model_weights.ckpt"),
    "a parent path within": member("a/../../model_weights.ckpt"),
    "a symbolic link": member("model_weights.ckpt", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": member("model_weights.ckpt", tarfile.LNKTYPE, "/etc/passwd"),
    "a character device": member("model_weights.ckpt", tarfile.CHRTYPE),
    "a block device": member("model_weights.ckpt", tarfile.BLKTYPE),
    "a pipe": member("model_weights.ckpt", tarfile.FIFOTYPE),
    "an old sparse file": member("model_weights.ckpt", tarfile.GNUTYPE_SPARSE),
    "a new sparse file": member("model_weights.ckpt", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "a sparse file of 2^60": member("model_weights.ckpt", **{"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 60)}),
    "a size of 2^60": member("model_weights.ckpt", size=str(1 << 60)),
    "a size of -1": member("model_weights.ckpt", size="-1"),
    "a size that is none": member("model_weights.ckpt", size="many"),
    "10,000 headers": member("model_weights.ckpt", **{f"k{number}": "" for number in range(10_000)}),
    "a name of a megabyte": member("model_weights.ckpt/" + "a" * (1 << 20)),
    "ranks of a pipeline": member("tp_rank_00_pp_rank_000/model_weights.ckpt"),
    "no weights": member("other.txt"),
}


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", TAR_MEMBERS)
def test_members_of_tar_archives(tmp_path: Path, bounded: None, name: str) -> None:
    refused(tar(tmp_path / "x.nemo", (TAR_MEMBERS[name], b""), (member("model_config.yaml"), b"a: 1")))


def nemo_parts(paths: Paths) -> dict[str, bytes]:
    with tarfile.open(paths["nemo"]) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


TAR_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "compressed": gzip.compress,
    "a wrong checksum": lambda data: data[:150] + b"7" + data[151:],
    "a size beyond the archive": lambda data: respelled(data, 124, b"77777777777\0"),
    "a size of 2^62, in base 256": lambda data: respelled(data, 124, b"\x80" + bytes(3) + (1 << 62).to_bytes(8, "big")),
    "a negative size, in base 256": lambda data: respelled(
        data, 124, b"\xff" * 8 + (-512 & 0xFFFFFFFF).to_bytes(4, "big")
    ),
    "a member twice": lambda data: data[: _end(data)] + data,
    "no end": lambda data: data[: _end(data)],
    "rubbish for an end": lambda data: data[: _end(data)] + b"x" * 1024,
}


def _end(data: bytes) -> int:
    return -(-len(data.rstrip(b"\0")) // 512) * 512


def respelled(data: bytes, at: int, field: bytes) -> bytes:
    """The first member's header with another field, its checksum made to fit."""
    header = bytearray(data[:512])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize("name", TAR_BYTES)
def test_tar_archives(tmp_path: Path, paths: Paths, bounded: None, name: str) -> None:
    path = tmp_path / "x.nemo"
    path.write_bytes(TAR_BYTES[name](paths["nemo"].read_bytes()))
    refused(path)


# --- zip ---------------------------------------------------------------------------------------------------------

GOOD = whole(mapping(model=mapping(w=tensor())))


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def patched(data: bytes, signature: bytes, at: int, field: bytes, *, last: bool = False) -> bytes:
    """An archive with another field in its first, or last, record of a kind."""
    start = (data.rfind if last else data.find)(signature) + at
    return data[:start] + field + data[start + len(field) :]


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
STORED = torch_zip(GOOD)
BODY = (("a/data.pkl", GOOD), ("a/byteorder", b"little"), ("a/data/0", bytes(16)))

ZIPS = {
    "compressed": zipped(*BODY, compression=zipfile.ZIP_DEFLATED),
    "a bomb": zipped(("a/data.pkl", bytes(1 << 25)), *BODY[1:], compression=zipfile.ZIP_DEFLATED),
    "compressed with LZMA": zipped(*BODY, compression=zipfile.ZIP_LZMA),
    "encrypted": patched(STORED, CENTRAL, 8, b"\x01\x00"),
    "a method nobody knows": patched(STORED, CENTRAL, 10, b"\x63\x00"),
    "a version nobody knows": patched(STORED, CENTRAL, 6, b"\xff\x00"),
    "no such local header": patched(STORED, LOCAL, 0, b"PK\x07\x08", last=True),
    "a local header elsewhere": patched(STORED, CENTRAL, 42, struct.pack("<I", 1 << 30)),
    "members that overlap": patched(STORED, CENTRAL, 42, bytes(4), last=True),
    "a member larger than the file": patched(STORED, CENTRAL, 20, struct.pack("<II", 1 << 30, 1 << 30)),
    "a member of other sizes": patched(STORED, CENTRAL, 24, struct.pack("<I", 1 << 30)),
    "a name beyond the local header": patched(STORED, LOCAL, 26, b"\xff\xff", last=True),
    "a directory beyond the file": patched(STORED, END, 12, struct.pack("<I", 1 << 31)),
    "a directory elsewhere": patched(STORED, END, 16, struct.pack("<I", 1 << 31)),
    "other entries than it says": patched(STORED, END, 8, b"\x09\x00\x09\x00"),
    "one of several disks": patched(STORED, END, 4, b"\x01\x00\x01\x00"),
    "no pickle": zipped(*BODY[1:]),
    "two pickles": zipped(*BODY, ("b/data.pkl", GOOD)),
    "a pickle in the root": zipped(("data.pkl", GOOD), *BODY[1:]),
    "an absolute path": zipped(*BODY, ("/etc/passwd", b"x")),
    "a parent path": zipped(*BODY, ("a/../../x", b"x")),
    "a big-endian machine": zipped(BODY[0], ("a/byteorder", b"big"), BODY[2]),
    "another program's": zipped(("word/document.xml", b"<xml/>")),
    "nothing": END + bytes(18),
    "only a beginning": STORED[:60],
}


def with_entry(data: bytes, extra: bytes) -> bytes:
    """An archive whose first directory entry has an extra field and sizes that refer to it."""
    data = patched(data, CENTRAL, 20, b"\xff" * 8)
    start = data.find(CENTRAL)
    name = int.from_bytes(data[start + 28 : start + 30], "little")
    data = patched(data, CENTRAL, 30, struct.pack("<H", len(extra)))
    data = data[: start + 46 + name] + extra + data[start + 46 + name :]
    size = int.from_bytes(data[data.rfind(END) + 12 :][:4], "little")
    return patched(data, END, 12, struct.pack("<I", size + len(extra)), last=True)


ZIPS |= {
    "64-bit sizes beyond the file": with_entry(STORED, struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62)),
    "64-bit sizes that are not there": with_entry(STORED, struct.pack("<HH", 1, 0)),
    "an extra field cut short": with_entry(STORED, struct.pack("<HHQ", 1, 16, 1)),
}


@pytest.mark.parametrize("name", ZIPS)
def test_zip_archives(tmp_path: Path, bounded: None, name: str) -> None:
    (tmp_path / "esm2_x.pt").write_bytes(ZIPS[name])
    refused(tmp_path / "esm2_x.pt")


def test_two_members_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        data = zipped(*BODY, BODY[0])
    (tmp_path / "esm2_x.pt").write_bytes(data)
    refused(tmp_path / "esm2_x.pt", "same name")


HOLES = {
    "header": "where a header or a name is expected",
    "directory": "where a header or a name is expected",
    "pickle": "damaged",
    "config": "far beyond",
    "safetensors": "a header of",
}


@pytest.mark.parametrize("name", HOLES)
def test_files_with_holes(tmp_path: Path, paths: Paths, bounded: None, name: str) -> None:
    """A file of 64 GB that takes no space on disk, where something short is expected."""
    size = 64 << 30
    if name == "header":
        path, at = tmp_path / "x.nemo", tmp_path / "x.nemo"
        info = member("x", tarfile.XHDTYPE)
        info.size = size - 4096
        start = info.tobuf(tarfile.GNU_FORMAT)
    elif name == "pickle":
        path = at = tmp_path / "esm1b.pt"
        start = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001))
        start += b"\x80\x04\x8e" + (size - 100).to_bytes(8, "little")
    elif name == "directory":
        path = at = tmp_path / "esm2_x.pt"
        start = LOCAL + bytes(60)
    else:
        path = copied(paths["hf"], tmp_path)
        at = path / ("config.json" if name == "config" else "model.safetensors")
        start = b"{" if name == "config" else (size - 8).to_bytes(8, "little") + b"{"
    with at.open("wb") as stream:
        stream.write(start)
        stream.truncate(size)
        if name == "directory":
            stream.seek(size - 98)
            stream.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size - 4096, 1000))
            stream.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, size - 98, 1) + END + b"\xff" * 16 + bytes(2))
    refused(path, HOLES[name])


# --- YAML --------------------------------------------------------------------------------------------------------

LAUGHS = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
MERGES = "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

YAMLS = {
    "laughs": f"a: &a [x]\n{LAUGHS}num_attention_heads: *i\n",
    "merges": f"a: &a {{x: 1}}\n{MERGES}num_attention_heads: 2\n",
    "a call": "num_attention_heads: !!python/object/apply:os.system ['touch MARKER']\n",
    "a new object": "num_attention_heads: !!python/object/new:os.system ['touch MARKER']\n",
    "a name": "num_attention_heads: !!python/name:os.system\n",
    "a call as key": "? !!python/object/apply:os.system ['touch MARKER']\n: 1\nnum_attention_heads: 2\n",
    "lists 1,000 deep": "[" * 1_000,
    "lists 100,000 deep": "[" * 100_000,
    "keys 1,000 deep": "? " * 1_000,
    "keys 10,000 deep": "? " * 10_000,
    "a list that holds itself": "num_attention_heads: &a [*a]\n",
    "a mapping that holds itself": "num_attention_heads: &a {x: *a}\n",
    "a number of 5,000 digits": f"num_attention_heads: {'9' * 5_000}\n",
    "a number of 50,000 digits, in hexadecimal": f"num_attention_heads: 0x{'f' * 50_000}\n",
    "a number of 50,000 digits, in base 60": f"num_attention_heads: 1{':1' * 50_000}\n",
    "NaN": "num_attention_heads: .nan\n",
    "infinity": "num_attention_heads: .inf\n",
    "a fraction": "num_attention_heads: 2.5\n",
    "0": "num_attention_heads: 0\n",
    "a billion": "num_attention_heads: 1000000000\n",
    "a negative number": "num_attention_heads: -2\n",
    "text": "num_attention_heads: many\n",
    "yes": "num_attention_heads: true\n",
    "a date": "num_attention_heads: 2024-99-99\n",
    "bytes that are none": "num_attention_heads: !!binary '='\n",
    "another number of heads": "num_attention_heads: 3\n",
    "layers it has not": "num_attention_heads: 2\nnum_layers: 7\n",
    "another width": "num_attention_heads: 2\nhidden_size: 32\n",
    "half a megabyte": "num_attention_heads: 2\n" + "# a\n" * (1 << 17),
    "nothing readable": "\x00\x01\x02",
    "a directive": "%FOO\n%YAML 9.9\n---\n- a",
}


LONG_YAMLS = ("lists 100,000 deep", "keys 10,000 deep")


@pytest.mark.parametrize(
    ("kind", "name"),
    [case for case in matrix(["nemo", "nemo2"], YAMLS) if getattr(case, "values", case)[1] not in LONG_YAMLS]
    + [pytest.param(kind, name, marks=pytest.mark.long) for kind in ("nemo", "nemo2") for name in LONG_YAMLS],
)
def test_yaml(tmp_path: Path, paths: Paths, bounded: None, kind: str, name: str) -> None:
    marker = tmp_path / "marker"
    text = YAMLS[name].replace("MARKER", str(marker))
    if kind == "nemo":
        good = nemo_parts(paths)
        if not name.startswith(("nothing", "lists")):
            kept = {"position_embedding_type": "rope", "bias_gelu_fusion": False, "esm_gelu": True}
            text += yaml.safe_dump(kept)
        parts = {"model_config.yaml": text.encode(), "model_weights.ckpt": good["./model_weights.ckpt"]}
        path = tar(tmp_path / "x.nemo", *((member(key), data) for key, data in parts.items()))
    else:
        path = copied(paths["nemo2"], tmp_path / "case")
        (path / "context/model.yaml").write_text(text)
    refused(path)
    assert not marker.exists()


# --- safetensors -------------------------------------------------------------------------------------------------


def header(text: str | dict[str, Any], data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = (text if isinstance(text, str) else json.dumps(text)).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "nothing": b"",
    "seven bytes": b"\x10" + bytes(6),
    "a header of 2^63": header({"a": entry()}, length=1 << 63),
    "a header of 2^64 - 1": header({"a": entry()}, length=(1 << 64) - 1),
    "a header longer than the file": header({"a": entry()}, length=4096),
    "a header of no bytes": header("", length=0),
    "a header of 17 MB": header('{"a":' + " " * (17 << 20) + "1}"),
    "no JSON": header("hello"),
    "no object": header("[1, 2]"),
    "no UTF-8": (4).to_bytes(8, "little") + b'{"\xff"' + bytes(16),
    "lists 100,000 deep": header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "tensors that overlap": header({"a": entry(), "b": entry()}),
    "a hole": header({"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36)),
    "bytes that nobody names": header({"a": entry()}, bytes(32)),
    "offsets beyond the file": header({"a": entry(offsets=(0, 1 << 40))}),
    "offsets the wrong way round": header({"a": entry(offsets=(16, 0))}),
    "negative offsets": header({"a": entry(offsets=(-16, 0))}),
    "negative shape": header({"a": entry(shape=(-2, -2))}),
    "a shape that overflows": header({"a": entry(shape=(1 << 40, 1 << 40))}),
    "a shape of other size": header({"a": entry(shape=(3, 3))}),
    "NaN as shape": header('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "infinity as shape": header('{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}}'),
    "a huge number": header('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,16]}}'),
    "a type nobody knows": header({"a": entry(dtype="F33")}),
    "a type of another size": header({"a": entry(dtype="F64")}),
    "metadata that are no text": header({"__metadata__": {"a": 1}, "a": entry()}),
    "two tensors of one name": header(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}'),
    "NaN as name": header({"NaN": entry()}),
    "a line break in a name": header({"a\nb\x1b[31m": entry()}),
    "no tensors": header({}, b""),
    "a pickle": live(Path("/nowhere/marker"))["os.system"],
    "a page of the Web": b"<!DOCTYPE html><html><body>Not Found</body></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 30000000\n",
}


@pytest.mark.parametrize(("kind", "name"), matrix(["hf", "te", "extras"], SAFETENSORS))
def test_safetensors(tmp_path: Path, paths: Paths, bounded: None, kind: str, name: str) -> None:
    path = copied(paths["nemo" if kind == "extras" else kind], tmp_path)
    bad = path.with_name("tiny.nemo.extras.safetensors") if kind == "extras" else path / "model.safetensors"
    bad.write_bytes(SAFETENSORS[name])
    refused(path)


# --- JSON --------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, Any] = {
    "nothing": "",
    "no object": "[]",
    "lists 100,000 deep": "[" * 100_000,
    "17 MB": "{" + " " * (17 << 20) + "}",
    "no UTF-8": b"\xff\xfe{}",
    "no layers": {"num_hidden_layers": None},
    "a billion layers": {"num_hidden_layers": 10**9},
    "-1 layers": {"num_hidden_layers": -1},
    "2.5 layers": {"num_hidden_layers": 2.5},
    "layers in words": {"num_hidden_layers": "two"},
    "a list of layers": {"num_hidden_layers": [[[2]]]},
    "true layers": {"num_hidden_layers": True},
    "more layers than there are": {"num_hidden_layers": 3},
    "a width of 2^60": {"hidden_size": 1 << 60},
    "another width": {"hidden_size": 32},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 5},
    "another inner width": {"intermediate_size": 65},
    "an epsilon of NaN": '{"layer_norm_eps": NaN}',
    "an epsilon of infinity": '{"layer_norm_eps": 1e999}',
    "an angle of 10^400": '{"rope_theta": 1e400}',
    "another vocabulary": {"vocab_size": 34},
    "a small vocabulary": {"vocab_size": 5},
    "a number of 5,000 digits": '{"vocab_size": ' + "9" * 5000 + "}",
    "another mask": {"mask_token_id": 4},
    "another family": {"model_type": "llama"},
    "a family in a list": {"model_type": ["esm"]},
    "other positions": {"position_embedding_type": "relative"},
    "positions in a list": {"position_embedding_type": [[]]},
    "a folding model": {"is_folding_model": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json(tmp_path: Path, paths: Paths, bounded: None, name: str) -> None:
    path = copied(paths["hf"], tmp_path)
    value = CONFIGS[name]
    if isinstance(value, str) and value.startswith('{"'):
        value = json.loads((path / "config.json").read_text()) | json.loads(value) if "999" not in value[:20] else value
    if isinstance(value, dict):
        value = json.dumps(json.loads((path / "config.json").read_text()) | value)
    (path / "config.json").write_bytes(value if isinstance(value, bytes) else value.encode())
    refused(path)


INDICES: dict[str, Any] = {
    "a parent path": {"weight_map": {"a": "../../other.safetensors"}},
    "an absolute path": {"weight_map": {"a": "/etc/passwd"}},
    "the parent": {"weight_map": {"a": ".."}},
    "no name": {"weight_map": {"a": ""}},
    "a name with NUL": {"weight_map": {"a": "a\x00b"}},
    "a number": {"weight_map": {"a": 7}},
    "an absent shard": {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
    "a tensor that its shard lacks": {"weight_map": {"a": "model.safetensors"}},
    "no map": {},
    "a list": {"weight_map": ["a"]},
    "no tensors": {"weight_map": {}},
    "lists 100,000 deep": "[" * 100_000,
    "17 MB": "{" + " " * (17 << 20) + "}",
}


@pytest.mark.parametrize(("kind", "name"), matrix(["hf", "te", "bin"], INDICES))
def test_indices(tmp_path: Path, paths: Paths, bounded: None, kind: str, name: str) -> None:
    path = copied(paths[kind], tmp_path)
    (tmp_path / "other.safetensors").write_bytes((paths["hf"] / "model.safetensors").read_bytes())
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    value = INDICES[name]
    (path / index).write_text(value if isinstance(value, str) else json.dumps(value))
    refused(path)


# --- distributed metadata ----------------------------------------------------------------------------------------


def words(described: Any) -> Any:
    return next(value for key, value in described.state_dict_metadata.items() if "word_embeddings" in key)


def info(described: Any) -> Any:
    return next(value for key, value in described.storage_data.items() if "word_embeddings" in key.fqn)


def many_of_one(described: Any) -> None:
    """A tensor of any size from pieces that are all the same bytes."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    one, tensor, size = info(described), words(described), words(described).size
    tensor.size = torch.Size((size[0] * 1000, size[1]))
    for number in range(1, 1000):
        offsets = torch.Size((size[0] * number, 0))
        tensor.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=size))
        described.storage_data[MetadataIndex("module.embedding.word_embeddings.weight", offsets)] = one


METADATA: dict[str, Callable[[Any], Any]] = {
    "no tensors": lambda d: d.state_dict_metadata.clear(),
    "nowhere": lambda d: d.storage_data.clear(),
    "another shape": lambda d: setattr(words(d), "size", (1 << 60, 16)),
    "a shape that overflows": lambda d: setattr(words(d), "size", (1 << 40, 1 << 40)),
    "a negative shape": lambda d: setattr(words(d), "size", (-128, -16)),
    "a shape of text": lambda d: setattr(words(d), "size", ("a", "b")),
    "a piece outside": lambda d: setattr(words(d).chunks[0], "offsets", (1 << 50, 0)),
    "a piece of other size": lambda d: setattr(words(d).chunks[0], "sizes", (5, 16)),
    "a piece of other axes": lambda d: setattr(words(d).chunks[0], "sizes", (2048,)),
    "no pieces": lambda d: words(d).chunks.clear(),
    "a piece twice": lambda d: words(d).chunks.append(words(d).chunks[0]),
    "pieces that share their bytes": many_of_one,
    "no type": lambda d: setattr(words(d).properties, "dtype", None) or setattr(words(d), "properties", 5),
    "a type that is not its piece's": lambda d: setattr(words(d).properties, "dtype", torch.float64),
    "a type that is none of ours": lambda d: setattr(words(d).properties, "dtype", torch.int64),
    "a file elsewhere": lambda d: setattr(info(d), "relative_path", "../../../etc/passwd"),
    "an absolute file": lambda d: setattr(info(d), "relative_path", "/etc/passwd"),
    "a file that is absent": lambda d: setattr(info(d), "relative_path", "__9_9.distcp"),
    "a file that is no text": lambda d: setattr(info(d), "relative_path", 7),
    "bytes beyond the file": lambda d: setattr(info(d), "offset", 1 << 60),
    "bytes before the file": lambda d: setattr(info(d), "offset", -5),
    "no bytes": lambda d: setattr(info(d), "length", 0),
    "compressed bytes": lambda d: setattr(info(d), "transform_descriptors", ["zlib"]),
}


@pytest.mark.parametrize("name", METADATA)
def test_distributed_metadata(tmp_path: Path, paths: Paths, bounded: None, name: str) -> None:
    path = copied(paths["nemo2"], tmp_path)
    described = pickle.loads((path / "weights/.metadata").read_bytes())  # our own
    METADATA[name](described)
    (path / "weights/.metadata").write_bytes(pickle.dumps(described))
    refused(path)


# --- cut short ---------------------------------------------------------------------------------------------------

WHOLE = {
    "hf": ("model.safetensors", "config.json", "vocab.txt"),
    "bin": ("pytorch_model.bin",),
    "te": ("model.safetensors", "config.json"),
    "fair-esm": ("", "esm2_tiny-contact-regression.pt"),
    "nemo": ("", "tiny.nemo.extras.safetensors"),
    "nemo2": ("weights/.metadata", "weights/__0_0.distcp"),
}
CUTS = [(kind, name) for kind, names in WHOLE.items() for name in names]


@pytest.mark.parametrize("step", [16_384, pytest.param(1024, marks=pytest.mark.long)])
@pytest.mark.parametrize(("kind", "name"), CUTS)
def test_cut_short(tmp_path: Path, paths: Paths, bounded: None, kind: str, name: str, step: int) -> None:
    path = copied(paths[kind], tmp_path)
    file = path / name if path.is_dir() else path.with_name(name) if name else path
    data = file.read_bytes()
    if kind == "nemo" and not name:
        data = data[: _end(data) + 512]  # without the zeros after its end
    cuts = [*range(0, len(data), step), len(data) - 2]  # the last may be a line's end
    for cut in cuts:
        file.write_bytes(data[:cut])
        refused(path)


# --- whole, but not of one piece ---------------------------------------------------------------------------------


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A Hugging Face folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


QUERY = "esm.encoder.layer.1.attention.self.query.weight"

MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "a missing tensor": (lambda t: t.pop(QUERY), (f"no tensor {QUERY}",)),
    "a wrong shape": (lambda t: t.update({QUERY: torch.zeros(8, 16)}), (QUERY, "[8, 16]", "[16, 16]")),
    "a wrong type": (lambda t: t.update({QUERY: t[QUERY].long()}), (QUERY, "I64")),
    "frequencies that differ": (
        lambda t: t.update({key: t[key] * 2 for key in list(t) if "1.attention" in key and "inv_freq" in key}),
        ("inv_freq", "differs"),
    ),
    "an untied head": (lambda t: t.update({"lm_head.decoder.weight": torch.ones(33, 16)}), ("untied",)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits(tmp_path: Path, paths: Paths, name: str) -> None:
    change, messages = MISFITS[name]
    refused(changed(copied(paths["hf"], tmp_path), change), "model.safetensors", *messages)


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_leave_nothing_behind(tmp_path: Path, paths: Paths, name: str) -> None:
    folder = changed(copied(paths["hf"], tmp_path), MISFITS[name][0])
    with pytest.raises(CheckpointError):
        convert(folder, tmp_path / "new" / "copy", "te", peers=False)
    assert not (tmp_path / "new").exists()


def test_an_extra_tensor_is_a_note(tmp_path: Path, paths: Paths) -> None:
    folder = changed(copied(paths["hf"], tmp_path), lambda tensors: tensors.update(more=torch.zeros(2)))
    with pytest.warns(ProteaWarning, match=r"1 .*more"), open_checkpoint(folder):
        pass


@pytest.mark.parametrize("kind", ["hf", "fair-esm", "nemo", "nemo2", "te"])
def test_nan_and_infinity_keep_their_bits(tmp_path: Path, paths: Paths, kind: str) -> None:
    strange = torch.tensor([0x7FC00001, -0x400000 + 5, 0x7F800000, -0x80000000], dtype=torch.int32).view(torch.float32)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY][0, :4] = strange

    source = changed(copied(paths["hf"], tmp_path), change)
    target = tmp_path / {"fair-esm": "esm2_copy.pt", "nemo": "copy.nemo"}.get(kind, "copy")
    convert(source, target, kind, peers=False)
    with open_checkpoint(target) as copy:
        assert same_bits(copy.parameter("layers.1.self_attn.q_proj.weight")[0, :4].clone(), strange)


EXTRAS: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "another width": lambda tensors, config: config.update(hidden_size=32),
    "another family": lambda tensors, config: config.update(position_embedding_type="absolute"),
    "another head": lambda tensors, config: tensors.update({"contact_head.regression.weight": torch.zeros(1, 5)}),
    "half a head": lambda tensors, config: tensors.pop("contact_head.regression.bias"),
    "other frequencies": lambda tensors, config: tensors.update(inv_freq=torch.zeros(7)),
    "a tensor of no model": lambda tensors, config: tensors.update(more=torch.zeros(7)),
    "whole numbers": lambda tensors, config: tensors.update({"contact_head.regression.bias": torch.zeros(1).long()}),
    "no configuration": lambda tensors, config: config.clear(),
    "a configuration of lists": lambda tensors, config: config.update(hidden_size=[[]], model_type={}),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extras_of_another(tmp_path: Path, paths: Paths, name: str) -> None:
    path = copied(paths["nemo"], tmp_path)
    beside = tmp_path / "tiny.nemo.extras.safetensors"
    tensors = load_file(beside)
    with safe_open(beside, framework="pt") as handle:
        config = json.loads(handle.metadata()["protea_config"])
    EXTRAS[name](tensors, config)
    save_file(tensors, beside, {"protea_config": json.dumps(config)})
    refused(path, "extras.safetensors")


@pytest.mark.parametrize("config", ["[]", "7", "{", "[" * 100_000])
def test_extras_without_a_configuration(tmp_path: Path, paths: Paths, config: str) -> None:
    path = copied(paths["nemo"], tmp_path)
    save_file({}, tmp_path / "tiny.nemo.extras.safetensors", {"protea_config": config})
    refused(path, "extras.safetensors: damaged")


@pytest.mark.parametrize("kind", ["fair-esm", "nemo"])
def test_what_lies_beside_from_before_is_not_taken_in(tmp_path: Path, paths: Paths, kind: str) -> None:
    """A contact head of another model would be read with the new file."""
    copied(paths[kind], tmp_path)
    (tmp_path / paths[kind].name).unlink()
    with pytest.raises(OutputError, match=re.escape(str(tmp_path))):
        convert(paths["hf"], tmp_path / paths[kind].name, kind, peers=False)
    assert not (tmp_path / paths[kind].name).exists()


def test_weights_of_nan_are_converted_and_not_compared(tmp_path: Path, paths: Paths) -> None:
    source = changed(copied(paths["hf"], tmp_path), lambda tensors: tensors.update({QUERY: tensors[QUERY] * torch.nan}))
    report = convert(source, tmp_path / "copy", "hf")
    assert report.checks[-1].startswith("not compared with other libraries")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: object) -> None:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(format_named("nemo"), "write", fail)
    with pytest.raises(OutputError, match=r"copy\.nemo: .*No space left"):
        convert(paths["hf"], tmp_path / "copy.nemo", peers=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["fair-esm", "te"])
def test_a_full_disk(tmp_path: Path, paths: Paths, kind: str) -> None:
    """One line, and nothing left behind, wherever the writing stops."""
    name = {"fair-esm": "esm2_copy.pt", "nemo": "copy.nemo"}.get(kind, "copy")
    code = (
        "import resource, signal, sys\n"
        "from protea.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "convert", str(paths["hf"]), name, "--to", kind]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"protea: error: {name}: cannot be written: .+\n", done.stderr)
    assert not list(tmp_path.iterdir())
