"""The golden file of messages: sorted, each key once, and each key used by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from messages import MESSAGES, check_message, read_messages

TESTS = Path(__file__).parent


def key_patterns(source: str) -> set[str]:
    """Return patterns of all strings in a file that may be keys; a value in an f-string matches any text."""
    patterns = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            patterns.add(re.escape(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in node.values]
            # Only an f-string that begins with its region is a key.
            if re.match(r"[\w-]+\\\.", parts[0] if parts else ""):
                patterns.add("".join(parts))
    return patterns


def test_messages_are_sorted_and_unique() -> None:
    keys = [line.split("\t", 1)[0] for line in MESSAGES.read_text(encoding="utf-8").splitlines()]
    assert keys == sorted(set(keys)), "run the tests of the changed messages with PROTEA_WRITE_MESSAGES=1 to sort them"


def test_every_message_is_used() -> None:
    patterns = set().union(*(key_patterns(path.read_text()) for path in sorted(TESTS.rglob("*.py"))))
    used = re.compile("|".join(sorted(patterns)))
    unused = {key for key in read_messages() if not used.fullmatch(key)}
    assert not unused, f"no test uses these lines of {MESSAGES.name}; delete them"


@pytest.mark.parametrize(
    ("source", "key", "used"),
    [
        ('check_message("output.exists-file", error)', "output.exists-file", True),
        ('check_message(f"output.exists-{kind}", error)', "output.exists-file", True),
        ('check_message(f"output.exists-{kind}", error)', "output.long-name", False),
        ('print(f"{region}.{name}")', "output.long-name", False),
    ],
)
def test_which_strings_are_keys(source: str, key: str, used: bool) -> None:
    assert any(re.fullmatch(pattern, key) for pattern in key_patterns(source)) == used


def test_a_changed_message_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROTEA_WRITE_MESSAGES", raising=False)
    key, text = next(iter(read_messages().items()))
    check_message(key, text)
    with pytest.raises(AssertionError, match=re.escape(key)):
        check_message(key, f"{text} changed")
