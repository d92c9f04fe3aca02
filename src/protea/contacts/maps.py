"""Contact maps on disk: complete ones in HDF5, or their likely pairs in a table."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from protea.contacts.predict import contacts, too_long
from protea.embed.stores import store_name
from protea.errors import SequenceTooLongError, UsageError
from protea.infer.runner import FloatArray, Runner
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.output import staged
from protea.progress import SILENT, Progress
from protea.rerun import failed
from protea.tables import Beside, check_output, write_table

ContactMap = tuple[str, str, FloatArray]
"""Name and sequence of a protein, and its map ``[L, L]``."""


def check_maps(path: Path, run: Mapping[str, Any], models: Callable[[], Mapping[str, Any]], *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done; see ``tables.check_output``."""
    try:
        check_output(path, run, models, overwrite=overwrite, others=(".h5",))
    except UsageError as error:
        raise UsageError(
            f"{path}: unknown kind of contacts; name a .h5, or a .csv, .tsv or .parquet for a table of pairs"
        ) from error


def without_too_long(model: Encoder, proteins: Mapping[str, str], rows: list[ReportRow]) -> dict[str, str]:
    """The proteins that are short enough to predict, at least one; ``rows`` receives the others."""
    kept = {}
    for name, sequence in proteins.items():
        reason = too_long(model, len(sequence))
        if reason is None:
            kept[name] = sequence
        else:
            rows.append(ReportRow(name, "skipped", reason))
    if not kept:
        raise SequenceTooLongError(f"{rows[-1].id}: {rows[-1].detail}")
    return kept


def predict_maps(
    model: Encoder,
    proteins: Mapping[str, str],
    draw: Callable[[str, FloatArray], None],
    progress: Progress = SILENT,
    runner: Runner | None = None,
) -> Iterator[ContactMap]:
    """The maps of proteins, one after another; ``draw`` receives each, ``progress`` advances by residues.

    ``runner`` computes the passes; by default one of the model's own.
    """
    progress.begin("predicting", sum(map(len, proteins.values())))
    for name, sequence in proteins.items():
        probabilities = contacts(model, model.alphabet.encode(sequence), name, runner)
        draw(name, probabilities)
        yield name, sequence, probabilities
        progress.advance(len(sequence))


def write_maps(
    path: Path | None, maps: Iterable[ContactMap], rows: list[ReportRow], settings: Mapping[str, Any]
) -> None:
    """Write maps as the suffix of ``path`` says, with the report and the settings; without a path, only draw them.

    ``min_probability`` and ``min_separation`` of the settings limit the pairs of a table.
    """
    settings = {**settings, **failed(rows)}
    beside = Beside("id\twhat\tdetail", rows, settings)
    if path is None:
        deque(maps, maxlen=0)
    elif path.suffix == ".h5":
        with staged(path, overwrite=True) as aside:
            _write_h5(aside, maps, settings)
            beside.write(aside)
    else:
        write_table(path, _pairs(maps, settings["min_probability"], settings["min_separation"]), beside)


def _write_h5(path: Path, maps: Iterable[ContactMap], settings: Mapping[str, Any]) -> None:
    """Write one ``[L, L]`` float32 dataset per protein, named as ``protea embed`` names them."""
    with closing(h5py.File(path, "w", libver=("v108", "v108"), track_order=True)) as file:
        for name, sequence, probabilities in maps:
            dataset = file.create_dataset(store_name(name), data=probabilities)
            dataset.attrs["id"] = name
            dataset.attrs["sequence"] = np.bytes_(sequence)
            dataset.attrs["length"] = len(sequence)
        file.attrs["protea"] = json.dumps(dict(settings))


def _pairs(maps: Iterable[ContactMap], least: float, separation: int) -> Any:
    """A table of pairs; residues are counted from 1, i before j."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    types = {"id": text, "i": number, "j": number, "residue_i": text, "residue_j": text, "probability": pa.float64()}
    schema = pa.schema(types)
    tables = [schema.empty_table()]
    for name, sequence, probabilities in maps:
        i, j = np.nonzero(np.triu(probabilities >= least, min(separation, len(sequence))))
        letters = np.array(list(sequence))
        columns = ([name] * len(i), i + 1, j + 1, letters[i], letters[j], probabilities[i, j])
        tables.append(pa.table([pa.array(column) for column in columns], list(types)).cast(schema))
    return pa.concat_tables(tables).combine_chunks()
