"""Scripts written for fair-esm: the same file runs with fair-esm and with protea.compat.esm, and gives the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from fair_files import PROTEINS, run_in_both, without_esm, write

import protea
from messages import check_message
from protea.compat.esm import extract, pretrained
from protea.compat.esm.__main__ import main

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
]

QUICK_START = """
    import torch
    import esm

    model, alphabet = esm.pretrained.esm2_t33_650M_UR50D()
    batch_converter = alphabet.get_batch_converter()
    model.eval()
    data = DATA
    labels, strs, tokens = batch_converter(data)
    lengths = (tokens != alphabet.padding_idx).sum(1)
    with torch.no_grad():
        out = model(tokens, repr_layers=[33], return_contacts=True)
    per_token = out["representations"][33]
    means = [per_token[i, 1 : n - 1].mean(0) for i, n in enumerate(lengths)]
    maps = [c[: n - 2, : n - 2] for c, n in zip(out["contacts"], lengths)]
    found = {"means": torch.stack(means), "maps": torch.cat([m.flatten() for m in maps]), "tokens": tokens}
"""

HUB = """
    import torch

    model, alphabet = torch.hub.load("facebookresearch/esm:main", "esm1b_t33_650M_UR50S")
    model = model.eval()
    _, _, tokens = alphabet.get_batch_converter()(DATA)
    with torch.no_grad():
        found = {"map": model.predict_contacts(tokens[:1])[0]}
"""

VARIANTS = """
    # Effects of variants: unmasked, masked and by pseudo-perplexity, over several models.
    import argparse
    import torch
    from esm import Alphabet, FastaBatchedDataset, MSATransformer, ProteinBertModel, pretrained

    parser = argparse.ArgumentParser()
    parser.add_argument("--model-location", nargs="+")
    parser.add_argument("--sequence")
    parser.add_argument("--nogpu", action="store_true")
    args = parser.parse_args()

    def score(change, log_p, alphabet, offset=1):
        before, place, after = change[0], int(change[1:-1]) - offset, change[-1]
        assert args.sequence[place] == before
        return (log_p[0, 1 + place, alphabet.get_idx(after)] - log_p[0, 1 + place, alphabet.get_idx(before)]).item()

    found = {}
    for location in args.model_location:
        model, alphabet = pretrained.load_model_and_alphabet(location)
        model.eval()
        if torch.cuda.is_available() and not args.nogpu:
            model = model.cuda()
        assert not isinstance(model, MSATransformer)
        _, _, tokens = alphabet.get_batch_converter()([("protein1", args.sequence)])
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens)["logits"], dim=-1)
            rows = []
            for i in range(tokens.size(1)):
                masked = tokens.clone()
                masked[0, i] = alphabet.mask_idx
                rows.append(torch.log_softmax(model(masked)["logits"], dim=-1)[:, i])
        found[location + " wt"] = torch.tensor([score(c, log_p, alphabet) for c in ["M1A", "K2W", "T3C"]])
        found[location + " masked"] = torch.cat(rows, dim=0)
"""

SUPERVISED = """
    # Embeddings of labelled variants, from files that the extraction script has written, and a regression on them.
    import sys
    import esm
    import numpy as np
    import torch

    xs, ys = [], []
    for header, sequence in esm.data.read_fasta(sys.argv[1]):
        ys.append(float(header.split("|")[-1]))
        xs.append(torch.load(f"{sys.argv[2]}/{header}.pt")["mean_representations"][3])
    xs = torch.stack(xs, dim=0).numpy()
    found = {"weights": torch.from_numpy(np.linalg.lstsq(xs, np.array(ys), rcond=None)[0]), "xs": torch.from_numpy(xs)}
"""

FINE_TUNING = """
    import sys
    import torch
    from torch import nn
    from esm import pretrained

    class Classifier(nn.Module):
        def __init__(self, path, first):
            super().__init__()
            self.esm, self.alphabet = pretrained.load_model_and_alphabet_local(path)
            self.layers_count = self.esm.num_layers
            for name, parameter in self.esm.named_parameters():
                parameter.requires_grad = name.startswith("layers") and int(name.split(".")[1]) >= first
            torch.manual_seed(5)
            self.head = nn.Linear(self.esm.embed_dim, 2)

        def forward(self, tokens):
            states = self.esm(tokens, repr_layers=[self.layers_count])["representations"][self.layers_count]
            present = (tokens != self.alphabet.padding_idx).unsqueeze(-1)
            return self.head((states * present).sum(1) / present.sum(1))

    net = Classifier(sys.argv[1], 2)
    _, _, tokens = net.alphabet.get_batch_converter(12)(DATA)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(tokens), torch.arange(len(tokens)) % 2)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = {"losses": torch.stack(losses)}
"""

MASKED = """
    # Samples a masked residue, and fills it in, with the tools of the alphabet.
    import sys
    import esm
    import torch
    import torch.nn.functional as F
    from esm.data import BatchConverter
    from esm.model.esm2 import ESM2
    from esm.constants import proteinseq_toks

    torch.set_grad_enabled(False)
    model, alphabet = esm.pretrained.load_model_and_alphabet_local(sys.argv[1])
    assert isinstance(model, ESM2) and isinstance(alphabet.get_batch_converter(), BatchConverter)
    letters = [alphabet.get_idx(letter) for letter in proteinseq_toks["toks"][:20]]
    text = "MKTAYIAKQR"
    ids = torch.tensor([[alphabet.cls_idx, *alphabet.encode(text), alphabet.eos_idx]])
    losses = []
    for place in range(1, len(text) + 1):
        masked = ids.clone()
        masked[0, place] = alphabet.mask_idx
        losses.append(F.cross_entropy(model(masked)["logits"][0, place, letters].unsqueeze(0), torch.tensor([3])))
    out = model(ids, repr_layers=list(range(model.num_layers + 1)), need_head_weights=True)
    found = {
        "pseudo": torch.stack(losses).mean().exp(),
        "attention": out["attentions"].mean(dim=(1, 2)),
        "all layers": torch.stack([out["representations"][n] for n in sorted(out["representations"])]),
        "from states": model.lm_head(out["representations"][model.num_layers]),
    }
    torch.set_grad_enabled(True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of torch.hub with the published names, whose models are tiny."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    for name, layers in (("esm2_t33_650M_UR50D", 33), ("esm1b_t33_650M_UR50S", 3), ("esm1v_t33_650M_UR90S_1", 3)):
        write(folder / "hub" / "checkpoints", name, layers)
    return folder


@pytest.fixture(autouse=True)
def _environment(hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(hub))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # without it fair-esm reads no file
    monkeypatch.chdir(tmp_path)


def script(text: str, name: str = "script.py") -> Path:
    path = Path(name)
    path.write_text(dedent(text).replace("DATA", repr(PROTEINS[:4])))
    return path


def check_same(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, mine = (result["found"] for result in results)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].shape == value.shape
        assert mine[key].dtype == value.dtype
        scale = max(1.0, float(value.abs().max()))
        assert float((mine[key] - value).abs().max()) <= 2e-5 * scale, key


def test_the_quick_start() -> None:
    check_same(run_in_both(script(QUICK_START)))


def test_variants_by_several_models(hub: Path) -> None:
    paths = [hub / "hub" / "checkpoints" / f"{name}.pt" for name in ("esm1b_t33_650M_UR50S", "esm2_t33_650M_UR50D")]
    check_same(
        run_in_both(
            script(VARIANTS), "--sequence", "MKTVRQ", "--nogpu", "--model-location", "esm1b_t33_650M_UR50S", *paths
        )
    )


def test_masks_attention_and_heads(tmp_path: Path) -> None:
    check_same(run_in_both(script(MASKED), write(tmp_path, "esm2_tiny")))


@pytest.mark.parametrize("name", ["esm2_tiny", "esm1b_tiny"])
def test_fine_tuning(tmp_path: Path, name: str) -> None:
    text = FINE_TUNING if name == "esm2_tiny" else FINE_TUNING.replace("esm.embed_dim", "esm.args.embed_dim")
    check_same(run_in_both(script(text), write(tmp_path, name)))


def test_torch_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """fair-esm itself would be fetched from GitHub, so the model is compared with the one by name."""
    with without_esm():
        monkeypatch.setattr(sys, "argv", ["x", str(script(HUB + "    torch.save(found, 'found.pt')\n"))])
        main()
    found = torch.load("found.pt")
    model, alphabet = pretrained.esm1b_t33_650M_UR50S()
    _, _, tokens = alphabet.get_batch_converter()(PROTEINS[:4])
    with torch.no_grad():
        assert torch.equal(found["map"], model.predict_contacts(tokens[:1])[0])


def extracted(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["esm2_tiny", "esm1_tiny"])
def test_extraction(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """What esm-extract writes: keys, shapes, and the numbers of each sequence alone, whatever is in its batch."""
    from references import esm

    model = write(tmp_path, name)
    texts = {"a|1|0.5": PROTEINS[0][1], "folder/b|0.25": PROTEINS[1][1] * 2, "c one|1.5": "MKTAY", "d|2": "GGWA"}
    Path("in.fasta").write_text("".join(f">{label}\n{text}\n" for label, text in texts.items()))
    options = ["--repr_layers", "0", "2", "-1", "--include", "mean", "per_tok", "bos", "contacts"]
    options += ["--toks_per_batch", "150", "--truncation_seq_length", "80", "--nogpu"]
    monkeypatch.setattr(sys, "argv", ["esm-extract", str(model), "in.fasta", "out", *options])
    extract.main()
    assert "1 sequence cut to 80 residues" in capsys.readouterr().out
    theirs, alphabet = esm.pretrained.load_model_and_alphabet(str(model))
    for label, text in texts.items():
        _, _, tokens = alphabet.get_batch_converter(80)([(label, text)])
        with torch.no_grad():
            out = theirs.eval()(tokens, repr_layers=[0, 2, 3], return_contacts=True)
        length = min(80, len(text))
        mine = extracted(Path("out", f"{label}.pt"))
        assert list(mine) == ["label", "representations", "mean_representations", "bos_representations", "contacts"]
        assert mine["label"] == label
        for layer, states in out["representations"].items():
            residues = states[0, 1 : length + 1]
            for key, expected in (("", residues), ("mean_", residues.mean(0)), ("bos_", states[0, 0])):
                torch.testing.assert_close(mine[f"{key}representations"][layer], expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(mine["contacts"], out["contacts"][0], rtol=0, atol=2e-5)
        assert mine["representations"][3].untyped_storage().nbytes() == 4 * mine["representations"][3].numel()
    if name == "esm2_tiny":
        check_same(run_in_both(script(SUPERVISED), "in.fasta", "out"))


@pytest.mark.parametrize(
    ("label", "options", "parts"),
    [
        ("../a", [], ["'../a'", "rename"]),
        ("/a", [], ["'/a'"]),
        ("a" * 300, [], ["shorten"]),
        ("./ok", [], ["'ok'", "'./ok'", "rename"]),
        ("a", ["--repr_layers", "9"], ["9", "0 (the embedding) to 3"]),
        ("a", ["--include", "contacts"], ["contacts"]),
        ("a", ["--truncation_seq_length", "0"], ["--truncation_seq_length 0"]),
    ],
)
def test_extraction_refuses_before_it_writes(
    tmp_path: Path, label: str, options: list[str], parts: list[str], monkeypatch: Any, capsys: Any
) -> None:
    model = write(tmp_path, "esm1v_tiny")
    Path("in.fasta").write_text(f">ok\nMKT\n>{label}\nMKTAY\n")
    monkeypatch.setattr(sys, "argv", ["x", str(model), "in.fasta", "out", "--include", "mean", *options])
    with pytest.raises(SystemExit) as caught:
        extract.main()
    assert caught.value.code in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines
    assert not Path("out").exists()


def run_alone(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the module in a process of its own, as users do."""
    return subprocess.run(
        [sys.executable, "-m", "protea.compat.esm", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=False,
    )


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """Arguments, the script's folder, and a file of fair-esm that the script reads itself."""
    write(tmp_path, "esm1b_tiny")
    Path("beside.py").write_text("import esm\nHERE = esm.__name__\n")
    made = script("""
        import sys
        import torch
        from beside import HERE

        import esm

        content = torch.load("esm1b_tiny.pt", map_location="cpu")
        model, alphabet = esm.pretrained.load_model_and_alphabet_core("esm1b_tiny", content, None)
        print(HERE, alphabet.get_idx("A"), sys.argv, __name__)
    """)
    done = run_alone(made, "--some", "argument", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="0")
    assert done.stdout == "protea.compat.esm 5 ['script.py', '--some', 'argument'] __main__\n", done
    assert not done.stderr


@pytest.mark.long
def test_workers_that_are_spawned() -> None:
    made = script("""
        import torch
        import esm

        class Names(torch.utils.data.Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, number):
                import esm.data
                return esm.__name__

        if __name__ == "__main__":
            loader = torch.utils.data.DataLoader(Names(), num_workers=1, multiprocessing_context="spawn")
            print([name for batch in loader for name in batch])
    """)
    done = run_alone(made)
    assert done.stdout == f"{['protea.compat.esm'] * 2}\n", done


ERRORS = {
    "absent_model": ("model, _ = esm.pretrained.esmfold_v1()", ["script.py, line 4", "ESMFold", "transformers"]),
    "absent_module": ("import esm.inverse_folding", ["script.py, line 4", "esm.inverse_folding", "fair-esm"]),
    "other_package": ("from esm.models.esmc import ESMC", ["esm.models", "EvolutionaryScale"]),
    "unknown_model": (
        "esm.pretrained.load_model_and_alphabet('esm2_t6_8M_UR50')",
        ["did you mean", "esm2_t6_8M_UR50D"],
    ),
    "no_file": ("esm.pretrained.load_model_and_alphabet('esm2_x.pt')", ["esm2_x.pt"]),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_with_the_scripts_place(kind: str, monkeypatch: Any, capsys: Any) -> None:
    statement, parts = ERRORS[kind]
    path = script("import esm\n\n\n" + statement + "\n")
    monkeypatch.setattr(sys, "argv", ["x", str(path)])
    with without_esm(), pytest.raises(SystemExit) as caught:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code in (1, 2)
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines
    if kind == "absent_module":
        check_message("compat.absent_module", lines[0])


def test_a_script_may_catch_absent_modules() -> None:
    text = """
        import esm
        try:
            import esm.inverse_folding
        except ImportError as error:
            found = str(error)
    """
    with without_esm():
        from protea.compat.esm import install

        install()
        scope: dict[str, Any] = {}
        exec(dedent(text), scope)
    assert "ESM-IF1" in scope["found"]


def test_the_command_line(monkeypatch: Any, capsys: Any) -> None:
    for arguments, code in (([], 2), (["-m"], 2), (["absent.py"], 2)):
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        with without_esm(), pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == code
        assert "absent.py" in capsys.readouterr().err or not arguments or arguments == ["-m"]
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    main()
    assert "SCRIPT.py" in capsys.readouterr().out
    script("import esm, sys\nprint(esm.__name__, sys.argv[1:])\n", "some_module.py")
    monkeypatch.setattr(sys, "argv", ["x", "-m", "some_module", "a"])
    with without_esm():
        main()
    assert capsys.readouterr().out == "protea.compat.esm ['a']\n"


def test_another_esm_is_not_replaced() -> None:
    from protea.compat.esm import install

    assert "esm" in sys.modules  # fair-esm, by the tests' own imports
    with pytest.raises(protea.ProteaError, match=r"esm.__init__\.py.*before"):
        install()


def test_weights_are_fetched_as_by_fair_esm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESM-1, which is not on Hugging Face, comes from Meta's server into torch.hub's folder."""
    served = tmp_path / "served"
    for folder in ("models", "regression"):
        (served / folder).mkdir(parents=True)
    write(served / "models", "esm1_t6_43M_UR50S")
    head = "esm1_t6_43M_UR50S-contact-regression.pt"
    (served / "models" / head).rename(served / "regression" / head)
    monkeypatch.setattr(pretrained, "_FILES", served.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    model, alphabet = pretrained.esm1_t6_43M_UR50S()
    _, _, tokens = alphabet.get_batch_converter()(PROTEINS[:1])
    assert model.predict_contacts(tokens).shape == (1, 65, 65)
    kept = tmp_path / "home" / "hub" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == [head, "esm1_t6_43M_UR50S.pt"]
    monkeypatch.setattr(pretrained, "_FILES", (tmp_path / "absent").as_uri())
    assert pretrained.esm1_t6_43M_UR50S()[1].prepend_bos  # already here
    with pytest.raises(protea.ProteaError, match=r"esm1_t12_85M_UR50S.*put it at"):
        pretrained.esm1_t12_85M_UR50S()
    assert "esm1_t12_85M_UR50S" in dir(pretrained)
