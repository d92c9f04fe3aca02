"""What the native routes compute: a request's sequences in, an answer out, by the functions that the commands use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from protea.contacts.predict import contacts, too_long
from protea.data.masking import masking_named
from protea.embed import embeddings
from protea.embed.embeddings import Asked, Embedding, check_poolings, entropy, resolve_layers
from protea.embed.prepare import EncodedRecord, RecordPolicies, SeenIds, fit, prepare
from protea.embed.stores import ENTROPY, LOG_PROBABILITIES, RESIDUES, ArrayLayout, store_name
from protea.errors import FastaError, SequenceTooLongError, UsageError
from protea.fasta import Record
from protea.finetune.prediction_columns import columns as predicted_columns
from protea.finetune.prediction_columns import rows as predicted_rows
from protea.infer.runner import Runner
from protea.letters import ReportRow, clean
from protea.models.encoder import Encoder
from protea.progress import SILENT
from protea.score import effects, perplexity
from protea.score.effects import Scoring
from protea.score.expected import LongProtein, tokens_seen_at_once
from protea.score.proteins import check_no_masks, choice
from protea.score.variant_table import check_lengths, rows_of, scan_table, scores_of, variant_table
from protea.score.variants import CANONICAL, chosen_places, scan_cells
from protea.serve import schemas
from protea.serve.answer_formats import Answer, Column, Row, listed
from protea.serve.served import ServedAdapter, ServedModel, kinds_of

_ID: Final = (Column("id", "text"), Column("length", "int"), Column("truncated_from", "int"))

_PROTEIN: Final = "sequence 0"
"""The name in errors of the only protein of a request."""


@dataclass
class Work:
    """A checked request: the number of tokens to compute, and the function that gives the answer with a runner."""

    tokens: int
    sequences: int
    answer: Callable[[Runner], Answer]


def records_of(sequences: Sequence[str | schemas.Named]) -> list[Record]:
    """Records, whose places say number and id; a ``FastaError`` if HDF5 would name two of them alike."""
    records, seen = [], SeenIds()
    for number, given in enumerate(sequences):
        name, letters = (given.id, given.sequence) if isinstance(given, schemas.Named) else (str(number), given)
        record = Record(name, "", letters, f"sequence {number} ({name})")
        if not seen.first_time(store_name(name)):
            raise FastaError(f"{record.place}: an earlier sequence has this id; give each sequence its own id")
        records.append(record)
    return records


def prepared(
    records: Iterable[Record], model: Encoder, policies: RecordPolicies, rows: list[ReportRow]
) -> list[EncodedRecord]:
    """Encoded records; ``rows`` receives what was changed, cut or left out."""
    encoded = []
    for item in prepare(records, model, policies, SeenIds()):
        rows.extend(item.rows)
        if item.encoded is not None:
            encoded.append(item.encoded)
    if not encoded:
        raise _none_left(rows)
    return encoded


def _none_left(rows: Sequence[ReportRow]) -> FastaError:
    return FastaError("no sequence is left: " + "; ".join(f"id {row.id}: {row.detail}" for row in rows[:5]))


def about(model: ServedModel | ServedAdapter, rows: Iterable[ReportRow], tokens: int, **more: Any) -> dict[str, Any]:
    """The facts about an answer: whose numbers they are, and every record that was changed, cut or left out."""
    notes = [row._asdict() for row in rows]
    weights = {"sha256": model.sha256} if isinstance(model, ServedModel) else {}
    precision = model.lane.model.precision
    return {"model": model.name, **weights, "computed_in": precision, "tokens": tokens, **more, "notes": notes}


def _facts(record: EncodedRecord) -> Row:
    return {"id": record.record.id, "length": len(record.ids), "truncated_from": record.truncated_from}


def _embedding_work(
    model: ServedModel,
    body: schemas.SequencesBody,
    long: Any,
    layout: ArrayLayout,
    asked: Asked,
    arrays: Callable[[Embedding], Row],
    **more: Any,
) -> Work:
    rows: list[ReportRow] = []
    module = model.lane.model
    policies = RecordPolicies(long=long, unknown=body.unknown, gaps=body.gaps)
    encoded = prepared(records_of(body.sequences), module, policies, rows)
    tokens = sum(record.tokens for record in encoded)
    columns = []
    for kind in layout.kinds:
        shape: tuple[int | None, ...] = (layout.width,)
        if kind in (RESIDUES, LOG_PROBABILITIES, ENTROPY):
            shape = (None,) if kind == ENTROPY else (None, layout.width)
        columns += [Column(layout.name(kind, layer), "floats", shape) for layer in layout.layers]

    def answer(runner: Runner) -> Answer:
        found = embeddings.embed(runner, encoded, asked)
        return Answer(
            about(model, rows, tokens, **more),
            (*_ID, *columns),
            (_facts(embedding.encoded) | arrays(embedding) for embedding in found),
        )

    return Work(tokens, len(encoded), answer)


def embed(model: ServedModel, body: schemas.EmbedBody) -> Work:
    """One vector per sequence, as ``protea embed -o``."""
    module = model.lane.model
    poolings = check_poolings(body.pool, module.alphabet.frame)
    layers = resolve_layers(body.layers, module)
    layout = ArrayLayout(poolings, layers, module.config.hidden_size, "float32")

    def arrays(embedding: Embedding) -> Row:
        return {
            layout.name(kind, layer): embedding.pooled[kind][place]
            for kind in poolings
            for place, layer in enumerate(layers)
        }

    return _embedding_work(model, body, body.long, layout, Asked(layers=layers, poolings=poolings), arrays)


def residues(model: ServedModel, body: schemas.ResiduesBody) -> Work:
    """One vector per residue, as ``protea embed -r``."""
    module = model.lane.model
    layers = resolve_layers(body.layers, module)
    layout = ArrayLayout((RESIDUES,), layers, module.config.hidden_size, "float32")

    def arrays(embedding: Embedding) -> Row:
        assert embedding.residues is not None
        return {layout.name(RESIDUES, layer): embedding.residues[place] for place, layer in enumerate(layers)}

    return _embedding_work(model, body, body.long, layout, Asked(layers=layers, residues=True), arrays)


def logits(model: ServedModel, body: schemas.LogitsBody) -> Work:
    """Log-probabilities of each residue, as ``protea embed --logits``."""
    module = model.lane.model
    module.require("logits")
    alphabet = module.alphabet
    predicted = tuple(map(alphabet.tokens.index, alphabet.residues))
    layout = ArrayLayout((LOG_PROBABILITIES, ENTROPY), (module.config.num_hidden_layers,), len(predicted), "float32")

    def arrays(embedding: Embedding) -> Row:
        values = embedding.log_probabilities
        assert values is not None
        return {LOG_PROBABILITIES: values, ENTROPY: entropy(values)}

    asked = Asked(layers=(), predicted=predicted)
    return _embedding_work(model, body, body.long, layout, asked, arrays, letters=alphabet.residues)


def predict(adapter: ServedAdapter, body: schemas.PredictBody) -> Work:
    """The rows of ``protea predict``."""
    predictor, module = adapter.predictor, adapter.lane.model
    policies = RecordPolicies(
        long=body.long or predictor.long,
        unknown=body.unknown or predictor.unknown,
        gaps=body.gaps or predictor.gaps,
    )
    notes: list[ReportRow] = []
    encoded = prepared(records_of(body.sequences), module, policies, notes)
    tokens = sum(record.tokens for record in encoded)
    kinds = {"double": "float", "int64": "int", "bool": "bool", "string": "text"}
    columns = [Column(field.name, kinds[str(field.type)]) for field in predicted_columns(predictor)]

    def rows(runner: Runner) -> Iterator[Row]:
        for embedding in embeddings.embed(runner, encoded, kinds_of(predictor)):
            table = predicted_rows(predictor, embedding)
            for values in zip(*(table[column.name] for column in columns), strict=True):
                yield dict(zip((column.name for column in columns), values, strict=True))

    return Work(tokens, len(encoded), lambda runner: Answer(about(adapter, notes, tokens), columns, rows(runner)))


def _letters(record: Record, module: Encoder, body: schemas.Body, rows: list[ReportRow]) -> Record | None:
    """The record in letters of the alphabet, as scores read it."""
    check_no_masks(record.sequence, record.place)
    cleaned = clean(record, module.alphabet, body.unknown, body.gaps)
    rows.extend(cleaned.rows)
    return None if cleaned.sequence is None else record._replace(sequence=cleaned.sequence)


def _proteins(module: Encoder, body: schemas.SequencesBody, rows: list[ReportRow]) -> list[Record]:
    cleaned = (_letters(record, module, body, rows) for record in records_of(body.sequences))
    kept = [record for record in cleaned if record is not None]
    if not kept:
        raise _none_left(rows)
    return kept


def contact_maps(model: ServedModel, body: schemas.ContactsBody) -> Work:
    """Contact maps, as ``protea contacts``."""
    module = model.lane.model
    module.require("contacts")
    notes: list[ReportRow] = []
    records = _proteins(module, body, notes)
    for record in records:
        if reason := too_long(module, len(record.sequence)):
            raise SequenceTooLongError(f"{record.place}: {reason}")
    tokens = sum(module.alphabet.frame.tokens(len(record.sequence)) for record in records)

    def rows(runner: Runner) -> Iterator[Row]:
        for record in records:
            ids = module.alphabet.encode(record.sequence)
            found = contacts(module, ids, record.place, runner)
            yield {"id": record.id, "length": len(ids), "contacts": found}

    columns = (*_ID[:2], Column("contacts", "floats", (None, None)))
    return Work(tokens, len(records), lambda runner: Answer(about(model, notes, tokens), columns, rows(runner)))


def perplexities(model: ServedModel, body: schemas.PerplexityBody) -> Work:
    """The rows of ``protea perplexity -o``, and the perplexity of all sequences together."""
    module = model.lane.model
    module.require("logits")
    alphabet, notes = module.alphabet, list[ReportRow]()
    records = _proteins(module, body, notes)
    frame = alphabet.frame
    if body.pseudo:
        long = choice("long", body.long or "window", LongProtein)
        tokens = 0
        for record in records:
            size = frame.tokens(len(record.sequence))
            tokens += len(record.sequence) * min(size, tokens_seen_at_once(module, record.place, size, long))
        jobs = []
    else:
        long = choice("long", body.long or "truncate", Literal["truncate", "full", "error"])
        cut = (fit(record, alphabet.encode(record.sequence), module, long, notes) for record in records)
        masks = masking_named(body.masking)
        jobs = list(perplexity.mask(alphabet, ((e.record.place, e.ids) for e in cut), masks, body.seed))
        tokens = sum(len(job.tokens) for job in jobs)

    def answer(runner: Runner) -> Answer:
        if body.pseudo:
            named = ((record.place, record.sequence) for record in records)
            values = [-one for one, _ in effects.pseudo_log_likelihoods(runner, named, long=long)]
        else:
            values = list(perplexity.losses(runner, jobs))
        means = [float(one.mean(dtype="float64")) if len(one) else None for one in values]
        rows: Iterator[Row] = (
            {
                "id": record.id,
                "length": len(record.sequence),
                "predicted": len(one),
                "loss": mean,
                "perplexity": None if mean is None else perplexity.of_loss(mean),
            }
            for record, one, mean in zip(records, values, means, strict=True)
        )
        columns = (*_ID[:2], Column("predicted", "int"), Column("loss", "float"), Column("perplexity", "float"))
        return Answer(about(model, notes, tokens, perplexity=perplexity.of_all(values)), columns, rows)

    return Work(tokens, len(records), answer)


def score(model: ServedModel, body: schemas.ScoreBody) -> Work:
    """The rows of ``protea score``; a variant that cannot be scored has a reason instead of a score."""
    return _scored(model, body, variant_table(body.variants), ("mutant",))


def scan(model: ServedModel, body: schemas.ScanBody) -> Work:
    """The rows of ``protea score --scan``, and the scores as a matrix ``[L, 20]``."""
    return _scored(model, body, None, ("position", "wild_type", "letter", "mutant"))


def _scored(model: ServedModel, body: schemas.ProteinBody, table: Any, names: tuple[str, ...]) -> Work:
    module, notes = model.lane.model, list[ReportRow]()
    module.require("logits")
    record = _letters(Record("0", "", body.sequence, _PROTEIN), module, body, notes)
    if record is None:
        raise FastaError(f"no sequence is left: {notes[-1].detail}")
    how = Scoring(method=body.method, offset=body.offset, long=body.long)
    positions = body.positions if isinstance(body, schemas.ScanBody) else None
    if table is None:
        table = scan_table({_PROTEIN: record.sequence}, body.offset, positions)
        if not table.num_rows:
            raise UsageError("nothing to scan: no residue other than gaps")
    rows = rows_of(table, {_PROTEIN: record.sequence}, module.alphabet, how)
    check_lengths([module], rows.proteins, body.long)
    size = min(module.alphabet.frame.tokens(len(record.sequence)), module.trained_tokens)
    if body.long == "full":
        size = module.alphabet.frame.tokens(len(record.sequence))
    tokens = how.passes(rows.proteins) * size
    reasons = {problem.row - 1: problem.reason for problem in rows.problems}
    kinds = {"position": "int"}
    columns = [Column(name, kinds.get(name, "text")) for name in names]
    columns += [Column("model_score", "float"), Column("reason", "text")]

    def answer(runner: Runner) -> Answer:
        scores = scores_of(module, rows, how, SILENT, runner=runner)
        given = table.select(list(names)).to_pylist()
        found = (
            row | {"model_score": value, "reason": reasons.get(place)}
            for place, (row, value) in enumerate(zip(given, scores, strict=True))
        )
        more: dict[str, Any] = {"advice": rows.advice} if rows.advice else {}
        if isinstance(body, schemas.ScanBody):
            places = chosen_places(_PROTEIN, record.sequence, positions, body.offset)
            cells = scan_cells(record.sequence, places, [0.0 if value is None else value for value in scores])
            more |= {"letters": CANONICAL, "matrix": listed(cells)}
        return Answer(about(model, notes, tokens, **more), columns, found)

    return Work(tokens, 1, answer)
