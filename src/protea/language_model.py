"""The Python interface: a model with its alphabet, taking sequences and giving arrays."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, get_args, overload

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
from protea.contacts.structures import Chain, read_structures, structure_files
from protea.data.masking import Masking, masking_named
from protea.disk import sha256
from protea.embed import embeddings
from protea.embed.embeddings import Asked, Embedding, resolve_layers
from protea.embed.pooling import check_poolings
from protea.embed.prepare import EncodedRecord, Long, fit
from protea.errors import ProteaWarning, UnknownResidueError, UsageError
from protea.evaluate import proteingym
from protea.fasta import Record
from protea.infer.budget import default_budget
from protea.infer.loading import load_model
from protea.infer.runner import FloatArray, Runner
from protea.letters import ReportRow
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.score import effects, perplexity
from protea.score.expected import check_policy
from protea.score.records import check_residues
from protea.score.variants import CANONICAL, parse_all, single_substitutions

L = TypeVar("L", bound=Collection[object])


def load(
    model: str | Path = bundled.NAME, *, device: str = "auto", dtype: str = "float32", trainable: bool = False
) -> LanguageModel:
    """Load a model.

    Args:
        model: a published name (``protea info --list``), a Hugging Face repository, or a checkpoint of any format: a
            folder, a ``.pt`` of Meta's package, a ``.nemo``, a BioNeMo 2 directory. Without it, Protea-mini, which
            comes with the package.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        trainable: leave ``module`` as plain PyTorch, to be trained, changed or moved. Without it, on a CPU, weights are
            put into the order that the processor multiplies fastest, as the commands do.

    Raises:
        UsageError: the device or type is unknown; UnknownModelError for an unknown name.
        CheckpointError: the files are absent, damaged or do not fit together.
        DeviceError: the device is not there.
    """
    loaded = load_model(model, device=device, dtype=dtype, trainable=trainable)
    return LanguageModel(loaded.module, name=loaded.name, files=loaded.files, head_record=loaded.head_record)


class LanguageModel:
    """A protein language model.

    Attributes:
        module: the ``torch.nn.Module``.
        name: what it was loaded by.
        files: the files it was loaded from, if any.
    """

    def __init__(
        self, module: Encoder, *, name: str, files: Sequence[Path] = (), head_record: Path | None = None
    ) -> None:
        self.module = module
        self.name = name
        self.files = list(files)
        self._head_record = head_record
        self._fitted: heads.Fitted | None = None

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
        """The architecture's numbers."""
        return self.module.config

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do beyond embedding: ``attention``, ``logits``, ``contacts``."""
        return self.module.capabilities

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return self.module.compute_dtype

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of the weight files by name; nothing for a model that was not loaded from files."""
        return {path.name: sha256(path) for path in self.files}

    @overload
    def embed(
        self,
        sequences: Sequence[str],
        *,
        pool: None = None,
        layers: Sequence[int] | None = None,
        long: Long = "truncate",
        token_budget: int | None = None,
    ) -> list[FloatArray]: ...

    @overload
    def embed(
        self,
        sequences: Sequence[str],
        *,
        pool: str,
        layers: Sequence[int] | None = None,
        long: Long = "truncate",
        token_budget: int | None = None,
    ) -> FloatArray: ...

    def embed(
        self,
        sequences: Sequence[str],
        *,
        pool: str | None = None,
        layers: Sequence[int] | None = None,
        long: Long = "truncate",
        token_budget: int | None = None,
    ) -> list[FloatArray] | FloatArray:
        """Hidden states of each residue, or one vector a sequence.

        A sequence gets the same numbers in whatever company it is embedded, to float32 rounding.

        Args:
            sequences: residues in upper case; ``<mask>`` stands for a masked position.
            pool: ``mean``, ``max``, ``std`` (over residues) or ``bos``; without it, one row a residue.
            layers: which hidden states, 0 the embedding, -1 the last after its norm; without it, the last.
            long: what to do with a sequence over the model's limit.
            token_budget: tokens computed at a time; bounds memory.

        Returns:
            Without ``pool`` a list of float32 arrays ``[L, D]``, with it one array ``[N, D]``; with ``layers`` given,
            an axis for them comes first in each: ``[n_layers, L, D]`` and ``[N, n_layers, D]``.

        Raises:
            UnknownResidueError: a letter outside the alphabet.
            SequenceTooLongError: a sequence over the limit, unless truncated.
            UsageError: an unknown pooling, layer or policy.
        """
        poolings = () if pool is None else check_poolings([pool], self.alphabet.frame)
        numbers = resolve_layers((-1,) if layers is None else layers, self.module)
        asked = Asked(layers=numbers, poolings=poolings, residues=pool is None)
        found = embeddings.embed(self._runner(token_budget), self._encode(sequences, long), asked)
        arrays = [_array(embedding, pool) for embedding in found]
        if layers is None:
            arrays = [array[0] for array in arrays]
        if pool is None:
            return arrays
        shape = (0, *(() if layers is None else (len(layers),)), self.config.hidden_size)
        return np.stack(arrays) if arrays else np.empty(shape, dtype=np.float32)

    def logits(
        self, sequences: Sequence[str], *, long: Long = "truncate", token_budget: int | None = None
    ) -> list[FloatArray]:
        """Language-model logits of each residue: a list of ``[L, V]`` float32, V in ``alphabet.tokens``' order.

        Raises:
            CapabilityError: the checkpoint has no language-model head.
            UnknownResidueError: a letter outside the alphabet.
            SequenceTooLongError: a sequence over the limit, unless truncated.
        """
        return list(embeddings.logits(self._runner(token_budget), self._encode(sequences, long)))

    def perplexity(
        self,
        sequences: Sequence[str],
        *,
        masking: str | Masking = "standard",
        seed: int = 42,
        long: Long = "truncate",
        token_budget: int | None = None,
    ) -> float:
        """Perplexity of masked residues: exp of the summed loss over all of them.

        BioNeMo 2's protocol: 15 % of all residues, of those 80 % hidden, 10 % replaced, 10 % left; one pass.

        Args:
            sequences: residues in upper case.
            masking: a variant by name (``docs/data.md``), or any other.
            seed: of the masks, which depend on it and the sequence's number alone.
            long: what to do with a sequence over the model's limit.
            token_budget: tokens computed at a time; bounds memory.

        Raises:
            CapabilityError: the checkpoint has no language-model head.
            UnknownResidueError: a letter outside the alphabet, or a mask.
            SequenceTooLongError: a sequence over the limit, unless truncated.
            UsageError: no residue is masked, so few there are.
        """
        chosen = masking_named(masking) if isinstance(masking, str) else masking
        ids = [(f"sequence {number}", one.ids) for number, one in enumerate(self._encode(sequences, long))]
        for place, one in ids:
            check_residues(one, self.alphabet, place)
        masked = perplexity.mask(self.alphabet, ids, chosen, seed)
        return perplexity.of_all(perplexity.losses(self._runner(token_budget), masked))

    def pseudo_perplexity(
        self, sequences: Sequence[str], *, long: str = "window", token_budget: int | None = None
    ) -> NDArray[np.float64]:
        """Pseudo-perplexity ``[N]`` of each sequence: exp(-1/L Σ log p(residue | all others)), a pass a residue.

        Args:
            sequences: residues in upper case.
            long: for sequences longer than the model was trained on: ``window`` masks each residue within
                ProteinGym's window, ``full`` runs them whole, ``error`` refuses them.
            token_budget: tokens computed at a time; bounds memory.

        Raises:
            CapabilityError: the checkpoint has no language-model head.
            UnknownResidueError: a letter outside the alphabet.
            SequenceTooLongError: a sequence over the limit.
        """
        check_policy(long)
        named = [(f"sequence {number}", _one(one)) for number, one in enumerate(_list(sequences))]
        for place, sequence in named:
            check_residues(self.alphabet.encode(sequence), self.alphabet, place)
        found = effects.pseudo_log_likelihoods(self._runner(token_budget), named, long=long)
        return np.array([perplexity.of_loss(-float(values.mean(dtype=np.float64))) for values in found])

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

        Args:
            sequence: the wild type, residues in upper case.
            variants: ``A24V``; several changes at once ``A24V:G30S``; ``A24del``, ``A24_G25insKL`` and
                ``A24_G30delinsKL`` by pseudo-likelihood.
            method: ``masked-marginals``, ``wildtype-marginals`` or ``pseudo-likelihood``.
            offset: the number of the first residue.
            long: for a sequence longer than the model was trained on: ProteinGym's windows, ``full`` or ``error``.
            token_budget: tokens computed at a time; bounds memory.

        Raises:
            VariantError: a variant that the sequence does not have, or that the method cannot score.
            CapabilityError: the checkpoint has no language-model head.
            UnknownResidueError: a letter outside the alphabet.
            SequenceTooLongError: the sequence is over the limit.
            UsageError: the method is unknown.
        """
        check_residues(self.alphabet.encode(_one(sequence)), self.alphabet, "the sequence")
        how = effects.Scoring(method=method, offset=offset, long=long, token_budget=self.budget(token_budget))
        known = parse_all(_list(variants), sequence, self.alphabet, offset)
        protein = effects.Protein("the sequence", sequence, known)
        return next(effects.score(self.module, [protein], how))

    def scan(
        self, sequence: str, *, method: str = "masked-marginals", long: str = "window", token_budget: int | None = None
    ) -> NDArray[np.float64]:
        """Effects of every substitution, ``[L, 20]``: at each place the letters of ``protea.score.variants.CANONICAL``.

        Args:
            sequence: the wild type, residues in upper case.
            method: as in ``score``, in whose units scores are; the wild type's own letter has 0, a gap's row NaN.
            long: likewise.
            token_budget: likewise.

        Raises:
            CapabilityError: the checkpoint has no language-model head.
            UnknownResidueError: a letter outside the alphabet.
            SequenceTooLongError: the sequence is over the limit.
            UsageError: the method is unknown.
        """
        cells = list(single_substitutions(_one(sequence)))
        names = [f"{sequence[place]}{place + 1}{new}" for place, new in cells]
        scores = self.score(sequence, names, method=method, long=long, token_budget=token_budget)
        found = np.zeros((len(sequence), len(CANONICAL)))
        found[[not letter.isalpha() for letter in sequence]] = np.nan
        for (place, new), score in zip(cells, scores, strict=True):
            found[place, CANONICAL.index(new)] = score
        return found

    def evaluate_proteingym(
        self, folder: str | Path, *, method: str = "masked-marginals", long: str = "window"
    ) -> list[proteingym.Measured]:
        """Effects of variants beside deep mutational scans; ``protea.evaluate.proteingym.means`` averages them.

        Args:
            folder: of assays, as ``protea evaluate proteingym`` takes it.
            method: as in ``score``.
            long: likewise.

        Raises:
            DataError: the folder's tables are absent, damaged or lack a column.
            MissingExtraError: scikit-learn is not installed.
            CapabilityError: the checkpoint has no language-model head.
            SequenceTooLongError: a protein is over the limit.
            UsageError: the method is unknown.
        """
        how = effects.Scoring(method=method, long=long)
        scans = [proteingym.AssayScores(assay, self.alphabet, how) for assay in proteingym.read_assays(Path(folder))]
        for scan in scans:
            scan.add(self.module, lambda done: None)
        return [scan.measured() for scan in scans]

    def contacts(self, sequence: str) -> FloatArray:
        """Probability ``[L, L]`` that two residues are in contact (Cβ closer than 8 Å).

        Raises:
            CapabilityError: the checkpoint has no contact head; ``protea fit-contacts`` fits one.
            UnknownResidueError: a letter outside the alphabet.
            SequenceTooLongError: more tokens than the model has positions.
            DeviceError: the map would not fit into memory.
            NonFiniteError: the model gives infinities or NaN.
        """
        (found,) = predict.contacts(self.module, [self.alphabet.encode(_one(sequence))])
        return found

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
        """Fit a contact head to some chains of structures (Rao et al. 2020), in place of one that the model has.

        Args:
            structures: PDB and mmCIF files, and folders of them.
            count: chains to fit on.
            seed: which, and of what is random in fitting.
            head: ``regression`` on attention maps, or ``bilinear`` on the last hidden states.
            c: of the regression: inverse strength of its L1 penalty.
            rank: of the bilinear head.

        Returns:
            The names of the chains it was fitted on, on which it looks better than it is. ``save`` does not keep them:
            ``protea fit-contacts`` writes a folder that says what its head has seen.

        Raises:
            MissingExtraError: biotite or scikit-learn is not installed.
            StructureError: there is no protein in any of the structures.
            DataError: there are fewer chains than asked for, or none has contacts.
            DeviceError: the maps do not fit in memory.
        """
        settings = heads.FitSettings(head=head, count=count, seed=seed, c=c, rank=rank)
        chosen, _ = heads.choose(self._chains(structures), settings)
        self.module.contact_head = heads.fit(self.module, chosen, settings, _silent)
        self._fitted = heads.Fitted.of((chain.name, chain.sequence) for chain in chosen)
        return [chain.name for chain in chosen]

    def evaluate_contacts(
        self, structures: Sequence[str | Path], *, exclude: Collection[str] = (), include_fitted: bool = False
    ) -> list[ChainPrecision]:
        """Precision of contacts against structures, a row a chain; ``protea.contacts.precision.means`` averages them.

        Args:
            structures: PDB and mmCIF files, and folders of them.
            exclude: names of chains to leave out.
            include_fitted: keep chains that the head was fitted on, by ``fit_contacts`` or, by ``contact-head.json``,
                before it was loaded. Without, they are left out with a warning.

        Raises:
            UsageError: a name is no chain's.
            CapabilityError: the model has no contact head; ``fit_contacts`` fits one.
            MissingExtraError: biotite is not installed.
            StructureError: there is no protein in any of the structures.
            NonFiniteError: the model gives infinities or NaN.
        """
        self.module.require("contacts")
        chains = self._chains(structures)
        if unknown := sorted(set(_list(exclude)) - {chain.name for chain in chains}):
            raise UsageError(f"exclude: {unknown[0]!r}: no chain has this name")
        chains = [chain for chain in chains if chain.name not in exclude]
        if not include_fitted and (fitted := self._fitted or heads.fitted_beside(self._head_record)):
            seen = [chain for chain in chains if fitted.covers(chain)]
            chains = [chain for chain in chains if not fitted.covers(chain)]
            if seen:
                warnings.warn(
                    f"left out {len(seen)} chains that the contact head was fitted on, {seen[0].name} among them; "
                    "include_fitted=True keeps them",
                    ProteaWarning,
                    stacklevel=2,
                )
        return [precision.score(chain, precision.predict(self.module, chain)) for chain in chains]

    def attention(self, sequence: str, *, layers: Sequence[int], heads: Sequence[int] | None = None) -> FloatArray:
        """Attention ``[len(layers), len(heads), T, T]``, BOS and EOS included; rows attend and sum to 1.

        Args:
            sequence: residues in upper case.
            layers: from 1; negative ones count from the last.
            heads: from 0; by default all.

        Raises:
            UsageError: a layer or head does not exist.
            UnknownResidueError: a letter outside the alphabet.
            SequenceTooLongError: more tokens than the model has positions.
            NonFiniteError: the model gives infinities or NaN.
        """
        return predict.attention(self.module, self.alphabet.encode(_one(sequence)), layers, heads)

    def save(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face folder, which Protea and ``transformers`` load.

        Raises:
            OutputError: the folder exists and is not empty, or cannot be written.
        """
        hf.save(self.module, Path(folder))

    def budget(self, token_budget: int | None = None) -> int:
        """Tokens computed at a time: as given, or what the memory that is free allows.

        Raises:
            UsageError: it is below 1.
        """
        if token_budget is None:
            return default_budget(self.module)
        if token_budget < 1:
            raise UsageError(f"a token budget must be at least 1, got {token_budget}")
        return token_budget

    def _runner(self, token_budget: int | None) -> Runner:
        return Runner(self.module, self.budget(token_budget))

    def _chains(self, structures: Sequence[str | Path]) -> list[Chain]:
        """Chains that the model can see; what is skipped is a warning."""
        if not _list(structures):
            raise UsageError("name at least one structure, a file or a folder")
        chains, notes = read_structures(structure_files(map(Path, structures)), _silent)
        reasons = {chain.name: precision.unfit(self.module, chain) for chain in chains}
        skipped = [(note.name, note.detail) for note in notes if note.what == "skipped"]
        for name, reason in [*skipped, *((name, reason) for name, reason in reasons.items() if reason is not None)]:
            warnings.warn(f"{name}: skipped: {reason}", ProteaWarning, stacklevel=3)
        return [chain for chain in chains if reasons[chain.name] is None]

    def _encode(self, sequences: Sequence[str], long: Long) -> Iterator[EncodedRecord]:
        if long not in get_args(Long):
            raise UsageError(f"unknown policy for long sequences {long!r}; use {', '.join(get_args(Long))}")
        for number, sequence in enumerate(_list(sequences)):
            record = _record(number, sequence)
            notes: list[ReportRow] = []
            ids = _ids(record, self.alphabet)
            encoded = fit(record, ids, self.module, long, notes)
            if encoded.truncated_from is not None:
                warnings.warn(f"sequence {number} truncated: {notes[-1].detail}", ProteaWarning, stacklevel=4)
            yield encoded


def _silent(what: str, done: int, of: int) -> None:
    pass


def _list(sequences: L) -> L:
    if isinstance(sequences, str):
        raise UsageError("expected a list, got one string; write [string]")
    return sequences


def _one(sequence: str) -> str:
    if not isinstance(sequence, str):
        raise UsageError(f"expected one sequence, a string; got {type(sequence).__name__}")
    if not sequence:
        raise UsageError("expected a sequence of at least one residue")
    return sequence


def _ids(record: Record, alphabet: Alphabet) -> NDArray[np.uint8]:
    try:
        return alphabet.encode(record.sequence)
    except UnknownResidueError as error:
        raise UnknownResidueError(f"{record.place}: {error}") from error


def _record(number: int, sequence: str) -> Record:
    if not sequence:
        raise UsageError(f"sequence {number} is empty")
    return Record(str(number), "", sequence, f"sequence {number}")


def _array(embedding: Embedding, pool: str | None) -> FloatArray:
    if pool is not None:
        return embedding.pooled[pool]
    assert embedding.residues is not None
    return embedding.residues
