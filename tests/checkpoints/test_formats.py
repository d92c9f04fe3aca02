"""Files as other programs write them load with those programs' numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from torch import Tensor, nn

import protea
from conftest import CONFIGS, disturb
from messages import check_message
from protea.checkpoints import hf
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import open_checkpoint, recognised
from protea.models.encoder import Encoder
from protea.models.esm2 import ESM2
from protea.models.registry import build
from references import hf_name, load_transformers, new_fair_esm, run_fair_esm, run_transformers

CPU = torch.device("cpu")
IDS = torch.tensor([0, 20, 15, 11, 5, 32, 24, 30, 19, 4, 2])
HEADS = 5


def read(path: Path) -> Encoder:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_checkpoint(path) as checkpoint:
            return checkpoint.load(dtype=torch.float32, device=CPU)


def logits(model: Encoder, ids: Tensor = IDS) -> Tensor:
    from protea.packing import pack

    with torch.inference_mode():
        return model.head(model(pack([ids.to(torch.uint8).numpy()])))


def close(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max()) <= 2e-5 * max(1.0, float(theirs.abs().max()))


@pytest.fixture
def random_state(tmp_path: Path) -> tuple[dict[str, Any], Encoder]:
    """A small ESM-2 with every number random, and its Hugging Face state dictionary; frequencies rounded to float16."""
    hf.write_random(tmp_path / "random", build(CONFIGS["esm2"]), seed=3, dtype=torch.float32)
    model = hf.open_checkpoint(tmp_path / "random").load(dtype=torch.float32, device=CPU)
    disturb(model)
    state = {hf_name(name): value.detach() for name, value in model.named_parameters()}
    return state, model


def same(model: Encoder, other: Encoder, but: str = "contact_head") -> None:
    theirs = dict(other.named_parameters())
    for name, value in model.named_parameters():
        if not name.startswith(but):
            assert torch.equal(value, theirs[name]), name


# --- fair-esm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["esm2", "esm1b", "esm1v"])
def test_files_of_fair_esm(tmp_path: Path, name: str, legacy: bool) -> None:
    from argparse import Namespace

    config = CONFIGS[name]
    theirs = new_fair_esm(build(config))
    disturb(theirs)
    described: dict[str, Any]
    if name == "esm2":
        described = {
            "cfg": {
                "model": Namespace(
                    encoder_layers=3, encoder_embed_dim=40, encoder_attention_heads=HEADS, token_dropout=True
                )
            }
        }
    else:
        described = {"args": layouts.esm1_args(3, 40, HEADS, 160)}
    path = tmp_path / f"{name}_test.pt"
    layouts.write_fair_esm(path, theirs, described, _use_new_zipfile_serialization=not legacy)
    if name == "esm1v":
        path.with_name("esm1v_test-contact-regression.pt").unlink()
    model = protea.load(path, device="cpu")
    assert model.capabilities == {"attention", "logits"} | ({"contacts"} if name != "esm1v" else set())
    if name != "esm2":
        theirs.embed_tokens.weight.data[32] = 0  # as Meta's loader does
    assert close(logits(model.module), run_fair_esm(theirs, IDS)[1])
    assert model.weights_sha256().keys() >= {path.name}


def test_the_configuration_of_omegaconf(tmp_path: Path) -> None:
    """As the published ESM-2 files have it: a DictConfig, whose class is not imported to read it."""
    from omegaconf import OmegaConf

    theirs = new_fair_esm(build(CONFIGS["esm2"]))
    disturb(theirs)
    sizes = {"encoder_layers": 3, "encoder_embed_dim": 40, "encoder_attention_heads": HEADS, "token_dropout": True}
    cfg = OmegaConf.create({"model": sizes, "task": {"data": ["a", "b"]}, "common": {"seed": 1}})
    path = tmp_path / "esm2_test.pt"
    layouts.write_fair_esm(path, theirs, {"args": None, "cfg": cfg, "optimizer_history": [{"lr": 1.0}]})
    code = (
        "import sys, protea\n"
        f"model = protea.load({str(path)!r}, device='cpu')\n"
        "assert 'omegaconf' not in sys.modules\n"
        "print(model.config.num_hidden_layers, model.config.num_attention_heads)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "5"]
    assert close(logits(read(path)), run_fair_esm(theirs, IDS)[1])


# --- BioNeMo 1 ---------------------------------------------------------------------------------------------------

ESM2NV = {
    "num_layers": 3,
    "hidden_size": 40,
    "ffn_hidden_size": "${multiply:${model.hidden_size}, 4}",
    "num_attention_heads": HEADS,
    "position_embedding_type": "rope",
    "hidden_dropout": 0,
    "attention_dropout": 0.0,
    "embedding_token_dropout": True,
    "esm_gelu": True,
    "bias_gelu_fusion": False,
}


@pytest.mark.parametrize("unpacked", [False, True])
def test_nemo_files_of_esm2nv(tmp_path: Path, random_state: tuple[dict[str, Any], Encoder], unpacked: bool) -> None:
    state, model = random_state
    frequencies = {"inv_freq": model.inv_freq.half().float()} if isinstance(model, ESM2) else {}
    weights = layouts.nemo_state(state | frequencies, HEADS)
    path = tmp_path / "esm2nv.nemo"
    layouts.write_nemo(path, {"./model_weights.ckpt": weights}, layouts.nemo_yaml(**ESM2NV))
    if unpacked:
        import tarfile

        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        path = tmp_path / "unpacked"
    again = read(path)
    assert recognised(path).NAME == "nemo"
    same(again, model)
    assert again.config == model.config
    assert isinstance(again, ESM2)
    assert torch.equal(again.inv_freq, frequencies["inv_freq"])


def test_tensor_parallel_parts(tmp_path: Path) -> None:
    hf.write_random(
        tmp_path / "random",
        build(type(CONFIGS["esm2"])(**{**vars(CONFIGS["esm2"]), "num_attention_heads": 4})),
        seed=3,
        dtype=torch.float32,
    )
    model = hf.open_checkpoint(tmp_path / "random").load(dtype=torch.float32, device=CPU)
    disturb(model)
    state = {hf_name(name): value.detach() for name, value in model.named_parameters()}
    parts = layouts.split_ranks(layouts.nemo_state(state, 4), 2)
    named = {f"./mp_rank_{rank:02d}/model_weights.ckpt": part for rank, part in enumerate(parts)}
    config = layouts.nemo_yaml(**(ESM2NV | {"num_attention_heads": 4, "tensor_model_parallel_size": 2}))
    layouts.write_nemo(tmp_path / "two.nemo", named, config)
    same(read(tmp_path / "two.nemo"), model)
    parts[1]["model.lm_head.dense.bias"] += 1
    layouts.write_nemo(tmp_path / "differ.nemo", named, config)
    with pytest.raises(protea.ProteaError, match=r"differ\.nemo.*lm_head\.dense\.bias"):
        read(tmp_path / "differ.nemo")
    pipeline = {f"./tp_rank_00_pp_rank_00{rank}/model_weights.ckpt": part for rank, part in enumerate(parts)}
    layouts.write_nemo(tmp_path / "pipeline.nemo", pipeline, config)
    with pytest.raises(protea.ProteaError) as caught:
        read(tmp_path / "pipeline.nemo")
    check_message("checkpoints.pipeline-parallel", caught.value, tmp=tmp_path)


@pytest.mark.parametrize(("fusion", "activation"), [({}, "gelu_tanh"), ({"bias_gelu_fusion": False}, "gelu")])
def test_nemo_files_of_esm1nv(tmp_path: Path, fusion: dict[str, Any], activation: str) -> None:
    hf.write_random(tmp_path / "random", build(CONFIGS["esm1nv"]), seed=3, dtype=torch.float32)
    model = hf.open_checkpoint(tmp_path / "random").load(dtype=torch.float32, device=CPU)
    disturb(model)
    state = {hf_name(name): value.detach() for name, value in model.named_parameters()}
    config = layouts.nemo_yaml(
        num_layers=3, hidden_size=40, ffn_hidden_size=160, num_attention_heads=HEADS, hidden_dropout=0.1, **fusion
    )
    weights = {"./model_weights.ckpt": {"state_dict": layouts.nemo_state(state, HEADS)}}
    layouts.write_nemo(tmp_path / "esm1nv.nemo", weights, config)
    again = read(tmp_path / "esm1nv.nemo")
    same(again, model)
    assert vars(again.config) == vars(model.config) | {"hidden_act": activation}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"megatron_legacy": True}, r"model_config\.yaml: megatron_legacy True"),
        ({"normalization": "layernorm1p"}, "normalization 'layernorm1p'.*'layernorm'"),
        ({"esm_gelu": False, "bias_gelu_fusion": True}, "bias_gelu_fusion.*esm_gelu"),
        ({"num_attention_heads": "many"}, "num_attention_heads.*'many'"),
        ({"num_attention_heads": 7}, "hidden_size 40.*num_attention_heads 7"),
        ({"num_layers": 4}, r"model\.language_model\.encoder\.layers\.3.* 11 "),
        ({"hidden_size": 80}, r"\[128, 40\], model_config\.yaml.*\[128, 80\]"),
        ({"ffn_hidden_size": 80}, r"dense_h_to_4h\.weight.*\[160, 40\], model_config\.yaml.*\[80, 40\]"),
    ],
)
def test_nemo_files_that_contradict_themselves(
    tmp_path: Path, random_state: tuple[dict[str, Any], Encoder], change: dict[str, Any], message: str
) -> None:
    weights = {"./model_weights.ckpt": layouts.nemo_state(random_state[0], HEADS)}
    layouts.write_nemo(tmp_path / "m.nemo", weights, layouts.nemo_yaml(**(ESM2NV | change)))
    with pytest.raises(protea.ProteaError, match=message):
        read(tmp_path / "m.nemo")


# --- BioNeMo 2 ---------------------------------------------------------------------------------------------------

MEGATRON = """
import sys, warnings
warnings.simplefilter("ignore")

def main():
    import io, torch
    import torch.distributed as dist
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    what, state, folder = sys.argv[1:]
    outside, layers = torch.load(state)
    tensor = ShardedTensor.from_rank_offsets
    sharded = {key: tensor(key, value) for key, value in outside.items()}
    for number, layer in enumerate(layers):
        for key, value in layer.items():
            name = f"module.encoder.layers.{key}"
            sharded[f"{number}.{key}"] = tensor(name, value, (0, number, len(layers)), prepend_axis_num=1)
        name = "module.encoder.layers.self_attention.linear_qkv._extra_state"
        sharded[f"{number}.extra"] = ShardedObject(name, io.BytesIO(b"x"), (len(layers),), (number,))
    if what == "save":
        try:
            dist_checkpointing.save(sharded, folder)
        except (AssertionError, RuntimeError) as error:  # what it does with a GPU once all is written
            assert "CUDA" in str(error), error
    else:
        wanted = {key: value for key, value in sharded.items() if isinstance(value, ShardedTensor)}
        loaded = dist_checkpointing.load({k: v.without_data() and v for k, v in wanted.items()}, folder)
        for key, value in outside.items():
            assert torch.equal(loaded[key], value), key
        for number, layer in enumerate(layers):
            for key, value in layer.items():
                assert torch.equal(loaded[f"{number}.{key}"], value), key
        print("equal")

if __name__ == "__main__":
    main()
"""


def megatron(tmp_path: Path, what: str, state: Any, folder: Path) -> str:
    """A real Megatron in a process of its own."""
    (tmp_path / "run_megatron.py").write_text(MEGATRON)
    torch.save(state, tmp_path / "state.pt")
    command = [sys.executable, str(tmp_path / "run_megatron.py"), what, str(tmp_path / "state.pt"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_directories_that_megatron_writes(tmp_path: Path, random_state: tuple[dict[str, Any], Encoder]) -> None:
    """Layers stacked on a first axis; extra state, which is pickled bytes, beside them."""
    state, model = random_state
    folder = tmp_path / "nemo2"
    (folder / "weights").mkdir(parents=True)
    megatron(tmp_path, "save", layouts.nemo2_state(state, HEADS), folder / "weights")
    layouts.write_context(folder, HEADS)
    again = read(folder)
    assert recognised(folder).NAME == "nemo2"
    same(again, model)
    assert again.config == model.config
    same(read(folder / "weights"), model)


@pytest.mark.long
def test_megatron_loads_what_we_write(tmp_path: Path, random_state: tuple[dict[str, Any], Encoder]) -> None:
    from protea.checkpoints import nemo2

    state, model = random_state
    parameters = dict(model.named_parameters())
    nemo2.write(tmp_path / "ours", model, parameters.__getitem__, torch.float32)
    outside, layers = layouts.nemo2_state(state, HEADS)
    assert megatron(tmp_path, "load", (outside, layers), tmp_path / "ours" / "weights").strip() == "equal"


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_directories_with_stacked_and_numbered_layers(
    tmp_path: Path, random_state: tuple[dict[str, Any], Encoder], prefix: str, stacked: bool
) -> None:
    from torch.distributed import checkpoint as dcp

    state, model = random_state
    outside, layers = layouts.nemo2_state(state, HEADS)
    whole = dict(outside)
    if stacked:
        whole |= {f"module.encoder.layers.{key}": torch.stack([layer[key] for layer in layers]) for key in layers[0]}
    else:
        for number, layer in enumerate(layers):
            whole |= {f"module.encoder.layers.{number}.{key}": value for key, value in layer.items()}
    whole["optimizer.state.exp_avg.module.embedding.word_embeddings.weight"] = torch.zeros(128, 40)
    renamed = {key.replace("module.", prefix, 1): value.clone() for key, value in whole.items()}
    folder = tmp_path / "nemo2"
    (folder / "weights").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(renamed, checkpoint_id=folder / "weights", no_dist=True)
    layouts.write_context(folder, HEADS)
    same(read(folder), model)


def test_a_directory_without_its_context(tmp_path: Path) -> None:
    """Published sizes are known by their depth and width; others say what is missing."""
    from protea.checkpoints import nemo2
    from protea.models.esm2 import SIZES

    for name, config in {"8M": SIZES["8M"], "small": CONFIGS["esm2"]}.items():
        model = build(config)
        nemo2.write(
            tmp_path / name, model, lambda key, model=model: torch.zeros(model.get_parameter(key).shape), torch.float32
        )
        (tmp_path / name / "context" / "model.yaml").unlink()
    assert read(tmp_path / "8M").config == SIZES["8M"]
    with pytest.raises(protea.ProteaError) as caught:
        read(tmp_path / "small")
    check_message("checkpoints.unknown-heads", caught.value, tmp=tmp_path)


# --- TransformerEngine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "esm."])
@pytest.mark.parametrize("interleaved", [True, False])
def test_folders_of_the_transformer_engine_recipe(
    tmp_path: Path, random_state: tuple[dict[str, Any], Encoder], prefix: str, interleaved: bool
) -> None:
    import json

    state, model = random_state
    config = json.loads((tmp_path / "random" / "config.json").read_text())
    layouts.write_te(tmp_path / "te", state, config, prefix=prefix, interleaved=interleaved)
    again = read(tmp_path / "te")
    assert recognised(tmp_path / "te").NAME == "te"
    same(again, model)
    assert again.config == model.config


# --- Hugging Face's older files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_model_bin(tmp_path: Path, random_state: tuple[dict[str, Any], Encoder], sharded: bool) -> None:
    import json

    state, model = random_state
    folder = tmp_path / "legacy"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "random" / "config.json").read_text())
    keys = sorted(state)
    if sharded:
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        halves = [keys[::2], keys[1::2]]
        for name, half in zip(names, halves, strict=True):
            torch.save({key: state[key] for key in half}, folder / name)
        weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save({key: nn.Parameter(value) for key, value in state.items()}, folder / "pytorch_model.bin")
    same(read(folder), model, but="nothing")
    theirs = load_transformers(tmp_path / "random")
    theirs.load_state_dict(state, strict=False)
    assert close(logits(read(folder)), run_transformers(theirs, IDS)[1].detach())


def test_parameters_stay_mapped(tmp_path: Path) -> None:
    """A tensor stored in one piece is the file's own pages, in every container."""
    hf.write_random(tmp_path / "hf", build(CONFIGS["esm2"]), seed=0, dtype=torch.float32)
    checkpoint: Checkpoint = hf.open_checkpoint(tmp_path / "hf")
    torch.save(
        {key: checkpoint.tensors[key].clone() for key in checkpoint.tensors}, tmp_path / "hf" / "pytorch_model.bin"
    )
    (tmp_path / "hf" / "model.safetensors").unlink()
    again = hf.open_checkpoint(tmp_path / "hf")
    name = "layers.0.fc1.weight"
    assert again.parameter(name).data_ptr() == again.parameter(name).data_ptr()
