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
POLL_SECONDS = 0.05  # after which a question that waits for the one before notices that it is no longer wanted
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


class AskedTwiceError(VisitorError):
    """The same question again, such as by a second click, while its answer is still being made or waits."""

    def __init__(self) -> None:
        super().__init__("This question is being answered already. Wait for its answer.")


class SupersededError(VisitorError):
    """The visitor has begun another search, or removed the pictures, before the hits of this one were there."""

    def __init__(self) -> None:
        super().__init__("Another search was begun before this one was complete.")


@dataclass(eq=False)
class Answering:
    """An answer that is being made, or waits for those before it.

    Args:
        asked: what was asked, to know it again. stop: set when nobody wants it any more. ended: set when nothing more
            comes of it.
    """

    asked: Any
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


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
    removals: int = 0  # so often all pictures were removed
    lock: threading.Lock = field(default_factory=threading.Lock)
    number: int = 0  # of the conversation, as the page counts them
    begun: float = 0.0  # when the fresh question was asked that began it, by `time.monotonic`
    searches: int = 0  # so many have begun
    running: list[Answering] = field(default_factory=list)  # in the order in which they came

    @contextmanager
    def answering(self, number: int, asked: Any, asked_at: float | None = None) -> Iterator[threading.Event]:
        """Yields what is set when the answer made within the block is no longer wanted; waits for those before it.

        Raises:
            AskedTwiceError: when the same was asked last, and is not answered yet.
            ConversationEndedError: when a conversation after that of this `number`, or by a fresh question after this
                one, has begun, or begins.
        """
        this = Answering(asked)
        if number > self.number:  # the question has overtaken what begins its conversation
            self.begin_conversation(number)
        with self.lock:
            if number < self.number or (asked_at is not None and asked_at < self.begun):
                raise ConversationEndedError
            wanted = [one for one in self.running if not one.stop.is_set()]
            if wanted and wanted[-1].asked == asked:
                raise AskedTwiceError
            before = list(self.running)
            self.running.append(this)
        try:
            for one in before:  # whose turns this question follows up
                while not (one.ended.wait(POLL_SECONDS) or one.stop.is_set() or this.stop.is_set()):
                    pass
            if this.stop.is_set():
                raise ConversationEndedError
            yield this.stop
        finally:
            with self.lock:
                self.running.remove(this)
            this.ended.set()

    def stop_answers(self) -> None:
        """Let the answers end that are being made."""
        with self.lock:
            self._stop_answers()

    def _stop_answers(self) -> None:
        for one in self.running:
            one.stop.set()

    def begin_conversation(self, number: int = 0, asked_at: float | None = None) -> None:
        """Forget what was said, and let the answers end that are being made.

        Args:
            number: of the new conversation; one that has begun already goes on. 0 where it has none.
            asked_at: when the question was asked that begins it, where that is known; one that was asked before that
                of the present one begins none.
        """
        with self.lock:
            if 0 < number <= self.number or (asked_at is not None and asked_at < self.begun):
                return
            self.conversation = Conversation()
            self.number = max(self.number, number)
            self.begun = max(self.begun, asked_at or 0)
            self._stop_answers()

    @property
    def is_in_conversation(self) -> bool:
        """Whether something was said that stands, or an answer is awaited."""
        with self.lock:
            return bool(self.conversation.turns) or any(not one.stop.is_set() for one in self.running)

    def begin_search(self) -> int:
        """Forget the search before, and what is found for it from now on; returns the number of the new one."""
        with self.lock:
            self.query = None
            self.searches += 1
            return self.searches

    def end_search(self, number: int, query: Any) -> None:
        """Remember what was searched, so that it can be ranked anew.

        Raises:
            SupersededError: when another search has begun since.
        """
        with self.lock:
            if number != self.searches:
                raise SupersededError
            self.query = query

    def same(self, jpeg: bytes) -> Picture | None:
        """The picture with this content, where it is here already."""
        return next((one for one in list(self.pictures.values()) if one.jpeg == jpeg), None)

    @property
    def room(self) -> int:
        """For so many more pictures."""
        return MAX_FILES - len(self.pictures)

    def remove_pictures(self, removals: int | None = None) -> None:
        """Forget the pictures, and those that are being compressed.

        Args:
            removals: which removal it is; one that was made already is not made again. Default: the next one.
        """
        with self.lock:
            if removals is None or removals > self.removals:
                self.pictures.clear()
                self.removals = self.removals + 1 if removals is None else removals

    def check_removals(self, removals: int) -> None:
        """Raise `VisitorError` unless all pictures were removed just so often."""
        if removals != self.removals:
            raise VisitorError("Your pictures were removed while others were added. Add those again to keep them.")

    def add(self, title: str, jpeg: bytes, summary: Any, removals: int = 0) -> Picture | None:
        """The new picture; None where its content is here already, or no room is left.

        Args:
            removals: as they were when its upload began.

        Raises:
            VisitorError: when the pictures were removed since.
        """
        with self.lock:  # two uploads of one visitor may arrive at once
            self.check_removals(removals)
            if self.room <= 0 or self.same(jpeg) is not None:
                return None
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
        """Let go of all that is held of a session, and end the answers that are being made for it."""
        with self._lock:
            visitor = self._visitors.pop(session, None)
        if visitor is not None:
            visitor.stop_answers()

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
