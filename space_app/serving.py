"""Starting the web server of the Space, what it does not serve, and that it forgets who has left."""

import ctypes
import gc
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .app import CSS, build, build_failed
from .options import SpaceOptions, load_service
from .service import Service
from .uploads import MAX_FILE_BYTES, MAX_FILES
from .visitors import IDLE_SECONDS

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 5
UPLOAD_SECONDS = 120  # that a file may wait on the disk to be read, which deletes it
HEARTBEAT_SECONDS = 5  # after which a closed page is noticed
MAX_WAITING = 100  # in the queue; more are told to come back
FONT = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the visitor's own machine
# Of Gradio: files by their path, and pages that are saved on the server.
CLOSED = ("/file", "/gradio_api/file", "/gradio_api/stream", "/gradio_api/deep_link", "/gradio_api/proxy", "/proxy")
# The page loads nothing from elsewhere; Gradio's own scripts are inline in part, and its templates are compiled.
POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    b"form-action 'self'"
)


class Gate:
    """ASGI middleware: closes `CLOSED`, bounds an upload before it is read, and forbids requests to elsewhere."""

    def __init__(self, app: Any, max_bytes: int = MAX_FILES * MAX_FILE_BYTES):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if path.startswith(tuple(f"{one}{end}" for one in CLOSED for end in ("=", "/"))) or path in CLOSED:
            return await _refuse(send, 404, "This Space serves no files.")
        if path.endswith("/upload"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit() or int(length) > self.max_bytes:
                return await _refuse(send, 413, f"At most {self.max_bytes // 10**6} MB are taken at once.")

        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        return await self.app(scope, receive, with_policy)


async def _refuse(send: Callable, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})


class Sweeper:
    """Lets go, every few seconds, of what a visitor has left behind in the service and in Gradio's own memory.

    Gradio keeps the last value of every component of a session, pictures among them, after its page was closed, its
    places in the queue, and of each upload a folder named after its content and the path.
    """

    def __init__(self, page: Any, service: Service, uploads: Path):
        self.page, self.service, self.uploads = page, service, uploads
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sweep(self) -> None:
        self.service.visitors.let_go_silent()
        held, queue = self.page.state_holder, self.page._queue
        silent = datetime.now() - timedelta(seconds=IDLE_SECONDS)
        gone = []
        for session, state in list(held.session_data.items()):
            if state.is_closed:
                self.service.visitors.leave(session)
            elif session in self.service.visitors or held.time_last_used.get(session, silent) > silent:
                continue
            held.delete_state(session)
            for kept in (held.session_data, held.time_last_used):
                kept.pop(session, None)
            if not queue.pending_event_ids_session.get(session):
                queue.pending_event_ids_session.pop(session, None)
                queue.pending_messages_per_session.pop(session, None)
            gone.append(session)
        if gone:
            _give_memory_back()
        self._sweep_uploads(time.time() - UPLOAD_SECONDS)
        for paths in self.page.temp_file_sets:
            for path in [path for path in list(paths) if not os.path.exists(path)]:
                paths.discard(path)

    def _sweep_uploads(self, before: float) -> None:
        """Delete what was written to the disk before a time, and folders and files that are empty."""
        for path in sorted(self.uploads.rglob("*"), reverse=True):  # what is in a folder comes before it
            try:
                about = path.stat()
                if path.is_dir():
                    if about.st_mtime < time.time() - SWEEP_SECONDS:  # an upload makes it just before the file
                        path.rmdir()  # which fails unless it is empty
                elif about.st_mtime < before or not about.st_size and about.st_mtime < time.time() - SWEEP_SECONDS:
                    path.unlink()
            except OSError:  # not empty, or gone already
                continue

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SWEEP_SECONDS):
            try:
                self.sweep()
            except Exception:
                logger.exception("Sweeping failed.")


def _give_memory_back() -> None:
    """To the system what is free, which the C library of Linux otherwise keeps for a next time."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class RunningSpace:
    """A Space that is being served; leave the block, or call `close`, to end it.

    Attributes:
        url: where it is. service: None where it could not be loaded.
    """

    def __init__(self, service: Service | None, reason: str = "", host: str | None = None, port: int | None = None):
        # Uploads pass through the disk: a folder that none but this process reads, and that goes with it.
        self._folder = tempfile.TemporaryDirectory(prefix="fwd2bot-space-")
        self.uploads = Path(self._folder.name)
        settings = {
            "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # its queue remembers the sessions of so many calls
            "GRADIO_HEARTBEAT_INTERVAL": os.environ.get("GRADIO_HEARTBEAT_INTERVAL", str(HEARTBEAT_SECONDS)),
            "GRADIO_TEMP_DIR": self._folder.name,
        }
        self._before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        self.service = service
        self.page = build_failed(reason) if service is None else build(service)
        self.page.queue(default_concurrency_limit=4, max_size=MAX_WAITING, api_open=False)
        _, self.url, _ = self.page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            footer_links=["api"],
            allowed_paths=[],
            max_file_size=MAX_FILE_BYTES,
            state_session_capacity=1000,
            app_kwargs={"middleware": [Middleware(Gate)]},
            css=CSS,
            theme=gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"]),
        )
        self._sweeper = None if service is None else Sweeper(self.page, service, self.uploads)

    def __enter__(self) -> "RunningSpace":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.stop()
        self.page.close()
        self._folder.cleanup()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def sweep(self) -> None:
        """Let go now of what those who left have left behind, which happens every few seconds anyway."""
        if self._sweeper is not None:
            self._sweeper.sweep()

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        self.page.block_thread()


def serve(options: SpaceOptions, host: str | None = None, port: int | None = None) -> None:
    """Serve a Space until Ctrl-C; where the model or the store cannot be loaded, a page that says so.

    Args:
        host, port: Default: Gradio's environment variables, which are 127.0.0.1 and the first free one from 7860 on.
    """
    service, reason = None, ""
    try:
        service = load_service(options.or_environment())
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        print(f"error: {reason}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which leaves the block below, and its folder is deleted
    with RunningSpace(service, reason, host, port) as space:
        print(f"The Space is at {space.url} (Ctrl-C ends it)", flush=True)
        space.wait()
