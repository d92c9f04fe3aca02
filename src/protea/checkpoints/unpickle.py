"""Pickles read without running anything: what a checkpoint's pickle describes, never what it asks to be called.

Python's own unpickler calls whatever a file names. This one knows the few operations and the few names that
checkpoints need. Tensors become descriptions of where their numbers are; configuration objects of other libraries
become ``Inert`` records of their state; any other name, and any other operation, is an error.
"""

from __future__ import annotations

import io
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from protea.errors import CheckpointError

MAX_PICKLE_BYTES: Final = 64 << 20
"""Far above the description of any model; what is larger holds something else."""

_MAX_OPERATIONS: Final = 8_000_000
"""The same for what is in it: an operation of one byte may make an object of a hundred."""

_MAX_AXES: Final = 16

_DTYPES: Final = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_STORAGES: Final = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
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
"""Of pickle's 68 operations; without any that reserves memory for data which is not there, or numbers of any length."""


class StorageRef(NamedTuple):
    """A storage that a pickle names: its key in the file, the type and number of its elements."""

    dtype: torch.dtype
    key: str
    numel: int


class TensorRef(NamedTuple):
    """A tensor that a pickle describes: a strided view of a storage, in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """What stands for an object of a class that is not run: the class's name, and the state it was given."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def extend(self, items: list[Any]) -> None:
        """What a pickle does to a list."""
        self.items += items

    def append(self, item: Any) -> None:
        """The same, for one item."""
        self.items.append(item)


def shown(value: Any) -> str:
    """A value as messages show it: what is built of others could be of any size once written out."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list | tuple) else repr(value)[:100]


class _Name(NamedTuple):
    """A name that a pickle may call, and what happens then."""

    name: str
    call: Callable[..., Any]


def unpickle(data: bytes | io.RawIOBase, where: str) -> Any:
    """Read one pickle.

    Args:
        data: the pickle, or a stream at whose position one begins, left after it.
        where: what messages call it.

    Returns:
        What it describes, of dicts, lists, tuples, strings, numbers, types, ``TensorRef`` and ``Inert``.

    Raises:
        CheckpointError: it is damaged, too large, or names something that a checkpoint has no use for.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return _Unpickler(stream, where).load()
    except CheckpointError:
        raise
    # Damage shows as almost anything: bytes that are missing, lists that are none, numbers that are too large.
    except Exception as error:
        raise CheckpointError(f"{where}: damaged: {type(error).__name__} while reading it; fetch it again") from error


class _Unpickler(pickle._Unpickler):
    """The standard library's reader in Python, with its operations replaced by the harmless ones."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    proto: int

    def __init__(self, stream: io.IOBase, where: str) -> None:
        super().__init__(stream)
        self._where = where
        self._operations = 0

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; nothing is imported."""
        if self.proto < 3:  # written with the names of Python 2
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if full in _CALLS:
            return _CALLS[full]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if _INERT.fullmatch(full):
            return _Name(full, lambda *arguments, **_: Inert(full, arguments))
        raise CheckpointError(
            f"{self._where}: asks for {full[:200]!r}, which no checkpoint needs; this file may be "
            "hostile and was not loaded"
        )

    def persistent_load(self, pid: Any) -> StorageRef:
        """A storage, which a pickle names by a tuple."""
        kind, dtype, key, _, count, *_ = pid
        described = isinstance(dtype, torch.dtype) and isinstance(key, str | int) and isinstance(count, int)
        if kind != "storage" or not described:
            raise ValueError("not a storage")
        return StorageRef(dtype, str(key), count)

    def get_extension(self, code: int) -> None:
        """The operations that come here are not among the allowed."""
        raise AssertionError(code)

    def load_reduce(self) -> None:
        """Call a name, if it is one of ours."""
        arguments = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        """Make an object of a class, as calling it would."""
        arguments = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        """The same with keywords, which are dropped: a record has no use for them."""
        self.stack.pop()
        self.load_newobj()

    def _called(self, what: Any, arguments: Any) -> Any:
        if not isinstance(what, _Name) or not isinstance(arguments, tuple):
            raise CheckpointError(f"{self._where}: calls what is no name; this file may be hostile, and was not loaded")
        return what.call(*arguments)

    def load_build(self) -> None:
        """Give a record its state. Dictionaries of tensors carry one, with versions that nobody needs."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):
            raise ValueError("state for what takes none")

    def load_setitem(self) -> None:
        """One item of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        """Items of a dictionary."""
        items = self.pop_mark()
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nested tuples as keys would be hashed level by level, as deep as the file likes.
            if not isinstance(key, str | int | float | Inert | None):
                raise ValueError("a key that is no name")
            if isinstance(target, Inert):
                target.items.append((key, value))
            elif isinstance(target, dict):
                if key in target:
                    raise ValueError("one name for two things")
                target[key] = value
            else:
                raise ValueError("items for what takes none")


class _Operations(dict[int, Callable[[Any], None]]):
    """The allowed operations; another is refused by its code."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        def refuse(reader: _Unpickler) -> None:
            raise CheckpointError(
                f"{reader._where}: asks for the operation {bytes([code])!r}, which no checkpoint needs; this file is "
                "damaged or hostile, and was not loaded"
            )

        return refuse


def _counted(operation: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(reader: _Unpickler) -> None:
        reader._operations += 1
        if reader._operations > _MAX_OPERATIONS:
            raise CheckpointError(f"{reader._where}: describes far more than a model; not read")
        operation(reader)

    return run


_KNOWN: Final[dict[int, Callable[[Any], None]]] = pickle._Unpickler.dispatch
_Unpickler.dispatch = _Operations(
    {
        code: _counted(_Unpickler.__dict__.get(f"load_{name.lower()}", _KNOWN[code]))
        for name in _OPERATIONS.split()
        for code in getattr(pickle, name)
    }
)


def _mapping(*arguments: Any) -> dict[Any, Any]:
    """An ordered dictionary, whose items come as pairs or later; a default dictionary, whose default is dropped."""
    pairs = arguments[-1] if arguments and isinstance(arguments[-1], list) else []
    out: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise ValueError("a key that is no name")
        out[key] = value
    return out


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *stride)
    possible = all(isinstance(number, int) and 0 <= number < 1 << 60 for number in numbers)
    if len(shape) != len(stride) or len(shape) > _MAX_AXES or not possible:
        raise ValueError("a tensor of impossible shape")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _size(*values: Any) -> tuple[Any, ...]:
    return tuple(values[0]) if values else ()


def _first(value: Any, *_: Any) -> Any:
    return value


def _record(kind: Any, *_: Any) -> Inert:
    """What ``copyreg`` makes of an old-style object: its class comes first."""
    if not isinstance(kind, _Name):
        raise ValueError("an object without a class")
    return Inert(kind.name)


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError("bytes from no text")
    return text.encode(encoding)


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "copyreg._reconstructor": _record,
    "_codecs.encode": _encoded,
}
_CALLS: Final = {name: _Name(name, call) for name, call in _FUNCTIONS.items()}
