"""The step of the installation that builds the native library.

Where that is impossible, the installation goes on without it, and says so. ``PROTEA_BUILD`` names another platform of
``src/protea/native/build_library.py``, for which Zig must build it, or is ``none``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/protea/native")


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """Builds the library: into the wheel, or beside the sources for an editable installation."""

    _folder: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library before the wheel is written."""
        wanted = os.environ.get("PROTEA_BUILD") or None
        if self.target_name != "wheel" or wanted == "none":
            return
        builder = _load(Path(self.root, NATIVE, "build_library.py"))
        editable = version == "editable"
        to = Path(self.root, NATIVE) if editable else Path(tempfile.mkdtemp(prefix="protea-"))
        self._folder = None if editable else to
        try:
            target = builder.find_target(wanted)
            if editable and builder.is_current(target, to):
                return
            facts = builder.build_named(wanted, to)
        except builder.BuildError as error:
            if wanted:
                raise
            self.app.display_warning(f"{builder.NOT_BUILT}: {error}")
            return
        self.app.display_info(f"protea: the native library is built: {', '.join(facts.sets)}; {facts.compiler}")
        if not editable:
            for name in (target.library, target.facts):
                build_data["force_include"][str(to / name)] = f"protea/native/{name}"
            build_data["pure_python"] = False
            # Nothing in the library depends on a version of Python.
            build_data["tag"] = f"py3-none-{target.wheel if wanted else target.local_wheel}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel now holds."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _load(path: Path) -> Any:
    spec = spec_from_file_location("protea_build_library", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
