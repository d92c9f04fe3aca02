"""What holds for the package as a whole: layers, cycles, who knows what, public names, start-up."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest

import protea
from protea.models import registry

SOURCE = Path(protea.__file__).parent
ROOT = Path(__file__).parents[1]

LAYERS = [
    {"errors"},
    {"alphabet", "allocator", "bundled", "device", "disk", "optional", "progress", "settings_errors", "text"},
    {"fasta", "packing"},
    {"letters"},
    {"output"},
    {"journal", "tables"},
    {"models"},
    {"transforms"},
    {"checkpoints"},
    {"infer"},
    {"embed", "data"},
    {"score"},
    {"contacts"},
    {"evaluate", "plot", "train"},
    {"language_model"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
"""Imports go from higher ranks to lower ones, or stay within one package."""


def module_name(path: Path) -> str:
    """A file's module, a package's ``__init__`` its package."""
    return ".".join(("protea", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported(source: str, package: str) -> set[str]:
    """Modules of the package that a file imports, wherever in it, for type checking too."""
    paths: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            paths |= {f"{module}.{alias.name}" for alias in node.names}
    # A public name stands for the module it comes from.
    public = {f"protea.{name}": module for name, module in protea._HOME.items()}
    found = set()
    for path in paths:
        name = public.get(path, path)
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", "protea"}


def layers(source: str, package: str) -> set[str]:
    """The layers of what a file imports."""
    return {name.split(".")[1] for name in imported(source, package)}


def package_of(path: Path) -> str:
    return ".".join(("protea", *path.relative_to(SOURCE).parent.parts))


def home(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [path for path in MODULES.values() if home(path) not in {"__init__", "__main__"}]


def test_every_layer_has_a_rank() -> None:
    assert {home(path) for path in FILES} == RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_left(path: Path) -> None:
    mine = home(path)
    found = layers(path.read_text(), package_of(path))
    wrong = {name for name in found if name != mine and RANK[name] >= RANK[mine]}
    assert not wrong, f"{mine} imports {wrong}"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import protea", set()),
        ("import protea, protea.cli", {"cli"}),
        ("import protea.embed.run as run", {"embed"}),
        ("from protea import cli", {"cli"}),
        ("from protea import cli as c, errors", {"cli", "errors"}),
        ("from protea import load", {"language_model"}),
        ("from protea import __version__", set()),
        ("from protea.embed import run", {"embed"}),
        ("from . import attention", {"models"}),
        ("from .attention import attend", {"models"}),
        ("from .. import cli", {"cli"}),
        ("from ..cli import main", {"cli"}),
        ("def f():\n    from ..cli.embed import embed", {"cli"}),
        ("if TYPE_CHECKING:\n    from protea.infer.runner import Runner", {"infer"}),
        ("from torch import nn\nimport numpy.random", set()),
    ],
)
def test_every_way_to_import_is_seen(statement: str, expected: set[str]) -> None:
    assert layers(statement, "protea.models") == expected


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports within functions and for type checking count; only what is imported by its name as a string does not."""
    graph = {name: imported(path.read_text(), package_of(path)) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    # What is left lies on a cycle, or leads to one.
    assert not {name: others & graph.keys() for name, others in graph.items()}


FAMILIES = [place.partition(":") for place in registry.FAMILIES if isinstance(place, str)]


@pytest.mark.parametrize("path", [path for path in FILES if home(path) != "models"], ids=module_name)
def test_no_family_is_known_outside_the_models(path: Path) -> None:
    assert len(FAMILIES) >= 3
    source = path.read_text()
    assert not imported(source, package_of(path)) & {module for module, _, _ in FAMILIES}
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not names & {f"{name}{end}" for _, _, name in FAMILIES for end in ("", "Config")}


@pytest.mark.parametrize("path", [path for path in FILES if home(path) != "plot"], ids=module_name)
def test_frames_are_no_arithmetic(path: Path) -> None:
    """How BOS and EOS stand around a sequence is known to the alphabet's frame alone."""
    wrong = re.findall(
        r"\b(?:tokens|residues|length|len\([^()]*\))(?:\))? [-+] 2\b|\w\[1:-1\]|\]\[1:-1\]", path.read_text()
    )
    assert not wrong


def test_models_know_nothing_of_parallelism() -> None:
    for path in (SOURCE / "models").rglob("*.py"):
        assert "distributed" not in path.read_text(), path


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


MOST_LINES = 8000


def test_embedding_takes_a_part_of_the_package(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Whoever reads what ``protea embed`` runs from a Hugging Face folder to Parquet reads no more than this."""
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n")
    code = (
        "import sys; from protea.cli import main\n"
        f"sys.argv = ['protea', 'embed', 'in.fasta', '-m', {str(model_folders['esm2'])!r}, '-o', 'out.parquet']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*(one.__file__ for name, one in sys.modules.items() if name.partition('.')[0] == 'protea'), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    files = [line for line in done.stdout.splitlines() if line.endswith(".py")]
    assert len(files) > 30
    assert sum(len(Path(file).read_text().splitlines()) for file in files) <= MOST_LINES


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_what_is_imported_exists(folder: str) -> None:
    """In files, too, that only run where there is a GPU."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "protea" or node.level:
                continue
            module = import_module(node.module or "")
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or find_spec(name), f"{path}: {name} does not exist"
