"""Check the wheels of a folder: ``python packaging/check_wheels.py dist``, as ``make wheels`` does.

``twine check`` and ``check-wheel-contents`` know what holds for every package; this knows Protea's.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from zipfile import ZipFile

MOST_BYTES = 20_000_000
"""The largest size of a wheel without its native library, in bytes."""

PLATFORMS = {"manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "macosx_11_0_arm64"}
LICENCES = ("LICENSE", "NOTICE")


def check(wheel: Path) -> None:
    """Exit with a message if something is missing, too large, or not from the same sources."""
    with ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist()}
        libraries = [name for name in files if name.endswith(".so")]
        if len(libraries) != 1:
            sys.exit(f"{wheel}: {len(libraries)} native libraries, expected one")
        facts = json.loads(archive.read(libraries[0].removesuffix(".so") + ".json"))
        if facts["library"] != hashlib.sha256(archive.read(libraries[0])).hexdigest():
            sys.exit(f"{wheel}: {libraries[0]} is not the library that its facts describe")
        size = sum(info.compress_size for name, info in files.items() if name not in libraries)
        if size > MOST_BYTES:
            sys.exit(f"{wheel}: {size:,} bytes besides the native library, more than {MOST_BYTES:,}")
        for name in LICENCES:
            if not any(file.endswith(f".dist-info/licenses/{name}") for file in files):
                sys.exit(f"{wheel}: {name} is missing")
    print(f"{wheel.name}: {size / 1e6:.1f} MB and a library of {files[libraries[0]].compress_size / 1e3:.0f} kB")


def main() -> None:
    """Check every wheel, and that there is one for each platform."""
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    found = {wheel.stem.rpartition("-")[2] for wheel in wheels}
    if found != PLATFORMS or len(wheels) != len(PLATFORMS):
        sys.exit(f"{sys.argv[1]}: wheels for {sorted(found)}, expected one each for {sorted(PLATFORMS)}")
    for wheel in wheels:
        check(wheel)


if __name__ == "__main__":
    main()
