"""Residues to token ids and back: the vocabularies of the ESM family.

Encoding is one table look-up per byte. A residue outside the alphabet is an error; callers may have other policies.

Sources: Meta's ``esm`` package (``Alphabet.from_architecture("ESM-1b")``) and the SentencePiece vocabulary of
NVIDIA's ESM-1nv.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from protea.errors import UnknownResidueError

_INVALID: Final = 255
_MASK: Final = "<mask>"

Count = TypeVar("Count", int, NDArray[np.int64])


class Frame(NamedTuple):
    """The special tokens around a sequence: the ids of BOS and EOS, or ``None`` for a token that is not added."""

    bos: int | None
    eos: int | None

    @property
    def specials(self) -> tuple[int, ...]:
        """The ids that the frame adds."""
        return tuple(token for token in self if token is not None)

    @property
    def before(self) -> int:
        """Number of tokens before the first residue."""
        return int(self.bos is not None)

    @property
    def rows(self) -> slice:
        """The rows of a framed sequence that are residues."""
        return slice(self.before, None if self.eos is None else -1)

    def tokens(self, residues: Count) -> Count:
        """Number of tokens for a number of residues."""
        return residues + len(self.specials)

    def residues(self, tokens: Count) -> Count:
        """Number of residues in a number of tokens."""
        return tokens - len(self.specials)

    def around(self, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The tokens ``[T]`` of a sequence with residues ``[L]``."""
        parts = (self.specials[: self.before], ids, self.specials[self.before :])
        return np.concatenate([np.asarray(part, np.uint8) for part in parts])


@dataclass(frozen=True, kw_only=True)
class Alphabet:
    """A vocabulary: its tokens in the order of their ids, and the ids of the special ones.

    Residues are the tokens of one letter. Models may expect no ``bos`` or ``eos``. Packed batches have no ``pad``, and
    encoding never returns ``unk``.
    """

    name: str
    tokens: tuple[str, ...]
    bos: int | None
    eos: int | None
    pad: int
    unk: int
    mask: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def frame(self) -> Frame:
        """The special tokens around every sequence."""
        return Frame(self.bos, self.eos)

    @cached_property
    def residues(self) -> str:
        """The one-letter tokens in the order of their ids."""
        return "".join(token for token in self.tokens if len(token) == 1)

    @cached_property
    def _to_id(self) -> bytes:
        ids = {ord(token): number for number, token in enumerate(self.tokens) if len(token) == 1}
        return bytes(ids.get(code, _INVALID) for code in range(256))

    def encode(self, sequence: str) -> NDArray[np.uint8]:
        """The ids ``[L]`` of residues in upper case, without BOS and EOS; ``<mask>`` is one masked position."""
        parts = sequence.split(_MASK)
        starts = accumulate((len(part) + 1 for part in parts[:-1]), initial=0)
        ids = bytes([self.mask]).join(map(self._translate, parts, starts))
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
        """The text of ids, where special tokens look like ``<mask>``; ``IndexError`` for an id outside the alphabet."""
        return "".join([self.tokens[number] for number in ids.tolist()])


ESM: Final = Alphabet(
    name="ESM",
    tokens=(*("<cls>", "<pad>", "<eos>", "<unk>"), *"LAGVSERTIDPKQNFYMHWCXBUZO.-", *("<null_1>", "<mask>")),
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
