"""Letting go of what those who have left, or have fallen silent, left behind: in memory and on the disk."""

import ctypes
import gc
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from .gate import Arrivals
from .service import Service
from .visitors import IDLE_SECONDS

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 5
UPLOAD_SECONDS = 120  # that a file may lie on the disk, once it has arrived, before something wants to read it
EVENT = re.compile("[0-9a-f]{32}")  # a caller without a session gets the id of its event for one


class Sweeper:
    """Lets go, every few seconds, of what a visitor has left behind in the service and in Gradio's own memory.

    Gradio keeps the last value of every component of a session, pictures among them, after its page was closed, its
    places in the queue, and of each upload a folder and the path.
    """

    def __init__(self, page: Any, service: Service, uploads: Path, arrivals: Arrivals):
        self.page, self.service, self.uploads, self.arrivals = page, service, uploads, arrivals
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sweeper")
        self._thread.start()

    def sweep(self) -> None:
        """Each step, whether or not another one fails."""
        for step in (
            self._sweep_uploads,
            self.service.visitors.let_go_silent,
            self._forget_sessions,
            self._forget_paths,
        ):
            try:
                step()
            except Exception:
                logger.exception("A step of sweeping failed.")

    def _sweep_uploads(self) -> None:
        """Delete files that nobody has read, and folders that are empty."""
        now = time.time()
        before = min(now - UPLOAD_SECONDS, self.arrivals.begin_of_oldest())
        awaited = self._awaited()
        for path in sorted(self.uploads.rglob("*"), reverse=True):  # what is in a folder comes before it
            try:
                about = path.stat()
                if path.is_dir():
                    if about.st_mtime < now - SWEEP_SECONDS:  # an upload makes it just before the file
                        path.rmdir()  # which fails unless it is empty
                # Moved to its place when the whole upload had arrived, which changes the second of these times alone.
                elif max(about.st_mtime, about.st_ctime) < before and str(path) not in awaited:
                    path.unlink()
            except OSError:  # not empty, or gone already
                continue

    def _awaited(self) -> set[str]:
        """The files that events name which wait in the queue, or run."""
        events = list(self.page._queue.event_ids_to_events.values())
        return {path for event in events if event.data is not None for path in _paths(event.data.data)}

    def _forget_sessions(self) -> None:
        held, queue = self.page.state_holder, self.page._queue
        silent = datetime.now() - timedelta(seconds=IDLE_SECONDS)
        gone = False
        for session, state in list(held.session_data.items()):
            if state.is_closed or self._was_one_call(session):
                self.service.visitors.leave(session)
            elif session in self.service.visitors or held.time_last_used.get(session, silent) > silent:
                continue
            held.delete_state(session)
            for kept in (held.session_data, held.time_last_used):
                kept.pop(session, None)
            if not queue.pending_event_ids_session.get(session):
                queue.pending_event_ids_session.pop(session, None)
                queue.pending_messages_per_session.pop(session, None)
            gone = True
        if gone:
            _give_memory_back()

    def _was_one_call(self, session: str) -> bool:
        return bool(EVENT.fullmatch(session)) and session not in self.page._queue.event_ids_to_events

    def _forget_paths(self) -> None:
        for paths in self.page.temp_file_sets:
            for path in [path for path in list(paths) if not os.path.exists(path)]:
                paths.discard(path)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SWEEP_SECONDS):
            self.sweep()


def _paths(value: Any) -> Iterator[str]:
    """The paths of all files in the data of an event."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield os.path.abspath(value["path"])
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _paths(one)


def _give_memory_back() -> None:
    """To the system what is free, which the C library of Linux otherwise keeps for a next time."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
