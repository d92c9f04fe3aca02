"""The one way to disk: outputs appear whole or not at all, with what lies beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from messages import check_message
from protea.errors import OutputError, ProteaWarning
from protea.letters import ReportRow
from protea.output import check_output, check_space, report_path, run_path, staged, write_report, write_run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_all(target: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with staged(target, overwrite=overwrite) as place:
        place.write_text(text)
        write_report(place, [ReportRow("p1", "altered", "two\twords\x1b")])
        write_run(place, {"model": "m"})


def test_an_output_appears_with_its_report_and_run_file(tmp_path: Path) -> None:
    target = tmp_path / "made" / "out.tsv"
    write_all(target)
    assert names(target.parent) == {"out.tsv", "out.tsv.report.tsv", "out.tsv.run.yaml"}
    assert report_path(target).read_text() == "id\twhat\tdetail\np1\taltered\ttwo\\twords\\x1b\n"
    assert run_path(target).read_text() == "model: m\n"


def test_an_existing_output_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "out.tsv"
    write_all(target, "old")
    with pytest.raises(OutputError, match=r"out\.tsv"):
        write_all(target)
    assert target.read_text() == "old"
    write_all(target, "new", overwrite=True)
    assert target.read_text() == "new"
    assert len(names(tmp_path)) == 3


def test_a_folder_without_permission_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protea.output.os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "out.tsv", overwrite=True)
    check_message("output.permission", caught.value, tmp=tmp_path)


@pytest.mark.parametrize("beside", [report_path, run_path])
def test_a_file_beside_the_output_is_not_replaced_either(tmp_path: Path, beside: object) -> None:
    target = tmp_path / "out.tsv"
    path = beside(target)  # type: ignore[operator]
    path.write_text("the user's own")
    with pytest.raises(OutputError, match=path.name):
        write_all(target)
    assert names(tmp_path) == {path.name}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "new" / "out.tsv"

    def fail() -> None:
        with staged(target) as place:
            place.write_text("half")
            raise error

    with pytest.raises(OutputError if error is OSError else error):
        fail()
    assert names(tmp_path) == set()


def test_a_folder_replaces_an_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with staged(target) as place:
        place.mkdir()
        (place / "config.json").write_text("{}")
    assert names(target) == {"config.json"}
    with pytest.raises(OutputError, match="model"), staged(target):
        pass


@pytest.mark.parametrize("make", ["file", "folder", "dangling"])
def test_what_exists_is_refused_before_the_work(tmp_path: Path, make: str) -> None:
    path = tmp_path / "out.h5"
    {"file": path.touch, "folder": path.mkdir, "dangling": lambda: path.symlink_to("nowhere")}[make]()
    with pytest.raises(OutputError, match=r"out\.h5") as caught:
        check_output(path)
    check_message(f"output.exists-{make}", caught.value, tmp=tmp_path)
    if make == "folder":
        with pytest.raises(OutputError, match=r"out\.h5"):
            check_output(path, overwrite=True)
    else:
        check_output(path, overwrite=True)


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(OutputError, match="photos") as caught:
        check_output(folder, overwrite=True, ours=lambda path: (path / "protea.json").exists())
    check_message("output.foreign-folder", caught.value, tmp=tmp_path)


@pytest.mark.parametrize(
    ("name", "key"), [("absent/out.h5", "output.no-folder"), ("x" * 250, "output.long-name"), ("..", "output.no-name")]
)
def test_impossible_places(tmp_path: Path, name: str, key: str) -> None:
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / name)
    check_message(key, caught.value, tmp=tmp_path)


def test_space_is_summed_over_the_outputs_of_a_disk(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    check_space({tmp_path / "a": free // 4, tmp_path / "b": free // 4}, "free some")
    with pytest.raises(OutputError, match=r"a: .* free some"):
        check_space({tmp_path / "a": free, tmp_path / "b": free}, "free some")


def test_a_name_of_255_bytes_can_be_staged(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 127)
    with staged(target) as place:
        place.write_text("x")
    assert target.read_text() == "x"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with staged(target, overwrite=True) as place:
            place.mkdir()
            (place / text).touch()
    assert names(target) == {"new"}
    assert names(tmp_path) == {"model"}


HOLD = """
import sys
from pathlib import Path
from protea.output import staged
with staged(Path(sys.argv[1])) as place:
    place.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_aside_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out.tsv"
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        (aside,) = tmp_path.iterdir()
        write_all(target)  # beside a living process; nothing of it is removed
        assert (aside / "out.tsv").read_text() == "half"
        writer.kill()
    assert aside.exists()
    with pytest.warns(ProteaWarning, match=aside.name) as caught:
        write_all(target, "again", overwrite=True)
    check_message("output.removed-aside", str(caught[0].message), tmp=tmp_path)
    assert names(tmp_path) == {"out.tsv", "out.tsv.report.tsv", "out.tsv.run.yaml"}


@pytest.mark.parametrize(
    "part", [".m.nemo.model_weights.ckpt", "m-contact-regression.pt", ".m.nemo.run.yaml.unfinished"]
)
def test_parts_with_other_names_are_removed_too(tmp_path: Path, part: str) -> None:
    aside = tmp_path / ".m.nemo.1"
    aside.mkdir()
    (aside / part).touch()
    with pytest.warns(ProteaWarning, match=aside.name):
        write_all(tmp_path / "m.nemo")
    assert not aside.exists()


def test_a_hidden_folder_of_the_users_is_never_removed(tmp_path: Path) -> None:
    own = tmp_path / ".out.tsv.1"
    own.mkdir()
    (own / "thesis.txt").touch()
    write_all(tmp_path / "out.tsv")
    assert names(own) == {"thesis.txt"}
