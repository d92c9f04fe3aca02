"""Pages of the public Python interface, which Sphinx fills from the docstrings."""

from __future__ import annotations

import inspect
import pydoc

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
        ["protea.plot.contact_map", "protea.plot.single_site_scan", "protea.plot.profile"]
        + ["protea.plot.check_place", "protea.plot.share_script"],
    ),
    "fasta": ("FASTA files", ["protea.fasta.read_fasta"]),
    "client": ("A client of the service", ["protea.Client", "protea.client.ServiceError"]),
    "errors": ("Errors and warnings", ["protea.errors"]),
}
"""Pages, each with its title and what it describes."""


def own_members(name: str) -> list[str]:
    """The public members of a class that Protea defines, not a library that it builds on."""
    kind = pydoc.locate(name)
    homes = [base for base in inspect.getmro(kind) if base.__module__.startswith("protea.")]  # type: ignore[arg-type]
    return list(
        dict.fromkeys(member for base in homes for member in vars(base) if documented(vars(base)[member], member))
    )


def documented(member: object, name: str) -> bool:
    """Whether a member of a class is public and has a docstring in Protea."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return (
        not name.startswith("_")
        and getattr(function, "__module__", "").startswith("protea.")
        and bool(function.__doc__)
    )


def directive(name: str) -> str:
    """Sphinx's directive for a function, a class or a whole module."""
    last = name.rpartition(".")[2]
    if name == "protea.errors":
        return f".. automodule:: {name}\n   :members:\n   :exclude-members: warn\n   :show-inheritance:\n"
    if last[0].isupper():
        return f".. autoclass:: {name}\n   :members: {', '.join(own_members(name))}\n"
    return f".. autofunction:: {name}\n"


def python_pages() -> dict[str, str]:
    """The text of each page by its name."""
    described = {name.removeprefix("protea.") for _, names in GROUPS.values() for name in names}
    missing = set(protea.__all__) - described - {"__version__", "ProteaError", "ProteaWarning"}
    if missing:
        raise SystemExit(f"docs/site/python_reference.py: no page describes {', '.join(sorted(missing))}")
    pages = {
        f"reference/python/{page}": f"# {title}\n\n```{{eval-rst}}\n" + "\n".join(map(directive, names)) + "```\n"
        for page, (title, names) in GROUPS.items()
    }
    lines = [
        f"- [{title}](python/{page}.md): " + ", ".join(f"`{name}`" for name in names)
        for page, (title, names) in GROUPS.items()
    ]
    opening = (
        "# Python\n\nThese pages are made from docstrings. [The Python interface](../python.md) explains its rules.\n\n"
    )
    pages["reference/python"] = opening + "\n".join(lines) + "\n"
    return pages
