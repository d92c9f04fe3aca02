"""Tar archives read in place: members are stretches of the file, and nothing is ever unpacked."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath
from typing import Final

from protea.checkpoints.region import Region
from protea.errors import CheckpointError

_MAX_MEMBERS: Final = 100_000
_MAX_HEADERS: Final = 100
_MAGIC_AT: Final = 257


def is_tar(region: Region) -> bool:
    """Whether a file is an uncompressed tar archive."""
    return region.read(_MAGIC_AT, 5) == b"ustar"


def is_gzip(region: Region) -> bool:
    """Whether a file is compressed with gzip."""
    return region.read(0, 2) == b"\x1f\x8b"


def tar_members(path: Path) -> dict[str, Region]:
    """The files in a tar archive, by their paths without a leading ``./``.

    Raises:
        CheckpointError: the archive is damaged, or has members that no checkpoint has: links, devices, absolute paths
            or ones that lead outside, two of one name.
    """
    whole = Region.of_file(path)
    members: dict[str, Region] = {}
    try:
        with tarfile.open(fileobj=whole.stream(), mode="r:") as archive:
            for count, member in enumerate(archive, start=1):
                archive.members = []  # type: ignore[attr-defined]  # it keeps all that it has seen
                name = str(PurePosixPath(member.name))
                why = _refused(member, name, members) or ("is one of too many" if count > _MAX_MEMBERS else None)
                if why:
                    raise CheckpointError(
                        f"{path}: member {member.name[:200]!r} {why}; this file may be hostile and was not loaded"
                    )
                if member.isfile():
                    members[name] = whole.part(member.offset_data, member.size, f"{path}: {name}")
            # What follows the last member is zeros; the library takes anything, and nothing, for an end.
            if whole.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("no end of the archive")
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch it again") from error
    return members


def _refused(member: tarfile.TarInfo, name: str, members: dict[str, Region]) -> str | None:
    if len(member.pax_headers) > _MAX_HEADERS:
        return "has more headers than any"
    if not (member.isdir() or member.isreg()) or member.issparse():
        return "is neither a file nor a folder"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "leads out of the archive"
    if name in members:
        return "is there twice"
    return None


def folder_members(folder: Path) -> dict[str, Region]:
    """The same for an archive that somebody unpacked into a folder, two levels deep."""
    paths = [*folder.iterdir(), *(inner for outer in folder.iterdir() if outer.is_dir() for inner in outer.iterdir())]
    return {str(path.relative_to(folder)): Region.of_file(path) for path in sorted(paths) if path.is_file()}
