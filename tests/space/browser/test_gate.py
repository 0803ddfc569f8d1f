"""What the web server refuses before it reads or fetches anything."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from test_serving import BOUNDARY, END, call, file_data, result

from fwd2bot.space_app.gate import Arrivals


def status(space, path, body=None, headers=None):
    try:
        with urlopen(Request(space.url + path, body, headers or {})) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


@pytest.fixture
def elsewhere():
    """The address of a picture on another server, and what that server was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.png", asked
        server.shutdown()


@pytest.mark.parametrize("name", ["search", "ask", "compress"])
def test_address_is_not_fetched_by_any_endpoint(space, elsewhere, monkeypatch, name):
    url, asked = elsewhere
    one = {**file_data(url), "url": url}
    data = {"search": [one, 4, 2], "ask": ["What?", [one], 0, 4, False, False], "compress": [one, 4]}[name]
    told = result(space, name, call(space, name, *data))
    assert asked == [] and "event: error" in told and "not from an address" in told


@pytest.mark.parametrize(
    "path",
    [
        "process_recording",
        "vibe-edit",
        "undo-vibe-edit",
        "component_server",
        "run-history/buckets",
        "monitoring",
        "profiling/summary",
        "file=/etc/passwd",
        "stream/1",
    ],
)
@pytest.mark.parametrize("prefix", ["", "gradio_api/"])
def test_what_the_page_does_not_need_is_closed(space, prefix, path):
    assert status(space, prefix + path) == 404
    assert status(space, prefix + path, b"{}", {"Content-Type": "application/json"}) == 404


def test_what_the_page_needs_is_open(space):
    for path in ("", "config", "theme.css", "gradio_api/info", "gradio_api/startup-events"):
        assert status(space, path) == 200, path


def test_upload_in_chunks_is_refused_whatever_length_it_claims(space):
    where = urlsplit(space.url)
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 10\r\n"
        f"Transfer-Encoding: chunked\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    )
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_field_of_an_upload_is_short(space):
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"\r\n\r\n'.encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    assert status(space, "gradio_api/upload", part + b"x" * 5000 + b"\r\n" + END, headers) == 400


def test_uploads_under_way_are_bounded_together(space, monkeypatch):
    from fwd2bot.space_app import gate

    monkeypatch.setattr(gate, "MAX_ARRIVING_BYTES", 100)
    body = json.dumps(["x" * 200]).encode()
    assert (
        status(space, "gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}) == 503
    )


def test_file_that_arrives_is_no_older_than_its_arrival_though_the_clock_of_files_is_coarse(tmp_path):
    arrivals = Arrivals()
    for number in range(100):
        path = tmp_path / str(number)
        with arrivals.one(1):
            path.write_bytes(b"x")
            about = path.stat()
            assert max(about.st_mtime, about.st_ctime) >= arrivals.begin_of_oldest()
