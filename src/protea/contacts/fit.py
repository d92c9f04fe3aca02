"""Contact heads, fitted to chains whose contacts are known.

    regression  L1 logistic regression on attention maps (Rao et al. 2020), by scikit-learn's liblinear. ``c`` is
                scikit-learn's: it minimises |w| + c · (sum of losses). 0.15 is what the authors of Meta's models say
                they used (github.com/facebookresearch/esm/issues/249); the paper's λ = 0.15 is this number.
    bilinear    P, Q and b of ``BilinearContactHead`` on the last hidden states, by AdamW, stopped by chains kept apart

Contacts are a few in a hundred pairs, and both see them so: what they predict are probabilities. Knows nothing of
structures: a chain is ids, pairs and contacts.

Shapes: L residues, D model width, N layers, H heads, P pairs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from threading import Thread
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from protea.contacts.predict import features, states
from protea.device import available_memory
from protea.errors import DataError, DeviceError, MissingExtraError, NonFiniteError, ProteaWarning
from protea.models.encoder import Encoder
from protea.models.heads import BilinearContactHead, ContactHead

C: Final = 0.15
RANK: Final = 32

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_BYTES_A_VALUE: Final = 38
"""float32, and liblinear's two copies, by rows and by columns, of an index and a value each; as measured."""

_SIZE: Final = 0.05
"""Of products at first, where states are of size 1: what is random is not to outweigh what is learned."""

# Of 1e-3 and 3e-4, and of decays from 0.1 to 20, these generalised best from 20 chains and from 100.
_LEARNING_RATE: Final = 3e-4
_WEIGHT_DECAY: Final = 0.1
_EPOCHS: Final = 1000
_PATIENCE: Final = 30
"""Epochs without a lower loss on the chains kept apart, after which training ends."""


class Example(NamedTuple):
    """A chain to learn from.

    Attributes:
        ids: ``[L]`` of the residues that the model sees.
        rows: ``[P]`` the first residue of each pair.
        columns: ``[P]`` the second.
        contacts: ``[P]`` whether they are in contact.
    """

    ids: NDArray[np.uint8]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    contacts: NDArray[np.bool_]


def _silent(what: str, done: int, of: int) -> None:
    pass


def fit_regression(
    model: Encoder, examples: Sequence[Example], *, c: float = C, seed: int = 0, progress: Progress = _silent
) -> ContactHead:
    """The logistic regression from all attention maps to contacts.

    Args:
        model: of any family, on the device to compute on.
        examples: all of whose pairs are fitted.
        c: inverse strength of the L1 penalty.
        seed: of the order in which weights are visited.
        progress: told how far it is.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        DataError: no pair is in contact, or all are.
        DeviceError: the maps of all pairs do not fit in memory.
        NonFiniteError: the model gives infinities or NaN.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("fitting contact heads needs scikit-learn: pip install 'protea[evaluate]'") from error
    contacts = _contacts(examples)
    maps = _maps(model, examples, len(contacts), progress)
    progress("regression", 0, 1)
    # Version 1.8 renamed the L1 penalty; the wrong name is ignored, or will be an error.
    renamed = LogisticRegression().get_params().get("penalty") != "l2"
    l1: dict[str, Any] = {"l1_ratio": 1} if renamed else {"penalty": "l1"}
    fitted = LogisticRegression(**l1, C=c, solver="liblinear", random_state=seed)

    def fit() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted.fit(maps, contacts)

    _aside(fit)
    if fitted.n_iter_[0] >= fitted.max_iter:
        message = f"the regression has not converged after {fitted.max_iter} rounds; a smaller c would"
        warnings.warn(message, ProteaWarning, stacklevel=2)
    progress("regression", 1, 1)
    head = ContactHead(sum(model.config.attention_heads))
    with torch.no_grad():
        head.regression.weight.copy_(torch.from_numpy(fitted.coef_))
        head.regression.bias.copy_(torch.from_numpy(fitted.intercept_))
    return head.to(model.device)


def _maps(model: Encoder, examples: Sequence[Example], total: int, progress: Progress) -> NDArray[np.float32]:
    """``[P, N·H]`` what the regression sees of all pairs, ``total`` of them."""
    width = sum(model.config.attention_heads)
    needed, free = total * width * _BYTES_A_VALUE, available_memory()
    if needed > free:
        raise DeviceError(
            f"{width} attention maps of {total:,} pairs take {needed / 1e9:.1f} GB of memory to fit, and "
            f"{free / 1e9:.1f} GB are free; fit on fewer structures"
        )
    maps = np.empty((total, width), np.float32)
    filled = 0
    device = model.device
    for number, one in enumerate(examples):
        progress("attention", number, len(examples))
        pairs = torch.from_numpy(one.rows).to(device), torch.from_numpy(one.columns).to(device)
        maps[filled : filled + len(one.rows)] = features(model, one.ids, pairs)
        filled += len(one.rows)
    if not np.isfinite(maps).all():
        raise NonFiniteError("attention of this model has infinities or NaN; its weights are damaged or diverged")
    return maps


def _contacts(examples: Sequence[Example]) -> NDArray[np.bool_]:
    """Those of all pairs.

    Raises:
        DataError: there is nothing to tell apart.
    """
    contacts = np.concatenate([np.empty(0, bool), *(one.contacts for one in examples)])
    if contacts.all() or not contacts.any():
        raise DataError(
            f"{int(contacts.sum()):,} of {len(contacts):,} pairs of residues are in contact: nothing to tell apart; "
            "take other structures, or more"
        )
    return contacts


def _aside(work: Callable[[], object]) -> None:
    """Run C code that takes minutes and heeds no signal in a thread, so that a signal can end the wait for it."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def fit_bilinear(
    model: Encoder,
    examples: Sequence[Example],
    apart: Sequence[Example],
    *,
    rank: int = RANK,
    seed: int = 0,
    progress: Progress = _silent,
) -> BilinearContactHead:
    """The bilinear head from last hidden states to contacts.

    Args:
        model: of any family, on the device to compute on.
        examples: to train on, a step each.
        apart: what training is stopped by: the head with the lowest loss on these is kept.
        rank: rows of P and Q.
        seed: of the first weights and of the order.
        progress: told how far it is.

    Raises:
        DataError: no pair is in contact, or all are, in one of the two.
        NonFiniteError: the model gives infinities or NaN.
    """
    base = float(_contacts(examples).mean())
    _contacts(apart)
    total = len(examples) + len(apart)
    seen: list[_Seen] = []
    for number, one in enumerate([*examples, *apart]):
        progress("hidden states", number, total)
        seen.append(_see(model, one))
    train, valid = seen[: len(examples)], seen[len(examples) :]
    # Channels differ in size a hundredfold; in equal units, one learning rate fits all.
    unit = torch.cat([each.states for each in train]).square().mean(0).sqrt().clamp_min(1e-6)
    for each in seen:
        each.states.div_(unit)
    head = _begin(model.config.hidden_size, rank, base, seed).to(unit.device)
    _train(head, train, valid, seed, progress)
    with torch.no_grad():
        for projection in (head.p_proj, head.q_proj):
            projection.weight.div_(unit)
    return head


class _Seen(NamedTuple):
    """A chain as the head sees it.

    Attributes:
        states: ``[L, D]``.
        pairs: ``[P]`` where pairs are in a flat ``[L, L]``.
        contacts: ``[P]`` 1 for contacts, else 0.
    """

    states: Tensor
    pairs: Tensor
    contacts: Tensor

    def loss(self, head: BilinearContactHead) -> Tensor:
        """The sum over its pairs."""
        logits = head(self.states).flatten()[self.pairs]
        return F.binary_cross_entropy_with_logits(logits, self.contacts, reduction="sum")


def _see(model: Encoder, one: Example) -> _Seen:
    x = states(model, one.ids)
    pairs = torch.from_numpy(one.rows * len(one.ids) + one.columns).to(x.device)
    return _Seen(x, pairs, torch.from_numpy(one.contacts).to(x))


def _begin(width: int, rank: int, base: float, seed: int) -> BilinearContactHead:
    """Small random P and Q, and as b the log-odds of contacts: what is right where nothing is known."""
    head = BilinearContactHead(width, rank)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for projection in (head.p_proj, head.q_proj):
            values = generator.standard_normal((rank, width)) * math.sqrt(_SIZE / width / math.sqrt(rank))
            projection.weight.copy_(torch.from_numpy(values))
        head.bias.fill_(math.log(base / (1 - base)))
    return head


def _train(
    head: BilinearContactHead, train: Sequence[_Seen], valid: Sequence[_Seen], seed: int, progress: Progress
) -> None:
    """Train until the loss on ``valid`` has not fallen for some epochs; leaves the weights with the lowest."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    generator = np.random.default_rng(seed)
    pairs = sum(len(one.pairs) for one in train) / len(train)
    best, best_epoch, kept = math.inf, 0, deepcopy(head.state_dict())
    for epoch in range(_EPOCHS):
        progress("bilinear head", epoch, _EPOCHS)
        with torch.no_grad():
            loss = float(sum(one.loss(head) for one in valid))
        if loss < best:
            best, best_epoch, kept = loss, epoch, deepcopy(head.state_dict())
        elif epoch - best_epoch >= _PATIENCE:
            break
        for number in generator.permutation(len(train)):
            optimizer.zero_grad()
            # Chains count by their pairs, as in one sum over all.
            (train[number].loss(head) / pairs).backward()
            optimizer.step()
    progress("bilinear head", _EPOCHS, _EPOCHS)
    head.load_state_dict(kept)
