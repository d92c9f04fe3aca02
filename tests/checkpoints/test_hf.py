"""The Hugging Face layout: what others wrote loads here, what we write loads there, and damage is named."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import CONFIGS, disturb
from messages import check_message
from protea.checkpoints import hf
from protea.checkpoints.tensors import INDEX, WEIGHTS
from protea.errors import CheckpointError, OutputError, ProteaWarning
from protea.models.encoder import Encoder
from protea.models.esm2 import ESM2, SIZES
from protea.models.registry import build
from protea.output import staged
from references import EsmForMaskedLM, hf_name, transformers_config

CPU = torch.device("cpu")


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    with hf.open_checkpoint(folder) as checkpoint:
        return checkpoint.load(dtype=dtype, device=CPU)


def random_model(name: str, folder: Path) -> Encoder:
    hf.write_random(folder, build(CONFIGS[name]), seed=2, dtype=torch.float32)
    model = read(folder)
    disturb(model)
    return model


def same(a: Encoder, b: Encoder) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(tmp_path: Path, name: str) -> None:
    model = random_model(name, tmp_path / "random")
    hf.save(model, tmp_path / "saved")
    again = read(tmp_path / "saved")
    assert again.config == model.config
    assert again.capabilities == model.capabilities
    assert same(model, again)


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_hold_the_same(tmp_path: Path, name: str) -> None:
    model = random_model(name, tmp_path / "random")
    parameters = dict(model.named_parameters())
    hf.write(tmp_path / "sharded", model, parameters.__getitem__, torch.float32, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] >= sum(parameter.nbytes for parameter in parameters.values())
    assert same(model, read(tmp_path / "sharded"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_and_storing_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model("esm2", tmp_path / "random")
    half = read(tmp_path / "random", dtype)
    assert isinstance(half, ESM2)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == dtype
        if not name.endswith("bias") and "norm" not in name:
            assert torch.equal(parameter, model.get_parameter(name).to(dtype))
    assert half.inv_freq.dtype == torch.float32
    hf.save(half, tmp_path / "half")
    stored = load_file(tmp_path / "half" / WEIGHTS)
    kinds = {key.rsplit(".", 1)[1] == "inv_freq": tensor.dtype for key, tensor in stored.items()}
    assert kinds == {False: dtype, True: torch.float32}
    assert same(half, read(tmp_path / "half", dtype))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_seeds_give_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        hf.write_random(tmp_path / name, build(CONFIGS["esm2"]), seed=seed, dtype=torch.float32)
    a, b, c = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(("size", "limit"), [("8M", 10_000), pytest.param("35M", 20_000, marks=pytest.mark.long)])
def test_weights_stay_mapped(tmp_path: Path, size: str, limit: int) -> None:
    """Loading in the stored type copies nothing: the file's pages are the parameters."""
    hf.write_random(tmp_path / "large", build(SIZES[size]), seed=0, dtype=torch.float32)
    hf.write_random(tmp_path / "small", build(CONFIGS["esm2"]), seed=0, dtype=torch.float32)
    code = (
        "import sys, torch, pathlib\n"
        "from protea.checkpoints import hf\n"
        "def anonymous():\n"
        "    rows = dict(line.split(':') for line in open('/proc/self/status') if ':' in line)\n"
        "    return int(rows['RssAnon'].split()[0])\n"
        "def load(path):\n"
        "    model = hf.open_checkpoint(pathlib.Path(path)).load(dtype=torch.float32, device=torch.device('cpu'))\n"
        "    return model, sum(parameter.sum() for parameter in model.parameters())\n"
        "small = load(sys.argv[1])\n"
        "before = anonymous()\n"
        "large = load(sys.argv[2])\n"
        "print(anonymous() - before)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    command = [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < limit, f"{grown} kB of memory for the weights of {size} that could stay in the file"


# --- what others write -------------------------------------------------------------------------------------------

ROTARY_NAMES = ("esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq", "esm.rotary_embeddings.inv_freq")


def respell(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any
) -> Path:
    """A copy of a checkpoint with other tensors or configuration."""
    target.mkdir()
    raw = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(raw))
    save_file({key: value.clone() for key, value in change(load_file(folder / WEIGHTS)).items()}, target / WEIGHTS)
    return target


def with_gamma_and_beta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers 5.23's spelling: gamma and beta, and one wildcard key for all layers' frequencies."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if "LayerNorm." in key:
            key = key.replace(".weight", ".gamma").replace(".bias", ".beta")  # noqa: PLW2901
        if key.endswith("inv_freq"):
            key = "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq"  # noqa: PLW2901
        out[key] = value
    return out


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``EsmModel``'s keys."""
    return {key.removeprefix("esm."): value for key, value in tensors.items() if key.startswith("esm.")}


def with_one_frequency_key(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {key: value for key, value in tensors.items() if not key.endswith("inv_freq")}
    first = next(value for key, value in tensors.items() if key.endswith("inv_freq"))
    return rest | {"esm.rotary_embeddings.inv_freq": first}


@pytest.mark.parametrize(
    ("name", "change"),
    [("esm2", with_gamma_and_beta), ("esm1b", with_gamma_and_beta), ("esm2", with_one_frequency_key)],
)
def test_other_spellings(tmp_path: Path, name: str, change: Callable[..., dict[str, Tensor]]) -> None:
    model = random_model(name, tmp_path / "random")
    hf.save(model, tmp_path / "saved")
    assert same(model, read(respell(tmp_path / "saved", tmp_path / "other", change)))


@pytest.mark.parametrize("name", ["esm2", "esm1b", "esm1v"])
def test_the_bare_encoder_loads_without_its_heads(tmp_path: Path, name: str) -> None:
    model = random_model(name, tmp_path / "random")
    hf.save(model, tmp_path / "saved")
    encoder = read(respell(tmp_path / "saved", tmp_path / "bare", bare))
    assert encoder.capabilities == {"attention", "contacts"}
    hf.save(encoder, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["EsmModel"]
    assert same(encoder, read(tmp_path / "again"))


def test_a_classifier_loads_and_its_head_is_reported(tmp_path: Path) -> None:
    random_model("esm2", tmp_path / "random")

    def classify(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {key: value for key, value in tensors.items() if not key.startswith("lm_head")}
        return kept | {"classifier.dense.weight": torch.zeros(2, 2), "classifier.dense.bias": torch.zeros(2)}

    folder = respell(tmp_path / "random", tmp_path / "classifier", classify)
    with pytest.warns(ProteaWarning, match=r"2 .*classifier\.dense\.bias"):
        model = read(folder)
    assert "logits" not in model.capabilities


def test_known_leftovers_pass_without_a_word(tmp_path: Path) -> None:
    """Position embeddings that rotary files carry for nothing, buffers, and a repeat of the tied matrix."""

    def leftovers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {
            "esm.embeddings.position_embeddings.weight": torch.zeros(1026, 40),
            "esm.embeddings.position_ids": torch.zeros(1, 1026, dtype=torch.int64),
            "lm_head.decoder.weight": tensors["esm.embeddings.word_embeddings.weight"],
        }

    model = random_model("esm2", tmp_path / "random")
    hf.save(model, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(model, read(respell(tmp_path / "saved", tmp_path / "more", leftovers)))


def test_stored_frequencies_are_used_and_absent_ones_computed(tmp_path: Path) -> None:
    random_model("esm2", tmp_path / "random")
    exact = read(tmp_path / "random").inv_freq
    rounded = exact.half()

    def store(value: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            replaced = {key: value if key.endswith("inv_freq") else old for key, old in tensors.items()}
            return {key: tensor for key, tensor in replaced.items() if tensor is not None}

        return change

    assert not torch.equal(rounded.float(), exact)
    half = read(respell(tmp_path / "random", tmp_path / "half", store(rounded))).inv_freq
    assert torch.equal(half, rounded.float())
    absent = read(respell(tmp_path / "random", tmp_path / "absent", store(None))).inv_freq
    assert torch.equal(absent, exact)
    coarse = respell(tmp_path / "random", tmp_path / "coarse", store(exact.bfloat16()))
    with pytest.warns(ProteaWarning, match=r"coarse.*inv_freq.*bfloat16"):
        assert torch.equal(read(coarse).inv_freq, exact)


@pytest.mark.parametrize("name", ["esm2", "esm2nv", "esm1b", "esm1v"])
def test_transformers_loads_what_we_save(tmp_path: Path, name: str) -> None:
    model = random_model(name, tmp_path / "random")
    hf.save(model, tmp_path / "saved")
    theirs, report = EsmForMaskedLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    state = theirs.state_dict()
    for ours, parameter in model.named_parameters():
        assert torch.equal(state[hf_name(ours)], parameter), ours
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(model, read(tmp_path / "theirs"))


def test_transformers_finds_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = random_model("esm2", tmp_path / "random")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "random")
    sequence = "MKT<mask>ZB"
    expected = [0, *model.alphabet.encode(sequence).tolist(), 2]
    assert tokenizer(sequence)["input_ids"] == expected


@pytest.mark.parametrize("name", ["esm2", pytest.param("esm1b", marks=pytest.mark.long)])
def test_transformers_4_loads_what_we_save_and_we_what_it_saves(tmp_path: Path, name: str) -> None:
    folder = os.environ.get("PROTEA_TRANSFORMERS_4")
    if folder is None:
        pytest.skip("PROTEA_TRANSFORMERS_4 does not name a folder with transformers 4; `make test` sets it")
    model = random_model(name, tmp_path / "random")
    hf.save(model, tmp_path / "saved")
    code = (
        "import sys, transformers\n"
        "from transformers import AutoTokenizer, EsmForMaskedLM\n"
        "assert transformers.__version__.startswith('4.'), transformers.__version__\n"
        "model, report = EsmForMaskedLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(report.values()), report\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1])('MK<mask>')['input_ids'] == [0, 20, 15, 32, 2]\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    environment = os.environ | {"PYTHONPATH": folder}
    command = [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert same(model, read(tmp_path / "theirs"))


def test_classes_of_transformers_all_load(tmp_path: Path) -> None:
    from transformers import EsmForSequenceClassification, EsmForTokenClassification, EsmModel

    config = transformers_config(build(CONFIGS["esm2"]))
    for kind in (EsmModel, EsmForSequenceClassification, EsmForTokenClassification):
        folder = tmp_path / kind.__name__
        kind(config).save_pretrained(folder)
        with pytest.warns(ProteaWarning, match=str(folder)):
            assert read(folder).capabilities == {"attention", "contacts"}


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf.write_random(tmp_path / "model", build(CONFIGS["esm2"]), seed=0, dtype=torch.float32)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = build(CONFIGS["esm2"])
    hf.write(
        tmp_path / "sharded",
        model,
        lambda name: torch.zeros(model.get_parameter(name).shape),
        torch.float32,
        max_shard_bytes=100_000,
    )
    return tmp_path / "sharded"


def fails(folder: Path, pattern: str, key: str = "") -> None:
    """Reading fails; the message names what the pattern says, and a pinned one has the wording of its key."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read(folder)
    if key:
        check_message(f"checkpoints.{key}", caught.value, tmp=folder.parent)


@pytest.mark.parametrize("keep", [0, 5, 4000, -10])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    fails(folder, f"{WEIGHTS}: ")


def test_absent_files(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    fails(folder, f"{WEIGHTS}.*{INDEX}", "no-weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails(folder, r"pytorch_model\.bin: ", "not-torch-save")
    (folder / "config.json").unlink()
    fails(folder, r"config\.json", "no-config")


def test_absent_and_damaged_shards(sharded: Path) -> None:
    paths = sorted(sharded.glob("*.safetensors"))
    paths[1].rename(sharded / "elsewhere")
    fails(sharded, f"{paths[1].name}.*{len(paths)}.*{INDEX}", "no-shard")
    paths[1].write_bytes(paths[0].read_bytes())
    fails(sharded, f"{paths[1].name}: ")
    (sharded / INDEX).write_text("{")
    fails(sharded, f"{INDEX}: ")
    (sharded / INDEX).write_text('{"weight_map": {"x": "../../outside.safetensors"}}')
    fails(sharded, f"{INDEX}: .*outside.safetensors'")


def test_shapes_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    fails(
        respell(folder, tmp_path / "wide", lambda tensors: tensors, intermediate_size=80),
        r"wide/model.safetensors: esm.encoder.layer.0.intermediate.dense.weight .*\[160, 40\].*\[80, 40\]",
        "shape",
    )
    fails(
        respell(folder, tmp_path / "deep", lambda tensors: tensors, num_hidden_layers=4),
        r"deep/model.safetensors: .*esm.encoder.layer.3.* 15 ",
    )


def test_an_untied_head(folder: Path, tmp_path: Path) -> None:
    def untie(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.decoder.weight": torch.ones(33, 40)}

    fails(
        respell(folder, tmp_path / "untied", untie),
        "untied/model.safetensors: lm_head.decoder.weight .*esm.embeddings.word_embeddings.weight",
        "untied-head",
    )

    def shift(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.decoder.bias": torch.ones(33)}

    fails(
        respell(folder, tmp_path / "shifted", shift),
        r"shifted/model.safetensors: lm_head.decoder.bias .*lm_head.bias",
    )


def test_frequencies_that_differ_between_layers(folder: Path, tmp_path: Path) -> None:
    key = ROTARY_NAMES[0].format(1)

    def disagree(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {key: torch.ones(4)}

    fails(
        respell(folder, tmp_path / "m", disagree),
        f"m/model.safetensors: {key} .*{ROTARY_NAMES[0].format(0)}",
    )


def test_frequencies_of_another_width(folder: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.ones(5) if key.endswith("inv_freq") else value for key, value in tensors.items()}

    fails(
        respell(folder, tmp_path / "m", widen),
        rf"m/model.safetensors: {ROTARY_NAMES[0].format(0)} .*\[5\].*\[4\]",
    )


@pytest.mark.parametrize("key", ["lm_head.bias", ROTARY_NAMES[0].format(0)])
@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "I64"), (torch.bool, "BOOL")])
def test_types_that_are_no_weights(folder: Path, tmp_path: Path, key: str, dtype: torch.dtype, name: str) -> None:
    """Quantized weights, say, whose scales are elsewhere."""

    def quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {key: tensors[key].to(dtype)}

    fails(
        respell(folder, tmp_path / "m", quantize),
        f"m/model.safetensors: {key} .*{name}.*F64, F32, F16",
    )


def test_weights_without_tensors(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)
    fails(folder, f"{WEIGHTS}: .*esm.embeddings.word_embeddings.weight", "no-tensor")
    (folder / INDEX).write_text('{"weight_map": {}}')
    fails(folder, f"{INDEX}: .*weight_map")
    (folder / INDEX).write_text("[" * 100_000)
    fails(folder, f"{INDEX}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert'.*'esm'.*'esm1nv'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "40"}, "hidden_size .*int.*'40'"),
        ({"hidden_size": True}, "hidden_size .*int.*True"),
        ({"hidden_size": 41}, "hidden_size 41.*num_attention_heads 5"),
        ({"token_dropout": 1}, "token_dropout .*bool.*1"),
        ({"emb_layer_norm_before": "no"}, "emb_layer_norm_before .*bool.*'no'"),
        ({"position_embedding_type": "absolute", "emb_layer_norm_before": "no"}, "emb_layer_norm_before "),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .*1.*1,000.*1000000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers .*1.*1,000.*-1"),
        ({"intermediate_size": 10**18}, "intermediate_size .*1.*1,048,576.*10"),
        ({"vocab_size": 10**12}, "vocab_size .*1.*1,048,576.*10"),
        ({"max_position_embeddings": 0}, "max_position_embeddings .*1.*1,073,741,824.*0"),
        ({"layer_norm_eps": 0}, "layer_norm_eps .*0.*1.*0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps .*0.*1.*nan"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps .*0.*1.*10"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob .*0.*1.*1.0"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob .*0.*1.*-0"),
        ({"rope_theta": 0}, "rope_theta .*1.*1e12.*0"),
        ({"vocab_size": 20}, "vocab_size 20.*33.*ESM"),
        ({"mask_token_id": 2}, "mask_token_id 2.*ESM.*32"),
        ({"is_folding_model": True}, "is_folding_model True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_configurations_we_do_not_run(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fails(respell(folder, tmp_path / "other", lambda tensors: tensors, **change), f"other/config.json: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ""),
        ("[" * 100_000, ""),
        ("[]", "not-a-json-object"),
    ],
)
def test_configuration_that_is_no_configuration(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    fails(folder, r"config\.json: ", message)


def test_another_vocabulary(folder: Path) -> None:
    """A nucleotide model of the same class, say."""
    tokens = (folder / "vocab.txt").read_text().split()
    tokens[4], tokens[5] = tokens[5], tokens[4]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    fails(folder, "vocab.txt: .*4.*'A'.*'L'", "other-alphabet")
    (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>"]))
    fails(folder, "vocab.txt: .*2.*'nothing'.*'<eos>'")


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", WEIGHTS])
def test_files_that_cannot_be_read(folder: Path, name: str) -> None:
    path = folder / name
    path.chmod(0)
    if not os.access(path, os.R_OK):
        fails(folder, f"{name}: .*Permission denied")
    path.unlink()
    path.symlink_to(path)
    fails(folder, f"{name}: .*symbolic links")
    path.unlink()
    path.mkdir()
    fails(folder, f"{name}: .*Is a directory", "not-readable" if name == "config.json" else "")


def test_a_vocabulary_that_is_no_text(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    fails(folder, "vocab.txt: .*UTF-8")


# --- writing -----------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    with pytest.raises(OutputError, match=str(folder)):
        hf.save(model, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=str(tmp_path / "file")):
        hf.save(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    hf.save(model, tmp_path / "empty")
    assert same(model, read(tmp_path / "empty"))


def test_places_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    with pytest.raises(OutputError, match=r"x: .*File name too long"):
        hf.save(model, tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="loop: "):
        hf.save(model, tmp_path / "loop")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    if not os.access(locked, os.R_OK):
        with pytest.raises(OutputError, match=r"model: .*Permission denied"):
            hf.save(model, locked / "model")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    model = build(CONFIGS["esm2"])

    def fail(name: str) -> Tensor:
        raise OSError(28, "No space left on device")

    wanted = pytest.raises(OutputError, match=r"model: .*No space left")
    with wanted, staged(tmp_path / "deeper" / "model") as place:
        hf.write(place, model, fail, torch.float32)
    assert not (tmp_path / "deeper").exists()


def test_saved_files_are_readable_by_others(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
