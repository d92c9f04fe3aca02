"""Files of pictures: what is refused, what stays the same, what names do to them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import AMINO_ACIDS, png_size, read_page, read_svg

from messages import check_message
from protea.cli.contacts import picture_paths
from protea.errors import MissingExtraError, OutputError, UsageError
from protea.plot import check_place, contact_map, profile, share_script, single_site_scan
from protea.plot.pictures import clean_title, grouped, title_lines

Draw = Callable[..., None]

KINDS = ("png", "svg")
"""Whose bytes matplotlib makes."""

MAKERS = """
import numpy as np
from pathlib import Path
from protea.plot import contact_map, profile, single_site_scan

values = -np.arange(1, 61, dtype=np.float32).reshape(3, 20)
logs = values - np.log(np.exp(values).sum(1, keepdims=True))

def draw_contacts(path, title="a protein"):
    contact_map(Path(path), np.eye(3), truth=np.ones((3, 3), bool), title=title)

def draw_scan(path, title="a protein"):
    single_site_scan(Path(path), values, sequence="MKT", letters="LAGVSERTIDPKQNFYMHWC", title=title)

def draw_profile(path, title="a protein"):
    profile(Path(path), sequence="MKT", log_probabilities=logs, letters="LAGVSERTIDPKQNFYMHWC", title=title)
"""


def makers() -> list[Draw]:
    names: dict[str, Any] = {}
    exec(MAKERS, names)
    return [names[name] for name in ("draw_contacts", "draw_scan", "draw_profile")]


draws = pytest.mark.parametrize("draw", makers(), ids=lambda draw: draw.__name__)


@draws
def test_kinds(draw: Draw, tmp_path: Path) -> None:
    for kind in ("png", "svg", "html"):
        draw(tmp_path / f"p.{kind}")
    assert min(png_size(tmp_path / "p.png")) > 400
    assert "a protein" in read_svg(tmp_path / "p.svg").texts
    page = read_page(tmp_path / "p.html")
    assert page.title == page.layout["title"]["text"] == "a protein"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "p.png", "p.svg"]


def test_pages_share_a_script(tmp_path: Path) -> None:
    """One copy of plotly.js for a folder; pages elsewhere, and beside another version of it, have their own."""
    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder in (shared, other):
        folder.mkdir()
    share_script(shared)
    (other / "plotly.min.js").write_text("/* plotly.js v1.0 */")
    share_script(other)
    assert (other / "plotly.min.js").read_text() == "/* plotly.js v1.0 */"
    for number, draw in enumerate(makers()):
        draw(shared / f"{number}.html")
        draw(other / f"{number}.html")
        page, whole = read_page(shared / f"{number}.html", "plotly.min.js"), read_page(other / f"{number}.html")
        assert page == whole
    sizes = {path.name: path.stat().st_size for path in shared.iterdir()}
    script = sizes.pop("plotly.min.js")
    assert sum(sizes.values()) < script / 10


@draws
def test_same_bytes(draw: Draw, tmp_path: Path) -> None:
    """Whatever the user's settings of matplotlib, which stay as they are."""
    for kind in ("png", "svg", "html"):
        draw(tmp_path / f"one.{kind}")
        with matplotlib.rc_context({"font.size": 30, "image.cmap": "gray", "svg.fonttype": "path"}):
            draw(tmp_path / f"two.{kind}")
            assert matplotlib.rcParams["font.size"] == 30
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


@pytest.mark.long
def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    lines = [f"draw_{what}(r'{tmp_path}/{what}.{kind}')" for what in ("contacts", "scan", "profile") for kind in KINDS]
    quiet = "import sys; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", "\n".join([MAKERS, *lines, quiet])], check=True)
    for draw in makers():
        for kind in KINDS:
            path = tmp_path / f"{draw.__name__.removeprefix('draw_')}.{kind}"
            theirs = sha256(path.read_bytes()).hexdigest()
            draw(path)
            assert sha256(path.read_bytes()).hexdigest() == theirs


@draws
@pytest.mark.parametrize("name", ["p.pdf", "p", "p.PNG", ".png"])
def test_other_suffixes(draw: Draw, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        draw(tmp_path / name)
    check_message("plot.suffix", caught.value, path=tmp_path / name)


@draws
@pytest.mark.parametrize("kind", ["png", "svg", "html"])
def test_unwritable_places(draw: Draw, tmp_path: Path, kind: str) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*no; create it first"):
        draw(tmp_path / "no" / f"p.{kind}")
    (tmp_path / f"d.{kind}").mkdir()
    with pytest.raises(OutputError, match="is a folder; name a file"):
        draw(tmp_path / f"d.{kind}")
    with pytest.raises(OutputError, match="the name is too long"):
        draw(tmp_path / f"{'n' * 251}.{kind}")
    assert [path.name for path in tmp_path.iterdir()] == [f"d.{kind}"]


def test_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.svg"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"p\.svg: cannot be written: No space left"):
        contact_map(path, np.eye(2), title="")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("kind", "library"), [("png", "matplotlib.figure"), ("svg", "matplotlib.figure"), ("html", "plotly.graph_objects")]
)
@draws
def test_missing_library(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"protea\[plot\]") as caught:
        draw(tmp_path / f"p.{kind}")
    check_message(f"plot.missing_library.{kind}", caught.value, tmp=tmp_path, python=sys.executable)
    check_place(tmp_path / ("p.html" if kind != "html" else "p.png"))


@pytest.mark.parametrize(
    ("kind", "library"), [("png", "matplotlib.figure"), ("svg", "matplotlib.figure"), ("html", "plotly.graph_objects")]
)
def test_missing_library_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, library: str) -> None:
    """The message names what the command named, and no picture of its own invention."""
    for folder in (tmp_path / "new", Path(), tmp_path):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, library, None)
            with pytest.raises(MissingExtraError, match=rf"^{folder}: .*\.{kind} .*protea\[plot\]"):
                picture_paths(folder, ["one", "two"], kind=f".{kind}", overwrite=False)
        assert picture_paths(folder, ["one"], kind=f".{kind}", overwrite=False) == {"one": folder / f"one.{kind}"}


TITLES = {
    "<b>bold</b> & <script>alert(1)</script></title>": "<b>bold</b> & <script>alert(1)</script></title>",
    "costs $1 or $2, x_{1} \\alpha": "costs $1 or $2, x_{1} \\alpha",
    "a\x00b\x1bc\ud800d": "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}d",
    "two\n lines\t": "two lines",
    "蛋白 β-lactamase ]]> --> %{x}": "蛋白 β-lactamase ]]> --> %{x}",
    "": "",
}


@pytest.mark.parametrize("title", TITLES, ids=ascii)
def test_titles(tmp_path: Path, title: str) -> None:
    draw = makers()[2]
    for kind in ("svg", "html"):
        draw(tmp_path / f"p.{kind}", title)
    if title:
        assert TITLES[title] in read_svg(tmp_path / "p.svg").texts
    page = read_page(tmp_path / "p.html")
    escaped = TITLES[title].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert page.layout["title"]["text"] == escaped
    if title:
        assert page.title == TITLES[title]


@pytest.mark.parametrize("draw", makers()[:2], ids=["contacts", "scan"])
@pytest.mark.parametrize("title", ["W" * 300, "a long name, " * 23])
def test_long_titles(draw: Draw, tmp_path: Path, title: str) -> None:
    """Three lines at most, within the picture, and the rest is seen to be missing if it is."""
    draw(tmp_path / "p.png", title)
    draw(tmp_path / "p.svg", title)
    shown = "".join(text for text in read_svg(tmp_path / "p.svg").texts if text[:3] in {"WWW", "iii"} or "name" in text)
    assert shown.endswith("…") or len(shown.replace(" ", "")) == len(title.replace(" ", ""))
    assert title.replace(" ", "").startswith(shown.removesuffix("…").replace(" ", ""))
    edge = matplotlib.image.imread(tmp_path / "p.png")[:, -5:, :3]
    assert (edge == 1).all()


@given(st.text(), st.integers(10, 100))
def test_title_lines(title: str, width: int) -> None:
    lines = title_lines(title, width)
    assert len(lines) <= 3
    assert all(len(line) <= width for line in lines)
    assert all(line.isprintable() for line in lines)
    whole = clean_title(title).replace(" ", "")
    shown = "".join(lines).replace(" ", "")
    assert shown == whole or (len(lines) == 3 and shown[-1] == "…" and whole.startswith(shown[:-1]))


@given(st.permutations(AMINO_ACIDS + "XBZ*"), st.integers(1, 24))
def test_letters_by_chemistry(letters: list[str], count: int) -> None:
    groups = grouped(letters[:count])
    assert sorted(place for _, places in groups for place in places) == list(range(count))
    assert all(places for _, places in groups)
    found = {letters[place]: name for name, places in groups for place in places}
    for letter, name in {"A": "aliphatic", "W": "aromatic", "H": "positive", "D": "negative", "X": "other"}.items():
        assert found.get(letter, name) == name


@pytest.mark.parametrize(("letters", "message"), [("AA", "'A' is repeated"), (["A", "AB"], "'AB' is not one letter")])
def test_bad_letters(letters: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        single_site_scan(tmp_path / "p.png", np.zeros((1, 2)), sequence="A", letters=letters, title="")
    with pytest.raises(UsageError, match=message):
        profile(tmp_path / "p.png", log_probabilities=np.zeros((1, 2)), sequence="A", letters=letters, title="")
