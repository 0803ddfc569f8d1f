"""A running Space and a browser, both on this machine alone."""

import os
import shutil
import socket
import threading

import pytest

gradio_client = pytest.importorskip("gradio_client", reason="Gradio is not installed: make test-space")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/space/browser/" in item.nodeid:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def space(service):
    """A Space on the checkpoint inside the package, served by this process. Shared by the session."""
    from fwd2bot.space_app.serving import RunningSpace

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with RunningSpace(service, port=port) as running:  # Gradio's own choice could be that of another process
            yield running


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, run by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make test-space")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("the browser chromium was not found: apt-get install chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium has none of for root
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=sandbox)
        yield started
        started.close()


@pytest.fixture
def open_page(browser, space):
    """`open_page(width=…, dark=…)` opens the Space for a new visitor; an error of the page fails the test."""
    contexts, wrong = [], []

    def open_one(width=1000, height=900, dark=False, **options):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(space.url)
        page.wait_for_selector("#f2b-search")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def wait_to_compress(service, monkeypatch):
    """Pictures wait to be compressed until this is set."""
    compress, go = service.compress, threading.Event()

    def waits(images):
        assert go.wait(60)
        return compress(images)

    monkeypatch.setattr(service, "compress", waits)
    yield go
    go.set()
