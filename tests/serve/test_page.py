"""The page and the documentation of the routes: without a network, and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from serving import Running


def test_pages_need_no_network(server: Running) -> None:
    for path in ("/", "/docs", "/page.js", "/docs.js"):
        answer = server.ask("GET", path)
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(rb"https?://", answer.body)
    described = server.ask("GET", "/openapi.json").json
    for path in ("/v1/embed", "/v1/residues", "/v1/logits", "/v1/score", "/v1/scan", "/v1/contacts", "/v1/perplexity"):
        assert "requestBody" in described["paths"][path]["post"]
    assert described["components"]["schemas"]["EmbedBody"]["properties"]["sequences"]["examples"]


@pytest.mark.long
def test_the_page_in_a_browser(server: Running, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium is None:
        pytest.skip("chromium is not installed")
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(accept_downloads=True)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{server.url}/")
        page.fill("#fasta", ">a\nMKTAYIAKQR\n>b\nMK\n")
        page.click("button[type=submit]")
        page.wait_for_selector("#answer:not([hidden])")
        assert page.locator("#table tr").count() == 3
        assert "/v1/embed" in page.inner_text("#curl")
        assert page.inner_text("#command") == "protea embed proteins.fasta -m protea-mini -o vectors.parquet"
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "answer.json")
        assert [row["id"] for row in json.loads((tmp_path / "answer.json").read_text())["records"]] == ["a", "b"]
        page.fill("#fasta", "MK1")
        page.click("button[type=submit]")
        page.wait_for_selector("#status.error")
        assert "1 at 3" in page.inner_text("#status")
        page.goto(f"{server.url}/docs")
        page.wait_for_selector("details")
        assert page.locator("details").count() > 20
        browser.close()
    assert {url for url in asked if not url.startswith((server.url, "blob:"))} == set()
