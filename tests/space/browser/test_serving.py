"""What the server does with files and requests that arrive, and what it lets go of."""

import http.client
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from gradio_client import Client, handle_file
from page_steps import until

from fwd2bot.pipelines.embedded import gallery

BOUNDARY = "the-boundary"


def part(name, content):
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def upload(space, name, content):
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    with urlopen(Request(space.url + "gradio_api/upload", part(name, content) + END, headers)) as answer:
        return json.loads(answer.read())[0]


def call(space, name, *data, **more):
    """The id of the event of a caller without a session."""
    body = json.dumps({"data": data, **more}).encode()
    request = Request(space.url + f"gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.loads(answer.read())["event_id"]


def result(space, name, event):
    with urlopen(space.url + f"gradio_api/call/{name}/{event}") as answer:
        return answer.read().decode()


def file_data(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def age(path, seconds=3600):
    """Make a file look as old as if it had arrived so long ago; the time of its arrival cannot be set, see `later`."""
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def later(monkeypatch):
    """`later(seconds)` lets the sweeping that the test asks for see a clock that is so far ahead.

    The sweeper's own thread goes on by the true time: it would delete, at any moment, what the test still wants.
    """
    from fwd2bot.space_app import sweeping

    class Clock:
        ahead, of = 0.0, threading.get_ident()

        def time(self):
            return time.time() + (self.ahead if threading.get_ident() == self.of else 0)

    clock = Clock()
    monkeypatch.setattr(sweeping, "time", clock)
    return lambda seconds: setattr(clock, "ahead", seconds)


def test_same_file_of_two_visitors_is_two_files(space):
    content = gallery()[11].path.read_bytes()
    one, other = upload(space, "IMG_0001.jpg", content), upload(space, "IMG_0001.jpg", content)
    assert one != other
    for path in (one, other):
        assert "event: complete" in result(space, "compress", call(space, "compress", file_data(path), 1))
        assert not Path(path).exists()


def test_visitors_at_once_may_bring_the_same_file(space):
    made, failed = [], []

    def visit():
        client = Client(space.url, verbose=False)
        try:
            made.append(client.predict(handle_file(str(gallery()[3].path)), 1, api_name="/compress")["id"])
        except Exception as error:
            failed.append(str(error))
        finally:
            client.close()

    threads = [threading.Thread(target=visit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failed, made) == ([], ["own-1"] * 6)


def test_upload_that_still_arrives_is_not_swept(space, later):
    """A slow line: an hour's quarter passes between the first file and the second."""
    content = gallery()[1].path.read_bytes()
    before = set(space.uploads.rglob("*"))  # what other tests have left
    first, second = part("empty.png", b"") + part("a.png", content), part("b.png", content) + END
    address = urlsplit(space.url)
    line = http.client.HTTPConnection(address.hostname, address.port)
    line.putrequest("POST", "/gradio_api/upload")
    line.putheader("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
    line.putheader("Content-Length", str(len(first) + len(second)))
    line.endheaders(first)
    end = time.monotonic() + 60
    while len(arrived := set(space.uploads.rglob("*")) - before) < 2 and time.monotonic() < end:
        threading.Event().wait(0.02)
    assert len(arrived) == 2
    later(900)
    space.sweep()
    line.send(second)
    paths = json.loads(line.getresponse().read())
    line.close()
    assert len(paths) == 3 and all(Path(path).exists() for path in paths)
    while math.isfinite(space._sweeper.arrivals.begin_of_oldest()) and time.monotonic() < end:
        threading.Event().wait(0.02)  # the answer comes a moment before the server notes that all has arrived
    later(0)
    for path in paths:  # however old it is by the clock of its content, it has arrived just now
        age(path)
    space.sweep()
    assert all(Path(path).exists() for path in paths)
    later(600)
    space.sweep()
    assert not any(Path(path).exists() for path in paths)


def test_file_of_a_waiting_call_is_kept_until_it_is_read(space, service, monkeypatch, later):
    compress, go = service.compress, threading.Event()

    def waits(images):
        go.wait(20)
        return compress(images)

    monkeypatch.setattr(service, "compress", waits)
    path = [upload(space, f"{index}.png", gallery()[index].path.read_bytes()) for index in range(4)]
    events = [call(space, "compress", file_data(one), 1) for one in path]  # two are served, two wait
    later(600)
    space.sweep()
    go.set()
    assert all("event: complete" in result(space, "compress", event) for event in events)


def test_one_step_of_sweeping_that_fails_does_not_keep_the_others(space, service, monkeypatch, later, caplog):
    path = upload(space, "left.png", b"x")

    def fails():
        raise RuntimeError("a step")

    monkeypatch.setattr(service.visitors, "let_go_silent", fails)
    monkeypatch.setattr(space._sweeper, "_awaited", fails)
    later(600)
    space.page.upload_file_set.add("/gone")
    space.sweep()
    assert "/gone" not in space.page.upload_file_set and "a step" in caplog.text
    monkeypatch.undo()
    Path(path).unlink()


# Requests that are no uploads


def test_body_that_is_no_upload_and_says_that_it_is_large_is_refused_unread(space):
    address = urlsplit(space.url)
    line = http.client.HTTPConnection(address.hostname, address.port)
    line.putrequest("POST", "/gradio_api/call/search")
    line.putheader("Content-Length", "3000000")
    line.endheaders()
    answer = line.getresponse()
    assert answer.status == 413 and b"At most 1 MB are taken in a request" in answer.read()
    line.close()


def test_body_that_does_not_say_how_large_it_is_is_counted(space):
    """Until the byte that is too many, after which nothing is sent here, nor expected there."""
    address = urlsplit(space.url)
    line = http.client.HTTPConnection(address.hostname, address.port)
    line.putrequest("POST", "/gradio_api/call/search")
    line.putheader("Content-Type", "application/json")
    line.putheader("Transfer-Encoding", "chunked")
    line.endheaders()
    for part in (b'{"data": ["', *[b"x" * 65536] * 16):
        line.send(b"%x\r\n%s\r\n" % (len(part), part))
    answer = line.getresponse()
    assert answer.status == 413 and b"At most 1 MB are taken in a request" in answer.read()
    line.close()


def test_what_is_held_of_a_caller_without_a_session_goes_when_its_call_ends(space, service):
    path = upload(space, "once.png", gallery()[1].path.read_bytes())
    event = call(space, "compress", file_data(path), 1)
    assert "event: complete" in result(space, "compress", event)
    end = time.monotonic() + 10
    while event in space.page.state_holder.session_data and time.monotonic() < end:
        space.sweep()
    assert event not in space.page.state_holder.session_data and event not in service.visitors


def test_command_without_a_model_says_what_to_do_and_that_the_page_says_only_that():
    command = [sys.executable, "-m", "fwd2bot_cli", "demo", "--model", "/no/such/folder", "--device", "cpu"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as running:
        try:
            lines = []
            for line in running.stdout:
                lines.append(line)
                if "The Space is at" in line:
                    break
        finally:
            running.terminate()
    told = next(line for line in lines if line.startswith("error: "))
    assert "There is no folder '/no/such/folder'" in told
    assert "The Space is served all the same, and says this and nothing else." in told
    assert "Traceback" not in "".join(lines)


def test_requests_without_their_inputs_are_refused_and_the_queue_goes_on(space, service, monkeypatch):
    compress, begun, go = service._compress_texts, threading.Event(), threading.Event()

    def waits(texts):
        begun.set()
        assert go.wait(60)
        return compress(texts)

    with monkeypatch.context() as patch:
        patch.setattr(service, "_compress_texts", waits)
        inputs = ["What is it?", [], 1, 8, False, False]
        event = call(space, "ask", *inputs, session_hash="one")
        assert begun.wait(20)
        for given in ([], inputs[:5], [*inputs, 1]):
            with pytest.raises(HTTPError, match="400"):
                call(space, "ask", *given, session_hash="one")
        go.set()
        assert "event: complete" in result(space, "ask", event)
    client = Client(space.url, verbose=False)
    assert len(client.predict("a dog", 8, 1, api_name="/search")) == 1
    client.close()


def test_sessions_that_the_queue_does_not_know_do_not_stop_it(space, service, monkeypatch):
    compress, go = service._compress_texts, threading.Event()

    def waits(texts):
        assert go.wait(60)
        return compress(texts)

    queue = space.page._queue
    with monkeypatch.context() as patch:
        patch.setattr(service, "_compress_texts", waits)
        patch.setattr(queue.pending_messages_per_session, "max_size", 1)  # the sessions before the last are forgotten
        for session in ("one", "two", "three", "four", "five"):
            call(space, "search", "a dog", 8, 1, session_hash=session)
        for session in ("", "a<gradio-sep>b", 65 * "a"):
            with pytest.raises(HTTPError, match="400"):
                call(space, "search", "a dog", 8, 1, session_hash=session)
        go.set()
        until(lambda: not queue.event_ids_to_events, "all are served")
    assert not queue.stopped
    client = Client(space.url, verbose=False)
    assert len(client.predict("a dog", 8, 1, api_name="/search")) == 1
    client.close()


def test_question_after_one_that_is_cancelled_twice_is_answered(space, service, monkeypatch):
    compress, begun, go = service._compress_texts, threading.Event(), threading.Event()

    def waits(texts):
        begun.set()
        assert go.wait(60)
        return compress(texts)

    queue, inputs = space.page._queue, ["What is it?", [], 1, 8, False, False]
    with monkeypatch.context() as patch:
        patch.setattr(service, "_compress_texts", waits)
        first = call(space, "ask", *inputs, session_hash="twice")
        assert begun.wait(20)
        left = queue.event_ids_to_events[first]
        go.set()
        until(lambda: first not in queue.event_ids_to_events, "it has ended")
    queue.event_ids_to_events[first] = left  # as a second cancel leaves it, within milliseconds
    event = call(space, "ask", *inputs, session_hash="twice")
    until(lambda: event not in queue.event_ids_to_events, "the second one has ended")
    assert first not in queue.event_ids_to_events
