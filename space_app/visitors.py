"""What the server holds of each visitor, in memory only, and when it lets go of it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any

from PIL import Image

from .uploads import MAX_FILES, VisitorError, encode

MAX_VISITORS = 100
IDLE_SECONDS = 30 * 60
MAX_TURNS = 20
STOP_SECONDS = 5  # that an answer which is no longer wanted may take to end
THUMBNAIL = 192  # pixels


@dataclass(frozen=True)
class Picture:
    """A picture that can be searched for and asked about.

    Args:
        id: a short name that is unique for its visitor, such as "own-3" or "gallery-17".
        title: what the page calls it. text: what it shows, for who does not see it.
        jpeg: what is kept of it, encoded anew; None where the original cannot be reached.
        summary: `Fwd2BotSummary` of length 1, at the largest length.
        described: whether `text` is a description of it.
    """

    id: str
    title: str
    text: str
    jpeg: bytes | None
    summary: Any
    described: bool = False

    @property
    def name(self) -> str:
        """Its title, and what it shows where that is known."""
        return f"{self.title}: {self.text}" if self.described else self.title

    def image(self) -> Image.Image:
        """The pixels that the model saw, and sees again uncompressed.

        Raises:
            VisitorError: where the original cannot be reached.
        """
        if self.jpeg is None:
            raise VisitorError(f"The original of “{self.title}” cannot be reached here; choose another picture.")
        with Image.open(BytesIO(self.jpeg)) as picture:
            return picture.convert("RGB")

    @cached_property
    def thumbnail(self) -> bytes | None:
        """A small JPEG for the page."""
        if self.jpeg is None:
            return None
        picture = self.image()
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        return encode(picture, 85)


class ConversationEndedError(VisitorError):
    """A new conversation was begun while this answer was made or waited; nobody wants it any more."""

    def __init__(self) -> None:
        super().__init__("A new conversation was begun before this answer was complete. Ask again.")


@dataclass
class Turn:
    """A question, and its `Answer` from the summaries and uncompressed."""

    question: str
    answer: Any
    uncompressed: Any | None


@dataclass
class Conversation:
    """About which pictures, and what was said so far.

    Args:
        found: how many pictures the first question was to find; 0 where they were chosen.
    """

    pictures: tuple[str, ...] = ()
    found: int = 0
    turns: list[Turn] = field(default_factory=list)


@dataclass
class Visitor:
    """All that is held of one visitor."""

    pictures: dict[str, Picture] = field(default_factory=dict)
    query: Any = None  # the summary of what was searched last, so that another length needs no model
    conversation: Conversation = field(default_factory=Conversation)
    last_seen: float = 0.0
    busy: int = 0
    made: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    number: int = 0  # of the conversation, as the page counts them
    running: dict[threading.Event, threading.Event] = field(default_factory=dict)  # of answers: stop, and has ended

    @contextmanager
    def answering(self, number: int) -> Iterator[threading.Event]:
        """Yields what is set when the answer made within the block is no longer wanted.

        Raises:
            ConversationEndedError: when a conversation after that of this `number` has begun.
        """
        stop, ended = threading.Event(), threading.Event()
        with self.lock:
            if number < self.number:
                raise ConversationEndedError
            self.running[stop] = ended
        try:
            yield stop
        finally:
            with self.lock:
                del self.running[stop]
            ended.set()

    def begin_conversation(self, number: int = 0) -> None:
        """End the answers that are being made, and wait until they have ended."""
        with self.lock:
            self.conversation = Conversation()
            self.number = max(self.number, number)
            running = dict(self.running)
        for stop in running:
            stop.set()
        for ended in running.values():
            ended.wait(STOP_SECONDS)

    def check_room(self, count: int) -> None:
        """Raise `VisitorError` unless so many more pictures may be added."""
        held = len(self.pictures)
        if held + count > MAX_FILES:
            raise VisitorError(
                f"You have {held} pictures here and add {count}; at most {MAX_FILES} are kept. Remove yours, or "
                "choose fewer."
            )

    def add(self, title: str, jpeg: bytes, summary: Any) -> Picture:
        with self.lock:  # two uploads of one visitor may arrive at once
            self.check_room(1)
            self.made += 1
            picture = Picture(f"own-{self.made}", title, f"your picture {title}", jpeg, summary)
            self.pictures[picture.id] = picture
            return picture


class Visitors:
    """The visitors by the id of their session.

    One who leaves is let go at once, one who only falls silent after half an hour, and before that the one that was
    silent longest when there would be more than `MAX_VISITORS`: of those without pictures first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._visitors: dict[str, Visitor] = {}

    def __len__(self) -> int:
        return len(self._visitors)

    def __contains__(self, session: str) -> bool:
        return session in self._visitors

    @contextmanager
    def visit(self, session: str, keep: bool = True) -> Iterator[Visitor]:
        """The visitor of a session, who is not let go for silence within the block.

        Args:
            keep: whether one of whom nothing is held is held from now on.

        Raises:
            VisitorError: when there are too many that are all being served.
        """
        with self._lock:
            self._let_go_silent()
            visitor = self._visitors.get(session)
            if visitor is None:
                visitor = Visitor()
                if keep:
                    self._make_room()
                    self._visitors[session] = visitor
            visitor.busy += 1
            visitor.last_seen = self._clock()
        try:
            yield visitor
        finally:
            with self._lock:
                visitor.busy -= 1
                visitor.last_seen = self._clock()

    def leave(self, session: str | None) -> None:
        """Let go of all that is held of a session."""
        with self._lock:
            self._visitors.pop(session, None)

    def let_go_silent(self) -> None:
        with self._lock:
            self._let_go_silent()

    def _let_go_silent(self) -> None:
        limit = self._clock() - IDLE_SECONDS
        for session, visitor in list(self._visitors.items()):
            if not visitor.busy and visitor.last_seen < limit:
                del self._visitors[session]

    def _make_room(self) -> None:
        if len(self._visitors) < MAX_VISITORS:
            return
        idle = {
            session: (bool(one.pictures), one.last_seen) for session, one in self._visitors.items() if not one.busy
        }
        if not idle:
            raise VisitorError(f"{MAX_VISITORS} visitors are being served just now. Try again in a minute.")
        del self._visitors[min(idle, key=idle.get)]
