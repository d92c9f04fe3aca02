"""The native library on this processor and on emulated ones, called by a program without Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from protea.native import build_library
from protea.native.build_library import FLAGS, FOLDER, TARGETS, BuildError, Facts, Target

DRIVER = Path(__file__).with_name("driver.cpp")
ARM_ROOT = Path("/usr/aarch64-linux-gnu")
"""Where Debian's package ``libc6-arm64-cross`` puts the C library for 64-bit ARM."""


def compile_driver(folder: Path, command: Sequence[str]) -> Path:
    driver = folder / "driver"
    flags = ["-std=c++17", "-O1", f"-I{FOLDER}", str(DRIVER), "-o", str(driver), "-ldl", "-lpthread", "-lm"]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    return driver


def drive(*command: object) -> tuple[int, str]:
    """Return the exit code and the instruction set; its errors are in the report of a failure."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    name = re.search(r"^set (\w+)$", done.stdout, re.M)
    if done.returncode == 0:
        assert done.stdout.count("attention") == 4
    return done.returncode, name[1] if name else done.stdout.strip()


@pytest.fixture(scope="module")
def here() -> Target:
    """The platform of this machine, with its library in the package."""
    try:
        target = build_library.find_target()
    except BuildError as error:
        pytest.skip(str(error))
    if not build_library.is_current(target):
        pytest.skip(f"the native library is not built: {build_library.__file__} builds it")
    return target


@pytest.fixture(scope="module")
def driver(here: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return compile_driver(tmp_path_factory.mktemp("driver"), build_library.find_compiler())
    except BuildError as error:
        pytest.skip(str(error))


def emulator(name: str) -> str:
    program = shutil.which(name) or shutil.which(f"{name}-static")
    if program is None:
        pytest.skip(f"{name} is not installed: apt-get install qemu-user")
    return program


def zig() -> list[str]:
    try:
        return build_library.find_cross_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def test_every_set_of_this_processor(here: Target, driver: Path) -> None:
    """Each gives right results or refuses; the best is the default."""
    library, run = FOLDER / here.library, []
    for name in Facts.read(FOLDER / here.facts).sets:
        code, chosen = drive(driver, library, name)
        assert (code, chosen) in ((0, name), (3, "refused"))
        run += [name] if code == 0 else []
    assert drive(driver, library) == ((0, run[0]) if run else (3, "refused"))
    assert drive(driver, library, "abacus") == (3, "refused")


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("Nehalem", (3, "refused")),  # x86-64-v2
        ("Haswell", (0, "avx2")),  # x86-64-v3
    ],
)
def test_older_processors(processor: str, expected: tuple[int, str], here: Target, driver: Path) -> None:
    """No instruction that the processor lacks is executed: the emulator would end the program."""
    if here.name != "linux-x86_64":
        pytest.skip("processors of x86-64, emulated on one")
    assert drive(emulator("qemu-x86_64"), "-cpu", processor, driver, FOLDER / here.library) == expected


@pytest.mark.long
def test_arm(tmp_path: Path) -> None:
    command, target = zig(), build_library.find_target("linux-aarch64")
    program = emulator("qemu-aarch64")
    if not ARM_ROOT.exists():
        pytest.skip(f"{ARM_ROOT} is missing: apt-get install libc6-arm64-cross")
    build_library.build(target, tmp_path, command)
    driver = compile_driver(tmp_path, [*command, "-target", target.zig, "-fno-sanitize=undefined"])
    assert drive(program, "-L", ARM_ROOT, driver, tmp_path / target.library) == (0, "neon")


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_a_wheel_needs(target: Target, tmp_path: Path) -> None:
    """Every instruction set, C's library alone, and no function that glibc 2.28 lacks."""
    command = zig()
    facts = build_library.build(target, tmp_path, command)
    assert facts.sets == [*target.sets]
    if target.name.startswith("linux"):
        if shutil.which("readelf") is None:
            pytest.skip("readelf is not installed")
        text = subprocess.run(
            ["readelf", "-dW", "--dyn-syms", tmp_path / target.library], capture_output=True, text=True, check=True
        ).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
        assert needed <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
        assert max(tuple(map(int, found.split("."))) for found in re.findall(r"@GLIBC_([\d.]+)", text)) <= (2, 28)
        exported = set(re.findall(r"GLOBAL DEFAULT +\d+ (\w+)$", text, re.M))
        assert exported
        assert all(name.startswith("protea_") for name in exported)


@pytest.mark.parametrize("flag", ["-ffast-math", "-march=native", "-Ofast"])
def test_no_flag_changes_numbers_or_ties_to_a_machine(flag: str) -> None:
    assert flag not in FLAGS
    assert not any(flag in flags for target in TARGETS for flags in target.sets.values())
