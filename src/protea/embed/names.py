"""Names under which records are stored.

HDF5 names follow UniProt's embeddings files: the id with ``/`` as ``%2F``. File names are stricter, since file
systems limit length and letters.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Final
from urllib.parse import quote

_MAX_FILE_NAME: Final = 150


def store_name(record_id: str) -> str:
    """The dataset's name: ``/`` would make groups, ``.`` alone is the root, ``@max`` at the end marks a pooling.

    Two ids with one name count as duplicates.
    """
    if record_id == ".":
        return "%2E"
    name = record_id.replace("/", "%2F")
    return re.sub(r"@(mean|max|std|bos)$", r"%40\1", name) if "@" in name else name


def file_name(record_id: str) -> str:
    """A file name, without suffix, for any id: percent-encoded, and if long, cut and completed by a hash."""
    safe = quote(record_id, safe="|+=,@()[]~ ")
    safe = "%2E" + safe[1:] if safe.startswith(".") else safe
    if len(safe) <= _MAX_FILE_NAME:
        return safe
    return f"{safe[:_MAX_FILE_NAME]}-{blake2b(record_id.encode(), digest_size=8).hexdigest()}"
