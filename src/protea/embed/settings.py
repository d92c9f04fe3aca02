"""The options of ``protea embed``, from flags and from YAML files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from protea import bundled
from protea.embed.embeddings import check_poolings
from protea.embed.prepare import Duplicates, Long, RecordPolicies
from protea.errors import UsageError
from protea.fasta import STDIN
from protea.letters import Gaps, Unknown
from protea.output import WRITTEN
from protea.records import InputColumns, checked
from protea.settings_errors import Section, read_yaml, validate
from protea.shards import Shard, read_shard

PROVENANCE: Final = "provenance"
"""Key of a run file with the circumstances and counts of the run; ignored when the file is read."""


def _split(value: Any) -> Any:
    """Accept ``a,b`` for a list, and one member without brackets."""
    members = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not members or any(isinstance(member, bool) or not isinstance(member, str | int) for member in members):
        raise ValueError("must be a list, or members separated by commas")
    return [member.strip() if isinstance(member, str) else member for member in members]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


DIVISION: Final = "residues"
"""The unit that shards divide equally, as run files name it."""


def _shard(value: Any) -> Any:
    return value if value is None or isinstance(value, Shard) else read_shard(str(value))


class EmbedSettings(Section):
    """The options of ``protea embed``, with the names, defaults and meanings of the flags."""

    inputs: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
    sequences: Path | None = None
    residues: Path | None = None
    logits: Path | None = None
    model: str = bundled.NAME
    pool: Annotated[tuple[str, ...], BeforeValidator(_split), Field(min_length=1)] = ("mean",)
    layers: Annotated[tuple[int, ...], BeforeValidator(_split), Field(min_length=1)] = (-1,)
    dtype: Literal["float32", "bfloat16", "float16", "bf16-mixed", "int8"] = "float32"
    fast: bool = False
    store: Literal["float32", "float16"] = "float32"
    compression: Annotated[int, Field(ge=1, le=9)] | None = None
    device: str = "auto"
    devices: Annotated[int, Field(ge=1)] = 1
    long: Long = "truncate"
    unknown: Unknown = "x"
    gaps: Gaps = "keep"
    id_column: str | None = None
    sequence_column: str | None = None
    duplicates: Duplicates = "error"
    token_budget: Annotated[int, Field(ge=1)] | None = None
    shard: Annotated[Shard | None, BeforeValidator(_shard)] = None

    @property
    def policies(self) -> RecordPolicies:
        """The policies for records that cannot be embedded as they are."""
        return RecordPolicies(long=self.long, unknown=self.unknown, gaps=self.gaps, duplicates=self.duplicates)

    @property
    def columns(self) -> InputColumns:
        """The columns of input tables."""
        return InputColumns(self.id_column, self.sequence_column)

    @property
    def outputs(self) -> list[Path]:
        """The outputs, the one of ``-o`` first; a folder that serves ``-o`` and ``-r`` appears once."""
        paths = (self.sequences, self.residues, self.logits)
        return list(dict.fromkeys(path for path in paths if path is not None))

    def option(self, path: Path) -> str:
        """The option that names an output; of two options, the one of sequences."""
        return {self.logits: "--logits", self.residues: "-r", self.sequences: "-o"}[path]

    def shown(self) -> dict[str, Any]:
        """The settings as plain values for YAML and JSON."""
        plain = self.model_dump(mode="json", exclude_defaults=False)
        return plain | {"shard": None if self.shard is None else str(self.shard)}


def parse(values: Mapping[str, Any], origin: str) -> EmbedSettings:
    """Make settings of values by option name; ``origin`` says in messages where the values come from."""
    settings = validate(EmbedSettings, values, origin, noun="option")
    check_poolings(settings.pool)
    if settings.fast and settings.dtype != "float32":
        raise UsageError(f"{origin}: --fast chooses the type; leave out --dtype {settings.dtype}")
    if not settings.outputs:
        raise UsageError(
            "no output: name one with -o (one vector per sequence), -r (one per residue) or --logits (predictions)"
        )
    checked(settings.inputs, settings.columns)
    _check_paths(settings)
    if settings.shard is not None and settings.devices > 1:
        raise UsageError("--shard and --devices exclude each other: --devices makes one shard per GPU")
    return settings


def _check_paths(settings: EmbedSettings) -> None:
    """Refuse outputs that would replace each other, an input, or the folder of an input."""
    if any("\0" in str(path) for path in (*settings.inputs, *settings.outputs)):
        raise UsageError("a path holds a NUL byte")
    inputs = [os.path.realpath(path) for path in settings.inputs if path != STDIN]
    for path in settings.outputs:
        option = settings.option(path)
        if path.name in ("", ".."):
            raise UsageError(f"{option} {str(path)!r}: does not end in the name of a file or folder; add one")
        place = os.path.realpath(path)
        if place in inputs:
            raise UsageError(f"{path}: is both input and output; name another output")
        for given in inputs:
            if Path(given).is_relative_to(place):
                raise UsageError(f"{option} {path}: this folder holds the input {given}; name another output")
    by_option = {"-o": settings.sequences, "-r": settings.residues, "--logits": settings.logits}
    for (one, first), (other, second) in combinations(by_option.items(), 2):
        if first is None or second is None or os.path.realpath(first) != os.path.realpath(second):
            continue
        if other == "--logits":
            raise UsageError(f"{one} and --logits both name {second}; give each its own output")
        if first != second or first.suffix:
            raise UsageError(f"-o and -r both name {second}; give each its own file, or name a folder for both")


def read_config(path: Path) -> dict[str, Any]:
    """Read the options in a YAML file; the provenance and the size in a run file are ignored."""
    values = read_yaml(path)
    return {str(name).replace("-", "_"): value for name, value in values.items() if name not in (PROVENANCE, WRITTEN)}
