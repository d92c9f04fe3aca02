"""The run behind ``protea score``: from a FASTA file and a table of variants to scores, by one model or several.

Errors in any model or protein are found before the first model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from protea import bundled
from protea.alphabet import Alphabet
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.errors import FastaError, UsageError
from protea.infer.loading import LoadedModel, load_model
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.score import variant_table as tables
from protea.score.effects import Protein, Scoring
from protea.score.expected import tokens_seen_at_once
from protea.score.proteins import wild_types
from protea.tables import Beside, check_output, write_table

if TYPE_CHECKING:
    import pyarrow as pa


class ScoredVariants(NamedTuple):
    """The result of a run: the table with its scores, its rows by protein, and the changes of the wild types."""

    table: pa.Table
    rows: tables.Rows
    changes: list[ReportRow]


def score_variants(
    proteins: str,
    variants: Path | Sequence[str] | None,
    how: Scoring,
    *,
    models: Sequence[str] = (bundled.NAME,),
    column: str = "model_score",
    unknown: str = "x",
    one_protein: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
    load: Callable[[str], LoadedModel] = load_model,
    progress: Progress = SILENT,
) -> ScoredVariants:
    """Score variants of the proteins in a FASTA file, and write the output.

    Arguments are the options of the command; ``variants`` are a table, the variants themselves, or ``None`` for a
    single-site scan. ``one_protein`` refuses several proteins, which a picture cannot show. ``progress`` counts passes.
    """
    if output is not None:
        check_output(output, overwrite=overwrite)
    ensemble = open_ensemble(models)
    alphabet = common_alphabet(ensemble)
    changes: list[ReportRow] = []
    wild = wild_types([proteins], alphabet, unknown, changes)
    if variants is None:
        table, source = tables.scan_table(wild, how.offset), "scan"
    elif isinstance(variants, Path):
        table, source = tables.read_variants(variants), str(variants)
    else:
        table, source = tables.variant_table(variants), ",".join(variants)
    rows = tables.rows_of(table, wild, alphabet, how)
    tables.check_columns(table, column, models)
    if not table.num_rows:
        raise FastaError(f"{proteins}: nothing to scan; no protein in it has residues other than gaps")
    if one_protein and len(rows.proteins) != 1:
        raise UsageError(f"--plot draws one protein, but there are {len(rows.proteins)}; give a file of one protein")
    check_lengths(ensemble, rows.proteins, how.long)
    scores, provenance = {}, {}
    for name in models:
        model = load(name)
        progress.begin("scoring", how.passes(rows.proteins))
        scores[name] = tables.scores_of(model.module, rows, how, progress)
        provenance[name] = model.circumstances()
        del model  # free its memory before the next model is loaded
    table = tables.with_scores(table, column, scores)
    if output is not None:
        altered = [("", change.id, f"{change.what}: {change.detail}") for change in changes]
        lines = [*altered, *rows.problems, *(("", "", advice) for advice in rows.advice)]
        run = {"command": "score", "proteins": proteins, "variants": source, **asdict(how), "unknown": unknown}
        write_table(output, table, Beside("row\tvariant\treason", lines, run | {"models": provenance}))
    return ScoredVariants(table, rows, changes)


def open_ensemble(names: Sequence[str]) -> dict[str, Encoder]:
    """Models by name, without their weights; each must have a language-model head, and none may be named twice."""
    models: dict[str, Encoder] = {}
    places: set[Path] = set()
    for name in names:
        path = locate(name)
        if path.resolve() in places:
            raise UsageError(f"-m {name}: this model is named twice; name each model once")
        places.add(path.resolve())
        with open_checkpoint(path) as checkpoint:
            checkpoint.model.require("logits")
            models[name] = checkpoint.model
    return models


def common_alphabet(models: Mapping[str, Encoder]) -> Alphabet:
    """The smallest alphabet; a ``UsageError`` if another model cannot read it."""
    smallest = min((model.alphabet for model in models.values()), key=lambda alphabet: len(alphabet.residues))
    for name, model in models.items():
        if missing := sorted(set(smallest.residues) - set(model.alphabet.residues)):
            raise UsageError(
                f"-m {name}: its alphabet lacks {', '.join(missing)}, which the other models have; score it separately"
            )
    return smallest


def check_lengths(models: Mapping[str, Encoder], proteins: Sequence[Protein], long: str) -> None:
    """Refuse a protein that is too long for a model, even if only an insertion makes it so."""
    for protein in proteins:
        mutants = (variant.apply(protein.sequence) for variant in protein.variants if not variant.is_substitution)
        longest = max(map(len, (protein.sequence, *mutants)))
        for model in models.values():
            tokens_seen_at_once(model, protein.name, model.alphabet.frame.tokens(longest), long)
