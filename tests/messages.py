"""The wording of messages is in one file, ``messages.txt``, with one line ``key<TAB>message`` for each message.

Tests of a message's wording call ``check_message``; all other tests assert its class and the values and places in it.
After an intended change of wording, ``PROTEA_WRITE_MESSAGES=1 pytest -n 0`` writes the file again.
"""

from __future__ import annotations

import os
from pathlib import Path

MESSAGES = Path(__file__).with_name("messages.txt")


def check_message(key: str, message: BaseException | str, **places: object) -> None:
    """Compare a message with the line of its key, where ``{name}`` stands for a value of ``places``."""
    text = " ".join(str(message).split())
    for name, value in places.items():
        text = text.replace(str(value), f"{{{name}}}")
    known = read_messages()
    if os.environ.get("PROTEA_WRITE_MESSAGES"):
        known[key] = text
        MESSAGES.write_text("".join(f"{key}\t{known[key]}\n" for key in sorted(known)), encoding="utf-8")
    assert known.get(key) == text, f"{key}: the wording changed; PROTEA_WRITE_MESSAGES=1 accepts it"


def read_messages() -> dict[str, str]:
    """Return all messages by key."""
    if not MESSAGES.exists():
        return {}
    lines = MESSAGES.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)
