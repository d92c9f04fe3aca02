"""Pages of the public Python interface, which Sphinx fills from the docstrings."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import protea

GROUPS = {
    "models": ("Models", ["protea.load", "protea.LanguageModel"]),
    "outputs": ("Stored embeddings", ["protea.read_embeddings", "protea.StoredEmbeddings"]),
    "predictors": ("Trained predictors", ["protea.load_predictor", "protea.TrainedPredictor"]),
    "sklearn": (
        "Steps for scikit-learn",
        ["protea.sklearn.EmbeddingTransformer", "protea.sklearn.ProteaClassifier", "protea.sklearn.ProteaRegressor"],
    ),
    "plot": (
        "Pictures",
        [
            f"protea.plot.{name}"
            for name in ("contact_map", "single_site_scan", "profile", "check_place", "share_script")
        ],
    ),
    "fasta": ("FASTA files", ["protea.fasta.read_fasta"]),
    "client": ("A client of the service", ["protea.Client", "protea.client.ServiceError"]),
    "errors": ("Errors and warnings", ["protea.errors"]),
}
"""Pages, each with its title and what it describes."""


def own_members(name: str) -> list[str]:
    """The public members of a class that Protea defines and describes, not a library that it builds on."""
    kind: Any = pydoc.locate(name)
    homes = [vars(base) for base in inspect.getmro(kind) if base.__module__.startswith("protea.")]
    return [member for home in homes for member in home if not member.startswith("_") and described(home[member])]


def described(member: object) -> bool:
    """Whether a member is a property or method with a docstring in Protea."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return getattr(function, "__module__", "").startswith("protea.") and bool(function.__doc__)


def directive(name: str) -> str:
    """Sphinx's directive for a function, a class or a whole module."""
    last = name.rpartition(".")[2]
    if name == "protea.errors":
        return f".. automodule:: {name}\n   :members:\n   :exclude-members: warn\n   :show-inheritance:\n"
    if last[0].isupper():
        return f".. autoclass:: {name}\n   :members: {', '.join(own_members(name))}\n"
    return f".. autofunction:: {name}\n"


OPENING = """# Python

These pages are made from docstrings. [The Python interface](../python.md) explains its rules.

"""


def python_pages() -> dict[str, str]:
    """The text of each page by its name."""
    described_names = {name.removeprefix("protea.") for _, names in GROUPS.values() for name in names}
    missing = set(protea.__all__) - described_names - {"__version__", "ProteaError", "ProteaWarning"}
    if missing:
        raise SystemExit(f"docs/site/python_reference.py: no page describes {', '.join(sorted(missing))}")
    pages, lines = {}, []
    for page, (title, names) in GROUPS.items():
        directives = "\n".join(map(directive, names))
        pages[f"reference/python/{page}"] = f"# {title}\n\n```{{eval-rst}}\n{directives}```\n"
        lines.append(f"- [{title}](python/{page}.md): {', '.join(f'`{name}`' for name in names)}\n")
    return pages | {"reference/python": OPENING + "".join(lines)}
