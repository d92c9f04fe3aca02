"""Names, folders, Hugging Face's cache, and servers on this machine that fail; no network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

import protea
from conftest import CONFIGS
from messages import check_message
from protea.checkpoints.hub import architecture, find_local, locate, published, published_models
from protea.checkpoints.summary import describe, listing
from protea.errors import CheckpointError, UnknownModelError


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def put_into_cache(cache: Path, repository: str, folder: Path) -> None:
    """As ``snapshot_download`` lays it out."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))


LICENCES = {
    "MIT",
    "Apache-2.0",
    "AFL-3.0",
    "CC-BY-4.0 (not verified)",
    "LicenseRef-Cambrian-Open",
    "LicenseRef-Cambrian-Non-Commercial",
}
FORMATS = {"hf", "te", "nemo", "nemo2", "fair-esm", "sequence-models", "evolutionaryscale"}


def test_the_table() -> None:
    assert len(published_models()) == 44
    for name, known in published_models().items():
        assert known.name == name
        assert known.licence in (LICENCES if known.place else {""})
        assert bool(known.restriction) == (known.licence == "LicenseRef-Cambrian-Non-Commercial")
        assert known.format in (FORMATS if known.place else {""})
        assert not known.place or known.format in type(architecture(known)).stored
        assert known.sha256 == "" or re.fullmatch("[0-9a-f]{64}", known.sha256)
        assert known.contact_head == name.startswith(("esm2_", "esm1b_", "esm1_", "protea-mini"))
        assert "contacts" in architecture(known).capabilities or not known.contact_head
    rows = {row["name"]: row for row in listing()}
    assert rows["esm2_t33_650M_UR50D"]["parameters"] == 651_043_254
    assert rows["esm2nv_20B"]["place"] == "not published; architecture only"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("esm2_t6_8M", "esm2_t6_8M_UR50D"),
        ("ESM1NV", "esm1nv"),
        ("facebook/esm2_t30_150M", "esm2_t30_150M_UR50D"),
        ("facebook/esm2_t6_8M_UR50", "esm2_t6_8M_UR50D"),
        ("esm2", "esm2_t6_8M_UR50D"),
    ],
)
def test_near_names_are_offered(name: str, near: str) -> None:
    for find in (published, locate, describe):
        with pytest.raises(UnknownModelError, match=f"'{name}'.*{near}.*info --list"):
            find(name)


MEANT = {
    "esm2_650M": "esm2_t33_650M_UR50D, nvidia/esm2_t33_650M_UR50D",
    "esm2-8m": "esm2_t6_8M_UR50D, nvidia/esm2_t6_8M_UR50D",
    "ESM-2 8M": "esm2_t6_8M_UR50D, nvidia/esm2_t6_8M_UR50D",
    "esm28m": "esm2_t6_8M_UR50D, nvidia/esm2_t6_8M_UR50D",
    "esm_2_35M": "esm2_t12_35M_UR50D, nvidia/esm2_t12_35M_UR50D",
    "esm_150m": "esm2_t30_150M_UR50D, nvidia/esm2_t30_150M_UR50D",
    "esm2_t33": "esm2_t33_650M_UR50D, nvidia/esm2_t33_650M_UR50D",
    "t30": "esm2_t30_150M_UR50D, nvidia/esm2_t30_150M_UR50D",
    "650M": "esm2_t33_650M_UR50D, esm1b_t33_650M_UR50S, esm1v_t33_650M_UR90S_1",
    "15b": "esm2_t48_15B_UR50D, esm2nv_15B, nvidia/esm2_t48_15B_UR50D",
    "esm2_t36_3B": "esm2_t36_3B_UR50D, nvidia/esm2_t36_3B_UR50D",
    "esm2_t33_650M_UR50S": "esm2_t33_650M_UR50D, nvidia/esm2_t33_650M_UR50D",
    "esm2_t33_630M_UR50D": "esm2_t33_650M_UR50D, nvidia/esm2_t33_650M_UR50D",
    "ems2_t33_650M_UR50D": "esm2_t33_650M_UR50D, esm1b_t33_650M_UR50S, esm1v_t33_650M_UR90S_1",
    "esm1v": "esm1v_t33_650M_UR90S_1, esm1v_t33_650M_UR90S_2, esm1v_t33_650M_UR90S_3",
    "ESM-1v": "esm1v_t33_650M_UR90S_1, esm1v_t33_650M_UR90S_2, esm1v_t33_650M_UR90S_3",
    "esm1v_t33_650M_UR90S": "esm1v_t33_650M_UR90S_1, esm1v_t33_650M_UR90S_2, esm1v_t33_650M_UR90S_3",
    "esm-1b": "esm1b_t33_650M_UR50S",
    "esm1b_t33_650M_UR50D": "esm1b_t33_650M_UR50S",
    "ESM1NV": "esm1nv",
    "esm2nv-3b": "esm2nv_3B, esm2nv3b:2.0, esm2nv3b:2.1",
    "protea_mini": "protea-mini",
}


@pytest.mark.parametrize("name", MEANT)
def test_near_names_have_the_size_and_the_family_that_were_meant(name: str) -> None:
    with pytest.raises(UnknownModelError, match=f"did you mean {re.escape(MEANT[name])}\\?"):
        published(name)


def test_a_name_like_no_other() -> None:
    with pytest.raises(UnknownModelError) as caught:
        protea.load("zzz")
    check_message("checkpoints.unknown-model", caught.value)


@pytest.mark.parametrize("find", [locate, describe])
def test_no_name_is_not_the_current_folder(model_folders: dict[str, Path], find: Callable[[str], object]) -> None:
    shutil.copytree(model_folders["esm2"], ".", dirs_exist_ok=True)
    with pytest.raises(UnknownModelError, match="''"):
        find("")


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "facebook/esm2_t6_8M_UR50D"])
def test_without_network_the_files_and_their_place_are_named(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    check_message("checkpoints.no-network", re.sub(r"\(.*?\)", "({reason})", str(caught.value), count=1))


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "facebook/esm2_t6_8M_UR50D", "someone/finetuned"])
def test_the_advice_works(model_folders: dict[str, Path], name: str) -> None:
    """Files put where the message says are found by the same name."""
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    advised = re.search(r"into a folder (\S+)/ here", str(caught.value))
    assert advised
    shutil.copytree(model_folders["esm2"], advised[1])
    assert protea.load(name, device="cpu").config == CONFIGS["esm2"]
    assert describe(name)["weights"] == advised[1]


# --- a network that fails ----------------------------------------------------------------------------------------


asked: list[str] = []


class Server(BaseHTTPRequestHandler):
    """Answers as its path's first part says: nothing, a web page, a model whose files break off, or a whole one."""

    folder = Path()

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        _, failure, *path = self.path.split("/")
        asked.append(self.path)
        self.close_connection = True
        if failure == "wait":
            time.sleep(60)
        elif failure == "page":
            self.reply(b"<html>Log in to use this network</html>")
        elif failure == "whole" and "resolve" in path:
            self.reply((self.folder / path[-1]).read_bytes())
        elif failure == "whole" and "tree" in path:
            files = [
                {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": one.name} for one in self.files()
            ]
            self.reply(json.dumps(files).encode())
        elif failure == "whole":
            siblings = [{"rfilename": one.name} for one in self.files()]
            self.reply(json.dumps({"id": "a/b", "sha": "0" * 40, "siblings": siblings}).encode())
        elif failure == "break" and "tree" in path:
            self.reply(json.dumps([{"type": "file", "path": "config.json", "size": 1000, "oid": "1"}]).encode())
        elif failure == "break" and "api" in path:
            self.reply(json.dumps({"id": "a/b", "sha": "0" * 40, "siblings": [{"rfilename": "config.json"}]}).encode())
        elif failure == "break":
            self.reply(b"{", length=1000)

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def reply(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("ETag", f'"{self.path.rsplit("/", 1)[-1]}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        pytest.param("silence", "disconnected", marks=pytest.mark.long),
        pytest.param("page", "Expecting value", marks=pytest.mark.long),
        ("break", "received 1 bytes, expected 1000"),
    ],
)
def test_a_network_that_fails(tmp_path: Path, failure: str, reason: str) -> None:
    with serving() as address:
        settings = {"HF_ENDPOINT": f"{address}/{failure}", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        code = "from protea.checkpoints.hub import locate; locate('someone/model')"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("protea.errors.CheckpointError: someone/model ")
    assert reason in last


def test_a_network_that_does_not_answer(tmp_path: Path) -> None:
    """One message after one try, not a wait without end; the commands tell nothing else."""
    asked.clear()
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n")
    with serving() as address:
        settings = {"HF_ENDPOINT": f"{address}/wait", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        code = (
            "from protea.checkpoints import hub; from protea.cli import main; import sys\n"
            "hub.SECONDS = 0.5; sys.argv[1:] = 'embed in.fasta -m esm2_t6_8M_UR50D -o out.h5'.split(); main()"
        )
        command = [sys.executable, "-c", code]
        environment = os.environ | settings
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    check_message(
        "checkpoints.no-network", re.sub(r"\(.*?\)", "({reason})", done.stderr.removeprefix("protea: error: "), count=1)
    )
    assert "timed out" in done.stderr
    assert sum("models" in path for path in asked) == 1


def test_forbidden_networks_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(HF_HUB_OFFLINE forbids it\)"):
        locate("esm2_t6_8M_UR50D")


def test_the_cache_serves_where_the_network_is_gone(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    put_into_cache(tmp_path / "hub", "someone/model", model_folders["esm2"])
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    code = "import protea; print(protea.load('someone/model', device='cpu').config.hidden_size)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    assert (done.stdout, done.stderr) == ("40\n", "")


def test_a_repository_of_pickles_alone(
    tmp_path: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the largest ESM-2 were published: fetched when there is no safetensors file, and read without running them."""
    import torch
    from safetensors.torch import load_file

    served = tmp_path / "served"
    served.mkdir()
    shutil.copy(model_folders["esm2"] / "config.json", served)
    torch.save(load_file(model_folders["esm2"] / "model.safetensors"), served / "pytorch_model.bin")
    (served / "tf_model.h5").write_bytes(b"not wanted")
    monkeypatch.setattr(Server, "folder", served)
    with serving() as address:
        settings = {"HF_ENDPOINT": f"{address}/whole", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        code = "import protea; print(protea.load('someone/model', device='cpu').files)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" in done.stdout
    assert not list((tmp_path / "home").rglob("tf_model.h5"))


# --- names and paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "facebook/esm2_t6_8M_UR50D", "someone/finetuned"])
def test_the_cache_is_used(offline: Path, model_folders: dict[str, Path], name: str) -> None:
    repository = name if "/" in name else f"facebook/{name}"
    put_into_cache(offline, repository, model_folders["esm2"])
    model = protea.load(name, device="cpu")
    assert model.config == CONFIGS["esm2"]
    assert model.name == name
    assert describe(name)["sha256"]


def test_esm1v_comes_without_the_random_contact_head_of_its_conversion(
    offline: Path, model_folders: dict[str, Path]
) -> None:
    put_into_cache(offline, "facebook/esm1v_t33_650M_UR90S_1", model_folders["esm1v"])
    assert "contacts" not in protea.load("esm1v_t33_650M_UR90S_1", device="cpu").capabilities
    assert "contacts" in protea.load(model_folders["esm1v"], device="cpu").capabilities


def test_a_cached_configuration_alone_is_no_model(offline: Path, model_folders: dict[str, Path]) -> None:
    put_into_cache(offline, "someone/unfinished", model_folders["esm2"])
    for weights in offline.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(CheckpointError) as caught:
        find_local("someone/unfinished")
    check_message("checkpoints.not-in-cache", caught.value)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        protea.load("someone/unfinished")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_stands_for_its_folder(model_folders: dict[str, Path], name: str) -> None:
    assert locate(model_folders["esm2"] / name) == model_folders["esm2"]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "esm1nv.nemo"
    path.write_bytes(b"nothing of a model")
    assert locate(path) == path
    with pytest.raises(CheckpointError) as caught:
        protea.load(path)
    check_message("checkpoints.no-checkpoint-file", caught.value, tmp=tmp_path)


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(CheckpointError) as caught:
        locate("./models/absent")
    check_message("checkpoints.no-folder", caught.value)


@pytest.mark.parametrize("find", [locate, describe])
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("models/esm2_finetune.pt", "models has esm2_finetuned.pt"),
        ("models/esm2_finetune", "models has esm2_finetuned.pt"),
        ("modles/esm2_finetuned.pt", "this folder has models"),
        ("esm2_finetuned.pt", "this folder has esm2_finetuned.ckpt"),
        ("./models/run/", "models has runs"),
        ("models/runs/one/best.ckpt", "models/runs has one.d"),
        ("MODELS/x.safetensors", "this folder has models"),
        ("models/runs/one/best.ckpt", "there is no folder models/runs/one;"),
        ("absent/deep/x.pt", "there is no folder absent;"),
        ("models/x.pt", "no such folder or file; check the path"),
        ("models/esm2_t6_8M_UR50D.pt", "no such folder or file; models has"),
        ("esm2_t6_8M_UR50D.pt", "esm2_t6_8M_UR50D is the published model"),
    ],
)
def test_mistyped_paths(tmp_path: Path, find: Callable[[str], object], name: str, near: str) -> None:
    (tmp_path / "models" / "runs" / "one.d").mkdir(parents=True)
    for path in ("models/esm2_finetuned.pt", "models/other.txt", "esm2_finetuned.ckpt"):
        (tmp_path / path).write_text("")
    with pytest.raises(CheckpointError, match=re.escape(near)) as caught:
        find(name)
    assert str(caught.value).startswith(name)
    assert "info --list" not in str(caught.value) or not Path(name).suffix
    assert Path(name).suffix == "" or "no such folder or file" in str(caught.value)


def test_the_message_for_a_mistyped_path(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "best.pt").write_text("")
    with pytest.raises(CheckpointError) as caught:
        locate("models/bets.pt")
    check_message("checkpoints.mistyped-path", caught.value)


@pytest.mark.parametrize("name", ["a/b--c", "a..b/c", "a/b.", "a/b.git", f"a/{'b' * 120}", "ä/b"])
def test_what_can_be_neither_a_repository_nor_a_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: .*`protea info --list`"):
        locate(name)
    with pytest.raises(CheckpointError, match=f"{name}: "):
        describe(name)


def test_a_mistyped_path_that_looks_like_a_repository(tmp_path: Path) -> None:
    (tmp_path / "proteins.fa").write_text("")
    with pytest.raises(CheckpointError, match=r"proteins\.fa/x "):
        locate("proteins.fa/x")


@pytest.mark.parametrize("find", [locate, describe])
def test_paths_that_cannot_be_looked_at(tmp_path: Path, find: Callable[[str], object]) -> None:
    with pytest.raises(CheckpointError, match=r"xxx: .*File name too long"):
        find("x" * 300)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"loop/model: "):
        find(f"{tmp_path}/loop/model")
    (tmp_path / "locked").mkdir(mode=0)
    if not os.access(tmp_path / "locked", os.R_OK):
        with pytest.raises(CheckpointError, match=r"model.safetensors: .*Permission denied"):
            find("locked/model.safetensors")


def test_weights_published_in_other_formats_or_not_at_all() -> None:
    for name, key in (("esm1nv", "needs-account"), ("esm2nv_20B", "not-published")):
        with pytest.raises(CheckpointError) as caught:
            locate(name)
        check_message(f"checkpoints.{key}", caught.value)


def test_description_of_a_folder(model_folders: dict[str, Path]) -> None:
    folder = model_folders["esm1nv"]
    description = describe(str(folder))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert description["sha256"] == {"model.safetensors": digest}
    assert description["family"] == "ESM-1nv"
    assert description["residue_limit"] == description["trained_residues"] == 510
    assert description["stored_as"] == ["F32"]
    memory = description["memory_bytes"]
    assert memory["bfloat16"] == 2 * description["parameters"] < memory["bf16-mixed"] < memory["float32"]
    assert description["capabilities"] == ["attention", "logits"]


def test_description_of_a_name_downloads_nothing() -> None:
    description = describe("esm2_t48_15B_UR50D")
    assert description["parameters"] == 15_129_100_194
    assert description["residue_limit"] is None
    assert description["trained_residues"] == 1022
    assert description["licence"] == "MIT"
    assert "sha256" not in description
