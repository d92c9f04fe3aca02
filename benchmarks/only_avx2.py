r"""Hide AVX-512 from OpenVINO and ONNX Runtime, which have no setting for it, so that their AVX2 code can be measured.

Both ask the processor for its features with the instruction ``cpuid``. This program copies their packages into a
folder, and replaces each ``cpuid`` that objdump finds in the copied libraries by an instruction that does not exist.
A small library (``only_avx2.c``, loaded first) catches the signal, asks the processor, and removes AVX-512, AVX-VNNI
and AMX from the answer. The script ``python`` in the folder is the given interpreter with the copies; PyTorch and
Protea are limited by their own variables. It runs nowhere but on Linux and x86-64, and needs gcc and objdump.

What is measured so is the same processor without its AVX-512, not a processor that has AVX2 alone.

Usage: python benchmarks/only_avx2.py PYTHON FOLDER
       FOLDER/python benchmarks/only_avx2.py --check        # what OpenVINO computes with
       PROTEA_INSTRUCTION_SET=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
           python benchmarks/embed.py --peers FOLDER/python --only openvino,onnxruntime,transformers
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("openvino", "onnxruntime")
CPUID, ILLEGAL = b"\x0f\xa2", b"\x06\xa2"  # 06 is no instruction in 64 bits, and no compiler writes it
LIMITS = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW"  # the C library copies memory by it
SECTION = re.compile(r"^ *\d+ \S+ +([0-9a-f]+) +([0-9a-f]+) +[0-9a-f]+ +([0-9a-f]+) ")
FOUND = re.compile(r"^ *([0-9a-f]+):\tcpuid")


def questions(library: Path) -> list[int]:
    """Where the instructions ``cpuid`` are in a library's file: bytes that look like one elsewhere are none."""
    listing = subprocess.run(["objdump", "-h", library], check=True, capture_output=True, text=True).stdout
    sections = [[int(number, 16) for number in row.groups()] for row in map(SECTION.match, listing.split("\n")) if row]
    found = []
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for match in filter(None, map(FOUND.match, process.stdout)):
            address = int(match[1], 16)
            found += [address - start + offset for size, start, offset in sections if start <= address < start + size]
    return found


def hide(library: Path) -> int:
    """Replace the instructions ``cpuid`` of a library; return how many there are."""
    content = bytearray(library.read_bytes())
    if CPUID not in content:
        return 0
    offsets = questions(library)
    for offset in offsets:
        if content[offset : offset + 2] != CPUID:
            raise SystemExit(f"{library}: objdump shows cpuid at {offset:#x} of the file, where none is")
        content[offset : offset + 2] = ILLEGAL
    library.write_bytes(content)
    return len(offsets)


def make(python: str, folder: Path) -> None:
    """Write the copies, the library that answers, and the script that starts the interpreter with both."""
    folder.mkdir(parents=True)
    python, folder = str(Path(python).absolute()), folder.absolute()
    for name in PACKAGES:
        where = f"from importlib.util import find_spec; print(find_spec({name!r}).submodule_search_locations[0])"
        source = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
        shutil.copytree(source, folder / "site" / name)
        for library in sorted((folder / "site" / name).rglob("*.so*")):
            if count := hide(library):
                print(f"{library.name}: {count} questions")
    source, library = Path(__file__).with_suffix(".c"), folder / "only_avx2.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    script = folder / "python"
    variables = f"PYTHONPATH={folder / 'site'} LD_PRELOAD={library} {LIMITS}"
    script.write_text(f'#!/bin/sh\nexec env {variables} {python} "$@"\n')
    script.chmod(0o755)


def check() -> None:
    """Print what OpenVINO computes with, and when Linux last saw AVX-512 in each thread: -1 means never.

    The main thread may have used it while NumPy drew numbers, the others must not.
    """
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([-1, 1280], np.float32)
    weights = np.random.default_rng(0).standard_normal((1280, 1280)).astype(np.float32)
    graph = openvino.Model([ops.softmax(ops.matmul(x, ops.constant(weights), False, True), 1)], [x])
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for _ in range(30):
        compiled(np.ones((2048, 1280), np.float32))
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = node.get_rt_info()
        print(told["layerType"].astype(str), told["primitiveType"].astype(str))
    print(*openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    for thread in Path("/proc/self/task").iterdir():
        print("thread", thread.name, *(thread / "arch_status").read_text().split())


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    elif len(sys.argv) == 3:
        make(sys.argv[1], Path(sys.argv[2]))
    else:
        raise SystemExit(__doc__)
