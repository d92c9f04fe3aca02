"""Reads pickles without running anything: returns what a checkpoint's pickle describes, and calls nothing it names.

Python's own unpickler calls whatever a file names. This one accepts only the operations and names that checkpoints
need. Tensors become descriptions of where their values are; configuration objects of other libraries become ``Inert``
records of their state; every other name or operation is an error.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from protea.checkpoints.region import Region, damaged, hostile
from protea.errors import CheckpointError

MAX_PICKLE_BYTES: Final = 64 << 20
_MAX_OPERATIONS: Final = 8_000_000
"""Both limits are far above what any model needs. An operation of one byte may create an object of a hundred bytes."""

MAX_AXES: Final = 16
MAX_LENGTH: Final = 1 << 60
"""Every axis, stride and offset is smaller."""

_DTYPES: Final = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_KINDS: Final = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_STORAGES: Final = {f"{kind}Storage": dtype for kind, dtype in zip(_KINDS, _DTYPES.values(), strict=True)}
_STORAGES["UntypedStorage"] = torch.uint8
_INERT: Final = re.compile(
    r"argparse\.Namespace|typing\.\w+|pathlib\.\w+|datetime\.\w+|_?io\.BytesIO|collections\.(Counter|deque)"
    r"|builtins\.(int|float|str|bool|bytes|bytearray|list|dict|tuple|set|frozenset|complex|object|slice|type|range)"
    r"|(omegaconf|fairseq|megatron|nemo|bionemo|lightning|pytorch_lightning|lightning_fabric|transformer_engine"
    r"|torch\.distributed)\.[\w.]+"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|bool_?|u?int\d+|float\d+)"
    r"|torch\.(device|serialization\._get_layout|memory_format|contiguous_format|strided|nn\.parameter\.Parameter)"
)
"""Names that become records: classes of the configurations and metadata that real checkpoints carry."""

_OPERATIONS: Final = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD BINPERSID"
)
"""45 of pickle's 68 operations; none of them reserves memory for absent data, or reads numbers of any length."""


class StorageRef(NamedTuple):
    """A storage that a pickle names: its type and its key in the file."""

    dtype: torch.dtype
    key: str


class TensorRef(NamedTuple):
    """A tensor that a pickle describes: a strided view of a storage, in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """A record in place of an object whose class is not run: the class's name, and the state the object was given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def append(self, _: Any) -> None:
        """Ignore items that the pickle appends."""

    extend = append


class _Name(NamedTuple):
    """A name that a pickle may call, and the function that answers the call."""

    name: str
    call: Callable[..., Any]


def unpickle(source: Region | io.IOBase, where: str, scale: int = 1) -> Any:
    """What a pickle describes: dicts, lists, tuples, strings, numbers, types, ``TensorRef`` and ``Inert``.

    A stream is read from its position to the end of the pickle. Messages call the pickle ``where``. ``scale`` is what
    the usual limits are multiplied by.
    """
    if isinstance(source, Region):
        if source.size > scale * MAX_PICKLE_BYTES:
            raise CheckpointError(f"{where}: {source.size:,} bytes, far beyond what describes a model; not read")
        source = io.BytesIO(source.read())
    try:
        return _Unpickler(source, where, scale).load()
    except CheckpointError:
        raise
    # Damage raises almost any exception: missing bytes, wrong types, numbers that are too large.
    except Exception as error:
        raise damaged(where, f"{type(error).__name__} while reading it") from error


class _Unpickler(pickle._Unpickler):
    """The standard library's reader in Python, with harmless operations in place of its own."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    proto: int

    def __init__(self, stream: io.IOBase, where: str, scale: int) -> None:
        super().__init__(stream)
        self.where = where
        self.left = scale * _MAX_OPERATIONS

    def find_class(self, module: str, name: str) -> Any:
        # Nothing is imported.
        if self.proto < 3:  # written with the names of Python 2
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if full in _FUNCTIONS:
            return _Name(full, _FUNCTIONS[full])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if _INERT.fullmatch(full):
            return _Name(full, lambda *_: Inert(full))
        if module.partition(".")[0] not in sys.stdlib_module_names:
            raise CheckpointError(
                f"{self.where}: holds an object of {full[:200]!r}; reading it would run code, which may be hostile, so "
                "it was not loaded: save a state dict (`torch.save(model.state_dict(), FILE)`), not the model "
                "(`torch.save(model, FILE)`), or use `model.save_pretrained(FOLDER)`"
            )
        raise hostile(self.where, f"asks for {full[:200]!r}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> StorageRef:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str | int):
            raise ValueError("not a storage")
        return StorageRef(dtype, str(key))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise hostile(self.where, "calls an object that is no function")
        self.stack[-1] = function.call(*arguments)

    load_newobj = load_reduce  # to create an object means to call its class

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments, which a record does not need
        self.load_newobj()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state
        # A dictionary of tensors has a state too: version numbers that are not needed.
        elif not isinstance(self.stack[-1], dict):
            raise ValueError("state for an object that has none")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Inert):
            raise ValueError("items for an object that has none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            if isinstance(target, dict):
                if key in target:
                    raise ValueError("a dictionary has one key twice")
                target[key] = value


def _guarded(code: int, operation: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """An operation that is refused unless it is allowed, and that counts how often operations run."""

    def run(reader: _Unpickler) -> None:
        if operation is None:
            raise hostile(reader.where, f"asks for the operation {bytes([code])!r}, which no checkpoint needs")
        reader.left -= 1
        if reader.left < 0:
            raise CheckpointError(f"{reader.where}: describes far more than a model; not read")
        operation(reader)

    return run


_STANDARD: Final[dict[int, Callable[[Any], None]]] = pickle._Unpickler.dispatch
_ALLOWED: Final[dict[int, Callable[[Any], None]]] = {
    code: vars(_Unpickler).get(f"load_{name.lower()}", _STANDARD[code])
    for name in _OPERATIONS.split()
    for code in getattr(pickle, name)
}
_Unpickler.dispatch = {code: _guarded(code, _ALLOWED.get(code)) for code in range(256)}


def _check_key(key: Any) -> None:
    # Nested tuples as keys would be hashed level by level, to any depth.
    if not isinstance(key, str | int | float | Inert | None):
        raise ValueError("a key that is not a name")


def _mapping(*arguments: Any) -> dict[Any, Any]:
    """An ordered dictionary, whose items may be given as pairs, or a default dictionary, whose default is dropped."""
    pairs = arguments[-1] if arguments and isinstance(arguments[-1], list) else []
    for key, _ in pairs:
        _check_key(key)
    return dict(pairs)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *stride)
    possible = all(isinstance(number, int) and 0 <= number < MAX_LENGTH for number in numbers)
    if len(shape) != len(stride) or len(shape) > MAX_AXES or not possible:
        raise ValueError("a tensor of impossible shape")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "torch.Size": lambda *values: tuple(values[0]) if values else (),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "copyreg._reconstructor": lambda kind, *_: Inert(kind.name),  # an object, as old protocols write it
    "_codecs.encode": lambda text, _: str.encode(text, "latin1"),  # bytes, as protocol 2 writes them
}
