"""What comes in to the web server of the Space: what is refused unread, and where an upload lies until it is read."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradio import processing_utils, route_utils, routes

from .inputs import refuse_address
from .uploads import MAX_FILE_BYTES, MAX_FILES, MEGABYTE

MAX_BODY_BYTES = MEGABYTE  # of a request that is no upload
ARRIVAL_SECONDS = 3600  # after which an upload that still arrives is given up
CLOCK_SECONDS = 1  # that the time of a file may lie behind the clock: some milliseconds on Linux, more elsewhere
MAX_ARRIVING_BYTES = 1024 * MEGABYTE  # of all uploads under way
MAX_FIELD_BYTES = 1024  # of a part of an upload that is no file
# The first part of the paths that the page and `gradio_client` ask for; Gradio has many more, such as for files by
# their path, recordings, and what is saved on the server.
OPEN = frozenset(
    "api app_id assets call cancel config favicon.ico heartbeat info login_check manifest.json openapi.json pwa_icon "
    "queue reset robots.txt run startup-events static svelte theme.css token upload upload_progress user".split()
)
# The page loads nothing from elsewhere; Gradio's own scripts are inline in part, and its templates are compiled.
POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    b"form-action 'self'"
)


class Arrivals:
    """The uploads that are still arriving, so that none of their files is taken for one that was left behind."""

    def __init__(self) -> None:
        self._begun: dict[object, float] = {}
        self.bytes = 0

    @contextmanager
    def one(self, length: int) -> Iterator[None]:
        key = object()
        self._begun[key] = time.time() - CLOCK_SECONDS
        self.bytes += length
        try:
            yield
        finally:
            self.bytes -= length
            del self._begun[key]

    def begin_of_oldest(self) -> float:
        """Since when something has been arriving: a time as of `time.time`, infinity where nothing is."""
        return max(min(list(self._begun.values()), default=float("inf")), time.time() - ARRIVAL_SECONDS)


class Gate:
    """ASGI middleware: opens `OPEN` alone, bounds what is sent before it is read, forbids requests to elsewhere."""

    def __init__(self, app: Any, arrivals: Arrivals, max_bytes: int = MAX_FILES * MAX_FILE_BYTES + MEGABYTE):
        self.app, self.arrivals, self.max_bytes = app, arrivals, max_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        first = path.removeprefix("/gradio_api").strip("/").split("/")[0]
        if first and first not in OPEN:
            return await _refuse(send, 404, "This Space serves no files, and nothing else than its page and its API.")

        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        if not path.endswith("/upload"):
            return await self._bounded(scope, receive, with_policy)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        # Where a body comes in chunks, the length that it claims to have is not what ends it.
        if b"transfer-encoding" in headers or not length.isdigit() or int(length) > self.max_bytes:
            words = f"At most {self.max_bytes // MEGABYTE} MB are taken at once. Choose fewer or smaller files."
            return await _refuse(send, 413, words)
        if self.arrivals.bytes + int(length) > MAX_ARRIVING_BYTES:
            return await _refuse(send, 503, "Too much is being uploaded just now. Try again in a minute.")
        with self.arrivals.one(int(length)):
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


class BoundedParts(route_utils.GradioMultiPartParser):
    """A parser of uploads that holds no more in memory than a short field; Gradio's own holds any."""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None and len(self._current_part.data) + end - start > MAX_FIELD_BYTES:
            raise route_utils.MultiPartException(f"A field has at most {MAX_FIELD_BYTES} bytes. Send files as files.")
        super().on_part_data(data, start, end)


@contextmanager
def own_uploads() -> Iterator[None]:
    """Within the block Gradio puts each upload into a folder of its own, bounds its fields, and fetches nothing."""
    own = [
        (route_utils, "GradioUploadFile", OwnUpload),
        (route_utils, "GradioMultiPartParser", BoundedParts),
        (routes, "GradioMultiPartParser", BoundedParts),
        (processing_utils, "async_ssrf_protected_download", refuse_address),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in own]
    for module, name, value in own:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
