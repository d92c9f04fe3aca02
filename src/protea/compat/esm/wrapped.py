"""fair-esm's models: their call, their attributes and their names of parameters, around a model of Protea.

The model of Protea computes; this shell holds its modules under fair-esm's names. Without padding nothing is computed
for it, so its rows are 0, where fair-esm gives values that depend on the other sequences of a batch.

Shapes: B sequences, T tokens of the longest with padding, D width, V vocabulary, N layers, H heads.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.checkpoints import fair_esm
from protea.checkpoints.hub import published
from protea.compat.esm.absent import refuse
from protea.compat.esm.data import EsmAlphabet
from protea.compat.esm.head_modules import ContactPredictionHead, ContactSum, RobertaLMHead
from protea.compat.esm.hooks import adapt_hooks, of_batch
from protea.compat.esm.padded import PaddedBatch
from protea.device import resolve_device
from protea.errors import CapabilityError, UsageError, warn
from protea.models.encoder import Encoder
from protea.models.layers import ContactHead, LanguageModelHead, LayerContext
from protea.models.registry import build, initial_value
from protea.models.transformer import SelfAttention
from protea.text import shown
from protea.transforms.native_linear import multiply_natively

_NAMES: Final = {"word_embeddings": "embed_tokens", "position_embeddings": "embed_positions"}
"""fair-esm's names of modules where they differ from ours."""

_OURS: Final = {theirs: ours for ours, theirs in _NAMES.items()}

_ORDER: Final = (
    *("embed_tokens", "layers", "contact_head", "embed_positions", "emb_layer_norm_before", "emb_layer_norm_after"),
    *("self_attn", "k_proj", "v_proj", "q_proj", "out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
)
"""fair-esm's order of modules, and so of ``parameters()``, which scripts cut and optimizers count."""

_UNREAD: Final = ("rot_emb.inv_freq", "_float_tensor")
"""How keys end in fair-esm's state dicts that are not parameters."""


class EsmModel(nn.Module):
    """What both classes of fair-esm share; ``model(tokens, repr_layers=[33])``."""

    _encoder: Encoder
    alphabet: EsmAlphabet
    layers: nn.ModuleList
    lm_head: nn.Module
    num_layers: int

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        """The shell around a model of Protea, which becomes part of it."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._adopt(encoder)
        return model

    def _adopt(self, encoder: Encoder) -> None:
        multiply_natively(encoder)
        # No submodule: its own submodules get fair-esm's names here.
        self.__dict__["_encoder"] = encoder
        config, alphabet = encoder.config, EsmAlphabet.of(encoder.alphabet)
        self.alphabet, self.alphabet_size = alphabet, len(alphabet)
        self.padding_idx, self.mask_idx = alphabet.padding_idx, alphabet.mask_idx
        self.cls_idx, self.eos_idx = alphabet.cls_idx, alphabet.eos_idx
        self.prepend_bos, self.append_eos = alphabet.prepend_bos, alphabet.append_eos
        self.num_layers, self.embed_dim = config.num_hidden_layers, config.hidden_size
        self.attention_heads = config.attention_heads[0]
        self.embed_scale: float = 1
        self.token_dropout = bool(getattr(config, "token_dropout", False))
        head = encoder.lm_head
        if isinstance(head, LanguageModelHead):
            words = encoder.get_parameter("word_embeddings.weight")
            assert isinstance(words, nn.Parameter)
            RobertaLMHead.adopt(head, words)
        if isinstance(encoder.contact_head, ContactHead):
            ContactPredictionHead.adopt(encoder.contact_head, alphabet)
        for name, module in encoder.named_children():
            if module is head and isinstance(head, nn.Linear):
                self.embed_out, self.embed_out_bias = head.weight, head.bias
            elif not isinstance(module, nn.Identity):
                setattr(self, _NAMES.get(name, name), module)
        for module in self.modules():
            module._modules = dict(sorted(module._modules.items(), key=_place))
        for layer in self.layers:
            # Where fair-esm has them; the layer gets them back with each call.
            for name in list(layer._parameters):
                layer.get_submodule("self_attn").register_parameter(name, layer._parameters.pop(name))
            layer.register_forward_pre_hook(_only_packed, with_kwargs=True)
            _describe(layer, self.embed_dim, self.attention_heads, rotary="inv_freq" in encoder.stored_buffers)
        adapt_hooks(self)

    def forward(
        self,
        tokens: Tensor,
        repr_layers: Iterable[int] = (),
        need_head_weights: bool = False,
        return_contacts: bool = False,
    ) -> dict[str, Any]:
        """``logits`` ``[B, T, V]``; ``representations`` ``[B, T, D]`` by layer; what else is asked for.

        Layer 0 is the embedding, the last comes after the final norm. ``attentions`` are ``[B, N, H, T, T]``, and
        ``contacts``, which come with them, ``[B, T', T']`` without BOS and EOS.
        """
        layers = self._checked(repr_layers)
        batch = self._batch(tokens)
        states: dict[int, Tensor] = {}
        maps: list[Tensor] = []

        def keep(number: int, x: Tensor) -> None:
            if number in layers:
                states[number] = batch.padded(x)

        contacts = self._contacts(tokens) if return_contacts else None

        def add(layer: Tensor) -> None:
            maps.append(layer.to(self._encoder.compute_dtype))
            if contacts is not None:
                contacts.add(layer)

        x = self._computed(batch, keep, add if need_head_weights or return_contacts else None)
        result: dict[str, Any] = {"logits": batch.padded(self._logits(batch, x)), "representations": states}
        if maps:
            result["attentions"] = torch.stack(maps, 1)
        if contacts is not None:
            result["contacts"] = contacts.probabilities().to(x.dtype)
        return result

    def predict_contacts(self, tokens: Tensor) -> Tensor:
        """Probabilities of contacts ``[B, T', T']`` between residues; the maps of one layer are kept at a time."""
        batch, contacts = self._batch(tokens), self._contacts(tokens)
        x = self._computed(batch, None, contacts.add)
        return contacts.probabilities().to(x.dtype)

    def require(self, capability: str) -> None:
        """Raise ``CapabilityError`` with a remedy if the model lacks ``attention`` or ``contacts``."""
        self._encoder.require(capability)

    def _batch(self, tokens: Tensor) -> PaddedBatch:
        if getattr(self, "_is_replica", False):
            raise CapabilityError("torch.nn.DataParallel: Protea's models compute on one device; use one process a GPU")
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise CapabilityError(
                "torch.jit.trace: a trace would keep the lengths of this batch; call the model itself"
            )
        return PaddedBatch.of(tokens, self._encoder)

    def _computed(
        self,
        batch: PaddedBatch,
        keep: Callable[[int, Tensor], None] | None,
        add: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """The one forward pass, ``[N, D]``; ``keep`` receives hidden states, ``add`` the maps ``[B, H, T, T]``."""
        on_attention = None if add is None else lambda number, call: add(batch.maps(call))
        with of_batch(batch):
            x: Tensor = self._encoder(batch.packed, on_hidden=keep, on_attention=on_attention)
        return x

    def _logits(self, batch: PaddedBatch, x: Tensor) -> Tensor:
        if isinstance(self._encoder.lm_head, nn.Linear):
            return F.linear(x, self.embed_out, self.embed_out_bias)[:, : self.alphabet_size]
        with of_batch(batch):
            logits: Tensor = self.lm_head(x)
        # A script's own head may be wider than the alphabet.
        return logits[:, : self.alphabet_size] if isinstance(self.lm_head, RobertaLMHead) else logits

    def _contacts(self, tokens: Tensor) -> ContactSum:
        self.require("contacts")
        head = getattr(self, "contact_head", None)
        if not isinstance(head, ContactPredictionHead):
            raise CapabilityError(
                f"contacts: this model has a {type(head).__name__}, not fair-esm's contact head; use `protea contacts`"
            )
        return ContactSum(head, tokens)

    def _checked(self, repr_layers: Iterable[int]) -> set[int]:
        layers = set(repr_layers)
        if wrong := sorted(layer for layer in layers if not 0 <= layer <= len(self.layers)):
            raise UsageError(
                f"repr_layers={shown(wrong)}: this model has layers 0 (the embedding) to {len(self.layers)}"
            )
        return layers

    # --- parts that scripts replace, move and store ----------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A script replaces a part, as in model.layers = model.layers[:6].
        ours = _OURS.get(name, name)
        if isinstance(value, nn.Module) and ours in self._encoder._modules and ours != "lm_head":
            setattr(self._encoder, ours, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        encoder = self._encoder
        for name, buffer in encoder.stored_buffers.items():
            encoder.set_buffer(name, buffer.to(encoder.device))
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the model; ``DeviceError`` for a GPU that is not here."""
        for value in (*args, kwargs.get("device")):
            if isinstance(value, str | torch.device) or type(value) is int:
                resolve_device(f"cuda:{value}" if type(value) is int else str(value))
        return super().to(*args, **kwargs)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Move the model to a GPU; ``DeviceError`` without one."""
        return self.to("cuda" if device is None else device)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The weights under fair-esm's names, with the rotary frequencies that fair-esm keeps in each layer."""
        result = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        frequencies = self._encoder.stored_buffers.get("inv_freq")
        if frequencies is not None:
            for number in range(len(self.layers)):
                result[f"{prefix}layers.{number}.self_attn.rot_emb.inv_freq"] = frequencies
        elif not hasattr(self, "embed_positions"):
            result[f"{prefix}embed_positions._float_tensor"] = torch.zeros(1)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        unread = [key for key in state_dict if key.startswith(prefix) and key.endswith(_UNREAD)]
        frequencies = [state_dict.pop(key) for key in unread if key.endswith(_UNREAD[0])]
        for key in set(unread) & state_dict.keys():
            del state_dict[key]
        if frequencies and "inv_freq" in self._encoder.stored_buffers:
            self._encoder.set_buffer("inv_freq", frequencies[0].to(self._encoder.device, torch.float32))
        head = [key for key in state_dict if key.startswith(f"{prefix}contact_head.")]
        if head and getattr(self, "contact_head", None) is None:
            warn("this model has no contact head; the one in the state dict is left out")
            for key in head:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


class RotaryModel(EsmModel):
    """fair-esm's ``ESM2``; without a checkpoint it has random weights, which ``torch.manual_seed`` decides."""

    def __init__(
        self,
        num_layers: int = 33,
        embed_dim: int = 1280,
        attention_heads: int = 20,
        alphabet: EsmAlphabet | str = "ESM-1b",
        token_dropout: bool = True,
    ) -> None:
        super().__init__()
        known = EsmAlphabet.from_architecture("ESM-1b")
        given = alphabet if isinstance(alphabet, EsmAlphabet) else EsmAlphabet.from_architecture(alphabet)
        if given.all_toks != known.all_toks:
            raise UsageError("alphabet: ESM2 takes the alphabet of ESM-1b only")
        config: Any = published("esm2_t6_8M_UR50D").config
        self._adopt(
            _random(
                replace(
                    config,
                    num_hidden_layers=num_layers,
                    hidden_size=embed_dim,
                    num_attention_heads=attention_heads,
                    intermediate_size=4 * embed_dim,
                    token_dropout=token_dropout,
                )
            )
        )


class ProteinBertModel(EsmModel):
    """fair-esm's class of ESM-1, ESM-1b and ESM-1v, with their settings as ``args``."""

    args: Namespace

    def __init__(self, args: Namespace, alphabet: EsmAlphabet) -> None:
        raise CapabilityError(
            "ProteinBertModel(args, alphabet): load a model by esm.pretrained instead; `protea init` makes random ones"
        )

    def _adopt(self, encoder: Encoder) -> None:
        super()._adopt(encoder)
        settings = vars(fair_esm.described(encoder)["args"])
        self.args = Namespace(
            **{key.removeprefix("encoder_").removeprefix("decoder_"): value for key, value in settings.items()}
        )
        later = self.args.arch == "roberta_large"
        self.model_version, self.embed_scale = ("ESM-1b", 1) if later else ("ESM-1", math.sqrt(self.embed_dim))
        normed = hasattr(self, "emb_layer_norm_before")
        self.args.emb_layer_norm_before = normed
        if not normed:
            self.emb_layer_norm_before = None if later else False


def around(encoder: Encoder, name: str) -> EsmModel:
    """A model of Protea in its class of fair-esm; ``CapabilityError`` for a family that fair-esm has not."""
    if fair_esm.NAME not in type(encoder).stored:
        raise CapabilityError(
            f"{name}: fair-esm has no {encoder.config.family}; use protea.load({name!r}) instead of esm.pretrained"
        )
    encoder.require("logits")
    return (RotaryModel if "cfg" in fair_esm.described(encoder) else ProteinBertModel).of(encoder)


def _place(item: tuple[str, nn.Module | None]) -> int:
    """The place of a module, by its name, among those of the same parent; others keep theirs, behind these."""
    return _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER)


def _random(config: Any) -> Encoder:
    model = build(config)
    seed = int(torch.randint(2**31, ()))
    state = {name: initial_value(model, name, seed) for name, _ in model.named_parameters()}
    model.load_state_dict(state | model.stored_buffers, assign=True)
    return model


def _describe(layer: nn.Module, width: int, heads: int, *, rotary: bool) -> None:
    """Give a layer and its attention what scripts read of them."""
    attention = layer.get_submodule("self_attn")
    assert isinstance(attention, SelfAttention)
    sizes = {"embed_dim": width, "attention_heads": heads, "ffn_embed_dim": layer.get_submodule("fc1").out_features}
    vars(layer).update(sizes, use_rotary_embeddings=rotary)
    vars(attention).update(embed_dim=width, num_heads=heads, head_dim=attention.head_width, scaling=attention.scale)


def _only_packed(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs or len(args) != 2 or not isinstance(args[1], LayerContext):
        refuse("a call of one of model.layers", "layers")
    vars(layer).update(layer.get_submodule("self_attn")._parameters)
