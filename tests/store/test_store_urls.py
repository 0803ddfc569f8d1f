"""Pictures at URLs: fetched once, and listed with the reason when they cannot be."""

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import tiny


@pytest.fixture
def serve():
    """`serve({path: bytes})` gives the address of a server that has these, and a list of what it was asked for."""
    running = []

    def start(files):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                asked.append(self.path)
                if self.path not in files:
                    return self.send_error(404)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(files[self.path])

            def log_message(self, *arguments):
                pass

        running.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}", asked

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def png():
    file = io.BytesIO()
    tiny.pictures(1)[0].save(file, "PNG")
    return file.getvalue()


def test_picture_at_a_url_is_added_and_not_fetched_again(store, serve, png):
    address, asked = serve({"/a.png": png})
    assert store.add(f"{address}/a.png").added == 1
    assert store.add([f"{address}/a.png"]).skipped == 1
    assert asked == ["/a.png"]
    [hit] = store.search(tiny.pictures(1)[0], 1)
    assert hit["source"] == f"{address}/a.png" and hit["score"] == pytest.approx(1, abs=2e-3)


def test_url_that_is_not_there_fails_with_its_reason(store, serve, png):
    address, _ = serve({"/a.png": png, "/b.png": b"text"})
    report = store.add([f"{address}/{name}.png" for name in ("none", "a", "b")])
    assert report.added == len(store) == 1
    failed = dict(report.failed)
    assert "404" in failed[f"{address}/none.png"]
    assert "no picture in a format" in failed[f"{address}/b.png"]


def test_url_where_nobody_answers_fails_alone(store, serve, png):
    address, _ = serve({"/a.png": png})
    report = store.add(["http://127.0.0.1:9/x.png", f"{address}/a.png"])
    assert report.added == 1
    [(source, reason)] = report.failed
    assert source == "http://127.0.0.1:9/x.png" and reason
