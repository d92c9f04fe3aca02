"""Prepares a finished model for products in int8, which many CPUs do several times as fast as those in float32.

``pack_for_cpu`` then rounds weights to int8: 128 weights of an output share a scale, as do 128 inputs of a token when
the product is computed. Rounding changes a weight once and for all, so what it does to the mean input is in every
token. This part is removed: a few proteins pass through the model, and W x + b becomes W (x - c) + (b + W c) with the
mean input c behind a norm, which also leaves less to round; elsewhere, the bias makes up for what rounding does to W c.
Neither costs anything afterwards.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from protea.device import QUANTIZED
from protea.errors import DeviceError, UsageError
from protea.models.encoder import Encoder
from protea.native.products import GROUP, Packed, supports
from protea.packing import pack
from protea.transforms.cpu import is_plain
from protea.transforms.native_linear import multiply_natively

PRODUCTS: Final = torch.int8
"""The type that the layers multiply in."""

PROTEINS: Final = (
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVNCAKKIVSD"
    "GNGMNAWVAWRNRCKGTDVQAWIRGCRL",
    "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLRVDPVNFKL"
    "LSHCLLVTLAAHLPAEFTPAVHASLDKFLASVSTVLTSKYR",
)
"""Ubiquitin, lysozyme of hens and the alpha chain of human haemoglobin. Random residues are nearly as good."""


def check_quantizable(model: Encoder, device: torch.device) -> None:
    """Raise ``UsageError`` or ``DeviceError`` if the layers of a model cannot multiply in int8 on a device."""
    if not all(is_plain(layer) for layer in model.layers):
        raise UsageError(f"{model.config.family} models cannot compute in {QUANTIZED}; use bfloat16, or float32")
    if device.type != "cpu":
        raise UsageError(f"models compute in {QUANTIZED} on a CPU alone; on {device} use bf16-mixed, or float32")
    if not supports(PRODUCTS):
        raise DeviceError(
            f"{QUANTIZED} needs Protea's native library and a processor with AVX-512 VNNI or AVX-VNNI, which "
            "`protea doctor` shows; use float32"
        )


def bytes_of_weights(model: Encoder) -> int | None:
    """Bytes of a model's weights in int8, about; ``None`` if its layers are not packed in it."""
    if not all(is_plain(layer) for layer in model.layers):
        return None
    inside = sum(part.weight.numel() for part in model.layers.modules() if isinstance(part, nn.Linear))
    scales = inside * 4 // GROUP
    return 4 * (sum(parameter.numel() for parameter in model.parameters()) - inside) + inside + scales


def quantize(model: Encoder) -> None:
    """Prepare a model in float32, in place: its layers compute the same, and ``pack_for_cpu`` makes them int8."""
    check_quantizable(model, model.device)
    multiply_natively(model)
    means = mean_inputs(model)
    with torch.no_grad():
        for layer in model.layers:
            for norm, *products in _products(layer):
                _set_apart(means[products[0]], products, norm)
    model.quantized = True


def mean_inputs(model: Encoder) -> dict[nn.Module, Tensor]:
    """The mean input of each linear layer of the blocks over ``PROTEINS``, ``[inputs]``."""
    means: dict[nn.Module, Tensor] = {}

    def note(part: nn.Module, inputs: tuple[Tensor]) -> None:
        means[part] = inputs[0].double().mean(0).float()

    parts = [part for part in model.layers.modules() if isinstance(part, nn.Linear)]
    hooks = [part.register_forward_pre_hook(note) for part in parts]
    frame = model.alphabet.frame
    most = None if model.max_tokens is None else frame.residues(model.max_tokens)
    threads = torch.get_num_threads()
    # Some of PyTorch's functions have other bits where they divide a tensor among threads.
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            model(pack([frame.around(model.alphabet.encode(protein[:most])) for protein in PROTEINS]))
    finally:
        torch.set_num_threads(threads)
    for hook in hooks:
        hook.remove()
    return means


def _products(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """The products of a plain layer that have the same inputs, after the norm before them, if there is one."""
    attention = layer.self_attn
    return (
        (layer.self_attn_layer_norm, attention.q_proj, attention.k_proj, attention.v_proj),
        (None, attention.out_proj),
        (layer.final_layer_norm, layer.fc1),
        (None, layer.fc2),
    )


def _set_apart(mean: Tensor, products: list[nn.Linear], norm: Any) -> None:
    """Take a mean input out of what products round: out of the norm before them, or of the error of their weights."""
    centred = norm is not None and getattr(norm, "bias", None) is not None
    if centred:
        norm.bias -= mean
    for product in products:
        weight = product.weight if centred else product.weight - Packed.of(product.weight, PRODUCTS).unpacked()
        moved = (weight.double() @ mean.double()).float()
        product.bias = nn.Parameter(moved if product.bias is None else product.bias + moved)
