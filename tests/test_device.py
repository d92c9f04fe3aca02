"""Devices and floating-point types by their names."""

from __future__ import annotations

import pytest
import torch

from messages import check_message
from protea.device import resolve_device, resolve_dtype
from protea.errors import DeviceError, UsageError


def test_cpu_and_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"'cuda'.*use cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(DeviceError) as caught:
        resolve_device("cuda:2")
    check_message("device.gpus", caught.value)


def test_apples_gpu_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "cpu"
    assert resolve_device("mps").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="'mps'"):
        resolve_device("mps")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "xla"])
def test_no_device(name: str) -> None:
    with pytest.raises(UsageError, match="cpu, cuda or cuda:N") as caught:
        resolve_device(name)
    if name == "gpu":
        check_message("device.unknown", caught.value)


def test_types() -> None:
    assert resolve_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(UsageError) as caught:
        resolve_dtype("bf16")
    check_message("device.dtype", caught.value)
