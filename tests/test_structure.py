"""What holds for the package as a whole: layers, public names, start-up."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import protea
from protea.models.registry import FAMILIES

SOURCE = Path(protea.__file__).parent

LAYERS = [
    {"errors"},
    {"alphabet", "bundled", "device", "disk", "extras", "memory"},
    {"fasta", "packing"},
    {"models"},
    {"transforms"},
    {"checkpoints"},
    {"embed", "data"},
    {"score"},
    {"evaluate", "plot", "train"},
    {"language_model"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
"""Imports go from higher ranks to lower ones, or stay within one package."""


def imported(source: str, package: str) -> set[str]:
    """The layers that a file of a package imports, wherever in it; ``import protea`` alone is none."""
    paths: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            paths |= {f"{module}.{alias.name}" for alias in node.names}
    # A public name stands for the module it comes from.
    public = {f"protea.{name}": module for name, module in protea._HOME.items()}
    parts = [public.get(path, path).split(".") for path in paths]
    return {part[1] for part in parts if part[0] == "protea" and len(part) > 1 and part[1] in RANK}


def home(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if home(path) not in {"__init__", "__main__"}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_left(path: Path) -> None:
    mine = home(path)
    package = ".".join(("protea", *path.relative_to(SOURCE).parent.parts))
    wrong = {name for name in imported(path.read_text(), package) if name != mine and RANK[name] >= RANK[mine]}
    assert not wrong, f"{mine} imports {wrong}"


@pytest.mark.parametrize(
    ("statement", "layers"),
    [
        ("import protea", set()),
        ("import protea, protea.cli", {"cli"}),
        ("import protea.embed.engine as engine", {"embed"}),
        ("from protea import cli", {"cli"}),
        ("from protea import cli as c, errors", {"cli", "errors"}),
        ("from protea import load", {"language_model"}),
        ("from protea import __version__", set()),
        ("from protea.embed import engine", {"embed"}),
        ("from . import attention", {"models"}),
        ("from .attention import attend", {"models"}),
        ("from .. import cli", {"cli"}),
        ("from ..cli import main", {"cli"}),
        ("def f():\n    from ..cli.embed import embed", {"cli"}),
        ("from torch import nn\nimport numpy.random", set()),
    ],
)
def test_every_way_to_import_is_seen(statement: str, layers: set[str]) -> None:
    assert imported(statement, "protea.models") == layers


def test_models_know_nothing_of_parallelism() -> None:
    for path in (SOURCE / "models").rglob("*.py"):
        assert "distributed" not in path.read_text(), path


@pytest.mark.parametrize("layer", ["data", "train", "transforms"])
def test_no_family_is_special_to(layer: str) -> None:
    families = [family.__module__.rpartition(".")[2] for family in FAMILIES]
    for path in (SOURCE / layer).rglob("*.py"):
        source = path.read_text()
        assert not [name for name in families if f"models.{name}" in source or f"import {name}" in source], path


def test_public_names() -> None:
    assert protea.__all__ == ["LanguageModel", "ProteaError", "ProteaWarning", "__version__", "load"]
    for name in protea.__all__:
        assert getattr(protea, name) is not None
    assert dir(protea) == sorted(protea.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = protea.nothing


HEAVY = {"torch", "numpy", "h5py", "pyarrow", "rich", "huggingface_hub"}


@pytest.mark.parametrize("statement", ["import protea", "import protea.cli"])
def test_importing_stays_light(statement: str) -> None:
    code = f"{statement}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "protea" in loaded
    assert not HEAVY & set(loaded)


def test_loading_does_not_import_the_compiler(model_folders: dict[str, Path]) -> None:
    """Building on the meta device does, a second of it, if a layer draws random numbers there."""
    for folder in model_folders.values():
        code = f"import protea, sys; protea.load({str(folder)!r}, device='cpu'); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "torch._dynamo" not in done.stdout.split()


def test_errors_survive_pickling() -> None:
    """They are raised in worker processes too."""
    import pickle

    from protea import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, protea.ProteaError)]
    assert len(kinds) >= 9
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what, where, how to mend")))
        assert type(copy) is kind
        assert str(copy) == "what, where, how to mend"
