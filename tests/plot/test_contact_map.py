"""Maps of contacts: every cell has its colour and its number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from numpy.typing import NDArray
from pictures import array, pixels, png_size, read_page, read_svg

from protea.errors import UsageError
from protea.plot import contact_map
from protea.plot.contact_maps import _cells

TRUE = (0xD5, 0x5E, 0x00)
GREY = (0xB3, 0xB3, 0xB3)
WHITE = (255, 255, 255)


def some(length: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    values = generator.random((length, length), dtype=np.float32)
    truth = generator.random((length, length)) < 0.2
    return (values + values.T) * np.float32(0.5), truth | truth.T


def blue(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray(colormaps["Blues"](values, bytes=True))[..., :3]


@pytest.mark.parametrize("length", [1, 2, 10, 131])
def test_every_cell(length: int, tmp_path: Path) -> None:
    probabilities, truth = some(length)
    missing = np.arange(length) == 5
    contact_map(tmp_path / "p.svg", probabilities, truth=truth, missing=missing, title="", offset=7)
    svg = read_svg(tmp_path / "p.svg")
    picture = svg.images[0]
    assert picture.shape == (length, length, 3)
    expected = blue(probabilities)
    for row in range(length):
        for column in range(row):
            known = TRUE if truth[row, column] else WHITE
            expected[row, column] = GREY if missing[row] or missing[column] else known
    np.testing.assert_array_equal(picture, expected)
    assert {"residue", "predicted probability", "true contact, below", "predicted, above the diagonal"} <= set(
        svg.texts
    )
    assert ("not in the structure" in svg.texts) == (length > 5)
    ticks = {int(text) for text in svg.texts if text.isdecimal()}
    assert ticks
    assert all(7 <= tick < 7 + length for tick in ticks)


def test_without_truth(tmp_path: Path) -> None:
    probabilities, _ = some(12)
    probabilities[3, 9:] = np.nan
    contact_map(tmp_path / "p.svg", probabilities, title="")
    svg = read_svg(tmp_path / "p.svg")
    expected = blue(probabilities)
    expected[3, 9:] = GREY
    np.testing.assert_array_equal(svg.images[0], expected)
    assert "not predicted" in svg.texts
    assert "true contact, below" not in svg.texts


def test_whole_numbers(tmp_path: Path) -> None:
    contact_map(tmp_path / "p.svg", np.eye(3, dtype=int), title="")
    np.testing.assert_array_equal(read_svg(tmp_path / "p.svg").images[0], blue(np.eye(3, dtype=np.float32)))


def test_pixels(tmp_path: Path) -> None:
    """As many pixels for every cell, and enough for few of them."""
    probabilities, truth = some(10)
    contact_map(tmp_path / "p.png", probabilities, truth=truth, title="x")
    width, height = png_size(tmp_path / "p.png")
    assert 1200 < width < 2000
    assert 1200 < height < 2000
    found = (pixels(tmp_path / "p.png") == TRUE).all(-1).sum()
    contacts = np.tril(truth, -1).sum()
    assert contacts * 119**2 < found < contacts * 121**2 + 30**2


def test_page(tmp_path: Path) -> None:
    probabilities, truth = some(9)
    probabilities[2, 3] = np.nan
    missing = np.arange(9) == 0
    contact_map(tmp_path / "p.html", probabilities, truth=truth, missing=missing, title="", offset=-3)
    page = read_page(tmp_path / "p.html")
    predicted, true = page.of_type("heatmap")
    np.testing.assert_array_equal(array(predicted["z"]), probabilities)
    assert (predicted["x0"], predicted["dx"], predicted["zmin"], predicted["zmax"]) == (-3, 1, 0, 1)
    assert predicted["hovertemplate"].startswith("residues %{y:d} and %{x:d}<br>predicted probability %{z")
    kinds = array(true["z"])
    assert (kinds[np.triu_indices(9)] == 0).all()
    lower = np.tril_indices(9, -1)
    expected = np.where(truth, 1, 2)
    expected[0] = expected[:, 0] = 3
    np.testing.assert_array_equal(kinds[lower], expected[lower])
    assert page.layout["xaxis"]["range"] == [-3.5, 5.5]
    assert page.layout["yaxis"]["range"] == [5.5, -3.5]
    names = [trace["name"] for trace in page.of_type("scatter")]
    assert names == ["predicted, above the diagonal", "true contact, below", "not predicted or not in the structure"]


def test_colours_of_the_true_half(tmp_path: Path) -> None:
    """The steps of the scale are where the kinds are."""
    contact_map(tmp_path / "p.html", np.eye(3), truth=np.ones((3, 3), bool), title="")
    _, true = read_page(tmp_path / "p.html").of_type("heatmap")
    low, high = true["zmin"], true["zmax"]
    for kind, colour in enumerate(("rgba(0,0,0,0)", "#D55E00", "#FFFFFF", "#B3B3B3")):
        place = (kind - low) / (high - low)
        below = [step for step in true["colorscale"] if step[0] < place][-1]
        above = next(step for step in true["colorscale"] if step[0] > place)
        assert below[1] == above[1] == colour


def test_long_proteins(tmp_path: Path) -> None:
    """Squares of residues, and the picture says so; a lone contact is still there."""
    probabilities = np.zeros((2402, 2402), np.float32)
    probabilities[70, 2401] = probabilities[2401, 70] = 0.8
    truth = probabilities > 0.5
    contact_map(tmp_path / "p.svg", probabilities, truth=truth, title="")
    svg = read_svg(tmp_path / "p.svg")
    assert svg.images[0].shape == (1201, 1201, 3)
    assert tuple(svg.images[0][1200, 35]) == TRUE
    np.testing.assert_array_equal(svg.images[0][35, 1200], blue(np.array(0.8)))
    assert "predicted probability, the highest of 2 by 2 residues" in svg.texts
    contact_map(tmp_path / "p.html", probabilities[:2001, :2001], title="", offset=1)
    page = read_page(tmp_path / "p.html")
    (trace,) = page.of_type("heatmap")
    assert (trace["x0"], trace["dx"], array(trace["z"]).shape) == (1.5, 2, (1001, 1001))
    assert trace["hovertemplate"].startswith("2 by 2 residues around")
    assert page.layout["xaxis"]["range"] == [0.5, 2001.5]


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_squares(length: int, most: int, seed: int) -> None:
    probabilities, truth = some(length, seed)
    probabilities[np.random.default_rng(seed).random((length, length)) < 0.3] = np.nan
    missing = np.random.default_rng(seed).random(length) < 0.5
    cells = _cells(probabilities, truth, missing, 1, most)
    assert cells.truth is not None
    count = len(cells.probabilities)
    assert count <= most
    for row in range(count):
        for column in range(count):
            rows, columns = (np.arange(length)[one * cells.block :][: cells.block] for one in (row, column))
            inside = probabilities[np.ix_(rows, columns)]
            known = inside[~np.isnan(inside)]
            np.testing.assert_equal(cells.probabilities[row, column], known.max() if known.size else np.nan)
            if column >= row:
                assert cells.truth[row, column] == 0
            elif missing[rows].all() or missing[columns].all():
                assert cells.truth[row, column] == 3
            else:
                assert cells.truth[row, column] == (1 if truth[np.ix_(rows, columns)].any() else 2)


@pytest.mark.parametrize(
    ("probabilities", "options", "message"),
    [
        (np.zeros((2, 3)), {}, r"probabilities: shape \[2, 3\], expected \[2, 2\]"),
        (np.zeros((0, 0)), {}, "probabilities: nothing to draw"),
        (np.zeros(4), {}, r"probabilities: shape \[4\]"),
        (np.array([[0, 1.5], [0, 0]]), {}, r"probabilities: 1.5 at \[0, 1\]; expected 0 to 1, or NaN"),
        (np.array([[0, 0], [-np.inf, 0]]), {}, r"probabilities: -inf at \[1, 0\]"),
        (np.eye(2), {"truth": np.ones((3, 3), bool)}, r"truth: shape \[3, 3\], expected \[2, 2\]"),
        (np.eye(2), {"missing": np.ones(2, bool)}, "missing: .* truth"),
        (np.eye(2), {"truth": np.eye(2) > 0, "missing": np.ones(3, bool)}, r"missing: shape \[3\], expected \[2\]"),
    ],
)
def test_refusals(
    probabilities: NDArray[np.float64], options: dict[str, NDArray[np.bool_]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        contact_map(tmp_path / "p.png", probabilities, **options, title="")
    assert not list(tmp_path.iterdir())
