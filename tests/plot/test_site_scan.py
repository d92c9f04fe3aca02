"""Scans of substitutions: every score is where its residue and its letter are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import AMINO_ACIDS, array, png_size, read_page, read_svg

from protea.errors import UsageError
from protea.plot import single_site_scan

ORDER = "AVILMFWYSTNQKRHDECGP"
GREY = (0xB3, 0xB3, 0xB3)


def some(length: int, seed: int = 0) -> tuple[str, NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    sequence = "".join(generator.choice(list(AMINO_ACIDS), length))
    scores = generator.normal(-2, 3, (length, 20)).astype(np.float32)
    for row, letter in zip(scores, sequence, strict=True):
        row[AMINO_ACIDS.index(letter)] = 0
    return sequence, scores


@pytest.mark.parametrize("length", [1, 80, 81, 170])
def test_drawing(length: int, tmp_path: Path) -> None:
    sequence, scores = some(length)
    single_site_scan(tmp_path / "p.svg", scores, sequence=sequence, letters=AMINO_ACIDS, title="", offset=9)
    svg = read_svg(tmp_path / "p.svg")
    rows = -(-length // 80)
    panels = svg.images[:rows]
    assert all(panel.shape[0] == 20 for panel in panels)
    picture = np.concatenate(panels, axis=1).astype(int)
    assert picture.shape == (20, length, 3)
    # Red where negative, blue where positive, of equal strength.
    warmth = picture[..., 0] - picture[..., 2]
    shown = scores[:, [AMINO_ACIDS.index(letter) for letter in ORDER]].T
    assert (warmth[shown < -0.5] > 0).all()
    assert (warmth[shown > 0.5] < 0).all()
    # The first residues' letters, every row's axis, and its groups.
    texts = svg.texts
    assert [text for text in texts if len(text) == 1 and text.isalpha()].count("W") == sequence.count("W") + rows
    assert texts.count("aromatic") == rows
    numbers = {int(text) for text in texts if text.isdecimal()}
    assert numbers & set(range(9, 9 + length))
    assert "log-likelihood ratio to the wild type" in texts
    assert "wild type" in texts
    assert "not scored" not in texts


def test_letters_are_in_order(tmp_path: Path) -> None:
    sequence, scores = some(3)
    single_site_scan(tmp_path / "p.svg", scores, sequence=sequence, letters=AMINO_ACIDS, title="")
    letters = "".join(text for text in read_svg(tmp_path / "p.svg").texts if len(text) == 1 and text.isalpha())
    assert ORDER in letters
    assert sequence in letters


def test_what_was_not_scored(tmp_path: Path) -> None:
    _, scores = some(5)
    scores[2] = np.nan
    scores[4, AMINO_ACIDS.index("W")] = np.nan
    single_site_scan(tmp_path / "p.svg", scores, sequence="MKTWX", letters=AMINO_ACIDS, title="")
    svg = read_svg(tmp_path / "p.svg")
    grey = (svg.images[0] == GREY).all(-1)
    expected = np.zeros((20, 5), bool)
    expected[:, 2] = True
    expected[ORDER.index("W"), 4] = True
    expected[ORDER.index("T"), 2] = False  # the wild type needs no score
    np.testing.assert_array_equal(grey, expected)
    assert "not scored" in svg.texts


def test_nothing_scored(tmp_path: Path) -> None:
    for kind in ("svg", "html"):
        path = tmp_path / f"p.{kind}"
        single_site_scan(path, np.full((1, 20), np.nan), sequence="X", letters=AMINO_ACIDS, title="")
    assert (read_svg(tmp_path / "p.svg").images[0] == GREY).all()


@pytest.mark.long
def test_size_of_a_long_protein(tmp_path: Path) -> None:
    """Cells stay as large, so that letters can be read; the picture grows downward."""
    widths, heights = [], []
    for length in (80, 200):
        sequence, scores = some(length)
        single_site_scan(tmp_path / "p.png", scores, sequence=sequence, letters=AMINO_ACIDS, title="")
        width, height = png_size(tmp_path / "p.png")
        widths.append(width)
        heights.append(height)
    assert widths[0] == widths[1]
    assert heights[1] - heights[0] == pytest.approx(2 * (20 * 0.14 + 0.6) * 150, abs=2)


def test_page(tmp_path: Path) -> None:
    sequence, scores = some(100)
    scores[50] = np.nan
    sequence = "X" + sequence[1:]
    single_site_scan(tmp_path / "p.html", scores, sequence=sequence, letters=AMINO_ACIDS, title="", offset=1)
    page = read_page(tmp_path / "p.html")
    first, second = page.of_type("heatmap")
    assert (first["x0"], second["x0"]) == (1, 81)
    found = np.concatenate([array(first["z"]), array(second["z"])], axis=1)
    shown = scores[:, [AMINO_ACIDS.index(letter) for letter in ORDER]].T.copy()
    shown[ORDER.index(sequence[50]), 50] = 0
    np.testing.assert_array_equal(found, shown)
    assert first["text"][ORDER.index("W")][0] == "X1W"
    assert second["text"][ORDER.index(sequence[80])][0] == f"{sequence[80]}81, wild type"
    dots = [trace for trace in page.of_type("scatter") if trace["mode"] == "markers" and len(trace["x"]) > 1]
    marked = {(x, ORDER[y]) for trace in dots for x, y in zip(trace["x"], trace["y"], strict=True)}
    assert marked == {(place, letter) for place, letter in enumerate(sequence, 1) if letter != "X"}
    written = "".join("".join(trace["text"]) for trace in page.of_type("scatter") if trace["mode"] == "text")
    assert written == sequence
    assert page.layout["yaxis"]["ticktext"] == list(ORDER)
    assert page.layout["coloraxis"]["cmin"] == -page.layout["coloraxis"]["cmax"]


def test_colours_are_symmetric(tmp_path: Path) -> None:
    scores = np.array([[-4.0, 2.0, 4.0, 0.0]])
    single_site_scan(tmp_path / "p.html", scores, sequence="D", letters="AVID", title="")
    axis = read_page(tmp_path / "p.html").layout["coloraxis"]
    assert (axis["cmin"], axis["cmax"]) == (-4, 4)
    scores = np.linspace(-1, 1, 8000).reshape(400, 20)
    scores[0, 0] = -500
    single_site_scan(tmp_path / "p.html", scores, sequence="X" * 400, letters=AMINO_ACIDS, title="")
    axis = read_page(tmp_path / "p.html").layout["coloraxis"]
    assert axis["cmax"] == -axis["cmin"] == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize("length", [20, 76, 400])
def test_one_extreme_residue_leaves_the_others_their_colours(length: int, tmp_path: Path) -> None:
    """As the methionine at the start, whose scores are several times those of the rest."""
    sequence, scores = some(length)
    sequence = "M" + sequence[1:]
    scores[0] = -40
    scores[0, AMINO_ACIDS.index("M")] = 0
    for kind in ("html", "svg"):
        single_site_scan(tmp_path / f"p.{kind}", scores, sequence=sequence, letters=AMINO_ACIDS, title="")
    page = read_page(tmp_path / "p.html")
    limit = page.layout["coloraxis"]["cmax"]
    sizes = np.sort(np.abs(scores[scores != 0]))
    assert np.abs(scores[1:]).max() / 2 < limit <= np.abs(scores[1:]).max()
    beyond = int((sizes > limit).sum())
    assert 19 <= beyond <= max(19, len(sizes) // 100)
    # The values themselves stay, and the legend tells.
    assert array(page.of_type("heatmap")[0]["z"]).min() == -40
    told = f"beyond ±{limit:.3g}: {beyond:,} of {19 * length:,} scores"
    assert told in {trace.get("name") for trace in page.traces}
    assert told in read_svg(tmp_path / "p.svg").texts


def test_very_long_proteins_have_longer_rows(tmp_path: Path) -> None:
    scores = np.zeros((3300, 2), np.float32)
    single_site_scan(tmp_path / "p.html", scores, sequence="AC" * 1650, letters="AC", title="")
    panels = read_page(tmp_path / "p.html").of_type("heatmap")
    assert len(panels) == 40
    assert sum(len(panel["text"][0]) for panel in panels) == 3300


@pytest.mark.parametrize(
    ("scores", "sequence", "message"),
    [
        (np.zeros((2, 20)), "MKT", r"scores: shape \[2, 20\], expected \[3, 20\]"),
        (np.zeros((3, 19)), "MKT", r"scores: shape \[3, 19\]"),
        (np.zeros((0, 20)), "", "scores: nothing to draw"),
        (np.full((3, 20), -np.inf), "MKT", "scores: M1L is infinite; pass NaN if unknown"),
    ],
)
def test_refusals(scores: NDArray[np.float64], sequence: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        single_site_scan(tmp_path / "p.png", scores, sequence=sequence, letters=AMINO_ACIDS, title="")
    assert not list(tmp_path.iterdir())
