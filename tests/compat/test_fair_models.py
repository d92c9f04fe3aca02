"""The models of protea.compat.esm beside fair-esm's, on files that fair-esm reads too."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from fair_files import PROTEINS, reference, write
from torch import Tensor

import protea
import protea.compat.esm as ours
from protea.errors import CapabilityError, DeviceError, SequenceTooLongError, UsageError
from references import esm

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["esm2_tiny", "esm1b_tiny", "esm1v_tiny", "esm1_tiny"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fair")
    return {name: write(folder, name) for name in NAMES}


def check(mine: Tensor, theirs: Tensor) -> None:
    """The same shape and type, and numbers within 2e-5 of the largest."""
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype
    scale = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
    assert float((mine - theirs).detach().abs().max()) <= 2e-5 * scale


def both(path: Path) -> tuple[ours.pretrained.EsmModel, torch.nn.Module, Tensor]:
    model, alphabet = ours.pretrained.load_model_and_alphabet(str(path))
    theirs, their_alphabet = reference(path)
    batch = alphabet.get_batch_converter()(PROTEINS)
    expected = their_alphabet.get_batch_converter()(PROTEINS)
    assert batch[:2] == tuple(expected[:2])
    assert torch.equal(batch[2], expected[2])
    return model.eval(), theirs, batch[2]


@pytest.mark.parametrize("name", NAMES)
def test_gives_what_fair_esm_gives(files: dict[str, Path], name: str) -> None:
    model, theirs, tokens = both(files[name])
    options = {"repr_layers": range(4), "need_head_weights": True, "return_contacts": "1v" not in name}
    with torch.no_grad():
        mine, expected = model(tokens, **options), theirs(tokens, **options)
    assert mine.keys() == expected.keys()
    assert list(mine["representations"]) == list(expected["representations"])
    present = tokens != model.padding_idx
    assert not present.all()
    pairs = [(mine["logits"], expected["logits"])]
    pairs += [(mine["representations"][layer], expected["representations"][layer]) for layer in range(4)]
    for mine_rows, their_rows in pairs:
        assert mine_rows.shape == their_rows.shape
        check(mine_rows[present], their_rows[present])
        assert not mine_rows[~present].any()
    # fair-esm computes these rows too; they depend on what else is in the batch.
    assert expected["representations"][2][~present].abs().max() > 0.01
    for key in mine.keys() - {"logits", "representations"}:
        check(mine[key], expected[key])


@pytest.mark.parametrize("name", NAMES)
def test_options_and_positions_of_arguments(files: dict[str, Path], name: str) -> None:
    model, theirs, tokens = both(files[name])
    with torch.inference_mode():
        for arguments in ([], [[3]], [[-0, 1], True], [{2}, False]):
            mine, expected = model(tokens, *arguments), theirs(tokens, *arguments)
            assert mine.keys() == expected.keys()
            assert mine["representations"].keys() == expected["representations"].keys()
        if "1v" not in name:
            check(model.predict_contacts(tokens), theirs.predict_contacts(tokens))
            attentions = theirs(tokens, need_head_weights=True)["attentions"]
            check(model.contact_head(tokens, attentions), theirs.contact_head(tokens, attentions))


@pytest.mark.parametrize("name", NAMES)
def test_attributes_that_scripts_read(files: dict[str, Path], name: str) -> None:
    model, theirs, _ = both(files[name])
    kind = ours.ESM2 if name.startswith("esm2") else ours.ProteinBertModel
    assert type(model) is kind
    assert not isinstance(model, ours.MSATransformer)
    shared = ["num_layers", "alphabet_size", "padding_idx", "mask_idx", "cls_idx", "eos_idx", "prepend_bos"]
    own = ["embed_dim", "attention_heads", "token_dropout"] if name.startswith("esm2") else ["model_version"]
    for attribute in [*shared, "append_eos", *own]:
        assert getattr(model, attribute) == getattr(theirs, attribute)
    if not name.startswith("esm2"):
        for setting in ("arch", "layers", "embed_dim", "ffn_embed_dim", "attention_heads", "max_positions"):
            if setting != "max_positions" or name != "esm1_tiny":
                assert getattr(model.args, setting) == getattr(theirs.args, setting)
    assert len(model.layers) == len(theirs.layers)
    assert model.embed_tokens.weight.shape == theirs.embed_tokens.weight.shape
    assert model.embed_scale == theirs.embed_scale
    if name != "esm1_tiny":  # the class that made this file puts a setting into it that only ESM-1b has
        assert bool(getattr(model, "emb_layer_norm_before", None)) == (name == "esm1b_tiny")
        assert hasattr(model, "emb_layer_norm_before") == hasattr(theirs, "emb_layer_norm_before")
    for attribute in ("embed_dim", "ffn_embed_dim", "attention_heads", "use_rotary_embeddings"):
        assert getattr(model.layers[1], attribute) == getattr(theirs.layers[1], attribute)
    for attribute in ("embed_dim", "num_heads", "head_dim", "scaling"):
        assert getattr(model.layers[1].self_attn, attribute) == getattr(theirs.layers[1].self_attn, attribute)
    # Scripts cut the list of parameters, choose them by name, and optimizers number them.
    lists = [
        [(key, value.shape) for key, value in one.named_parameters() if "1v" not in name or "contact" not in key]
        for one in (model, theirs)
    ]
    assert lists[0] == lists[1]


def test_parameters_that_are_replaced_take_effect(files: dict[str, Path]) -> None:
    """Those of ESM-1's attention too, which Protea's layers hold themselves."""
    model, theirs, tokens = both(files["esm1_tiny"])
    before = model(tokens)["logits"]
    for one in (model, theirs):
        one.layers[1].self_attn.bias_v = torch.nn.Parameter(one.layers[1].self_attn.bias_v.detach() + 5)
    after = model(tokens)["logits"]
    assert not torch.allclose(after, before)
    check(after[tokens != 1], theirs(tokens)["logits"][tokens != 1])
    changed = {key: value + 1 if key.endswith("bias_v") else value for key, value in model.named_parameters()}
    again = torch.func.functional_call(model, changed, (tokens,))["logits"]
    check(again[tokens != 1], torch.func.functional_call(theirs, changed, (tokens,))["logits"][tokens != 1])
    assert torch.equal(model(tokens)["logits"], after)


def test_types_under_autocast(files: dict[str, Path]) -> None:
    model, theirs, tokens = both(files["esm2_tiny"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, expected = model(tokens, [0, 3]), theirs(tokens, [0, 3])
    assert mine["logits"].dtype == expected["logits"].dtype
    for layer, states in expected["representations"].items():
        assert mine["representations"][layer].dtype == states.dtype


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_both_ways(files: dict[str, Path], name: str) -> None:
    model, theirs, tokens = both(files[name])
    expected = theirs.state_dict()
    if "1v" in name:  # the head that fair-esm fills with noise
        expected = {key: value for key, value in expected.items() if "contact_head" not in key}
    mine = model.state_dict()
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        if "_float_tensor" not in key:
            assert torch.equal(mine[key], value), key
    before = model(tokens)["logits"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert not torch.equal(model(tokens)["logits"], before)
    model.load_state_dict(expected)
    assert torch.equal(model(tokens)["logits"], before)
    theirs.load_state_dict(mine, strict="1v" not in name)
    inside = torch.nn.ModuleDict({"esm": model, "head": torch.nn.Linear(2, 2)})
    assert {f"esm.{key}" for key in expected} <= inside.state_dict().keys()
    inside.load_state_dict(inside.state_dict())
    if "1v" in name:
        with pytest.warns(protea.ProteaWarning, match="no contact head"):
            model.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_fair_esms(files: dict[str, Path], name: str) -> None:
    model, theirs, tokens = both(files[name])
    present = tokens != model.padding_idx
    contacts = "1v" not in name
    for one in (model.train(), theirs.train()):
        result = one(tokens, repr_layers=[2, 3], return_contacts=contacts)
        loss = result["representations"][2][present].pow(2).sum() + result["representations"][3][present].sin().sum()
        loss = loss + result["logits"][present].logsumexp(-1).sum()
        (loss + result["contacts"].sum() if contacts else loss).backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in model.named_parameters():
        gradient = expected[key]
        assert parameter.grad is not None
        assert gradient is not None
        scale = max(1.0, float(gradient.abs().max()))
        # Corrected maps sum to 0, so that little is left of what their weights' gradients add up.
        most = 3e-4 if "contact_head" in key else 5e-5
        assert float((parameter.grad - gradient).abs().max()) <= most * scale, key


@pytest.mark.parametrize("name", NAMES)
def test_padding_among_the_tokens(files: dict[str, Path], name: str) -> None:
    """Some scripts write ``<pad>`` behind a sequence, so that it comes before ``<eos>``, or pad on the left."""
    model, theirs, _ = both(files[name])
    convert = model.alphabet.get_batch_converter()
    texts = [("a", "MKTAYIAK<pad><pad><pad>"), ("b", "MKTAYIAKQRG"), ("c", "<pad><pad>MKTAY<pad>IAKQ")]
    _, _, tokens = convert(texts)
    if not model.append_eos:
        tokens = torch.cat((tokens, torch.full((3, 1), model.cls_idx)), 1)
    present = tokens != model.padding_idx
    with torch.no_grad():
        mine = model(tokens, repr_layers=[3], return_contacts="1v" not in name)
        expected = theirs(tokens, repr_layers=[3], return_contacts="1v" not in name)
    check(mine["representations"][3][present], expected["representations"][3][present])
    if "1v" not in name:
        check(mine["attentions"], expected["attentions"])
        check(mine["contacts"], expected["contacts"])


@pytest.mark.parametrize("name", NAMES)
def test_narrow_types_copies_and_pickles(files: dict[str, Path], name: str) -> None:
    model, _, tokens = both(files[name])
    before = model(tokens, [3])
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (twin, again):
        assert torch.equal(one(tokens)["logits"], before["logits"])
    with torch.no_grad():
        twin.embed_tokens.weight.zero_()
        assert torch.equal(model(tokens)["logits"], before["logits"])
        for dtype in (torch.float16, torch.bfloat16):
            again = again.to(dtype)
            narrow = again(tokens, [3], need_head_weights=True)
            assert {narrow["logits"].dtype, narrow["attentions"].dtype, narrow["representations"][3].dtype} == {dtype}
            torch.testing.assert_close(narrow["logits"].float(), before["logits"], rtol=0.1, atol=0.3)


def test_parts_that_scripts_replace(files: dict[str, Path]) -> None:
    model, theirs, tokens = both(files["esm2_tiny"])
    present = tokens != model.padding_idx
    with torch.no_grad():
        states = model(tokens, [3])["representations"][3]
        check(model.lm_head(states)[present], theirs.lm_head(states)[present])
        check(model.embed_tokens(tokens), theirs.embed_tokens(tokens))
        for one in (model, theirs):
            one.layers = one.layers[:2]
        check(model(tokens, [2])["representations"][2][present], theirs(tokens, [2])["representations"][2][present])
        for one in (model, theirs):
            one.lm_head = torch.nn.Identity()
            one.emb_layer_norm_after = torch.nn.Identity()
        check(model(tokens)["logits"][present], theirs(tokens)["logits"][present])


def test_training_changes_the_model_and_not_the_file(files: dict[str, Path]) -> None:
    path = files["esm2_tiny"]
    before = path.read_bytes()
    model, _, tokens = both(path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers.2"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens)["logits"].transpose(1, 2), tokens, ignore_index=1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert path.read_bytes() == before


def test_content_of_torch_load(files: dict[str, Path]) -> None:
    for name, path in files.items():
        content = torch.load(path, weights_only=False)
        regression = path.with_name(f"{path.stem}-contact-regression.pt")
        head = torch.load(regression, weights_only=False) if regression.exists() else None
        model, _ = ours.pretrained.load_model_and_alphabet_core(name, content, head)
        again, _ = ours.pretrained.load_model_and_alphabet_local(path)
        assert (head is None) == ("1v" in name)
        for key, value in again.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
    with pytest.raises(UsageError, match="name first"):
        ours.pretrained.load_model_and_alphabet_core(content, None)  # type: ignore[arg-type]
    with pytest.raises(protea.ProteaError, match="model_data"):
        ours.pretrained.load_model_and_alphabet_core("esm2_x", {"weights": 1})


def test_random_models_follow_the_seed() -> None:
    def made(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours.ESM2(num_layers=2, embed_dim=40, attention_heads=5).layers[1].fc1.weight

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    shapes = {key: value.shape for key, value in esm.ESM2(2, 40, 5).state_dict().items()}
    assert {key: value.shape for key, value in ours.ESM2(2, 40, 5).state_dict().items()} == shapes


def test_any_checkpoint_of_fair_esms_families(model_folders: dict[str, Path]) -> None:
    for name in ("esm2", "esm2nv", "esm1b", "esm1"):
        model, _ = ours.pretrained.load_model_and_alphabet(str(model_folders[name]))
        assert model(torch.tensor([[0, 5, 6, 2]]))["logits"].shape == (1, 4, len(model.alphabet))
    with pytest.raises(CapabilityError, match="fair-esm has no ESM-1nv"):
        ours.pretrained.load_model_and_alphabet(str(model_folders["esm1nv"]))


def test_adapters_of_peft(files: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    model, _, tokens = both(files["esm2_tiny"])
    before = model(tokens)["logits"].detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    out = adapted(tokens, repr_layers=[3])
    torch.testing.assert_close(out["logits"], before, rtol=0, atol=1e-5)
    out["representations"][3].sum().backward()
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(learned) == 12
    assert all(parameter.grad is not None for parameter in learned)
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(0.3)
    assert not torch.allclose(adapted(tokens)["logits"], before)


def test_a_class_of_ones_own() -> None:
    class Classifier(ours.ESM2):
        def __init__(self) -> None:
            super().__init__(num_layers=2, embed_dim=40, attention_heads=5)
            self.extra = torch.nn.Linear(40, 3)

        def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
            return self.extra(super().forward(tokens, repr_layers=[2])["representations"][2])

    model = Classifier().to(torch.float64)
    assert model(torch.tensor([[0, 5, 6, 2]])).dtype == torch.float64
    assert {"extra.weight", "layers.1.fc1.weight"} <= model.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == 40 * 3 + 3 + sum(
        p.numel() for p in esm.ESM2(2, 40, 5).parameters()
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_mistakes_are_named(files: dict[str, Path]) -> None:
    model, _, tokens = both(files["esm2_tiny"])
    learned, _, _ = both(files["esm1v_tiny"])
    with pytest.raises(UsageError, match=r"repr_layers=\[33\].*0 .*to 3"):
        model(tokens, repr_layers=[33])
    with pytest.raises(UsageError, match=r"\[B, T\]"):
        model(tokens[0])
    with pytest.raises(UsageError, match="are list"):
        model(tokens.tolist())  # type: ignore[arg-type]
    with pytest.raises(CapabilityError, match="trace"):
        torch.jit.trace(model, (tokens,), strict=False)
    with pytest.raises(UsageError, match="id 77"):
        model(tokens + 77 - tokens.max())
    with pytest.raises(UsageError, match=r"row 1 .*padding"):
        model(torch.tensor([[0, 2], [1, 1]]))
    with pytest.raises(SequenceTooLongError, match="1,022"):
        learned(torch.full((1, 1025), 5))
    for call in (learned.predict_contacts, lambda tokens: learned(tokens, return_contacts=True)):
        with pytest.raises(CapabilityError, match="contacts"):
            call(tokens)
    with pytest.raises(CapabilityError, match=r"model\.layers"):
        model.layers[0](torch.zeros(4, 1, 40), self_attn_padding_mask=None)
    if not torch.cuda.is_available():
        moves = (model.cuda, lambda: model.to("cuda"), lambda: model.to(0), lambda: model.to(device="cuda:0"))
        for move in moves:
            with pytest.raises(DeviceError, match="cuda"):
                move()
