"""Stub until the loader comes."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch


@cache
def library():
    if os.environ.get("PROTEA_INSTRUCTION_SET") == "none":
        return None
    l = ctypes.CDLL("/tmp/m/protea.so")
    l.protea_instruction_set.restype = ctypes.c_char_p
    if os.environ.get("PROTEA_INSTRUCTION_SET"):
        assert l.protea_use(os.environ["PROTEA_INSTRUCTION_SET"].encode()) == 0
    return l


def reason():
    return None


@cache
def parallel():
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value


def instruction_set():
    found = library()
    return None if found is None else found.protea_instruction_set().decode()
