"""The Python interface: a model with its alphabet, which takes sequences and gives arrays."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from protea import bundled
from protea.alphabet import Alphabet
from protea.checkpoints import hf
from protea.contacts import fit as fitting
from protea.contacts import fitted_heads as heads
from protea.contacts import precision, predict
from protea.contacts.fitted_heads import Head
from protea.contacts.precision import ChainPrecision
from protea.data.masking import Masking, masking_named
from protea.embed import embeddings
from protea.embed.embeddings import Asked, check_poolings, resolve_layers
from protea.embed.prepare import EncodedRecord, Long, fit
from protea.errors import ProteaWarning, UnknownResidueError, UsageError
from protea.evaluate import proteingym
from protea.fasta import Record
from protea.infer.loading import LoadedModel, load_model
from protea.infer.runner import FloatArray
from protea.letters import ReportRow
from protea.models.family import EncoderConfig
from protea.score import effects, perplexity
from protea.score.expected import runner_for
from protea.score.proteins import check_no_masks, choice
from protea.score.variants import CANONICAL, parse_all, scan_cells, single_substitutions
from protea.text import counted

Text = TypeVar("Text")


def load(
    model: str | Path = bundled.NAME, *, device: str = "auto", dtype: str = "float32", trainable: bool = False
) -> LanguageModel:
    """Load a model, by default Protea-mini, which comes with the package.

    Args:
        model: a published name (``protea info --list``), a Hugging Face repository, or a checkpoint of any format.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        trainable: keep ``module`` as plain PyTorch, which can be trained, changed or moved. By default, weights on a
            CPU are put into the order that the processor multiplies fastest, as the commands do.
    """
    return LanguageModel(load_model(model, device=device, dtype=dtype, trainable=trainable))


class EmbedOptions(TypedDict, total=False):
    """Options of ``LanguageModel.embed`` that do not change the type of its result."""

    layers: Sequence[int] | None
    long: Long
    token_budget: int | None


class LanguageModel:
    """A protein language model: the ``torch.nn.Module`` as ``module``, its ``name``, and the ``files`` of its weights.

    Sequences are residues in upper case, and get the same numbers, to float32 rounding, whatever sequences are computed
    with them. ``long`` is the policy for a sequence over the model's limit: ``truncate``, ``window``, ``full`` or
    ``error`` (``docs/embedding.md``); scores take ``window`` (ProteinGym's windows), ``full`` and ``error``.
    ``token_budget`` is the number of tokens computed at a time, which bounds memory.

    Methods raise ``UnknownResidueError`` for a letter outside the alphabet, ``SequenceTooLongError`` for a sequence too
    long for the policy, ``CapabilityError`` for what the checkpoint lacks (see ``capabilities``), ``NonFiniteError`` if
    the model gives infinities or NaN, ``DeviceError`` if memory is too small, ``UsageError`` for an unknown name or a
    number out of range, ``StructureError`` and ``DataError`` for files that are damaged or absent or hold too little,
    and ``MissingExtraError`` if an optional library is not installed.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.module, self.name, self.files = loaded.module, loaded.name, loaded.files
        self._loaded = loaded
        self._fitted: frozenset[str] | None = None

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<LanguageModel {self.name!r}: {config.family}, {config.num_hidden_layers} layers, width "
            f"{config.hidden_size}, {self.dtype}, {self.device}>"
        )

    @property
    def alphabet(self) -> Alphabet:
        """Residues and their ids."""
        return self.module.alphabet

    @property
    def config(self) -> EncoderConfig:
        """The numbers of the architecture."""
        return self.module.config

    @property
    def capabilities(self) -> frozenset[str]:
        """Abilities beyond embedding: ``attention``, ``logits``, ``contacts``."""
        return self.module.capabilities

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return self.module.compute_dtype

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of the weight files by name."""
        return self._loaded.weights_sha256()

    @overload
    def embed(
        self, sequences: Sequence[str], *, pool: None = None, **options: Unpack[EmbedOptions]
    ) -> list[FloatArray]: ...

    @overload
    def embed(self, sequences: Sequence[str], *, pool: str, **options: Unpack[EmbedOptions]) -> FloatArray: ...

    def embed(
        self,
        sequences: Sequence[str],
        *,
        pool: str | None = None,
        layers: Sequence[int] | None = None,
        long: Long = "truncate",
        token_budget: int | None = None,
    ) -> list[FloatArray] | FloatArray:
        """Hidden states of each residue, or one vector per sequence; ``<mask>`` stands for a masked position.

        Without ``pool``, gives a list of float32 arrays ``[L, D]``; with ``mean``, ``max``, ``std`` (over residues) or
        ``bos`` one array ``[N, D]``. Layer 0 is the embedding, -1 the last after its norm, which is the default. If
        ``layers`` are given, an axis is added for them: ``[n_layers, L, D]`` or ``[N, n_layers, D]``.
        """
        poolings = () if pool is None else check_poolings([pool], self.alphabet.frame)
        numbers = resolve_layers((-1,) if layers is None else layers, self.module)
        asked = Asked(layers=numbers, poolings=poolings, residues=pool is None)
        records = embeddings.embed(runner_for(self.module, token_budget), self._encode(sequences, long), asked)
        states = [record.residues if pool is None else record.pooled[pool] for record in records]
        arrays = [state if layers is not None else state[0] for state in states if state is not None]
        if pool is None:
            return arrays
        shape = (0, *(() if layers is None else (len(layers),)), self.config.hidden_size)
        return np.stack(arrays) if arrays else np.empty(shape, dtype=np.float32)

    def logits(
        self, sequences: Sequence[str], *, long: Long = "truncate", token_budget: int | None = None
    ) -> list[FloatArray]:
        """Language-model logits of each residue: ``[L, V]`` float32, V in the order of ``alphabet.tokens``."""
        return list(embeddings.logits(runner_for(self.module, token_budget), self._encode(sequences, long)))

    def perplexity(
        self,
        sequences: Sequence[str],
        *,
        masking: str | Masking = "standard",
        seed: int = 42,
        long: Long = "truncate",
        token_budget: int | None = None,
    ) -> float:
        """Perplexity of masked residues: exp of the mean loss over the masked residues of all sequences.

        ``masking`` is a variant of ``docs/data.md``, or settings of your own; ``standard`` is BioNeMo 2's protocol.
        Masks depend only on ``seed`` and the sequence's number.
        """
        chosen = masking_named(masking) if isinstance(masking, str) else masking
        choice("policy for long sequences", long, Literal["truncate", "full", "error"])  # windows have several losses
        sequences = [sequence for _, sequence in _without_masks(sequences)]
        ids = ((encoded.record.place, encoded.ids) for encoded in self._encode(sequences, long))
        masked = perplexity.mask(self.alphabet, ids, chosen, seed)
        return perplexity.of_all(perplexity.losses(runner_for(self.module, token_budget), masked))

    def pseudo_perplexity(
        self, sequences: Sequence[str], *, long: str = "window", token_budget: int | None = None
    ) -> NDArray[np.float64]:
        """Pseudo-perplexity ``[N]`` of each sequence: exp(-1/L Σ log p(residue | all others)), one pass per residue."""
        values = effects.pseudo_log_likelihoods(
            runner_for(self.module, token_budget), _without_masks(sequences), long=long
        )
        return np.array([perplexity.of_loss(-float(residues.mean(dtype=np.float64))) for residues, _ in values])

    def score(
        self,
        sequence: str,
        variants: Sequence[str],
        *,
        method: str = "masked-marginals",
        offset: int = 1,
        long: str = "window",
        token_budget: int | None = None,
    ) -> NDArray[np.float64]:
        """Effects of variants, ``[n]``: log-likelihood ratios in nats, negative where the wild type is preferred.

        ``method`` is ``masked-marginals``, ``wildtype-marginals`` or ``pseudo-likelihood``. All score substitutions,
        ``A24V`` or several at once ``A24V:G30S``; the last also ``A24del``, ``A24_G25insKL`` and ``A24_G30delinsKL``.
        ``offset`` is the number of the first residue. A variant that does not fit is a ``VariantError``.
        """
        check_no_masks(_text(sequence), "the sequence")
        self.alphabet.encode(sequence)  # reports an unknown letter before any variant is read
        how = effects.Scoring(method=method, offset=offset, long=long, token_budget=token_budget)
        known = parse_all(_list(variants), sequence, self.alphabet, offset)
        protein = effects.Protein("the sequence", sequence, known)
        return next(effects.score(self.module, [protein], how))

    def scan(
        self, sequence: str, *, method: str = "masked-marginals", long: str = "window", token_budget: int | None = None
    ) -> NDArray[np.float64]:
        """Effects of every substitution, ``[L, 20]``, columns as in ``protea.score.variants.CANONICAL``; see ``score``.

        The wild type's own letter scores 0; the row of a gap is NaN.
        """
        variants = [f"{sequence[place]}{place + 1}{new}" for place, new in single_substitutions(_text(sequence))]
        scores = self.score(sequence, variants, method=method, long=long, token_budget=token_budget)
        cells = scan_cells(sequence, scores)
        for row, letter in zip(cells, sequence, strict=True):
            if letter in CANONICAL:
                row[CANONICAL.index(letter)] = 0
        return cells

    def evaluate_proteingym(
        self, folder: str | Path, *, method: str = "masked-marginals", long: str = "window"
    ) -> list[proteingym.Measured]:
        """Effects of variants compared with deep mutational scans, in a folder as for ``protea evaluate proteingym``.

        One row per assay; ``protea.evaluate.proteingym.means`` averages them.
        """
        how = effects.Scoring(method=method, long=long)
        scans = [proteingym.AssayScores(assay, self.alphabet, how) for assay in proteingym.read_assays(Path(folder))]
        for scan in scans:
            scan.add(self.module)
        return [scan.measured() for scan in scans]

    def contacts(self, sequence: str) -> FloatArray:
        """Probability ``[L, L]`` that two residues are in contact (Cβ closer than 8 Å)."""
        return predict.contacts(self.module, self.alphabet.encode(_text(sequence)))

    def fit_contacts(
        self,
        structures: Sequence[str | Path],
        *,
        count: int = 20,
        seed: int = 0,
        head: Head = "regression",
        c: float = fitting.C,
        rank: int = fitting.RANK,
    ) -> list[str]:
        """Fit a contact head to ``count`` chains of PDB or mmCIF files (Rao et al. 2020), and return their names.

        It replaces the model's own head: ``regression`` on attention maps, with ``c`` the inverse strength of its L1
        penalty, or ``bilinear`` on the last hidden states, of rank ``rank``. ``seed`` chooses the chains and starts the
        fit. On these chains the head looks better than it is; ``save`` does not keep their names.
        """
        settings = heads.FitSettings(head=head, count=count, seed=seed, c=c, rank=rank)
        rows: list[ReportRow] = []
        try:
            fitted_head, fitted, _ = heads.fit_to_structures(self.module, _paths(structures), settings, rows)
        finally:
            _warn_of(rows)
        self.module.contact_head = fitted_head
        self._fitted = frozenset(text for chain in fitted for text in (chain.name, chain.sequence))
        return [chain.name for chain in fitted]

    def evaluate_contacts(
        self, structures: Sequence[str | Path], *, exclude: Collection[str] = (), include_fitted: bool = False
    ) -> list[ChainPrecision]:
        """Precision of contacts against structures, one row per chain, for ``protea.contacts.precision.means``.

        Leaves out the chains ``exclude`` and, with a warning, those that the head was fitted on, unless
        ``include_fitted``.
        """
        fitted, record = self._fitted, self._loaded.head_record
        if fitted is None and record.exists() and not include_fitted:
            fitted = precision.fitted_on(record)
        rows: list[ReportRow] = []
        chains = precision.select_chains(
            self.module,
            _paths(structures),
            rows,
            exclude=_list(exclude),
            fitted=() if include_fitted or fitted is None else fitted,
            reason="the contact head was fitted on them; include_fitted=True keeps them",
        )
        _warn_of(rows)
        return precision.measure(self.module, chains)

    def attention(self, sequence: str, *, layers: Sequence[int], heads: Sequence[int] | None = None) -> FloatArray:
        """Attention ``[len(layers), len(heads), T, T]``, BOS and EOS included; each row sums to 1.

        Layers count from 1, negative ones from the last; heads count from 0, all by default.
        """
        return predict.attention(self.module, self.alphabet.encode(_text(sequence)), layers, heads)

    def save(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face folder, which Protea and ``transformers`` load; it must not exist yet."""
        hf.save(self.module, Path(folder))

    def _encode(self, sequences: Sequence[str], long: Long) -> Iterator[EncodedRecord]:
        choice("policy for long sequences", long, Long)
        for number, sequence in enumerate(_list(sequences)):
            place = f"sequence {number}"
            record = Record(str(number), "", _text(sequence, place), place)
            rows: list[ReportRow] = []
            try:
                ids = self.alphabet.encode(sequence)
            except UnknownResidueError as error:
                raise UnknownResidueError(f"{place}: {error}") from error
            encoded = fit(record, ids, self.module, long, rows)
            if encoded.truncated_from is not None:
                warnings.warn(f"{place} truncated: {rows[-1].detail}", ProteaWarning, stacklevel=4)
            yield encoded


def _paths(structures: Sequence[str | Path]) -> list[Path]:
    if not _list(structures):
        raise UsageError("name at least one structure, a file or a folder")
    return [Path(path) for path in structures]


def _warn_of(rows: Sequence[ReportRow]) -> None:
    """Warn of the chains that were skipped, one by one, and of those that were left out, by their reason."""
    messages = [f"{row.id}: skipped: {row.detail}" for row in rows if row.what == "skipped"]
    left_out = Counter(row.detail for row in rows if row.what == "left out" and row.detail != "--exclude")
    messages += [f"left out {counted(count, 'chain')}: {reason}" for reason, count in left_out.items()]
    for message in messages:
        warnings.warn(message, ProteaWarning, stacklevel=3)


def _list(texts: Iterable[Text]) -> list[Text]:
    if isinstance(texts, str):
        raise UsageError("expected a list, got one string; write [string]")
    return list(texts)


def _text(sequence: str, name: str = "the sequence") -> str:
    if not isinstance(sequence, str):
        raise UsageError(f"{name} must be a string, got {type(sequence).__name__}")
    if not sequence:
        raise UsageError(f"{name} is empty; give at least one residue")
    return sequence


def _without_masks(sequences: Sequence[str]) -> list[tuple[str, str]]:
    """Name and letters of each sequence."""
    named = [(f"sequence {number}", sequence) for number, sequence in enumerate(_list(sequences))]
    for name, sequence in named:
        check_no_masks(_text(sequence, name), name)
    return named
