"""What comes in to the web server of the Space: what is refused unread, and where an upload lies until it is read."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradio import route_utils

from .uploads import MAX_FILE_BYTES, MAX_FILES, MEGABYTE

MAX_BODY_BYTES = MEGABYTE  # of a request that is no upload
ARRIVAL_SECONDS = 3600  # after which an upload that still arrives is given up
# Of Gradio: files by their path, and pages that are saved on the server.
CLOSED = ("/file", "/gradio_api/file", "/gradio_api/stream", "/gradio_api/deep_link", "/gradio_api/proxy", "/proxy")
# The page loads nothing from elsewhere; Gradio's own scripts are inline in part, and its templates are compiled.
POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    b"form-action 'self'"
)


class Arrivals:
    """The uploads that are still arriving, so that none of their files is taken for one that was left behind."""

    def __init__(self) -> None:
        self._begun: dict[object, float] = {}

    @contextmanager
    def one(self) -> Iterator[None]:
        key = object()
        self._begun[key] = time.time()
        try:
            yield
        finally:
            del self._begun[key]

    def begin_of_oldest(self) -> float:
        """Since when something has been arriving: a time as of `time.time`, infinity where nothing is."""
        return max(min(list(self._begun.values()), default=float("inf")), time.time() - ARRIVAL_SECONDS)


class Gate:
    """ASGI middleware: closes `CLOSED`, bounds what is sent before it is read, and forbids requests to elsewhere."""

    def __init__(self, app: Any, arrivals: Arrivals, max_bytes: int = MAX_FILES * MAX_FILE_BYTES + MEGABYTE):
        self.app, self.arrivals, self.max_bytes = app, arrivals, max_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if path.startswith(tuple(f"{one}{end}" for one in CLOSED for end in ("=", "/"))) or path in CLOSED:
            return await _refuse(send, 404, "This Space serves no files.")

        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        if not path.endswith("/upload"):
            return await self._bounded(scope, receive, with_policy)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > self.max_bytes:
            words = f"At most {self.max_bytes // MEGABYTE} MB are taken at once. Choose fewer or smaller files."
            return await _refuse(send, 413, words)
        with self.arrivals.one():
            return await self.app(scope, receive, with_policy)

    async def _bounded(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Hand on a request whose body is counted while it is read, whatever length it claims to have."""
        words = f"At most {MAX_BODY_BYTES // MEGABYTE} MB are taken in a request. Send less, and pictures as uploads."
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return await _refuse(send, 413, words)
        read, refused = 0, False

        async def counted() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise _TooLargeError
            return message

        async def unless_too_large(message: dict) -> None:
            nonlocal refused
            if read <= MAX_BODY_BYTES:
                await send(message)
            elif not refused:  # what the application says of a body that it could not read
                refused = True
                await _refuse(send, 413, words)

        try:
            await self.app(scope, counted, unless_too_large)
        except _TooLargeError:
            if not refused:
                await _refuse(send, 413, words)


class _TooLargeError(Exception):
    """A body has more bytes than are read."""


async def _refuse(send: Callable, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})


class OwnUpload(route_utils.GradioUploadFile):
    """An upload with a folder of its own.

    Gradio names the folder after the content alone: the same file from two visitors would be one, and gone for the
    second when the first one's was read.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sha.update(secrets.token_bytes(16))


@contextmanager
def own_uploads() -> Iterator[None]:
    """Within the block Gradio puts each upload into a folder of its own."""
    before, route_utils.GradioUploadFile = route_utils.GradioUploadFile, OwnUpload
    try:
        yield
    finally:
        route_utils.GradioUploadFile = before
