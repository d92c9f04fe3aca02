"""The wording of messages, which one file holds: ``messages.txt``, a line ``key<TAB>message`` for each.

Tests that care how a message reads call ``check_message``; all others assert its class and the values and places in it.
``PROTEA_WRITE_MESSAGES=1 pytest -n 0`` writes the file anew, for a change of wording that is meant.
"""

from __future__ import annotations

import os
from pathlib import Path

MESSAGES = Path(__file__).with_name("messages.txt")


def check_message(key: str, message: BaseException | str, **places: object) -> None:
    """Compare a message with the one of its key; the values of ``places`` appear in the file as ``{name}``."""
    text = " ".join(str(message).split())
    for name, value in places.items():
        text = text.replace(str(value), f"{{{name}}}")
    known = read_messages()
    if os.environ.get("PROTEA_WRITE_MESSAGES"):
        known[key] = text
        MESSAGES.write_text("".join(f"{key}\t{known[key]}\n" for key in sorted(known)), encoding="utf-8")
    assert known.get(key) == text, f"{key}: the wording changed; PROTEA_WRITE_MESSAGES=1 accepts it"


def read_messages() -> dict[str, str]:
    """All messages by key."""
    if not MESSAGES.exists():
        return {}
    lines = MESSAGES.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)
