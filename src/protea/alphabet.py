"""Residues to token ids and back: the vocabularies of the ESM family.

Encoding is one table look-up per byte. This module knows nothing of files or models; what to do with a
residue outside the alphabet is the caller's policy, here it is an error.

Sources: Meta's ``esm`` package (``Alphabet.from_architecture("ESM-1b")``) and the SentencePiece vocabulary of
NVIDIA's ESM-1nv.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from protea.errors import UnknownResidueError

_INVALID: Final = 255
_MASK: Final = "<mask>"

Count = TypeVar("Count", int, NDArray[np.int64])


class Frame(NamedTuple):
    """The special tokens around a sequence: BOS or nothing before it, EOS or nothing after it.

    Attributes:
        bos: id before every sequence, or ``None``.
        eos: id after every sequence, or ``None``.
    """

    bos: int | None
    eos: int | None

    @property
    def specials(self) -> tuple[int, ...]:
        """The ids that the frame adds."""
        return tuple(token for token in self if token is not None)

    @property
    def before(self) -> int:
        """Tokens before the first residue."""
        return int(self.bos is not None)

    @property
    def rows(self) -> slice:
        """Which rows of a framed sequence are residues."""
        return slice(self.before, None if self.eos is None else -1)

    def tokens(self, residues: Count) -> Count:
        """How many tokens a number of residues makes."""
        return residues + len(self.specials)

    def residues(self, tokens: Count) -> Count:
        """How many residues are in a number of tokens."""
        return tokens - len(self.specials)

    def around(self, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The tokens ``[T]`` of a sequence's residues ``[L]``."""
        parts = (self.specials[: self.before], ids, self.specials[self.before :])
        return np.concatenate([np.asarray(part, np.uint8) for part in parts])


@dataclass(frozen=True, kw_only=True)
class Alphabet:
    """A vocabulary: the order of its tokens and the ids of the special ones.

    Attributes:
        name: what messages call it.
        tokens: all tokens in id order; residues are the one-letter ones.
        bos: id put before every sequence; ``None`` where models see none.
        eos: id put after every sequence; ``None`` likewise.
        pad: id of padding, which packed batches never contain.
        unk: id for "unknown", which encoding never produces on its own.
        mask: id of the masked position.
    """

    name: str
    tokens: tuple[str, ...]
    bos: int | None
    eos: int | None
    pad: int
    unk: int
    mask: int
    _to_id: bytes = field(init=False, repr=False, compare=False)
    _to_residue: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        to_id = bytearray([_INVALID] * 256)
        to_residue = bytearray(256)
        for token_id, token in enumerate(self.tokens):
            if len(token) == 1:
                to_id[ord(token)] = token_id
                to_residue[token_id] = ord(token)
        object.__setattr__(self, "_to_id", bytes(to_id))
        object.__setattr__(self, "_to_residue", bytes(to_residue))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def frame(self) -> Frame:
        """What stands around every sequence."""
        return Frame(self.bos, self.eos)

    @property
    def residues(self) -> str:
        """The one-letter tokens in id order."""
        return "".join(token for token in self.tokens if len(token) == 1)

    def encode(self, sequence: str) -> NDArray[np.uint8]:
        """Turn residues into ids, one each, without BOS and EOS.

        ``<mask>`` stands for one masked position.

        Args:
            sequence: letters of this alphabet, upper case.

        Returns:
            Ids of shape ``[L]``.

        Raises:
            UnknownResidueError: for the first letter outside the alphabet, with its position.
        """
        if _MASK in sequence:
            parts = sequence.split(_MASK)
            starts = accumulate((len(part) + 1 for part in parts[:-1]), initial=0)
            ids = bytes([self.mask]).join(map(self._translate, parts, starts))
        else:
            ids = self._translate(sequence, 0)
        return np.frombuffer(ids, dtype=np.uint8)

    def _translate(self, residues: str, start: int) -> bytes:
        # A letter beyond Latin-1 becomes "?", which no alphabet has; the message shows the original.
        ids = residues.encode("latin-1", errors="replace").translate(self._to_id)
        if _INVALID in ids:
            position = ids.index(_INVALID)
            raise self._unknown(residues[position], start + position)
        return ids

    def _unknown(self, letter: str, position: int) -> UnknownResidueError:
        if letter.islower() and letter.upper() in self.tokens:
            advice = f"write it in upper case ({letter.upper()})"
        elif letter == "*":
            advice = "remove the stop, or write X for an unknown residue"
        else:
            advice = "write X for an unknown residue, or remove it"
        return UnknownResidueError(
            f"residue {letter!r} at position {position + 1} is not in the {self.name} alphabet "
            f"({self.residues}); {advice}"
        )

    def decode(self, ids: NDArray[np.integer]) -> str:
        """Turn ids back into text; special tokens are written out, as in ``<mask>``.

        Raises:
            IndexError: for an id outside the alphabet.
        """
        values = np.asarray(ids)
        if values.size and (values.min() < 0 or values.max() >= len(self)):
            raise IndexError(f"token ids must be in [0, {len(self)}), got {values.min()} to {values.max()}")
        letters = values.astype(np.uint8).tobytes().translate(self._to_residue)
        if 0 in letters:
            return "".join(self.tokens[i] for i in values.tolist())
        return letters.decode("ascii")


ESM: Final = Alphabet(
    name="ESM",
    tokens=(
        *("<cls>", "<pad>", "<eos>", "<unk>"),
        *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
        *("<null_1>", "<mask>"),
    ),
    bos=0,
    pad=1,
    eos=2,
    unk=3,
    mask=32,
)
"""The 33 tokens of ESM-1b, ESM-1v and ESM-2."""

ESM1NV: Final = Alphabet(
    name="ESM-1nv",
    tokens=(*("<unk>", "<s>", "</s>", "<pad>", "<mask>"), *"LASGVERTDIPKNFQYHMCWXBZUO"),
    unk=0,
    bos=1,
    eos=2,
    pad=3,
    mask=4,
)
"""The 30 tokens of ESM-1nv; its embedding matrix is padded to 128 rows."""
