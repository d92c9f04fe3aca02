"""Answers as bytes, a few records at a time: JSON, base64 inside JSON, NPZ, HDF5, Parquet, or a stream of Arrow.

All formats but HDF5 need memory for a few records only; HDF5 is made in memory, so its size is limited.

    application/json                      arrays as lists; what is not a number is null
    application/json; arrays=base64       arrays as {"dtype", "shape", "data"}: little-endian float32
    application/x-npz                     one array a column; arrays whose shapes differ are COLUMN/0, COLUMN/1, ...
    application/x-hdf5                    as ``protea embed`` writes it: one dataset a record, further ones ID@COLUMN
    application/vnd.apache.parquet, application/vnd.apache.arrow.stream    a row a record
"""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protea.embed.stores import store_name
from protea.serve.problems import RefusedError
from protea.text import bytes_text

JSON: Final = "application/json"
BASE64: Final = "application/json; arrays=base64"
NPZ: Final = "application/x-npz"
HDF5: Final = "application/x-hdf5"
PARQUET: Final = "application/vnd.apache.parquet"
ARROW: Final = "application/vnd.apache.arrow.stream"

_CHUNK: Final = 1 << 20  # bytes that are collected before they are sent
_MOST_HDF5: Final = 256 << 20

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of an answer: ``text``, ``int``, ``float``, ``bool``, or arrays ``floats`` of float32.

    The shape of arrays has ``None`` for an axis whose length differs between records.
    """

    name: str
    kind: str
    shape: tuple[int | None, ...] = ()


@dataclass
class Answer:
    """What a request gets: facts about all of it, and rows that are computed as they are sent."""

    about: dict[str, Any]
    columns: Sequence[Column]
    rows: Iterator[Row]


def chosen(accept: str) -> str:
    """The format that an ``Accept`` header likes best; a refusal with status 406 names the formats."""
    entries = [_accepted(entry) for entry in accept.lower().split(",") if entry.strip()] or [(1.0, JSON)]
    weight, media_type = max(entries, key=lambda entry: entry[0])  # the first of several that are liked equally
    if media_type is None or not weight:
        raise RefusedError(f"no format of {accept[:200]!r} is known; use {', '.join(WRITERS)}", 406, "not-acceptable")
    return media_type


def _accepted(entry: str) -> tuple[float, str | None]:
    """The weight ``q`` of one entry of ``Accept``, and the format that it means; no weight if that is not known."""
    kind, *parameters = (piece.strip() for piece in entry.split(";"))
    given = {name.strip(): value.strip(' "') for name, _, value in (piece.partition("=") for piece in parameters)}
    if kind in ("*/*", "application/*", JSON):
        media_type = {"": JSON, "base64": BASE64}.get(given.get("arrays", ""))
    else:
        media_type = kind if kind in WRITERS else None
    weight = re.fullmatch(r"0(\.\d*)?|1(\.0*)?", given.get("q", "1"))
    return (float(weight[0]) if weight and media_type else 0.0), media_type


def written(answer: Answer, media_type: str) -> Iterator[bytes]:
    """The bytes of an answer in a format, in pieces of about a megabyte."""
    held: list[bytes] = []
    size = 0
    for piece in WRITERS[media_type](answer):
        held.append(piece)
        size += len(piece)
        if size >= _CHUNK:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def as_json(value: object) -> bytes:
    """A value as JSON in ASCII, so that no text can fail to be encoded."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _json(answer: Answer, array: Callable[[Any], bytes]) -> Iterator[bytes]:
    yield as_json(answer.about)[:-1] + b',"records":['
    for number, row in enumerate(answer.rows):
        members = (
            as_json(c.name) + b":" + (array(row[c.name]) if c.kind == "floats" else as_json(_plain(row[c.name])))
            for c in answer.columns
        )
        yield (b",{" if number else b"{") + b",".join(members) + b"}"
    yield b"]}"


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def rows_as_json(array: Any) -> bytes:
    """An array as JSON, a row at a time: no other thread runs while Python makes one text of a large list."""
    if array.ndim < 2:
        return as_json(listed(array))
    return b"[" + b",".join(map(rows_as_json, array)) + b"]"


def listed(array: Any) -> Any:
    """An array as lists for JSON; what is not a number is ``None``."""
    if np.isfinite(array).all():
        return array.tolist()
    given = array.astype(object)
    given[~np.isfinite(array)] = None
    return given.tolist()


def _encoded(array: Any) -> bytes:
    data = np.ascontiguousarray(array, "<f4")
    return as_json({"dtype": "float32", "shape": data.shape, "data": base64.b64encode(data.tobytes()).decode()})


class _Sink(io.RawIOBase):
    """Takes what a writer writes, and gives it out in pieces; cannot seek."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._place = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._place += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._place

    def taken(self) -> bytes:
        """What was written since the last call."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _npz(answer: Answer) -> Iterator[bytes]:
    sink = _Sink()
    kept: dict[str, list[Any]] = {column.name: [] for column in answer.columns if None not in column.shape}
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as file:
        for number, row in enumerate(answer.rows):
            for column in answer.columns:
                if column.name in kept:
                    kept[column.name].append(row[column.name])
                else:
                    _add(file, f"{column.name}/{number}", row[column.name])
            yield sink.taken()
        for column in answer.columns:
            if column.name in kept:
                _add(file, column.name, _array(column, kept[column.name]))
        _add(file, "protea", np.array(json.dumps(answer.about)))
    yield sink.taken()


def _add(file: zipfile.ZipFile, name: str, values: Any) -> None:
    with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, np.asarray(values), allow_pickle=False)


def _array(column: Column, values: list[Any]) -> Any:
    match column.kind:
        case "floats":
            return np.stack(values) if values else np.empty((0, *column.shape), np.float32)
        case "text":
            return np.array(["" if value is None else value for value in values], np.str_)
        case "int":
            return np.array([0 if value is None else value for value in values], np.int64)
        case "bool":
            return np.array(values, bool)
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _hdf5(answer: Answer) -> Iterator[bytes]:
    whole, size = io.BytesIO(), 0
    arrays = [column for column in answer.columns if column.kind == "floats"]
    others = [column for column in answer.columns if column.kind != "floats"]
    kept: dict[str, list[Any]] = {column.name: [] for column in others}
    with h5py.File(whole, "w", libver=("v108", "v108"), track_order=True) as file:
        for row in answer.rows:
            for number, column in enumerate(arrays):
                name = store_name(row["id"]) + (f"@{column.name}" if number else "")
                dataset = file.create_dataset(name, data=row[column.name])
                dataset.attrs.update({other.name: _array(other, [row[other.name]]).item() for other in others})
                size += row[column.name].nbytes
                if size > _MOST_HDF5:
                    most = bytes_text(_MOST_HDF5)
                    raise RefusedError(
                        f"HDF5 answers may have {most}; ask for {ARROW} or {NPZ}, or make a job", 413, "too-large"
                    )
            for column in () if arrays else others:
                kept[column.name].append(row[column.name])
        for column in () if arrays else others:
            text = h5py.string_dtype() if column.kind == "text" else None
            values = _array(column, kept[column.name])
            file.create_dataset(column.name, data=values.astype(object) if text else values, dtype=text)
        file.attrs["protea"] = json.dumps(answer.about)
        file.attrs["model_name"] = str(answer.about.get("model", ""))
    yield whole.getvalue()


def _schema(answer: Answer) -> pa.Schema:
    plain = {"text": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    fields = [(column.name, plain.get(column.kind) or _nested(column.shape)) for column in answer.columns]
    return pa.schema(fields, metadata={"protea": json.dumps(answer.about)})


def _nested(shape: Sequence[int | None]) -> pa.DataType:
    kind = pa.float32()
    for axis in reversed(shape):
        kind = pa.list_(kind) if axis is None else pa.list_(kind, axis)
    return kind


def _table(schema: pa.Schema, columns: Sequence[Column], rows: Sequence[Row]) -> pa.Table:
    arrays = []
    for column in columns:
        values = [row[column.name] for row in rows]
        if column.kind == "floats":
            arrays.append(_nested_array(column.shape, values))
        else:
            arrays.append(pa.array([_plain(value) for value in values], schema.field(column.name).type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _nested_array(shape: Sequence[int | None], values: list[Any]) -> pa.Array:
    """Arrays of one column; only the first axes may differ in length, and then all of an array's rows are alike."""
    array = pa.array(np.concatenate([np.ascontiguousarray(value, np.float32).reshape(-1) for value in values]))
    for axis in reversed(range(len(shape))):
        if shape[axis] is not None:
            array = pa.FixedSizeListArray.from_arrays(array, shape[axis])
            continue
        sizes = [np.full(int(np.prod(value.shape[:axis])), value.shape[axis]) for value in values]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int32)
        array = pa.ListArray.from_arrays(pa.array(offsets), array)
    return array


def _tables(answer: Answer, schema: pa.Schema) -> Iterator[pa.Table]:
    rows: list[Row] = []
    size = 0
    for row in answer.rows:
        rows.append(row)
        size += sum(getattr(value, "nbytes", 8) for value in row.values())
        if size >= _CHUNK:
            yield _table(schema, answer.columns, rows)
            rows, size = [], 0
    if rows:
        yield _table(schema, answer.columns, rows)


def _arrow(answer: Answer) -> Iterator[bytes]:
    sink, schema = _Sink(), _schema(answer)
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as writer:
        for table in _tables(answer, schema):
            writer.write_table(table)
            yield sink.taken()
    yield sink.taken()


def _parquet(answer: Answer) -> Iterator[bytes]:
    sink, schema = _Sink(), _schema(answer)
    with pq.ParquetWriter(pa.PythonFile(sink, "w"), schema) as writer:
        for table in _tables(answer, schema):
            writer.write_table(table)
            yield sink.taken()
    yield sink.taken()


WRITERS: Final[Mapping[str, Callable[[Answer], Iterator[bytes]]]] = {
    JSON: lambda answer: _json(answer, rows_as_json),
    BASE64: lambda answer: _json(answer, _encoded),
    NPZ: _npz,
    HDF5: _hdf5,
    PARQUET: _parquet,
    ARROW: _arrow,
}
"""Writers by media type."""
