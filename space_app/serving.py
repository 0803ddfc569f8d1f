"""Starting the web server of the Space."""

import gc
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .app import MODEL, build, build_failed
from .browser_side import CSS
from .gate import Arrivals, Gate, own_uploads
from .options import SpaceOptions, load_service
from .service import Service
from .sweeping import Sweeper
from .uploads import MAX_FILE_BYTES, MAX_FILES
from .waiting import bound_waiting, keep_going, keep_turns

HEARTBEAT_SECONDS = 5  # after which a closed page is noticed
MAX_WAITING = 100  # in the queue; more are told to come back
FONT = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the visitor's own machine
# What text has or lies on is darker than in Gradio's own: a contrast of at least 4.5; `CSS` has the dark accent.
THEME = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"]).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    color_accent="*primary_700",
    body_text_color_subdued="*neutral_600",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)


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
        self._own_uploads = ExitStack()
        self._own_uploads.enter_context(own_uploads())
        self.service, arrivals = service, Arrivals()
        self.page = build_failed(reason) if service is None else build(service)
        self.page.queue(default_concurrency_limit=4, max_size=MAX_WAITING, api_open=False)
        keep_going(self.page)
        bound_waiting(self.page, MODEL)
        keep_turns(self.page)
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
            # A file above `MAX_FILE_BYTES` is refused by itself, in our words; here the whole upload would be.
            max_file_size=MAX_FILES * MAX_FILE_BYTES,
            state_session_capacity=1000,
            app_kwargs={"middleware": [Middleware(Gate, arrivals=arrivals)]},
            css=CSS,
            theme=THEME,
        )
        self._sweeper = None if service is None else Sweeper(self.page, service, self.uploads, arrivals)

    def __enter__(self) -> "RunningSpace":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.stop()
        self.page.close()
        self._own_uploads.close()
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
        print(f"error: {reason} The Space is served all the same, and says this and nothing else.", file=sys.stderr)
    # What is there from the start stays: without the model and the libraries a collection takes no time.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which leaves the block below, and its folder is deleted
    with RunningSpace(service, reason, host, port) as space:
        print(f"The Space is at {space.url} (Ctrl-C ends it)", flush=True)
        space.wait()
