"""Models that transformers and peft wrote predict as there; runs are exported so that both load them unchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_run import data
from transformers import EsmConfig, EsmForSequenceClassification, EsmForTokenClassification, EsmModel
from transformers.utils import logging

from conftest import SMALL, Run, fails
from messages import check_message
from protea.errors import CheckpointError
from protea.finetune.foreign import read_foreign
from protea.finetune.predictor import read_predictor
from protea.infer.loading import ModelLoader
from protea.models.esm2 import ESM2Config
from protea.models.registry import build

__all__ = ["data"]  # a fixture

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft reads it
]
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    """Other tests switch transformers' bars on; they write to standard error, which these tests compare."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


SEQUENCE, TOKEN = "EsmForSequenceClassification", "EsmForTokenClassification"
CLASSES: dict[str, Any] = {SEQUENCE: EsmForSequenceClassification, TOKEN: EsmForTokenClassification}
PROTEINS = ["MKTAYIAKQRQISFVK", "GGLLA", "W", "ACDEFGHIKLMNPQRSTVWY"]
TOLERANCE = 1e-5


def write_proteins() -> Path:
    path = Path("in.fasta")
    path.write_text("".join(f">p{number}\n{text}\n" for number, text in enumerate(PROTEINS)))
    return path


def random_model(kind: str = SEQUENCE, labels: int = 2, problem: str | None = None, **options: Any) -> Any:
    """A classifier whose outputs differ from protein to protein by far more than the tolerance."""
    config = EsmConfig(
        **SMALL | {"vocab_size": 33, "position_embedding_type": "rotary", "token_dropout": True} | options,
        mask_token_id=32, pad_token_id=1, emb_layer_norm_before=False, num_labels=labels, problem_type=problem,
    )  # fmt: skip
    torch.manual_seed(3)
    model = CLASSES[kind](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape) * 0.1
    return model


def logits(model: Any, proteins: list[str] = PROTEINS) -> NDArray[np.float64]:
    """Of each protein, or of each residue of all of them."""
    alphabet = build(ESM2Config(**SMALL)).alphabet
    rows = []
    for text in proteins:
        ids = torch.tensor([[alphabet.bos, *alphabet.encode(text), alphabet.eos]])
        with torch.no_grad():
            found = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        rows.append(found[1:-1] if found.ndim == 2 else found[None])
    return torch.cat(rows).numpy()


def outcome(outputs: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    tensor = torch.from_numpy(outputs)
    return {"class": tensor.softmax(-1), "labels": tensor.sigmoid(), "value": tensor}[kind].numpy()


def agrees(table: pd.DataFrame, outputs: NDArray[np.float64], kind: str, names: list[str]) -> None:
    columns = ["predicted"] if kind == "value" else [f"probability_{name}" for name in names]
    expected = outcome(outputs, kind)
    np.testing.assert_allclose(table[columns], expected, rtol=0, atol=TOLERANCE)
    shared = {"id", "predicted", "truncated_from", "position", "residue"}
    assert set(table.columns) <= shared | set(columns)
    if kind == "class":
        assert table["predicted"].tolist() == [names[place] for place in expected.argmax(1)]


@pytest.mark.parametrize(
    ("kind", "problem", "labels", "means"),
    [
        (SEQUENCE, None, 1, "value"),
        (SEQUENCE, "regression", 1, "value"),
        (SEQUENCE, "single_label_classification", 2, "class"),
        (SEQUENCE, "single_label_classification", 3, "class"),
        (SEQUENCE, "multi_label_classification", 1, "labels"),
        (SEQUENCE, "multi_label_classification", 3, "labels"),
        (TOKEN, None, 1, "value"),
        (TOKEN, "regression", 1, "value"),
        (TOKEN, None, 2, "class"),
        (TOKEN, "single_label_classification", 3, "class"),
    ],
)
def test_predictions_are_those_of_transformers(
    run: Run, kind: str, problem: str | None, labels: int, means: str
) -> None:
    model = random_model(kind, labels, problem)
    model.save_pretrained("model")
    result = run("predict", "model", write_proteins(), "-o", "p.csv")
    assert result.code == 0, result
    assert not result.err
    table = pd.read_csv("p.csv", na_values=[], keep_default_na=False)
    agrees(table, logits(model), means, [f"LABEL_{number}" for number in range(labels)])
    if kind == TOKEN:
        assert "".join(table.residue) == "".join(PROTEINS)
    assert "nothing to do" in run("predict", "model", "in.fasta", "-o", "p.csv").err
    random_model(kind, labels, problem, layer_norm_eps=1e-3).save_pretrained("model")
    fails(run("predict", "model", "in.fasta", "-o", "p.csv"), 1, "p.csv")


def test_names_of_labels_and_old_files(run: Run) -> None:
    """``pytorch_model.bin``, labels with names, and no problem_type, which is said."""
    model = random_model(SEQUENCE, 3)
    model.config.id2label = {0: "cytosol", 1: "nucleus", 2: "membrane"}
    model.save_pretrained("model")
    torch.save(model.state_dict(), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    result = run("predict", "model", write_proteins(), "-o", "p.csv")
    assert result.code == 0, result
    assert result.err.count("\n") == 1
    assert "problem_type" in result.err
    agrees(pd.read_csv("p.csv"), logits(model), "class", ["cytosol", "nucleus", "membrane"])


def test_a_published_model(run: Run) -> None:
    """Not part of the project: ``PROTEA_FINETUNED`` names the folder of an EsmForSequenceClassification."""
    folder = os.environ.get("PROTEA_FINETUNED")
    if folder is None:
        pytest.skip("PROTEA_FINETUNED names no folder")
    model = EsmForSequenceClassification.from_pretrained(folder).eval()
    assert run("predict", folder, write_proteins(), "-o", "p.csv").code == 0
    agrees(pd.read_csv("p.csv"), logits(model), "class", ["LABEL_0", "LABEL_1"])


def write_adapter(
    kind: str = SEQUENCE, labels: int = 3, *, base: str = "base", **options: Any
) -> tuple[PeftModel, Path]:
    """A base without names of labels, and an adapter as if it were trained."""
    encoder = EsmModel.from_pretrained(_saved(random_model(kind, labels)), add_pooling_layer=False)
    encoder.config.num_labels = 2  # transformers' default, which it does not write
    encoder.save_pretrained(base)
    model = CLASSES[kind].from_pretrained(base, num_labels=labels)
    task = {SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS"}[kind]
    given = {"task_type": task, "r": 2, "target_modules": ["query", "dense"]} | options
    peft = get_peft_model(model, LoraConfig(**given))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * 0.1
    peft.save_pretrained("adapter")
    return peft.eval(), Path("adapter")


def _saved(model: Any) -> str:
    model.save_pretrained("whole")
    return "whole"


@pytest.mark.parametrize(
    ("kind", "labels", "options"),
    [
        (SEQUENCE, 3, {}),
        (SEQUENCE, 1, {"use_dora": True}),
        (SEQUENCE, 4, {"target_modules": "all-linear"}),
        (TOKEN, 3, {"target_modules": ["key", "value"], "use_rslora": True}),
        (TOKEN, 2, {"layers_to_transform": [0]}),
    ],
)
def test_predictions_of_adapters_are_those_of_peft(run: Run, kind: str, labels: int, options: dict[str, Any]) -> None:
    peft, folder = write_adapter(kind, labels, **options)
    result = run("predict", folder, write_proteins(), "-o", "p.csv")
    assert result.code == 0, result
    assert result.err.count("\n") == 1
    assert "LABEL_0" in result.err  # nobody says what the labels are called
    means = "value" if labels == 1 else "class"
    agrees(pd.read_csv("p.csv"), logits(peft), means, [f"LABEL_{number}" for number in range(labels)])
    Path("base").rename("moved")
    fails(run("predict", folder, "in.fasta", "-o", "q.csv"), 2, "adapter", "base", "-m")
    peft.base_model.model.config.id2label = {number: f"c{number}" for number in range(labels)}
    peft.base_model.model.config.save_pretrained("adapter")
    result = run("predict", folder, "in.fasta", "-o", "q.csv", "-m", "moved")
    assert result.code == 0, result
    agrees(pd.read_csv("q.csv"), logits(peft), means, [f"c{number}" for number in range(labels)])


def test_labels_of_the_base_are_taken_and_said(run: Run) -> None:
    peft, folder = write_adapter()
    config = peft.base_model.model.config
    config.id2label, config.problem_type = {0: "a", 1: "b", 2: "c"}, "multi_label_classification"
    config.save_pretrained("base")
    result = run("predict", folder, write_proteins(), "-o", "p.csv")
    assert result.code == 0, result
    assert "labels are those of its base, base/config.json" in result.err
    agrees(pd.read_csv("p.csv", keep_default_na=False), logits(peft), "labels", ["a", "b", "c"])


def _edit(path: str, **changes: Any) -> None:
    values = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({key: value for key, value in (values | changes).items() if value != "gone"}))


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "labels": ({"id2label": {"0": "a", "1": "b"}}, ("classifier.out_proj", "shape [3, 40]", "[2, 40]")),
    "numbers": ({"id2label": {"0": "a", "2": "b", "3": "c"}}, ("id2label",)),
    "no-list": ({"id2label": ["a", "b", "c"]}, ("id2label",)),
    "contradiction": ({"num_labels": 4}, ("num_labels 4",)),
    "twice": ({"id2label": {"0": "a", "1": "b", "2": "a"}}, ("'a' twice",)),
    "problem": ({"problem_type": "ranking"}, ("'ranking'", "regression")),
    "values": ({"problem_type": "regression"}, ("regression of 3 labels",)),
    "no-classifier": ({"architectures": ["EsmModel"]}, ("EsmModel", "protea finetune DATA -m")),
    "no-class": ({"architectures": "gone"}, ("architectures", "EsmForSequenceClassification")),
    "other-class": ({"architectures": ["BertForSequenceClassification"]}, ("Bert", "EsmForTokenClassification")),
    "other-unit": ({"architectures": [TOKEN]}, ("classifier.", TOKEN)),
    "alphabet": ({"vocab_size": 20}, ("alphabet",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistaken_models(run: Run, mistake: str) -> None:
    changes, parts = MISTAKES[mistake]
    random_model(labels=3, problem="single_label_classification").save_pretrained("model")
    _edit("model/config.json", **changes)
    fails(run("predict", "model", write_proteins(), "-o", "p.csv"), 1, "model", *parts)
    with pytest.raises(CheckpointError) as caught:
        read_foreign(Path("model"), ModelLoader("cpu"))
    if mistake not in ("alphabet", "other-unit"):
        check_message(f"finetune.foreign-{mistake}", caught.value)
    assert not list(Path().glob("*p.csv*"))


def test_other_mistakes(run: Run) -> None:
    write_proteins()
    model = random_model(labels=3, problem="single_label_classification")
    model.save_pretrained("model")
    fails(run("predict", "model", "in.fasta", "-o", "p.csv", "-m", "base"), 2, "model", "-m")
    tokens = build(ESM2Config(**SMALL)).alphabet.tokens
    Path("model/vocab.txt").write_text("\n".join((*tokens[:4], *reversed(tokens[4:]))))
    fails(run("predict", "model", "in.fasta", "-o", "p.csv"), 1, "vocab.txt", "alphabet")
    Path("model/vocab.txt").unlink()
    tensors = load_file("model/model.safetensors")
    save_file({key: value for key, value in tensors.items() if "out_proj" not in key}, "model/model.safetensors")
    fails(run("predict", "model", "in.fasta", "-o", "p.csv"), 1, "model", "needs classifier.out_proj.bias")
    random_model(TOKEN, 3, "multi_label_classification").save_pretrained("tokens")
    fails(run("predict", "tokens", "in.fasta", "-o", "p.csv"), 1, "tokens", "multi_label_classification of residues")
    random_model(SEQUENCE, 1).save_pretrained("one")
    _edit("one/config.json", problem_type="single_label_classification")
    fails(run("predict", "one", "in.fasta", "-o", "p.csv"), 1, "one", "1 label")
    assert not list(Path().glob("*p.csv*"))


def test_mistaken_adapters(run: Run, model_folders: dict[str, Path]) -> None:
    _, folder = write_adapter(target_modules=["query"])
    write_proteins()
    settings = (folder / "adapter_config.json").read_text()
    for key, changes, parts in (
        ("task", {"task_type": "FEATURE_EXTRACTION"}, ("FEATURE_EXTRACTION", "SEQ_CLS")),
        ("no-base", {"base_model_name_or_path": None}, ("base_model_name_or_path", "-m")),
        ("type", {"peft_type": "IA3"}, ("IA3", "merge_and_unload")),
    ):
        _edit("adapter/adapter_config.json", **changes)
        fails(run("predict", folder, "in.fasta", "-o", "p.csv"), 1, "adapter", *parts)
        with pytest.raises(CheckpointError) as caught:
            read_foreign(folder, ModelLoader("cpu"))
        check_message(f"finetune.foreign-adapter-{key}", caught.value)
        (folder / "adapter_config.json").write_text(settings)
    for name, options in (
        ("wide", {"hidden_size": 80}),
        ("deep", {"num_hidden_layers": 4}),
        ("flat", {"num_hidden_layers": 2}),
    ):
        random_model(labels=3, problem="single_label_classification", **options).save_pretrained(name)
        result = run("predict", folder, "in.fasta", "-o", "p.csv", "-m", name)
        lines = [line for line in result.err.splitlines() if "error" in line]
        assert result.code == 1, result
        assert len(lines) == 1
        assert "adapter" in lines[0]
        assert "name the right base with -m" in lines[0], lines
    result = run("predict", folder, "in.fasta", "-o", "p.csv", "-m", model_folders["esm1nv"])
    fails(result, 1, "adapter", "ESM-1nv", "-m")
    (folder / "vocab.txt").write_text("A\nC\n")
    fails(run("predict", folder, "in.fasta", "-o", "p.csv"), 1, "vocab.txt", "alphabet")
    (folder / "vocab.txt").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if "lora" in key}, folder / "adapter_model.safetensors")
    fails(run("predict", folder, "in.fasta", "-o", "p.csv"), 1, "adapter", "modules_to_save")
    shutil.copytree("base", "both")
    shutil.copytree(folder, "both", dirs_exist_ok=True)
    fails(run("predict", "both", "in.fasta", "-o", "p.csv"), 1, "both", "a whole model and an adapter")
    assert not list(Path().glob("*p.csv*"))


TRAINED = [
    ("sequence-class", "frozen"),
    ("sequence-value", "frozen"),
    ("multilabel", "frozen"),
    ("residue-class", "frozen"),
    ("sequence-value", "lora"),
    ("residue-class", "lora"),
    ("sequence-class", "full"),
]
KINDS = {"sequence-class": "class", "sequence-value": "value", "multilabel": "labels", "residue-class": "class"}


@pytest.mark.parametrize(("task", "method"), TRAINED)
def test_trained_heads_are_those_of_transformers(
    run: Run, data: Callable[[str], Path], model_folders: dict[str, Path], task: str, method: str
) -> None:
    """The export predicts in Protea and in transformers as the run does."""
    given, base = data(task), model_folders["esm2"]
    options = ("--head", "hf", "--method", method, "--epochs", 2, "--no-baselines", "--token-budget", 512)
    result = run("finetune", given, "-m", base, "-o", "out", *options)
    assert result.code == 0, result
    assert ("reads the vector bos" in result.err) == (task != "residue-class")
    head = read_predictor(Path("out")).head
    assert not head.centre.any()
    assert (head.spread == 1).all()
    assert (head.target[1] != 1) == (task == "sequence-value")
    result = run("export", "out", "-o", "model")
    assert result.code == 0, result
    residues = task == "residue-class"
    kind = TOKEN if residues else SEQUENCE
    assert result.out == f"model: {kind}\n"
    proteins = write_proteins()
    for folder in ("out", "model"):
        assert run("predict", folder, proteins, "-o", f"{folder}.csv").code == 0
    model, info = CLASSES[kind].from_pretrained("model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = list(read_predictor(Path("out")).classes)
    assert [model.config.id2label[number] for number in range(len(names))] == names
    for folder in ("out", "model"):
        table = pd.read_csv(f"{folder}.csv")
        if folder == "out":
            table = table.drop(
                columns=[
                    name for name in table if name.startswith(("calibrated", "set", "low", "high", "distance", "far"))
                ]
            )
        agrees(table, logits(model.eval()), KINDS[task], names)
    assert "nothing to do" in run("export", "out", "-o", "model").err
    again = run("export", "out", "-o", "model", "--dtype", "bfloat16")
    fails(again, 1, "model: exists already, of another run", "differs")
    if method != "lora":
        fails(run("export", "out", "-o", "adapter", "--adapter"), 2, method, "--adapter")
        return
    result = run("export", "out", "-o", "adapter", "--adapter")
    assert result.code == 0
    assert "protea convert" not in result.err  # the base is a folder
    assert "nothing to do" in run("export", "out", "-o", "adapter", "--adapter").err
    stock = CLASSES[kind].from_pretrained(base, config=EsmConfig.from_pretrained("adapter"))
    loaded = PeftModel.from_pretrained(stock, "adapter")  # peft warns of missing keys, and warnings are errors here
    result_again = loaded.load_adapter("adapter", "again")
    assert not result_again.missing_keys
    assert not result_again.unexpected_keys
    np.testing.assert_allclose(logits(loaded.eval()), logits(model), rtol=0, atol=TOLERANCE)
    assert run("predict", "adapter", proteins, "-o", "a.csv").code == 0
    agrees(pd.read_csv("a.csv"), logits(model), KINDS[task], names)


def test_an_adapter_of_a_base_that_transformers_does_not_know(run: Run, data: Callable[[str], Path]) -> None:
    """The note says how to get the base as a folder."""
    options = ("--method", "lora", "--head", "hf", "--epochs", 0.1, "--no-baselines")
    assert run("finetune", data("sequence-value"), "-o", "out", *options).code == 0
    result = run("export", "out", "-o", "adapter", "--adapter")
    assert result.code == 0, result
    assert "protea convert protea-mini base/ --to hf" in result.err
    assert run("convert", "protea-mini", "base/", "--to", "hf", "--no-peers").code == 0
    config = EsmConfig.from_pretrained("adapter")
    PeftModel.from_pretrained(EsmForSequenceClassification.from_pretrained("base", config=config), "adapter")


def test_exports_of_other_heads(run: Run, data: Callable[[str], Path], model_folders: dict[str, Path]) -> None:
    given, base = data("sequence-value"), model_folders["esm2"]
    options = ("--method", "lora", "--epochs", 1, "--no-baselines", "--split", "kfold:2")
    assert run("finetune", given, "-m", base, "-o", "out", *options).code == 0
    fails(run("export", "out", "-o", "model"), 2, "out", "2 predictors", "fold-1")
    result = run("export", "out/fold-1", "-o", "model")
    assert result.code == 0, result
    assert "stays in out/fold-1/head.safetensors" in result.err
    assert run("export", "out/fold-1", "-o", "adapter", "--adapter").code == 0
    encoder = EsmModel.from_pretrained("model", add_pooling_layer=False).eval()
    peft = PeftModel.from_pretrained(EsmModel.from_pretrained(base, add_pooling_layer=False), "adapter").eval()
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        states = [model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state for model in (encoder, peft)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=TOLERANCE)
    fails(run("predict", "model", given, "-o", "p.csv"), 1, "model", "EsmModel")
    fails(run("predict", "adapter", given, "-o", "p.csv"), 1, "adapter", "FEATURE_EXTRACTION")
    fails(run("export", "out/fold-1", "-o", "m", "--checkpoint", "best"), 2, "--checkpoint")
    fails(run("export", "out/fold-1", "-o", "m", "--to", "nemo"), 2, "--to nemo")
    fails(run("export", "out/fold-1", "-o", "m", "--adapter", "--dtype", "bfloat16"), 2, "--dtype bfloat16")
    Path("file").write_text("text")
    fails(run("export", "out/fold-1", "-o", "file"), 1, "file", "exists already")
    Path("pretrained").mkdir()
    fails(run("export", "pretrained", "-o", "m", "--adapter"), 2, "pretrained", "--adapter")
    assert not Path("m").exists()


def test_mistaken_options(run: Run, data: Callable[[str], Path], model_folders: dict[str, Path]) -> None:
    given, base = data("sequence-value"), model_folders["esm2"]
    command = ("finetune", given, "-o", "out", "--head", "hf", "-m")
    fails(run(*command, base, "--layer", "1"), 2, "--head hf", "--layer")
    fails(run(*command, model_folders["esm1nv"]), 2, "--head hf", "ESM-1nv")
    fails(run("finetune", data("pair-class"), "-o", "out", "--head", "hf", "-m", base), 2, "--head hf", "linear")
    assert run("finetune", given, "-m", model_folders["esm1nv"], "-o", "nv", "--no-baselines").code == 0
    fails(run("export", "nv", "-o", "model"), 2, "nv", "ESM-1nv")
    assert not Path("out").exists()
    assert not Path("model").exists()
