"""How well a model predicts residues that it cannot see; the run behind ``protea perplexity``.

    perplexity          exp(Σ -log p(token) / masked tokens); 15 % of all residues are masked at once, one pass a
                        sequence: BioNeMo 2's protocol (80/10/10, over all tokens, not a mean of means)
    pseudo-perplexity   exp(-1/L Σ log p(residue | all others)) of each sequence, one pass per residue

Masks depend only on the seed, the number of the sequence and the place of a residue: not on the sequences that share
its pack, and not on whether the model's alphabet has a BOS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea import bundled
from protea.alphabet import Alphabet
from protea.checkpoints.peers import check_peer, load_peer, masked_losses
from protea.data.draws import MASK, fold, later
from protea.data.masking import Masker, Masking, masking_named
from protea.embed.prepare import fit
from protea.errors import UsageError
from protea.fasta import Record
from protea.infer.loading import IN_FLOAT32, ModelLoader
from protea.infer.runner import FloatArray, Job, Runner, Wanted
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.output import fingerprint
from protea.progress import SILENT, Progress
from protea.rerun import FAILED, INPUT, PLOT
from protea.score.effects import pseudo_log_likelihoods
from protea.score.expected import LongProtein, runner_for
from protea.score.proteins import AS_USUAL, Reading, choice, read_proteins
from protea.tables import Beside, check_output, write_table

TOLERANCE: Final = 0.0005
"""Largest difference in perplexity between two implementations that agree."""

MaskedJob = Job[NDArray[np.uint8]]
"""A masked sequence and the places to predict; the tag holds the ids ``[P]`` of these tokens before masking."""


def mask(
    alphabet: Alphabet, sequences: Iterable[tuple[str, NDArray[np.uint8]]], masking: Masking, seed: int
) -> Iterator[MaskedJob]:
    """Mask sequences, given as name and ``[L]`` ids; a short one may get no mask."""
    masker = Masker(masking, alphabet)
    first = 1 - alphabet.frame.before  # without a BOS, residues have the draws that they have behind one
    for number, (name, ids) in enumerate(sequences):
        tokens = alphabet.frame.around(ids)
        changed, hidden = masker(tokens, later(fold(seed, 0, MASK, number), first), np.array([0, len(tokens)]))
        places = np.flatnonzero(hidden)
        yield Job(changed, Wanted(places=places), tokens[places], name)


def losses(runner: Runner, jobs: Iterable[MaskedJob], progress: Progress = SILENT) -> Iterator[FloatArray]:
    """Negative log-probability ``[P]`` of the masked tokens of each sequence, in nats; advances by tokens."""
    runner.model.require("logits")
    for result in runner.run(jobs):
        truth = result.job.tag
        yield -result.log_probabilities[np.arange(len(truth)), truth]
        progress.advance(len(result.job.tokens))


def of_all(losses: Iterable[FloatArray]) -> float:
    """Perplexity of the tokens of all sequences together; a ``UsageError`` if there are none."""
    total, count = 0.0, 0
    for values in losses:
        total += float(values.sum(dtype=np.float64))
        count += len(values)
    if not count:
        raise UsageError("no residue was masked; give more sequences, or mask a larger share of their residues")
    return of_loss(total / count)


def of_loss(loss: float) -> float:
    """Perplexity of a mean loss in nats; infinite if a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Predicted(NamedTuple):
    """The result of a run.

    Attributes:
        kind: ``perplexity``, or ``pseudo-perplexity``.
        records: sequences in letters of the alphabet, before they are cut.
        losses: for each sequence, the negative log-probability of its predicted residues, in nats.
        peer: perplexity by the library ``against``, and the largest difference of a residue's log-probability.
        letters: residues of the alphabet.
        log_probabilities: ``[L, len(letters)]`` of the only sequence, if ``plot`` and ``pseudo`` are set.
    """

    kind: str
    records: list[Record]
    losses: list[FloatArray]
    perplexity: float
    changes: list[ReportRow]
    peer: tuple[float, float] | None
    letters: str
    log_probabilities: FloatArray | None

    @property
    def agrees(self) -> bool:
        """Whether both libraries give the same perplexity."""
        return self.peer is None or abs(self.peer[0] - self.perplexity) <= TOLERANCE

    def shown(self) -> dict[str, Any]:
        """The result as plain values."""
        peer = None if self.peer is None else {"perplexity": self.peer[0], "largest_difference": self.peer[1]}
        return {
            "kind": self.kind,
            "perplexity": self.perplexity,
            "predicted_residues": sum(map(len, self.losses)),
            "residues": sum(len(record.sequence) for record in self.records),
            "sequences": len(self.records),
            "changes": [change._asdict() for change in self.changes],
            "against": peer and {**peer, "agrees": self.agrees},
        }


def measure_perplexity(
    inputs: Sequence[str],
    *,
    model: str = bundled.NAME,
    pseudo: bool = False,
    masking: str = "standard",
    select: float | None = None,
    seed: int = 42,
    long: str | None = None,
    reading: Reading = AS_USUAL,
    token_budget: int | None = None,
    against: str | None = None,
    plot: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    load: ModelLoader = IN_FLOAT32,
    progress: Progress = SILENT,
    make_runner: Callable[[Encoder, int | None], Runner] = runner_for,
) -> Predicted:
    """Predict the residues of FASTA files, and write the output, one row per sequence, if all is well.

    Arguments are the options of the command. ``pseudo`` masks each residue by itself and ignores ``masking``,
    ``select`` and ``seed``. ``long`` is ``truncate`` by default, ``window`` with ``pseudo``. ``plot`` is a picture
    that the caller draws; it cannot show several sequences. ``progress`` counts residues. ``make_runner`` makes what
    computes, from a model and a token budget. A ``FinishedError`` says that the same call has written the output
    already.
    """
    run: dict[str, Any] = {"command": "perplexity", "inputs": list(inputs), "pseudo": pseudo, **asdict(reading)}
    masks = masking_named(masking) if select is None else replace(masking_named(masking), select=select)
    if pseudo:
        policy = choice("--long", long or "window", LongProtein)
        run["long"] = policy
    else:
        policy = choice("--long", long or "truncate", Literal["truncate", "full", "error"])
        run |= {"long": policy, "masking": masking, "select": masks.select, "seed": seed}
    if output is not None:
        run |= {"against": against, INPUT: fingerprint(inputs)} | {PLOT: plot and str(plot)}
        check_output(output, run, lambda: load.identities([model]), overwrite=overwrite)
    loaded = load(model)
    module, alphabet = loaded.module, loaded.module.alphabet
    if against is not None:
        check_peer(against, module)
    changes: list[ReportRow] = []
    records = read_proteins(inputs, alphabet, reading, changes)
    if plot is not None and len(records) != 1:
        raise UsageError(f"--plot draws one protein, but there are {len(records)}; give a file of one protein")
    runner = make_runner(module, token_budget)
    masked: list[MaskedJob] = []
    profile = None
    if pseudo:
        progress.begin("masking", sum(len(record.sequence) for record in records))
        named = ((record.place, record.sequence) for record in records)
        columns = [alphabet.tokens.index(letter) for letter in alphabet.residues]
        values = []
        for log_likelihoods, log_probabilities in pseudo_log_likelihoods(runner, named, long=policy, progress=progress):
            values.append(-log_likelihoods)
            profile = None if plot is None else log_probabilities[:, columns]
    else:
        cut = (fit(record, alphabet.encode(record.sequence), module, policy, changes) for record in records)
        masked = list(mask(alphabet, ((encoded.record.place, encoded.ids) for encoded in cut), masks, seed))
        progress.begin("predicting", sum(len(job.tokens) for job in masked))
        values = list(losses(runner, masked, progress))
    perplexity = of_all(values)
    peer = None if against is None else _compare(against, loaded.path, masked, values, progress)
    kind = "pseudo-perplexity" if pseudo else "perplexity"
    predicted = Predicted(kind, records, values, perplexity, changes, peer, alphabet.residues, profile)
    if output is not None:
        run |= {"models": {model: loaded.circumstances()}, PLOT: None}
        run |= {} if predicted.agrees else {FAILED: f"{against} gives another perplexity"}
        _write(output, records, values, Beside("id\twhat\tdetail", changes, run))
    return predicted


def _write(path: Path, records: Sequence[Record], losses: Sequence[FloatArray], beside: Beside) -> None:
    import pyarrow as pa

    means = [float(values.mean(dtype="float64")) if len(values) else None for values in losses]
    columns = {
        "id": [record.id for record in records],
        "length": [len(record.sequence) for record in records],
        "predicted": [len(values) for values in losses],
        "loss": means,
        "perplexity": [None if mean is None else of_loss(mean) for mean in means],
    }
    write_table(path, pa.table(columns), beside)


def _compare(
    library: str, path: Path, masked: Sequence[MaskedJob], losses: Sequence[FloatArray], progress: Progress
) -> tuple[float, float]:
    run = load_peer(library, path)
    progress.begin(library, sum(len(job.tokens) for job in masked))
    peer_losses = []
    for job in masked:
        assert job.wanted.places is not None
        peer_losses.append(masked_losses(run, job.tokens, job.wanted.places, job.tag))
        progress.advance(len(job.tokens))
    differences = np.concatenate(losses) - np.concatenate(peer_losses)
    return of_all(peer_losses), float(np.abs(differences).max())
