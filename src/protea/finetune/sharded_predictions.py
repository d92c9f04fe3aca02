"""The merge of the shards of ``protea predict``: that of embeddings, with tables in place of arrays."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from protea.embed.outputs import EmbeddingOutput
from protea.embed.sharded import merge
from protea.embed.stores import ArrayLayout, Contents
from protea.errors import UsageError
from protea.finetune.prediction_store import SUFFIXES, PredictionTable, read_predictions
from protea.output import WRITTEN, read_run

_ANY: Final = ArrayLayout((), (), 0, "float32")  # a table does not say which arrays its rows were made of


def _stored(shard: Path, output: Path) -> tuple[EmbeddingOutput, Contents]:
    kind = SUFFIXES.get(output.suffix)
    if kind is None:
        raise UsageError(f"merge {output}: unknown suffix {output.suffix!r}; use {', '.join(SUFFIXES)}")
    schema, blocks = read_predictions(shard, kind)
    provenance = {name: value for name, value in read_run(shard).items() if name != WRITTEN}
    entries: Any = ((None, partial(dict, block)) for block in blocks)
    return PredictionTable(output, kind, _ANY, schema), Contents(provenance, _ANY, cast("Any", entries))


merge_predictions: Final = partial(merge, opened=_stored)
