"""Contact heads fitted to chains whose contacts are known. Knows nothing of structures.

    regression  L1 logistic regression on attention maps (Rao et al. 2020), by scikit-learn's liblinear. ``c`` is
                scikit-learn's: it minimises |w| + c · (sum of losses). 0.15 is what the authors of Meta's models say
                they used (github.com/facebookresearch/esm/issues/249); the paper's λ = 0.15 is this number.
    bilinear    P, Q and b of ``BilinearContactHead`` on the last hidden states, by AdamW; training stops when the loss
                on held-out chains no longer falls

Only a few in a hundred pairs are contacts, and both fits see all pairs, so the heads predict probabilities.

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
from protea.errors import DataError, DeviceError, NonFiniteError, ProteaWarning
from protea.limits import available_memory
from protea.models.encoder import Encoder
from protea.models.layers import BilinearContactHead, ContactHead
from protea.optional import extra
from protea.progress import SILENT, Progress

C: Final = 0.15
RANK: Final = 32

_BYTES_A_VALUE: Final = 38  # measured: a float32, and two copies by liblinear, each with an index and a value
_FIRST_SIZE: Final = 0.05  # size of the bilinear products before training; larger noise would outweigh what is learned

# Tried: rates of 1e-3 and 3e-4, decays from 0.1 to 20. These generalised best from 20 chains and from 100.
_LEARNING_RATE: Final = 3e-4
_WEIGHT_DECAY: Final = 0.1
_EPOCHS: Final = 1000
_PATIENCE: Final = 30  # training ends after this number of epochs without a lower loss on the held-out chains


class Example(NamedTuple):
    """A chain to learn from: ids ``[L]``; for its pairs ``[P]`` both residues and whether they are in contact."""

    ids: NDArray[np.uint8]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    contacts: NDArray[np.bool_]


def fit_regression(
    model: Encoder, examples: Sequence[Example], *, c: float = C, seed: int = 0, progress: Progress = SILENT
) -> ContactHead:
    """Fit the logistic regression from all attention maps to the contacts of all pairs.

    ``c`` is the inverse strength of the L1 penalty; ``seed`` orders liblinear's visits to the weights.
    """
    with extra("evaluate", "fitting contact heads needs scikit-learn"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    contacts = _contacts(examples)
    maps = _maps(model, examples, len(contacts), progress)
    # Version 1.8 renamed the L1 penalty; it ignores the old name, and later versions may refuse it.
    renamed = LogisticRegression().get_params().get("penalty") != "l2"
    l1: dict[str, Any] = {"l1_ratio": 1} if renamed else {"penalty": "l1"}
    regression = LogisticRegression(**l1, C=c, solver="liblinear", random_state=seed)

    def fit() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit(maps, contacts)

    progress.begin("regression")
    _in_thread(fit)
    if regression.n_iter_[0] >= regression.max_iter:
        message = f"the regression has not converged after {regression.max_iter} rounds; try a smaller c"
        warnings.warn(message, ProteaWarning, stacklevel=2)
    head = ContactHead(sum(model.config.attention_heads))
    with torch.no_grad():
        head.regression.weight.copy_(torch.from_numpy(regression.coef_))
        head.regression.bias.copy_(torch.from_numpy(regression.intercept_))
    return head.to(model.device)


def _maps(model: Encoder, examples: Sequence[Example], total: int, progress: Progress) -> NDArray[np.float32]:
    """``[P, N·H]``, the regression's input for all ``total`` pairs."""
    width = sum(model.config.attention_heads)
    needed, free = total * width * _BYTES_A_VALUE, available_memory()
    if needed > free:
        raise DeviceError(
            f"to fit {width} attention maps of {total:,} pairs needs {needed / 1e9:.1f} GB of memory; "
            f"{free / 1e9:.1f} GB are free; fit on fewer structures"
        )
    maps = np.empty((total, width), np.float32)
    filled = 0
    progress.begin("attention", len(examples))
    for example in examples:
        pairs = torch.from_numpy(example.rows).to(model.device), torch.from_numpy(example.columns).to(model.device)
        maps[filled : filled + len(example.rows)] = features(model, example.ids, pairs)
        filled += len(example.rows)
        progress.advance()
    if not np.isfinite(maps).all():
        raise NonFiniteError("attention of this model has infinities or NaN; its weights are damaged or diverged")
    return maps


def _contacts(examples: Sequence[Example]) -> NDArray[np.bool_]:
    """Whether each pair ``[P]`` is in contact; an error if all pairs are, or none."""
    contacts = np.concatenate([np.empty(0, bool), *(example.contacts for example in examples)])
    if contacts.all() or not contacts.any():
        raise DataError(
            f"{int(contacts.sum()):,} of {len(contacts):,} pairs of residues are in contact; a fit needs pairs with "
            "and without contact: use more structures, or others"
        )
    return contacts


def _in_thread(work: Callable[[], object]) -> None:
    """Run long C code, which ignores signals, in a thread, so that a signal can end the wait for it."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def fit_bilinear(
    model: Encoder,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    *,
    rank: int = RANK,
    seed: int = 0,
    progress: Progress = SILENT,
) -> BilinearContactHead:
    """Fit the bilinear head from last hidden states to contacts; keep the weights with the lowest ``held_out`` loss.

    ``rank`` is the number of rows of P and Q; ``seed`` decides the first weights and the order of chains.
    """
    share = float(_contacts(examples).mean())
    _contacts(held_out)
    inputs: list[_Input] = []
    progress.begin("hidden states", len(examples) + len(held_out))
    for example in [*examples, *held_out]:
        x = states(model, example.ids)
        pairs = torch.from_numpy(example.rows * len(example.ids) + example.columns).to(x.device)
        inputs.append(_Input(x, pairs, torch.from_numpy(example.contacts).to(x)))
        progress.advance()
    train, valid = inputs[: len(examples)], inputs[len(examples) :]
    # Channels differ in size a hundredfold. Scaled to the same size, they can share a learning rate.
    scale = torch.cat([chain.states for chain in train]).square().mean(0).sqrt().clamp_min(1e-6)
    for chain in inputs:
        chain.states.div_(scale)
    head = _first_head(model.config.hidden_size, rank, share, seed).to(scale.device)
    _train(head, train, valid, seed, progress)
    with torch.no_grad():
        for projection in (head.p_proj, head.q_proj):
            projection.weight.div_(scale)
    return head


class _Input(NamedTuple):
    """A chain as the bilinear head sees it; ``pairs`` are indices in a flat ``[L, L]``, ``contacts`` are 1 or 0."""

    states: Tensor
    pairs: Tensor
    contacts: Tensor

    def loss(self, head: BilinearContactHead) -> Tensor:
        """The sum over the pairs."""
        logits = head(self.states).flatten()[self.pairs]
        return F.binary_cross_entropy_with_logits(logits, self.contacts, reduction="sum")


def _first_head(width: int, rank: int, share: float, seed: int) -> BilinearContactHead:
    """Small random P and Q; b is the log-odds of the share of contacts, the best guess without knowledge."""
    head = BilinearContactHead(width, rank)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for projection in (head.p_proj, head.q_proj):
            values = generator.standard_normal((rank, width)) * math.sqrt(_FIRST_SIZE / width / math.sqrt(rank))
            projection.weight.copy_(torch.from_numpy(values))
        head.bias.fill_(math.log(share / (1 - share)))
    return head


def _train(
    head: BilinearContactHead, train: Sequence[_Input], valid: Sequence[_Input], seed: int, progress: Progress
) -> None:
    """Train until the loss on ``valid`` stops falling, and keep the weights with the lowest loss."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    generator = np.random.default_rng(seed)
    pairs = sum(len(chain.pairs) for chain in train) / len(train)
    best, best_epoch, kept = math.inf, 0, deepcopy(head.state_dict())
    progress.begin("bilinear head", _EPOCHS)
    for epoch in range(_EPOCHS):
        with torch.no_grad():
            loss = float(sum(chain.loss(head) for chain in valid))
        if loss < best:
            best, best_epoch, kept = loss, epoch, deepcopy(head.state_dict())
        elif epoch - best_epoch >= _PATIENCE:
            break
        for number in generator.permutation(len(train)):
            optimizer.zero_grad()
            # Divide by the mean number of pairs: the weight of a chain is its number of pairs.
            (train[number].loss(head) / pairs).backward()
            optimizer.step()
        progress.advance()
    head.load_state_dict(kept)
