import shutil
import sys

import pytest

import warm
from tools.ui.pages import LONG, Server, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(folder, accelerator):
    server = Server(sys.executable if accelerator == "gpu" else warm.python(), folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium (Debian, Ubuntu: apt install chromium)")
    with playwright.sync_playwright() as started:
        playwright.expect.set_options(timeout=LONG)
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=LONG)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, server):
    """Open the address that was printed, as a browser of its own would; errors of the page's programs fail the test."""
    problems, contexts = [], []

    def opened(width=1200):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        contexts[-1].set_default_timeout(LONG)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        assert "key" not in page.url
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems
