"""Tiny models of fair-esm with its own random weights, written as Meta published files, and runs of scripts in both."""

from __future__ import annotations

import runpy
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conftest import disturb
from references import esm

WIDTH, HEADS = 40, 5

PROTEINS = [
    ("first", "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG"),
    ("second", "KALTARQQEVFDLIRDHISQTGMPPTRAEIAQRLGFRSPNAAEEHLKALARKGVIEIVSGASRGIRLLQEE"),
    ("masked", "KALTARQQEVFDLIRD<mask>ISQTGMPPTRAEIAQRLGFRSPN"),
    ("odd letters", "K A <mask> I S Q X B U Z O . -"),
    ("one", "M"),
]


def new_esm2(layers: int = 3) -> nn.Module:
    return esm.ESM2(layers, WIDTH, HEADS)


def new_bert(arch: str, layers: int = 3, *, norm_before: bool = True) -> nn.Module:
    args = Namespace(
        arch=arch,
        layers=layers,
        embed_dim=WIDTH,
        ffn_embed_dim=3 * WIDTH,
        attention_heads=HEADS,
        max_positions=1024,
        emb_layer_norm_before=norm_before,
        token_dropout=arch == "roberta_large",
        final_bias=True,
    )
    return esm.ProteinBertModel(args, esm.data.Alphabet.from_architecture(arch))


def write(folder: Path, name: str, layers: int = 3) -> Path:
    """Write a file as Meta's of that name, with its regression unless it is of ESM-1v."""
    torch.manual_seed(len(name))
    path = folder / f"{name}.pt"
    if name.startswith("esm2"):
        model = new_esm2(layers)
        sizes = {"encoder_layers": layers, "encoder_embed_dim": WIDTH, "encoder_attention_heads": HEADS}
        described: dict[str, Any] = {"cfg": {"model": Namespace(**sizes, token_dropout=True)}}
        roots = ("encoder.sentence_encoder.", "encoder.")
    elif name.startswith("esm1_"):
        model = new_bert("protein_bert_base", layers)
        described, roots = {"args": model.args}, ("decoder.", "decoder.")
        torch.nn.init.normal_(model.embed_out, 0, 0.3)
    else:
        model = new_bert("roberta_large", layers, norm_before="1b" in name)
        sizes = {key: value for key, value in vars(model.args).items() if key != "emb_layer_norm_before"}
        prefixed = {f"encoder_{key}" if key not in _BARE else key: value for key, value in sizes.items()}
        described = {"args": Namespace(**prefixed, data="/a/path", lr=[0.0001])}
        roots = ("encoder.sentence_encoder.", "encoder.")
    disturb(model)
    state = model.state_dict()
    body = {f"{roots[key.startswith('lm_head')]}{key}": state[key] for key in state if "contact_head" not in key}
    torch.save({**described, "model": body}, path)
    if not name.startswith("esm1v"):
        head = {key: value for key, value in state.items() if "contact_head" in key}
        torch.save({"model": head}, folder / f"{name}-contact-regression.pt")
    return path


_BARE = {"arch", "max_positions", "token_dropout", "final_bias"}


def reference(path: Path) -> tuple[nn.Module, Any]:
    """fair-esm's own reading of a file."""
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    head = torch.load(regression, weights_only=False) if regression.exists() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, alphabet = esm.pretrained.load_model_and_alphabet_core(
            path.stem, torch.load(path, weights_only=False), head
        )
    return model.eval(), alphabet


@contextmanager
def without_esm() -> Iterator[None]:
    """Forget fair-esm, and undo at the end what ``install`` changes in this process."""
    before = {name: module for name, module in sys.modules.items() if _is_esm(name)}
    argv, path, finders, hub = sys.argv, sys.path[:], sys.meta_path[:], torch.hub.load
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_esm(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        sys.argv, sys.path[:], sys.meta_path[:], torch.hub.load = argv, path, finders, hub


def _is_esm(name: str) -> bool:
    return name.partition(".")[0] == "esm"


def run_in_both(script: Path, *arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of a script at its end: with fair-esm, and with Protea's stand-in."""
    from protea.compat.esm.installing import install

    results = []
    for ours in (False, True):
        with without_esm() if ours else nullcontext(), warnings.catch_warnings():
            if ours:
                install()
            else:
                warnings.simplefilter("ignore")  # of PyTorch, about fair-esm
            argv, sys.argv = sys.argv, [str(script), *map(str, arguments)]
            results.append(runpy.run_path(str(script), run_name="__main__"))
            sys.argv = argv
    return results[0], results[1]
