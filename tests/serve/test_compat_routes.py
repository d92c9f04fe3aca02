"""Routes of other services: the real client of OpenAI, and bodies as their documentation and sources show them."""

from __future__ import annotations

import io

import h5py
import numpy as np
import openai
import pytest

import protea
from serving import UBIQUITIN, Running

TWO = [UBIQUITIN, "MKTAYIAKQR"]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    found: np.ndarray = protea.load(device="cpu").embed(TWO, pool="mean")
    return found


@pytest.mark.parametrize("form", ["float", "base64"])
def test_openais_client(server: Running, vectors: np.ndarray, form: str) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="protea-mini", input=TWO, encoding_format=form)  # type: ignore[call-overload]
        found = [one.embedding for one in answer.data]
        if form == "base64":
            import base64

            found = [np.frombuffer(base64.b64decode(text), "<f4") for text in found]
        assert np.array_equal(np.array(found, np.float32), vectors)  # means over residues, not normalised
        assert [one.index for one in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == 78 + 12
        plain = client.embeddings.create(model="protea-mini", input=TWO[1])  # asks for base64 by itself
        assert np.array_equal(np.array(plain.data[0].embedding, np.float32), vectors[1])
        assert [model.id for model in client.models.list()] == ["protea-mini"]
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="text-embedding-3-small", input="MK")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="protea-mini", input="MK", dimensions=64)
        with pytest.raises(openai.BadRequestError, match="token ids"):
            client.embeddings.create(model="protea-mini", input=[[1, 2]])
        with pytest.raises(openai.BadRequestError, match="at 3"):
            client.embeddings.create(model="protea-mini", input="MK1")


def test_text_embeddings_inference(server: Running, vectors: np.ndarray) -> None:
    normal = np.array(server.post("/embed", {"inputs": TWO}).json)
    lengths = np.linalg.norm(vectors.astype(float), axis=1, keepdims=True)
    assert np.allclose(normal, vectors / lengths, rtol=1e-6)
    plain = server.post("/embed", {"inputs": TWO[1], "normalize": False, "truncate": False}).json
    assert np.array_equal(np.array(plain, np.float32), vectors[1:])
    every = server.post("/embed_all", {"inputs": TWO}).json
    assert [len(one) for one in every] == [76, 10]
    assert np.array_equal(np.array(every[1], np.float32), protea.load(device="cpu").embed(TWO[1]))
    info = server.ask("GET", "/info").json
    assert info["model_id"] == "protea-mini"
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert server.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": []}, 422),
        ({"inputs": "MK1"}, 422),
        ({"inputs": "M" * 1100}, 413),
        ({"inputs": "MK", "prompt_name": "query"}, 422),
        ({"inputs": "MK", "dimensions": 3}, 400),
        ({"inputs": ["MK"] * 5000}, 413),
        ({"input": "MK"}, 422),
    ],
)
def test_errors_of_text_embeddings_inference(server: Running, body: dict[str, object], status: int) -> None:
    answer = server.post("/embed", body)
    assert answer.status == status
    assert set(answer.json) == {"error", "error_type"}


def test_truncation_that_was_asked_for(server: Running) -> None:
    found = server.post("/embed", {"inputs": "M" * 1100, "truncate": True, "normalize": False}).json
    assert found == server.post("/embed", {"inputs": "M" * 1022, "normalize": False}).json


@pytest.mark.parametrize("form", ["npz", "h5"])
def test_nvidias_route(server: Running, vectors: np.ndarray, form: str) -> None:
    answer = server.post("/v1/biology/meta/protea-mini", {"sequences": TWO, "format": form}, "*/*")
    assert answer.headers["content-type"] == ("application/octet-stream" if form == "npz" else "application/x-hdf5")
    whole = io.BytesIO(answer.body)
    with np.load(whole) if form == "npz" else h5py.File(whole) as file:
        arrays = {name: np.array(file[name]) for name in ("embeddings", "representations")}
    assert np.array_equal(arrays["embeddings"], vectors)
    assert arrays["representations"].shape == (2, 76, 320)
    assert np.array_equal(arrays["representations"][1, :10], protea.load(device="cpu").embed(TWO[1]))
    assert not arrays["representations"][1, 10:].any()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("meta/esm2-650m", {"sequences": ["MK"]}, 404),
        ("meta/protea-mini", {"sequences": ["M"] * 33}, 422),
        ("meta/protea-mini", {"sequences": ["M" * 1025]}, 422),
        ("meta/protea-mini", {"sequences": ["MK"], "format": "csv"}, 422),
    ],
)
def test_errors_of_nvidias_route(server: Running, path: str, body: dict[str, object], status: int) -> None:
    answer = server.post(f"/v1/biology/{path}", body)
    assert answer.status == status
    assert set(answer.json) == {"detail"}
