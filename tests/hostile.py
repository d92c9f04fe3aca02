"""Hostile pickles, and every place in a checkpoint that can hold one."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from protea.checkpoints import hf
from protea.checkpoints.convert import convert
from protea.checkpoints.formats import open_checkpoint
from protea.errors import ProteaError
from protea.models.esm2 import ESM2Config
from protea.models.registry import build

TINY: Final = ESM2Config(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=64)


def originals(root: Path) -> dict[str, Path]:
    """Write one undamaged checkpoint of every format."""
    hf.write_random(root / "hf", build(TINY), seed=3, dtype=torch.float32)
    paths = {"hf": root / "hf", "bin": root / "bin"}
    for kind, name in (("fair-esm", "esm2_tiny.pt"), ("nemo", "tiny.nemo"), ("nemo2", "nemo2"), ("te", "te")):
        convert(root / "hf", root / name, kind, peers=False)
        paths[kind] = root / name
    paths["bin"].mkdir()
    shutil.copy(root / "hf" / "config.json", root / "bin")
    with hf.open_checkpoint(root / "hf") as checkpoint:
        torch.save({key: tensor.clone() for key, tensor in checkpoint.tensors.items()}, root / "bin/pytorch_model.bin")
    return paths


def copied(path: Path, folder: Path) -> Path:
    """Copy a checkpoint and the files beside it to another folder."""
    folder.mkdir(exist_ok=True)
    for entry in path.parent.glob(f"{path.stem}*"):
        (shutil.copytree if entry.is_dir() else shutil.copy)(entry, folder / entry.name)
    return folder / path.name


def listing(folder: Path) -> dict[str, int]:
    """Return the paths in a folder and their sizes."""
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*"))}


def refused(path: Path, *messages: str) -> None:
    """Assert that loading a checkpoint fails with one line that names it, and leaves the folder unchanged."""
    before = listing(path.parent)
    with pytest.raises(ProteaError) as caught, open_checkpoint(path) as checkpoint:
        checkpoint.load(dtype=torch.float32, device=torch.device("cpu"))
    message = str(caught.value)
    assert str(path.with_suffix("")) in message
    assert "\n" not in message
    assert len(message) < 1500
    assert listing(path.parent) == before
    for expected in messages:
        assert expected in message


# --- handmade pickles --------------------------------------------------------------------------------------------


def part(value: Any) -> bytes:
    """Pickle a value, to be put into another pickle."""
    return pickle.dumps(value, 2)[2:-1]


def call(module: str, name: str, *arguments: Any) -> bytes:
    """Return the opcodes that call a function."""
    return f"c{module}\n{name}\n".encode() + part(arguments) + b"R"


def whole(inner: bytes) -> bytes:
    """Return a complete pickle of protocol 2."""
    return b"\x80\x02" + inner + b"."


def mapping(**values: bytes) -> bytes:
    """Return a pickled dictionary of pickled values."""
    return b"}(" + b"".join(part(key) + value for key, value in values.items()) + b"u"


def record(name: str, state: bytes) -> bytes:
    """Return a pickled object with a state."""
    return f"c{name}\n".encode() + b")\x81" + state + b"b"


def doubled(times: int = 60) -> bytes:
    """Return a value that holds itself twice at every level: small as a pickle, endless when printed or traversed."""
    return b"]q\x00" + b"0h\x00h\x00\x86q\x00" * times


def tensor(
    shape: Any = (2, 2), stride: Any = (2, 1), offset: Any = 0, kind: str = "FloatStorage", key: bytes = part("0")
) -> bytes:
    """Return a pickled tensor."""
    storage = b"(" + part("storage") + f"ctorch\n{kind}\n".encode() + key + part("cpu") + part(4) + b"tQ"
    rest = part(offset) + part(shape) + part(stride) + part(False) + call("collections", "OrderedDict")
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


class Evil:
    """Return the pickle of an object whose unpickling calls a function."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def live(marker: Path) -> dict[str, bytes]:
    """Return pickles that create a file when Python's own unpickler reads them."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    line = f"S{touch!r}\n".encode()
    system = call("os", "system", touch)
    module = call("importlib", "import_module", "os")
    return {
        "os.system": whole(system),
        "posix.system": whole(call("posix", "system", touch)),
        "eval": whole(call("builtins", "eval", code)),
        "eval, as Python 2 calls it": whole(call("__builtin__", "eval", code)),
        "exec": whole(call("builtins", "exec", code)),
        "subprocess.call": whole(call("subprocess", "call", ["touch", str(marker)])),
        "subprocess.getoutput": whole(call("subprocess", "getoutput", touch)),
        "timeit.timeit": whole(call("timeit", "timeit", "pass", code)),
        "pickle.loads": whole(call("pickle", "loads", whole(system))),
        "torch.storage._load_from_bytes": whole(call("torch.storage", "_load_from_bytes", torch_zip(whole(system)))),
        "importlib and getattr": whole(
            b"cbuiltins\ngetattr\n(" + module + part("system") + b"tR" + part((touch,)) + b"R"
        ),
        "operator.methodcaller": whole(call("operator", "methodcaller", "system", touch) + b"(" + module + b"tR"),
        "functools.partial": whole(b"cfunctools\npartial\n(cos\nsystem\n" + part(touch) + b"tR)R"),
        "__reduce__ in protocol 0": pickle.dumps(Evil(touch), 0),
        "__reduce__ in protocol 1": pickle.dumps(Evil(touch), 1),
        "__reduce__ in protocol 4": pickle.dumps(Evil(touch), 4),
        "__reduce__ in protocol 5": pickle.dumps({"model": {"w": Evil(touch)}}, 5),
        "INST": b"(" + line + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + line + b"o.",
        "in a dictionary": whole(mapping(model=system)),
        "in a parameter": whole(
            mapping(model=mapping(w=b"ctorch._utils\n_rebuild_parameter\n(" + system + b"\x89" + part({}) + b"tR"))
        ),
        "in a configuration": whole(record("argparse\nNamespace", mapping(arch=system))),
        "in a reducer's argument": whole(b"ccollections\nOrderedDict\n(" + system + b"0]tR"),
    }


HUGE: Final = (1 << 62).to_bytes(8, "little")

NAMES: Final = [
    "builtins.getattr",
    "builtins.setattr",
    "builtins.open",
    "builtins.__import__",
    "builtins.compile",
    "builtins.memoryview",
    "torch.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.jit.load",
    "torch.compile",
    "torch.ops.load_library",
    "torch.serialization.load",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._tensor._rebuild_from_type_v2",
    "torch.package",
    "numpy.load",
    "numpy.f2py.crackfortran.myeval",
    "numpy.testing._private.utils.runstring",
    "types.CodeType",
    "types.FunctionType",
    "operator.attrgetter",
    "functools.reduce",
    "copyreg.add_extension",
    "weakref.ref",
    "codecs.decode",
    "webbrowser.open",
    "ctypes.CDLL",
    "runpy.run_path",
    "shutil.rmtree",
    "os.remove",
    "os.execv",
    "sys.setrecursionlimit",
    "pty.spawn",
    "urllib.request.urlopen",
    "socket.create_connection",
    "pydoc.locate",
    "asyncio.run",
    "multiprocessing.Process",
]

STREAMS: Final[dict[str, bytes]] = {
    "nothing": b"",
    "no more than a beginning": b"\x80\x02",
    "only an end": b".",
    "protocol 99": b"\x80\x63N.",
    "text": b"hello, world\n" * 10,
    "doubled 60 times": whole(doubled()),
    "doubled, as a storage's key": whole(mapping(model=mapping(w=tensor(key=doubled())))),
    "doubled, as a configuration": whole(mapping(args=doubled(), cfg=doubled(), model=mapping(w=tensor()))),
    "memo of 2^31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo that was never set": b"\x80\x02h\x07.",
    "LONG4 of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "LONG4 of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff\x01.",
    "BYTEARRAY8 of 2^62": b"\x80\x05\x96" + HUGE + b".",
    "BINUNICODE8 of 2^62": b"\x80\x04\x8d" + HUGE + b".",
    "BINBYTES8 of 2^62": b"\x80\x04\x8e" + HUGE + b".",
    "BINUNICODE of 2^32": b"\x80\x02X\xff\xff\xff\xff.",
    "BINSTRING of -2^31": b"\x80\x02T\x00\x00\x00\x80.",
    "FRAME of 2^62": b"\x80\x04\x95" + HUGE + b"N.",
    "INT of 100,000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "LONG of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID text": b"P/etc/passwd\n.",
    "persistent id that is none": b"\x80\x02K\x01Q.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "a key twice": whole(mapping(model=b"N") + b"(" + part("model") + b"Nu"),
    "a list as key": whole(b"}]Ns"),
    "state for a tuple": whole(b")}b"),
    "items for a string": whole(part("a") + b"(K\x01e"),
    "a call of what is no name": whole(part("os.system") + part(("x",)) + b"R"),
    "a list that holds itself": whole(b"]q\x00h\x00a"),
    "a configuration that holds itself": whole(
        b"}q\x01"
        + part("cfg")
        + b"comegaconf.dictconfig\nDictConfig\n)\x81q\x02"
        + mapping(_content=b"h\x02")
        + b"bs"
        + part("model")
        + mapping(w=tensor())
        + b"s"
    ),
    "numbers as the names of tensors": whole(mapping(model=b"}" + part(1) + tensor() + b"s")),
}


def deep(levels: int) -> dict[str, bytes]:
    """Nested containers, far deeper than Python recurses."""
    tuples = b")" + b"\x85" * levels
    return {
        "tuples": whole(tuples),
        "tuples as a dictionary's key": whole(b"}" + tuples + b"Ns"),
        "tuples as an ordered dictionary's key": whole(b"ccollections\nOrderedDict\n(](" + tuples + b"N\x86etR"),
        "tuples as a storage's key": whole(mapping(model=mapping(w=tensor(key=tuples)))),
        "tuples as a shape": whole(mapping(model=mapping(w=tensor(shape=(1,)).replace(part((1,)), tuples)))),
        "lists": whole(b"]" * levels + b"a" * (levels - 1)),
        "dictionaries": whole(b"}" + part("a") + (b"}" + part("a")) * levels + b"N" + b"s" * (levels + 1)),
        "records": whole(b"cargparse\nNamespace\n" * levels + b")" + b"R\x85" * levels),
    }


DEPTHS: Final = (5_000, 100_000)


def of_tensor(inner: bytes) -> bytes:
    """Return a pickle with one tensor in the place of a checkpoint's tensors."""
    return whole(mapping(model=mapping(w=inner), w=inner))


TENSORS: Final[dict[str, bytes]] = {
    "beyond its storage": of_tensor(tensor(shape=(4, 4), stride=(4, 1))),
    "offset beyond its storage": of_tensor(tensor(offset=1 << 40)),
    "negative offset": of_tensor(tensor(offset=-1)),
    "negative stride": of_tensor(tensor(stride=(-2, 1))),
    "stride 0, larger than its storage": of_tensor(tensor(shape=(1 << 20, 1 << 20), stride=(0, 0))),
    "stride of 2^59": of_tensor(tensor(stride=(1 << 59, 1))),
    "shape of 2^60": of_tensor(tensor(shape=(1 << 60,), stride=(0,))),
    "shape that overflows": of_tensor(tensor(shape=(1 << 32, 1 << 32), stride=(0, 0))),
    "shape with 0 that overflows": of_tensor(tensor(shape=(0, 1 << 59, 1 << 59), stride=(0, 0, 0))),
    "negative shape": of_tensor(tensor(shape=(-2, -2))),
    "1,000 axes": of_tensor(tensor(shape=(1,) * 1000, stride=(1,) * 1000)),
    "axes without strides": of_tensor(tensor(stride=(1,))),
    "a shape of text": of_tensor(tensor(shape=("2", "2"))),
    "a shape that is a number": of_tensor(tensor(shape=4)),
    "a storage that is not there": of_tensor(tensor(key=part("17"))),
    "a storage elsewhere": of_tensor(tensor(key=part("../../../etc/passwd"))),
    "no storage": of_tensor(b"ctorch._utils\n_rebuild_tensor_v2\n" + part((None, 0, (1,), (1,), False, {})) + b"R"),
    "a type that is none": of_tensor(tensor(kind="QInt8Storage")),
}


# --- containers --------------------------------------------------------------------------------------------------


def torch_zip(content: bytes) -> bytes:
    """Return a file of ``torch.save`` with a storage of 16 bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in (("data.pkl", content), ("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    return stream.getvalue()


def torch_legacy(content: bytes) -> bytes:
    """Return the same in the format before PyTorch 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    begin = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    return begin + content + pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16)


def fair_esm(paths: dict[str, Path], folder: Path, content: bytes) -> Path:
    """Write a ``.pt`` of Meta's package."""
    (folder / "esm2_x.pt").write_bytes(torch_zip(content))
    return folder / "esm2_x.pt"


def fair_esm_legacy(paths: dict[str, Path], folder: Path, content: bytes) -> Path:
    """Write a ``.pt`` in the old format of ESM-1b's file."""
    (folder / "esm1b.pt").write_bytes(torch_legacy(content))
    return folder / "esm1b.pt"


def regression(paths: dict[str, Path], folder: Path, content: bytes) -> Path:
    """Write a contact regression beside an undamaged model."""
    path = copied(paths["fair-esm"], folder)
    (folder / "esm2_tiny-contact-regression.pt").write_bytes(torch_zip(content))
    return path


def legacy_bin(paths: dict[str, Path], folder: Path, content: bytes) -> Path:
    """Write ``pytorch_model.bin``."""
    path = copied(paths["bin"], folder)
    (path / "pytorch_model.bin").write_bytes(torch_zip(content))
    return path


def nemo(paths: dict[str, Path], folder: Path, content: bytes) -> Path:
    """Write ``model_weights.ckpt`` in a ``.nemo``."""
    with tarfile.open(paths["nemo"]) as good, tarfile.open(folder / "x.nemo", "w") as bad:
        for member in good:
            data = torch_zip(content) if member.name.endswith(".ckpt") else good.extractfile(member).read()  # type: ignore[union-attr]
            member.size = len(data)
            bad.addfile(member, io.BytesIO(data))
    return folder / "x.nemo"


def metadata(paths: dict[str, Path], folder: Path, content: bytes) -> Path:
    """Write ``.metadata`` of a BioNeMo 2 directory."""
    path = copied(paths["nemo2"], folder)
    (path / "weights/.metadata").write_bytes(content)
    return path


def piece(paths: dict[str, Path], folder: Path, content: bytes) -> Path:
    """Write a piece of a ``.distcp`` file: the embeddings."""
    path = copied(paths["nemo2"], folder)
    data = torch_zip(content)
    with (path / "weights/__0_0.distcp").open("ab") as stream:
        at = stream.tell()
        stream.write(data)
    described = pickle.loads((path / "weights/.metadata").read_bytes())  # written by us
    for index, info in described.storage_data.items():
        if "word_embeddings" in index.fqn:
            info.offset, info.length = at, len(data)
    (path / "weights/.metadata").write_bytes(pickle.dumps(described))
    return path


Container = Callable[[dict[str, Path], Path, bytes], Path]

CONTAINERS: Final[dict[str, Container]] = {
    container.__name__: container
    for container in (metadata, fair_esm, fair_esm_legacy, regression, legacy_bin, nemo, piece)
}


def matrix(rows: Iterable[str], columns: Iterable[str]) -> list[Any]:
    """All pairs as parameters of a test; long but for the first row, the first column and a diagonal."""
    rows, columns = list(rows), list(columns)
    return [
        (row, column) if i == 0 or j == 0 or j % len(rows) == i else pytest.param(row, column, marks=pytest.mark.long)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]
