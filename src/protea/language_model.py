"""The Python interface: a model with its alphabet, which takes sequences and gives arrays."""

# A string and a mapping are iterables too, so the overloads of the methods overlap; the first that fits counts.
# mypy: disable-error-code="overload-overlap"

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from protea import bundled
from protea import sequences as door
from protea.alphabet import Alphabet
from protea.arguments import check, checked
from protea.checkpoints import hf
from protea.contacts import fit as fitting
from protea.contacts import fitted_heads as heads
from protea.contacts import precision, predict
from protea.contacts.fitted_heads import Head
from protea.contacts.precision import ChainPrecision
from protea.data.masking import VARIANTS, Masking, masking_named
from protea.device import DTYPES, MIXED, QUANTIZED
from protea.embed import embeddings
from protea.embed.embeddings import POOLINGS, Asked, check_poolings, resolve_layers
from protea.embed.prepare import EncodedRecord, Long, fit
from protea.errors import UsageError, warn
from protea.evaluate import proteingym
from protea.fasta import Record
from protea.infer.loading import LoadedModel, load_model
from protea.infer.runner import FloatArray
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.score import effects, perplexity
from protea.score.expected import LongProtein, runner_for
from protea.score.notation import parse_all
from protea.score.variants import CANONICAL, chosen_places, scan_cells, single_substitutions
from protea.sequences import Given, Name, OneSequence
from protea.text import counted

# What the arguments accept; ``checked`` reads these annotations.
ChainNames = Annotated[Collection[str], "a list of names"]
Device = Annotated[str | torch.device, "auto, cpu, cuda, or cuda:N"]
Dtype = Annotated[str, (*DTYPES, MIXED, QUANTIZED)]
Layers = Annotated[int | Sequence[int], "a whole number, or a list of them, as in [0, -1]"]
Masks = Annotated[str | Masking, f"a Masking, or one of {', '.join(VARIANTS)}"]
Method = Annotated[str, effects.METHODS]
ModelName = Annotated[Path, "the name of a model, or the path of a checkpoint"]
Positions = Annotated[str | Sequence[int] | None, "a list of residue numbers, or text as in 10-40,55"]
Pooling = Annotated[str | Sequence[str], f"{', '.join(POOLINGS)}, or a list of these"]


@checked
def load(
    model: str | Path = bundled.NAME, *, device: Device = "auto", dtype: Dtype = "float32", trainable: bool = False
) -> LanguageModel:
    """Load a model, by default Protea-mini, which comes with the package.

    Args:
        model: a published name (``protea info --list``), a Hugging Face repository, or a checkpoint of any format.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``float32``; ``bf16-mixed``, which ``--fast`` takes; ``bfloat16`` or ``float16`` for the whole model;
            ``int8`` for the products of the layers, on many CPUs the fastest and the least exact.
        trainable: keep ``module`` as plain PyTorch, which can be trained, changed or moved. By default, weights on a
            CPU are put into the order that the processor multiplies fastest, as the commands do.
    """
    check("model", model, ModelName)
    return LanguageModel(load_model(model, device=str(device), dtype=dtype, trainable=trainable))


class LogitsOptions(TypedDict, total=False):
    """Options of ``LanguageModel.logits``."""

    long: Long
    token_budget: int | None


class EmbedOptions(LogitsOptions, total=False):
    """Options of ``LanguageModel.embed`` that do not change the type of its result."""

    layers: Layers | None


class PseudoOptions(TypedDict, total=False):
    """Options of ``LanguageModel.pseudo_perplexity``."""

    long: LongProtein
    token_budget: int | None


class LanguageModel:
    """A protein language model: the ``torch.nn.Module`` as ``module``, its ``name``, and the ``files`` of its weights.

    ``sequences`` are one sequence, a list, or a mapping of names to sequences, and results come back in the same form;
    ``docs/python.md`` says what can be a sequence or a list. Residues are in upper case, and get the same numbers, to
    float32 rounding, whatever sequences are computed with them. ``long`` is the policy for a sequence over the model's
    limit: ``truncate``, ``window``, ``full`` or ``error`` (``docs/embedding.md``); scores take ``window`` (ProteinGym's
    windows), ``full`` and ``error``. ``token_budget`` is the number of tokens computed at a time, which bounds memory.

    Methods raise ``UnknownResidueError`` for a letter outside the alphabet, ``SequenceTooLongError`` for a sequence too
    long for the policy, ``CapabilityError`` for what the checkpoint lacks (see ``capabilities``), ``NonFiniteError`` if
    the model gives infinities or NaN, ``DeviceError`` if memory is too small, ``UsageError`` for an unknown name or a
    number out of range, ``StructureError`` and ``DataError`` for files that are damaged or absent or hold too little,
    and ``MissingExtraError`` if an optional library is not installed.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.module, self.name, self.files = loaded.module, loaded.name, loaded.files
        self.loaded = loaded
        self._fitted: frozenset[str] | None = None

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<LanguageModel {self.name!r}: {config.family}, {config.num_hidden_layers} layers, width "
            f"{config.hidden_size}, {self.module.precision}, {self.device}>"
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
        """The type of the weights; in ``bf16-mixed`` and ``int8`` float32, but not in the layers' products."""
        return self.module.compute_dtype

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of the weight files by name."""
        return self.loaded.weights_sha256()

    @overload
    def embed(
        self, sequences: OneSequence, *, pool: Pooling | None = None, **options: Unpack[EmbedOptions]
    ) -> FloatArray: ...

    @overload
    def embed(
        self, sequences: Mapping[Name, OneSequence], *, pool: Pooling | None = None, **options: Unpack[EmbedOptions]
    ) -> dict[Name, FloatArray]: ...

    @overload
    def embed(
        self, sequences: Iterable[OneSequence], *, pool: None = None, **options: Unpack[EmbedOptions]
    ) -> list[FloatArray]: ...

    @overload
    def embed(
        self, sequences: Iterable[OneSequence], *, pool: Pooling, **options: Unpack[EmbedOptions]
    ) -> FloatArray: ...

    @checked
    def embed(
        self,
        sequences: Any,
        *,
        pool: Pooling | None = None,
        layers: Layers | None = None,
        long: Long = "truncate",
        token_budget: int | None = None,
    ) -> Any:
        """Hidden states of each residue, or one vector per sequence; ``<mask>`` stands for a masked position.

        Without ``pool``, a sequence gives a float32 array ``[L, D]``, and with ``mean``, ``max``, ``std`` (over
        residues) or ``bos`` a vector ``[D]``; the vectors of a list are one array ``[N, D]``. Layer 0 is the embedding,
        -1 the last after its norm, which is the default. A list of poolings or of layers adds an axis in its order:
        ``[n_layers, L, D]``, ``[N, n_pools, n_layers, D]``.
        """
        pools, pool_axis = _axis(() if pool is None else pool)
        numbers, layer_axis = _axis(-1 if layers is None else layers)
        poolings = check_poolings(pools, self.alphabet.frame)
        if pool is not None and not poolings:
            raise UsageError(f"pool={pool}: name at least one pooling")
        asked = Asked(layers=resolve_layers(numbers, self.module), poolings=poolings, residues=pool is None)
        given = door.read(sequences, self.alphabet)
        records = embeddings.embed(runner_for(self.module, token_budget), under_policy(given, self.module, long), asked)
        if pool is None:
            return given.in_form([record.residues[layer_axis] for record in records if record.residues is not None])
        vectors = [np.stack([record.pooled[name] for name in poolings])[pool_axis, layer_axis] for record in records]
        shape = np.empty((0, len(poolings), len(numbers), self.config.hidden_size), np.float32)
        return given.in_form(np.stack(vectors) if vectors else shape[:, pool_axis, layer_axis])

    @overload
    def logits(self, sequences: OneSequence, **options: Unpack[LogitsOptions]) -> FloatArray: ...

    @overload
    def logits(
        self, sequences: Mapping[Name, OneSequence], **options: Unpack[LogitsOptions]
    ) -> dict[Name, FloatArray]: ...

    @overload
    def logits(self, sequences: Iterable[OneSequence], **options: Unpack[LogitsOptions]) -> list[FloatArray]: ...

    @checked
    def logits(self, sequences: Any, *, long: Long = "truncate", token_budget: int | None = None) -> Any:
        """Language-model logits of each residue: ``[L, V]`` float32, V in the order of ``alphabet.tokens``."""
        given = door.read(sequences, self.alphabet)
        encoded = under_policy(given, self.module, long)
        return given.in_form(list(embeddings.logits(runner_for(self.module, token_budget), encoded)))

    @checked
    def perplexity(
        self,
        sequences: OneSequence | Iterable[OneSequence] | Mapping[Name, OneSequence],
        *,
        masking: Masks = "standard",
        seed: int = 42,
        long: Literal["truncate", "full", "error"] = "truncate",  # the losses of windows are not one number
        token_budget: int | None = None,
    ) -> float:
        """Perplexity of masked residues: exp of the mean loss over the masked residues of all sequences.

        ``masking`` is a variant of ``docs/data.md``, or settings of your own; ``standard`` is BioNeMo 2's protocol.
        Masks depend only on ``seed`` and the sequence's number.
        """
        chosen = masking_named(masking) if isinstance(masking, str) else masking
        encoded = under_policy(door.read(sequences, self.alphabet, masks=False), self.module, long)
        ids = [(record.record.place, record.ids) for record in encoded]
        masked = perplexity.mask(self.alphabet, ids, chosen, seed)
        return perplexity.of_all(perplexity.losses(runner_for(self.module, token_budget), masked))

    @overload
    def pseudo_perplexity(self, sequences: OneSequence, **options: Unpack[PseudoOptions]) -> float: ...

    @overload
    def pseudo_perplexity(
        self, sequences: Mapping[Name, OneSequence], **options: Unpack[PseudoOptions]
    ) -> dict[Name, float]: ...

    @overload
    def pseudo_perplexity(
        self, sequences: Iterable[OneSequence], **options: Unpack[PseudoOptions]
    ) -> NDArray[np.float64]: ...

    @checked
    def pseudo_perplexity(
        self, sequences: Any, *, long: LongProtein = "window", token_budget: int | None = None
    ) -> Any:
        """Pseudo-perplexity ``[N]`` of each sequence: exp(-1/L Σ log p(residue | all others)), one pass per residue."""
        given = door.read(sequences, self.alphabet, masks=False)
        named = [(record.place, record.sequence) for record, _ in given.sequences]
        values = effects.pseudo_log_likelihoods(runner_for(self.module, token_budget), named, long=long)
        losses = [-float(residues.mean(dtype=np.float64)) for residues, _ in values]
        return given.in_form(np.array([perplexity.of_loss(loss) for loss in losses]))

    @checked
    def score(
        self,
        sequence: OneSequence,
        variants: Iterable[str],
        *,
        method: Method = "masked-marginals",
        offset: int = 1,
        long: LongProtein = "window",
        token_budget: int | None = None,
    ) -> NDArray[np.float64]:
        """Effects of variants, ``[n]``: log-likelihood ratios in nats, negative where the wild type is preferred.

        ``method`` is one of ``protea.score.effects.METHODS``. All score substitutions, ``A24V`` or several at once
        ``A24V:G30S``; ``pseudo-likelihood`` also insertions and deletions, by means over residues, and
        ``pseudo-likelihood-sum`` by sums. ``protea.score.notation`` lists what may be written, HGVS's names included.
        ``offset`` is the number of the first residue. A variant that does not fit is a ``VariantError``.
        """
        wild, _ = door.read_one(sequence, self.alphabet, masks=False)
        how = effects.Scoring(method=method, offset=offset, long=long, token_budget=token_budget)
        return self._effects(wild, door.listed("variants", variants, "a list, as in ['A24V']"), how)

    @checked
    def scan(
        self,
        sequence: OneSequence,
        *,
        positions: Positions = None,
        method: Method = "masked-marginals",
        offset: int = 1,
        long: LongProtein = "window",
        token_budget: int | None = None,
    ) -> NDArray[np.float64]:
        """Effects of every substitution, ``[L, 20]``, columns as in ``protea.score.variants.CANONICAL``; see ``score``.

        ``positions``, such as ``"10-40,55"``, limits the scan; ``offset`` is the number of the first residue. The wild
        type's own letter scores 0; rows of gaps and of other positions are NaN.
        """
        wild, _ = door.read_one(sequence, self.alphabet, masks=False)
        letters = wild.sequence
        places = chosen_places("the sequence", letters, positions, offset)
        variants = [f"{letters[place]}{place + offset}{new}" for place, new in single_substitutions(letters, places)]
        how = effects.Scoring(method=method, offset=offset, long=long, token_budget=token_budget)
        cells = scan_cells(letters, places, self._effects(wild, variants, how))
        for place in places:
            if letters[place] in CANONICAL:
                cells[place, CANONICAL.index(letters[place])] = 0
        return cells

    @checked
    def evaluate_proteingym(
        self, folder: str | Path, *, method: Method = "masked-marginals", offset: int = 1, long: LongProtein = "window"
    ) -> list[proteingym.Measured]:
        """Effects of variants compared with deep mutational scans, in a folder as for ``protea evaluate proteingym``.

        One row per assay; ``protea.evaluate.proteingym.means`` averages them.
        """
        check("folder", folder, Path)
        how = effects.Scoring(method=method, offset=offset, long=long)
        scans = [proteingym.AssayScores(assay, self.alphabet, how) for assay in proteingym.read_assays(Path(folder))]
        for scan in scans:
            scan.add(self.module)
        return [scan.measured() for scan in scans]

    def contacts(self, sequence: OneSequence) -> FloatArray:
        """Probability ``[L, L]`` that two residues are in contact (Cβ closer than 8 Å)."""
        record, ids = door.read_one(sequence, self.alphabet)
        return predict.contacts(self.module, ids, record.place)

    @checked
    def fit_contacts(
        self,
        structures: Iterable[str | Path],
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

    @checked
    def evaluate_contacts(
        self, structures: Iterable[str | Path], *, exclude: ChainNames = (), include_fitted: bool = False
    ) -> list[ChainPrecision]:
        """Precision of contacts against structures, one row per chain, for ``protea.contacts.precision.means``.

        Leaves out the chains ``exclude`` and, with a warning, those that the head was fitted on, unless
        ``include_fitted``.
        """
        fitted, record = self._fitted, self.loaded.head_record
        if fitted is None and record.exists() and not include_fitted:
            fitted = precision.fitted_on(record)
        rows: list[ReportRow] = []
        chains = precision.select_chains(
            self.module,
            _paths(structures),
            rows,
            exclude=exclude,
            fitted=() if include_fitted or fitted is None else fitted,
            reason="the contact head was fitted on them; include_fitted=True keeps them",
        )
        _warn_of(rows)
        return precision.measure(self.module, chains)

    @checked
    def attention(self, sequence: OneSequence, *, layers: Layers, heads: Layers | None = None) -> FloatArray:
        """Attention ``[len(layers), len(heads), T, T]``, BOS and EOS included; rows attend and sum to 1.

        Layers count from 1, negative ones from the last; heads count from 0, all by default. A number instead of a list
        gives no axis.
        """
        numbers, layer_axis = _axis(layers)
        chosen, head_axis = (None, slice(None)) if heads is None else _axis(heads)
        _, ids = door.read_one(sequence, self.alphabet)
        maps: FloatArray = predict.attention(self.module, ids, numbers, chosen)[layer_axis, head_axis]
        return maps

    def save(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face folder, which Protea and ``transformers`` load; it must not exist yet."""
        check("folder", folder, Path)
        hf.save(self.module, Path(folder))

    def _effects(self, wild: Record, variants: Sequence[str], how: effects.Scoring) -> NDArray[np.float64]:
        """Effects of variants of a protein, with a warning where they are sums that lengths change."""
        known = parse_all(variants, wild.sequence, self.alphabet, how.offset)
        protein = effects.Protein(wild.place, wild.sequence, known)
        if how.method == "pseudo-likelihood-sum" and (note := how.of_lengths([protein])):
            warn(note)
        return next(effects.score(self.module, [protein], how))


def under_policy(given: Given, model: Encoder, long: Long) -> list[EncodedRecord]:
    """Sequences under the policy for length, with a warning for each that is cut; the model needs no weights."""
    rows: list[ReportRow] = []
    encoded = [fit(record, ids, model, long, rows) for record, ids in given.sequences]
    details = (row.detail for row in rows if row.what == "truncated")
    for cut in encoded:
        if cut.truncated_from is not None:
            warn(f"{cut.record.place} truncated: {next(details)}")
    return encoded


def _axis(values: Any) -> tuple[tuple[Any, ...], int | slice]:
    """Values as a tuple, and the index of the results' axis for them: only a list keeps it."""
    if isinstance(values, str | int):
        return (values,), 0
    return tuple(values), slice(None)


def _paths(structures: Iterable[str | Path]) -> list[Path]:
    paths = door.listed("structures", structures, "a list of paths")
    for number, path in enumerate(paths):
        check(f"structures[{number}]", path, Path)
    if not paths:
        raise UsageError("name at least one structure, a file or a folder")
    return [Path(path) for path in paths]


def _warn_of(rows: Sequence[ReportRow]) -> None:
    """Warn of the chains that were skipped, one by one, and of those that were left out, by their reason."""
    messages = [f"{row.id}: skipped: {row.detail}" for row in rows if row.what == "skipped"]
    left_out = Counter(row.detail for row in rows if row.what == "left out" and row.detail != "--exclude")
    messages += [f"left out {counted(count, 'chain')}: {reason}" for reason, count in left_out.items()]
    for message in messages:
        warn(message)
