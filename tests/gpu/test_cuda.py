"""On an NVIDIA GPU: the same numbers as on the CPU, and the packed kernel where it applies. Skipped without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import protea
from conftest import CONFIGS, LoadModel
from protea.infer.runner import Job, Runner, Wanted
from protea.models.attention import SDPA, VARLEN, AttentionCall, pick_kernel
from protea.packing import CuSeqlens, PackedRows, pack
from protea.transforms.mixed import mix
from reference_attention import REFERENCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [1, 7, 64, 64, 345, 1024]
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "M", "ACDEFGHIKLMNPQRSTVWYX" * 20, "GG"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 16, 24, 64, 128])
def test_varlen_equals_the_reference(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.empty(sum(LENGTHS), 4, width, device="cuda").normal_(generator=generator).to(dtype) for _ in range(3)
    )
    cu = CuSeqlens.from_lengths(LENGTHS).to("cuda")
    call = AttentionCall(q, k, v, cu, cu, width**-0.5)
    assert pick_kernel(call) is VARLEN
    out = VARLEN.run(call)
    expected = REFERENCE.run(call)
    assert (out.float() - expected.float()).abs().max() < 2e-2


def test_varlen_of_some_queries() -> None:
    """The second sequence and the last have no queries; their keys and values have gradients of 0."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.empty(sum(LENGTHS), 4, 16, device="cuda").normal_(generator=generator) for _ in range(3))
    cu = CuSeqlens.from_lengths(LENGTHS).to("cuda")
    rows = PackedRows.of(np.array([0, 9, 20, 72, *range(200, 480)]), cu).to("cuda")
    results = []
    for kernel, dtype in ((VARLEN, torch.bfloat16), (REFERENCE, torch.float32)):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (q[rows.index], k, v)]
        out = kernel.run(AttentionCall(inputs[0], inputs[1], inputs[2], rows.cu_seqlens, cu, 0.25))
        results.append([out.float(), *(x.float() for x in torch.autograd.grad(out.float().square().sum(), inputs))])
    for ours, exact in zip(*results, strict=True):
        assert torch.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) > 0.999
    for gradient in results[0][2:]:
        assert not gradient[1:8].any()
        assert not gradient[481:].any()


def test_varlen_gradients_equal_the_references() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.empty(sum(LENGTHS), 4, 16, device="cuda").normal_(generator=generator) for _ in range(3))
    cu = CuSeqlens.from_lengths(LENGTHS).to("cuda")
    gradients = []
    for kernel, dtype in ((VARLEN, torch.bfloat16), (REFERENCE, torch.float32)):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        call = AttentionCall(inputs[0], inputs[1], inputs[2], cu, cu, 0.25)
        assert kernel is not VARLEN or pick_kernel(call) is VARLEN
        kernel.run(call).float().pow(2).sum().backward()
        gradients.append([x.grad.float() for x in inputs if x.grad is not None])
    for ours, exact in zip(*gradients, strict=True):
        assert torch.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) > 0.999


def test_choice_on_cuda() -> None:
    q = torch.zeros(4, 2, 16, device="cuda")
    cu = CuSeqlens.from_lengths([4]).to("cuda")
    assert pick_kernel(AttentionCall(q, q, q, cu, cu)) is SDPA
    half = q.bfloat16()
    assert pick_kernel(AttentionCall(half, half, half, cu, cu, bias=half.new_zeros(2, 4, 4))) is SDPA
    assert pick_kernel(AttentionCall(half, half, half, cu, cu, dropout=0.1)) is SDPA
    narrow = half[..., :12]
    assert pick_kernel(AttentionCall(narrow, narrow, narrow, cu, cu)) is SDPA


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_equals_the_cpu(load_small: LoadModel, name: str) -> None:
    cpu, gpu = load_small(name), load_small(name, device="cuda")
    for a, b in zip(cpu.embed(SEQUENCES, layers=[0, 1, -1]), gpu.embed(SEQUENCES, layers=[0, 1, -1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(a).max()))
    for a, b in zip(cpu.logits(SEQUENCES), gpu.logits(SEQUENCES), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_points_the_same_way(load_small: LoadModel, name: str, dtype: str) -> None:
    exact = load_small(name).embed(SEQUENCES)
    rough = load_small(name, dtype=dtype, device="cuda").embed(SEQUENCES)
    for a, b in zip(exact, rough, strict=True):
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() >= 0.999


@pytest.mark.parametrize("name", CONFIGS)
def test_narrow_products_stay_near_float32(load_small: LoadModel, name: str) -> None:
    exact, mixed = load_small(name).embed(SEQUENCES), load_small(name, device="cuda")
    mix(mixed.module)
    states: list[torch.Tensor] = []
    calls: list[AttentionCall] = []
    alphabet = mixed.alphabet
    batch = pack([alphabet.frame.around(alphabet.encode(sequence)) for sequence in SEQUENCES]).to("cuda")
    with torch.inference_mode():
        mixed.module(batch, on_hidden=lambda _, x: states.append(x), on_attention=lambda _, call: calls.append(call))
    assert {state.dtype for state in states} == {torch.float32}
    assert {x.dtype for call in calls for x in (call.q, call.k, call.v)} == {torch.bfloat16}
    for a, b in zip(exact, mixed.embed(SEQUENCES), strict=True):
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() >= 0.9999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_is_the_same_alone_and_in_any_pack(load_small: LoadModel, dtype: str) -> None:
    model = load_small("esm2", dtype=dtype, device="cuda")
    together = model.embed(SEQUENCES)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for sequence, packed in zip(SEQUENCES, together, strict=True):
        np.testing.assert_allclose(model.embed([sequence])[0], packed, rtol=0, atol=tolerance * np.abs(packed).max())


def test_the_command_line(load_small: LoadModel, tmp_path: Path) -> None:
    load_small("esm2").save(tmp_path / "model")
    (tmp_path / "a.fasta").write_text(">a\nMKTAYIAKQR\n")
    command = [sys.executable, "-m", "protea", "embed", tmp_path / "a.fasta", "-m", tmp_path / "model"]
    done = subprocess.run([*command, "-o", tmp_path / "a.h5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cuda" in done.stderr


def test_files_as_from_the_cpu(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Pinned copies on a separate stream, without synchronisation per pack, still put every number in its place."""
    from protea.embed.run import EmbedRun
    from protea.embed.settings import EmbedSettings
    from protea.embed.stores import read_store

    rng = np.random.default_rng(0)
    fasta = tmp_path / "in.fasta"
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    fasta.write_text("".join(f">r{n}\n{''.join(rng.choice(letters, rng.integers(1, 1500)))}\n" for n in range(200)))
    read = {}
    for device in ("cpu", "cuda"):
        settings = EmbedSettings(
            inputs=(str(fasta),), residues=tmp_path / f"{device}.h5", layers=(0, -1), long="window", token_budget=3000
        )
        EmbedRun(settings, protea.load(model_folders["esm2"], device=device).module, {})()
        read[device] = list(read_store(tmp_path / f"{device}.h5", "h5").records)
    for (entry, ours), (expected, theirs) in zip(read["cuda"], read["cpu"], strict=True):
        assert entry == expected
        np.testing.assert_allclose(ours["residues"], theirs["residues"], rtol=0, atol=1e-4)


def test_running_out_of_memory_halves_the_pack(load_small: LoadModel) -> None:
    model = load_small("esm2", device="cuda").module
    jobs = [Job(np.full(500, 20, dtype=np.uint8), Wanted(layers=(3,)), n, f"job {n}") for n in range(400)]
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 100e6) / total))
    try:
        results = list(Runner(model, 1_000_000).run(jobs))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [result.job.tag for result in results] == list(range(400))
    first = results[0].checked().states[3, "tokens"]
    for result in results[1:]:
        torch.testing.assert_close(result.checked().states[3, "tokens"], first, rtol=0, atol=1e-5)
