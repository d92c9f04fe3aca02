"""What is in a picture, read without the code that draws: PNG by its header, SVG as XML, pages by their JSON."""

from __future__ import annotations

import base64
import io
import json
import struct
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
from numpy.typing import NDArray

AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
"""In the order of the models' alphabet."""

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def pixels(data: bytes | Path) -> NDArray[np.uint8]:
    """``[height, width, 3]``."""
    image = matplotlib.image.imread(io.BytesIO(data) if isinstance(data, bytes) else data, format="png")
    return np.round(image[..., :3] * 255).astype(np.uint8)


@dataclass
class Svg:
    """Texts and images of a drawing, in its order."""

    texts: list[str]
    images: list[NDArray[np.uint8]]


def read_svg(path: Path) -> Svg:
    root = ElementTree.fromstring(path.read_bytes())
    assert root.tag == f"{SVG}svg"
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    coded = [image.attrib[HREF].partition("base64,")[2] for image in root.iter(f"{SVG}image")]
    return Svg(texts, [pixels(base64.b64decode(one)) for one in coded])


@dataclass
class Page:
    """What a page shows, and what it says of itself."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    title: str

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [trace for trace in self.traces if trace["type"] == kind]


class _Parser(HTMLParser):
    """Collects texts of elements, and refuses whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.inside = ""
        self.scripts: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.scripts += [value for name, value in attrs if name == "src"]
            attrs = [(name, value) for name, value in attrs if name != "src"]
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}, tag
        for name, value in attrs:
            assert name not in {"src", "href", "srcset", "data", "poster", "action"}, (tag, name, value)
            assert "url(" not in (value or ""), (tag, name, value)
        self.inside = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.inside, []).append(data)


def read_page(path: Path, script: str | None = None) -> Page:
    """The content of a page, which has its own plotly.js, or that of the file ``script`` beside it."""
    text = path.read_text(encoding="utf-8")
    parser = _Parser()
    parser.feed(text)
    assert not any("@import" in style or "http" in style for style in parser.texts.get("style", ()))
    assert parser.scripts == ([] if script is None else [script])
    code = parser.texts["script"] if script is None else [(path.parent / script).read_text(encoding="utf-8")]
    assert any("plotly.js v" in part for part in code)
    call = [part for part in parser.texts["script"] if part.strip()][-1]
    decoder, place, found = json.JSONDecoder(), call.index("Plotly.newPlot(") + len("Plotly.newPlot("), []
    for _ in range(3):
        while call[place] in " \n,":
            place += 1
        value, place = decoder.raw_decode(call, place)
        found.append(value)
    assert found[0] == "picture"
    return Page(found[1], found[2], parser.texts["title"][0])


def array(value: Any) -> NDArray[Any]:
    """Numbers as plotly writes them: base64 with a type, or a list."""
    if not isinstance(value, dict):
        return np.array(value, dtype=float)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    return flat.reshape([int(size) for size in value["shape"].split(",")]) if "shape" in value else flat
