"""Tiny random models in place of published ones, and what is trained from them; each is made once and copied."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import stand_in_files as files
import torch
from safetensors.torch import load_file

from protea.checkpoints import hf
from protea.checkpoints.convert import convert
from protea.checkpoints.hub import published_models
from protea.models.registry import build

SMALL: Final = {
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "head_width": 8,
    "inner_width": 16,
}
"""The largest sizes of a stand-in; pages ask for layer 6 and for head 3."""
REVISION: Final = "0" * 40
Call = Callable[..., None]


class Models:
    """Stand-ins by name. ``call`` runs ``protea`` with the given words, in the folder that comes first."""

    def __init__(self, shelf: Path, call: Call) -> None:
        self.shelf, self.call = shelf, call
        self.cache = shelf / "cache"

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.shelf / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    def published(self, name: str, *, seed: int = 1) -> Path:
        """A folder with the shape of a published model, only smaller."""
        config = published_models()[name].config
        fields = {field.name for field in dataclasses.fields(config)}
        sizes = {key: min(size, getattr(config, key)) for key, size in SMALL.items() if key in fields}
        small = dataclasses.replace(config, **sizes)

        def make(path: Path) -> None:
            hf.write_random(path, build(small), seed=seed, dtype=torch.float32)

        return self._once(f"models/{name}", make)

    def download(self, name: str) -> None:
        """Put a published model into the cache, as ``snapshot_download`` lays it out."""
        repository = published_models()[name].repository
        if repository is None:
            return

        def make(path: Path) -> None:
            (path / "refs").mkdir(parents=True)
            (path / "refs" / "main").write_text(REVISION)
            shutil.copytree(self.published(name), path / "snapshots" / REVISION)

        self._once(f"cache/models--{repository.replace('/', '--')}", make)

    def checkpoint(self, path: Path) -> None:
        """A checkpoint under a reader's name, in the format of its suffix."""
        named = next((name for name in published_models() if path.name.startswith(name)), None)
        family = named or ("esm1nv" if path.name.startswith("esm1nv") else "esm2_t6_8M_UR50D")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "trained.pt":  # weights alone, which are recognised by their shapes
            whole = self.shelf / "whole"
            hf.write_random(whole, build(published_models()["esm2_t6_8M_UR50D"].config), seed=1, dtype=torch.float32)
            torch.save(load_file(whole / "model.safetensors"), path)
        elif path.suffix in {".pt", ".nemo"}:
            source = self.published(family)
            name = f"{path.suffix[1:]}/{family}{path.suffix}"
            made = self._once(name, lambda to: convert(source, to, None, peers=False))
            for file in made.parent.glob(f"{family}*{path.suffix}"):
                shutil.copy(file, path.with_name(file.name.replace(family, path.name.removesuffix(path.suffix))))
        elif path.name.endswith((".safetensors", ".bin")):
            shutil.copy(self.published(family) / "model.safetensors", path)
        else:
            shutil.copytree(self.published(family), path)

    def predictor(self, path: Path, *, lora: bool = False) -> None:
        """A run of ``protea finetune``."""

        def make(folder: Path) -> None:
            data = self.shelf / "predictors"
            data.mkdir(exist_ok=True)
            files.labels(data / "labels.csv", "target", numbers=False)
            self.download("esm2_t6_8M_UR50D")
            method = ["--method", "lora", "--head", "hf", "--epochs", "1"] if lora else []
            options = ["-m", "esm2_t6_8M_UR50D", "--no-baselines", *method]
            self.call(data, "finetune", "labels.csv", "-o", folder.name, *options)

        shutil.copytree(self._once(f"predictors/{'lora' if lora else 'frozen'}", make), path)

    def foreign(self, path: Path, *, adapter: bool) -> None:
        """A classifier of transformers, or an adapter of peft."""

        def make(folder: Path) -> None:
            run = folder.with_name(f"run-of-{folder.name}")
            self.predictor(run, lora=True)
            self.call(folder.parent, "export", run.name, "-o", folder.name, *(["--adapter"] if adapter else []))

        shutil.copytree(self._once("foreign/adapter" if adapter else "foreign/classifier", make), path)

    def run(self, path: Path) -> None:
        """A run of ``protea pretrain`` with several checkpoints."""

        def make(folder: Path) -> None:
            files.fasta(folder.parent / "in.fasta", files.records(80))
            changes = ["data.fasta=in.fasta", "data.cluster=false", "run.steps=3", "save.every=1", "save.newest=3"]
            sizes = ["batch.tokens=1024", "batch.pack=1024", "schedule.warmup=1", "validation.every=1"]
            self.call(folder.parent, "pretrain", "quickstart", *changes, *sizes, "-o", folder.name)

        shutil.copytree(self._once("runs/run", make), path)

    def store(self, path: Path) -> None:
        """A store of training data, made without MMseqs2."""

        def make(folder: Path) -> None:
            files.uniref50(folder.parent / "uniref50.fasta")
            options = ["--uniref50", "uniref50.fasta", "--no-filter", "--valid", "5"]
            self.call(folder.parent, "data", "uniref", *options, "-o", folder.name)

        shutil.copytree(self._once("stores/store", make), path)

    def fitted(self, path: Path) -> None:
        """The record of a fitted contact head, which names the chains that it was fitted on."""

        def make(folder: Path) -> None:
            files.structures(folder.parent / "structures")
            self.checkpoint(folder.parent / "model")
            options = ["--head", "bilinear", "--count", "3"]
            self.call(folder.parent, "fit-contacts", "structures", "-m", "model", "-o", folder.name, *options)

        made = self._once("heads/fitted", make)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "contact-head.json", path)


def names_of_models(text: str) -> list[str]:
    """Published names in a text, longest first where one begins another."""
    return [name for name, known in published_models().items() if known.repository and name in text]
