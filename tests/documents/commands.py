"""Commands of ``protea`` within a line for a shell: found, parsed by the program's own parser, and made small."""

from __future__ import annotations

import re
import shlex
from typing import Any, Final, NamedTuple

from typer.exceptions import TyperException

from protea.errors import ProteaError
from protea.train.recipe import read_recipe, recipe_names
from test_named_options import LEAVES

SEPARATORS: Final = {"|", ";", "&&", "||", "&", ">", ">>", "2>", "<"}
SMALLER: Final = {"valid": 5, "test": 5, "count": 3, "last": 2, "nproc-per-node": 2, "array": 2}
"""The largest numbers that options may have with the stand-ins' few sequences, structures and checkpoints."""
SMALL_RUN: Final = {
    "batch.tokens": 2048,
    "batch.pack": 1024,
    "run.steps": 3,
    "schedule.warmup": 1,
    "validation.tokens": 2048,
    "validation.every": 1,
    "save.every": 1,
}
SMALL_MODEL: Final = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


class Command(NamedTuple):
    """What follows ``protea``, the command's name, and its parameters as the parser read them."""

    words: list[str]
    name: str
    parameters: dict[str, Any]


def tokens(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    return list(lexer)


def protea_words(text: str) -> list[list[str]]:
    """The words after each ``protea`` of a line, also behind ``python -m``, after an assignment, or in quotes."""
    found: list[list[str]] = []
    segment: list[str] | None = None
    previous = ""
    for token in tokens(text):
        if token in SEPARATORS:
            segment = None
        elif segment is not None:
            segment.append(token)
        elif token == "protea" and previous != "install":
            segment = []
            found.append(segment)
        elif "protea " in token:
            found += protea_words(token)
        previous = token
    return found


def parse(words: list[str], *, complete: bool = True) -> Command:
    """Parse what follows ``protea`` as the program does; a wrong name, option or value is an ``AssertionError``.

    Without ``complete``, the command may lack what it needs, as one within a sentence does.
    """
    name, rest = next(
        ((" ".join(words[:n]), words[n:]) for n in (2, 1) if " ".join(words[:n]) in LEAVES), (words[0], words[1:])
    )
    if name not in LEAVES:
        raise AssertionError(f"protea {' '.join(words)}: there is no command {name}")
    try:
        context = LEAVES[name].make_context(name, [word for word in rest if word != "--help"])
    except (TyperException, ProteaError) as error:
        if not complete and type(error).__name__ in {"MissingParameter", "BadOptionUsage"}:
            return Command(words, name, {})
        raise AssertionError(f"protea {' '.join(words)}: {getattr(error, 'message', error)}") from error
    if context.params.get("recipe") in recipe_names():
        read_recipe(context.params["recipe"], [one for one in context.params["changes"] or [] if "=..." not in one])
    return Command(words, name, context.params)


def without_placeholders(text: str) -> str:
    """A synopsis as a command: brackets and alternatives go, counts become numbers."""
    text = re.sub(r"\s{3,}.*$", "", text).replace("protea COMMAND", "protea embed")
    text = re.sub(r" \| \S+.*?(?= -o |$)", "", text).replace("|", "/")
    text = re.sub(r"\[KEY=VALUE\]\.\.\.| KEY=VALUE\.\.\.|\[options\]", "", text)
    return re.sub(r"(?<=[ =])N\b", "1", re.sub(r"[\[\]]|\.\.\.", "", text))


def made_small(text: str) -> str:
    """The line with numbers that suit the stand-ins, and with a tiny model in place of one from random weights."""

    def lower(match: re.Match[str]) -> str:
        return f"{match[1]}{min(int(match[3]), SMALLER[match[2]])}"

    for name in SMALLER:
        text = re.sub(rf"(--({name})[ =](?:1-)?)(\d+)\b(?!%)", lower, text)
    if re.search(r"protea finetune .*--method (lora|full)", text) and "--epochs" not in text:
        text = f"{text} --epochs 1"
    if "protea pretrain" not in text or "--dry-run" in text or "--list" in text or "$SMALL" in text:
        return text
    given = dict(re.findall(r"\b([a-z_]+\.[a-z_]+)=(\S+)", text))
    changes = {key: value for key, value in SMALL_RUN.items() if int(float(given.get(key, value + 1))) > value}
    if not re.search(r"\binit=|quickstart|domain-adaptation|\.yaml", text):
        changes |= {f"model.{key}": value for key, value in SMALL_MODEL.items()}
    for key in (*changes, "run.compile"):
        text = re.sub(rf" {key}=\S+", "", text)
    return " ".join([text, *(f"{key}={value}" for key, value in changes.items()), "run.compile=false"])
