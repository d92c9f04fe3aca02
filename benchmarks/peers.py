"""The programs that ``embed.py`` compares Protea with, each in its fastest way; imported by their own interpreters.

Every function returns a job, which reads the FASTA file, computes the last hidden state of every residue, averages it
over each sequence, and writes the averages. All but fair-esm and esm-cpp compute padded batches of 8 sequences sorted
by length, so that their numbers can be compared with Protea's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 8

Job = Callable[[], None]
Encode = Callable[[Any, Any], Any]  # token ids and attention mask [B, L] to hidden states [B, L, D], all NumPy arrays


def read_records(path: Path) -> list[tuple[str, str]]:
    """Read FASTA as scripts for other programs do."""
    entries = path.read_text().split(">")[1:]
    return [(name, "".join(lines)) for name, *lines in (entry.split("\n") for entry in entries)]


def in_batches(model: Path, fasta: Path, out: Path, encode: Encode) -> Job:
    """A job that tokenizes with transformers and computes padded batches."""
    import numpy as np
    from transformers import EsmTokenizer

    tokenizer = EsmTokenizer.from_pretrained(model)

    def job() -> None:
        records = read_records(fasta)
        order = sorted(range(len(records)), key=lambda n: len(records[n][1]))
        means: Any = [None] * len(records)
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            batch = tokenizer([records[n][1] for n in numbers], return_tensors="np", padding=True)
            states = encode(batch["input_ids"], batch["attention_mask"])
            for row, n in enumerate(numbers):
                means[n] = states[row, 1 : len(records[n][1]) + 1].mean(0)
        np.save(out.with_suffix(".npy"), np.stack(means).astype(np.float32))

    return job


def encoder(model: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """The encoder of transformers, from ids and mask to the last hidden state."""
    import torch
    from transformers import EsmModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = EsmModel.from_pretrained(
                model, dtype=getattr(torch, dtype), attn_implementation="sdpa", add_pooling_layer=False
            )

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return Encoder().eval().to(device)


def transformers_job(model: Path, fasta: Path, out: Path, dtype: str, device: str, *, compiled: bool = False) -> Job:
    import torch

    run = encoder(model, dtype, device)
    if compiled:
        run = torch.compile(run, dynamic=True)

    def encode(ids: Any, mask: Any) -> Any:
        with torch.inference_mode():
            return run(*(torch.from_numpy(x).to(device) for x in (ids, mask))).float().cpu().numpy()

    return in_batches(model, fasta, out, encode)


def compiled_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Job:
    return transformers_job(model, fasta, out, dtype, device, compiled=True)


def examples(model: Path, fasta: Path, count: int) -> list[tuple[Any, Any]]:
    """Ids and masks of a few sequences, each a batch of its own."""
    from transformers import EsmTokenizer

    tokenizer = EsmTokenizer.from_pretrained(model)
    batches = (tokenizer([sequence], return_tensors="pt") for _, sequence in read_records(fasta)[:count])
    return [(batch["input_ids"], batch["attention_mask"]) for batch in batches]


def openvino_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Job:
    """int8 is NNCF's quantization of weights and activations, calibrated on 32 of the sequences."""
    import openvino
    import torch

    with torch.no_grad():
        graph = openvino.convert_model(encoder(model), example_input=examples(model, fasta, 1)[0])
    if dtype == "int8":
        import nncf

        calibration = nncf.Dataset([tuple(x.numpy() for x in pair) for pair in examples(model, fasta, 32)])
        graph = nncf.quantize(graph, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=32)
    # The rest of an int8 model computes in bfloat16 where the processor has it.
    hints = {"float32": {"INFERENCE_PRECISION_HINT": "f32"}, "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"}}
    compiled = openvino.compile_model(graph, "CPU", {"PERFORMANCE_HINT": "LATENCY", **hints.get(dtype, {})})
    return in_batches(model, fasta, out, lambda ids, mask: compiled([ids, mask])[0])


def onnxruntime_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Job:
    """int8 is dynamic quantization: weights for each output channel, activations for each tensor while it runs."""
    import onnxruntime
    import torch

    path = out.with_suffix(".onnx")
    axes, names = {0: "batch", 1: "length"}, ["input_ids", "attention_mask"]
    with torch.no_grad():
        torch.onnx.export(
            encoder(model),
            examples(model, fasta, 1)[0],
            path,
            input_names=names,
            output_names=["states"],
            dynamic_axes=dict.fromkeys([*names, "states"], axes),
            dynamo=False,
        )
    if dtype == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source, path = path, out.with_suffix(".int8.onnx")
        quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return in_batches(
        model, fasta, out, lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    )


def fair_esm_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Job:
    """fair-esm makes batches of at most 4,096 tokens. It gets other random weights, which take the same time."""
    import numpy as np
    import torch
    from esm import Alphabet, FastaBatchedDataset
    from esm.model.esm2 import ESM2

    config = json.loads((model / "config.json").read_text())
    alphabet = Alphabet.from_architecture("ESM-1b")
    layers = config["num_hidden_layers"]
    loaded = ESM2(layers, config["hidden_size"], config["num_attention_heads"], alphabet).eval()

    def job() -> None:
        dataset = FastaBatchedDataset.from_file(fasta)
        batches = dataset.get_batch_indices(4096, extra_toks_per_seq=1)
        loader = torch.utils.data.DataLoader(dataset, collate_fn=alphabet.get_batch_converter(), batch_sampler=batches)
        means = {}
        with torch.inference_mode():
            for labels, strings, tokens in loader:
                states = loaded(tokens, repr_layers=[layers])["representations"][layers]
                for row, label in enumerate(labels):
                    means[label] = states[row, 1 : len(strings[row]) + 1].mean(0).numpy()
        np.save(out.with_suffix(".npy"), np.stack(list(means.values())))

    return job


def esm_cpp_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Job:
    """esm-cpp computes one sequence at a time, its only way, with int8 weights; its outputs are logits."""
    import esm_cpp
    import numpy as np

    loaded = esm_cpp.Model.load_from_safetensors(str(model / "model.safetensors"))
    loaded.quantize_weights()
    tokenizer = esm_cpp.Tokenizer()

    def job() -> None:
        ids = [np.array(tokenizer.encode(sequence), np.int32) for _, sequence in read_records(fasta)]
        np.save(out.with_suffix(".npy"), np.stack([loaded.forward(one)[1:-1].mean(0) for one in ids]))

    return job


JOBS = {
    "transformers": transformers_job,
    "transformers-compiled": compiled_job,
    "openvino": openvino_job,
    "onnxruntime": onnxruntime_job,
    "fair-esm": fair_esm_job,
    "esm-cpp": esm_cpp_job,
}
INCOMPARABLE = ("fair-esm", "esm-cpp")
"""Programs that compute something else: with other weights, or logits."""
