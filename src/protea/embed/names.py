"""Names of records in outputs.

HDF5 names follow UniProt's embedding files: the id with ``/`` as ``%2F``. File names are stricter, because file systems
limit length and letters.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Final
from urllib.parse import quote

_MAX_FILE_NAME: Final = 150


def store_name(record_id: str) -> str:
    """The name of a record's dataset. Two ids with the same name are duplicates.

    ``/`` would make groups, ``.`` alone is the root, and ``@max`` at the end marks a pooling; all are escaped.
    """
    if record_id == ".":
        return "%2E"
    name = record_id.replace("/", "%2F")
    return re.sub(r"@(mean|max|std|bos)$", r"%40\1", name) if "@" in name else name


def file_name(record_id: str) -> str:
    """A file name without suffix for any id: percent-encoded; a long one is cut and ends in a hash."""
    safe = quote(record_id, safe="|+=,@()[]~ ")
    safe = "%2E" + safe[1:] if safe.startswith(".") else safe
    if len(safe) <= _MAX_FILE_NAME:
        return safe
    return f"{safe[:_MAX_FILE_NAME]}-{blake2b(record_id.encode(), digest_size=8).hexdigest()}"
