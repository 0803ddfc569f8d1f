"""What the Space does, without its page: a visitor's pictures, searching, asking, looking inside. Plain Python."""

import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any

import torch

from fwd2bot import Fwd2BotSummary
from fwd2bot.pipelines.answer_inputs import question_prompt
from fwd2bot.training.attention_maps import attention_maps

from .collection import Hit, Shipped, StoreCollection
from .comparison import STORED, Answer, answer_from_summaries, answer_uncompressed
from .results import Added, Exchange, Look
from .uploads import Upload, VisitorError, check_count, decode, encode, shown_name
from .visitors import MAX_TURNS, Conversation, ConversationEndedError, Picture, Turn, Visitor, Visitors

BATCH_SIZE = 8
MAX_TEXT = 1000  # characters of a query or a question
MAX_TEXTS = 10
MAX_HITS = 50
MAX_ASKED = 5  # pictures of one question
MAX_NUMBER = 2**31  # of a conversation


class Service:
    """All that the page calls. Methods may run in several threads at once, for one visitor or for several.

    Args:
        model, processor: a whole Fwd2Bot, in evaluation mode.
        collection: the pictures that every visitor sees.
        english_only: refuse questions in another script, which this checkpoint has never seen.
    """

    def __init__(self, model: Any, processor: Any, collection: Shipped | StoreCollection, english_only: bool = False):
        self.model, self.processor, self.collection = model, processor, collection
        self.english_only = english_only
        self.visitors = Visitors()
        collection.prepare(self)

    @property
    def max_length(self) -> int:
        """The largest length k: that of the model, or of the store."""
        return self.collection.max_length or self.model.config.num_summary_tokens

    def warm_up(self) -> None:
        """Answer once, so that the first visitor's times are those of all others."""
        try:
            for one in self.collection.pictures[:1]:
                list(self.ask("warm-up", "What is it?", [one.id], self.max_length))
        finally:
            self.visitors.leave("warm-up")

    # A visitor's own pictures

    def add(
        self, session: str, uploads: Sequence[Upload], progress: Callable[[int, int], None] | None = None
    ) -> Added:
        """Decode, encode anew and compress files; a picture that is here already is not compressed again.

        Raises:
            VisitorError: for none or too many.
        """
        if not uploads:
            raise VisitorError("No file came. Choose at least one picture.")
        check_count(len(uploads))
        with self.visitors.visit(session) as visitor:
            visitor.check_room(len(uploads))
            added, read = Added(), {}
            for number, upload in enumerate(uploads, 1):
                name = shown_name(upload.name)
                try:
                    jpeg = encode(decode(upload))
                except VisitorError as error:
                    added.problems.append(str(error))
                else:
                    here = next((one for one in list(visitor.pictures.values()) if one.jpeg == jpeg), None)
                    if here is not None:
                        added.again.append((name, here))
                    elif jpeg in read:
                        added.problems.append(f"“{name}” is the same picture as “{read[jpeg]}”, and is taken once.")
                    else:
                        read[jpeg] = name
                if len(read) == BATCH_SIZE or number == len(uploads) and read:
                    added.pictures += self._compress_own(visitor, [(name, jpeg) for jpeg, name in read.items()])
                    read = {}
                if progress is not None:
                    progress(number, len(uploads))
            return added

    def own(self, session: str) -> list[Picture]:
        with self.visitors.visit(session, keep=False) as visitor:
            return list(visitor.pictures.values())

    def remove_own(self, session: str) -> None:
        """Let go of the visitor's pictures, of what was said about them, and of the last search."""
        with self.visitors.visit(session, keep=False) as visitor:
            with visitor.lock:
                visitor.pictures.clear()
                visitor.query = None
            visitor.begin_conversation()

    def compress(self, images: list[Any]) -> Fwd2BotSummary:
        """Summaries of pictures at the largest length, on the CPU."""
        inputs = self.processor.process_images(images).to(self.model.device)
        return self.model.compress(**inputs, num_summary_tokens=self.max_length).to("cpu")

    def _compress_own(self, visitor: Visitor, read: list[tuple[str, bytes]]) -> list[Picture]:
        # From what is kept, so that the answer without compression is about the same pixels.
        images = [Picture("", title, "", jpeg, None).image() for title, jpeg in read]
        return [
            visitor.add(title, jpeg, summary)
            for (title, jpeg), summary in zip(read, self.compress(images), strict=True)
        ]

    def _find(self, visitor: Visitor, ids: Sequence[str]) -> list[Picture]:
        found = [visitor.pictures.get(one) or self.collection.get(one) for one in ids]
        missing = [one for one, picture in zip(ids, found, strict=True) if picture is None]
        if missing:
            raise VisitorError(
                f"The picture {shown_name(missing[0])!r} is no longer here: what you bring is forgotten when the page "
                "is closed or silent for long. Add it again, or choose another one."
            )
        return found

    # Search

    def search(
        self, session: str, query: str | Upload, length: int, top_k: int = 6, *, keep: bool = True
    ) -> list[Hit]:
        """The pictures that fit a sentence, or that are like a picture, from the best on.

        Args:
            keep: whether to remember the query for `rerank`; one that fails is not, nor is the one before it.

        Raises:
            VisitorError: for an empty, too long or unreadable query, or numbers out of range.
        """
        with self.visitors.visit(session, keep=False) as visitor:
            visitor.query = None
        self._check_length(length)
        self._check_count("top_k", top_k, 1, MAX_HITS)
        if isinstance(query, Upload):
            made = self.compress([decode(query)])
        else:
            made = self._compress_texts([self._check_text(query, "query")])
        with self.visitors.visit(session, keep) as visitor:
            if keep:
                visitor.query = made
            return self._rank(visitor, made, length, top_k)

    def rerank(self, session: str, length: int, top_k: int = 6) -> list[Hit]:
        """The last search at another length, without the model: a prefix of a summary is the shorter summary."""
        self._check_length(length)
        with self.visitors.visit(session, keep=False) as visitor:
            return [] if visitor.query is None else self._rank(visitor, visitor.query, length, top_k)

    def _rank(self, visitor: Visitor, query: Fwd2BotSummary, length: int, top_k: int) -> list[Hit]:
        embedding = self.embed(query, length)[0]  # (d,)
        hits = self.collection.search(embedding, query, length, top_k)
        own = list(visitor.pictures.values())
        if own:
            scores = self.embed(Fwd2BotSummary.cat([one.summary for one in own]), length) @ embedding  # (N,)
            hits += [Hit(score, one) for score, one in zip(scores.tolist(), own, strict=True)]
        return sorted(hits, key=lambda hit: -hit.score)[:top_k]

    def embed(self, summary: Fwd2BotSummary, length: int) -> torch.Tensor:
        """`(N, d)` embeddings of summaries at a length, on the CPU."""
        return self.model.embed(summary=summary, num_summary_tokens=length).cpu()

    def _compress_texts(self, texts: list[str]) -> Fwd2BotSummary:
        inputs = self.processor.process_texts(texts, truncation=True).to(self.model.device)
        return self.model.compress(**inputs, num_summary_tokens=self.max_length).to("cpu")

    # Ask

    def ask(
        self,
        session: str,
        question: str,
        ids: Sequence[str],
        length: int,
        *,
        find: int = 0,
        uncompressed: bool = True,
        number: int = 0,
    ) -> Iterator[Exchange]:
        """Answer from summaries, then uncompressed, as a stream; a question about the same pictures is a follow-up.

        Args:
            ids: the pictures, or none with `find`.
            find: how many pictures the question itself shall find. A conversation whose pictures were found goes on
                with these as long as `find` stays the same.
            number: of the conversation that the question belongs to, see `new_conversation`.

        Raises:
            VisitorError: for an empty question, no picture, too many, one that is not here, or pictures together with
                `find`, before any compute.
            ConversationEndedError: when a new conversation has begun, or begins while the answer is made.
        """
        question = self._check_text(question, "question")
        self._check_length(length)
        self._check_count("find", find, 0, MAX_ASKED)
        self._check_count("number", number, 0, MAX_NUMBER)
        ids = self._check_ids(ids)
        if not ids and not find:
            raise VisitorError("No picture is chosen. Tick one below, or let the question find the pictures.")
        if ids and find:
            raise VisitorError(
                f"You have chosen {len(ids)} pictures, and the question shall find {find} more. Untick yours, or set "
                "the number of pictures to find to 0."
            )
        with self.visitors.visit(session) as visitor, visitor.answering(number) as stop:
            talk = visitor.conversation
            if find:
                goes_on = talk.turns and talk.found == find
                ids = talk.pictures if goes_on else tuple(self._retrieve(visitor, question, length, find))
            pictures = self._find(visitor, ids)
            with visitor.lock:  # a new conversation may have begun meanwhile, and is not to be replaced
                if stop.is_set():
                    raise ConversationEndedError
                if (talk.pictures, talk.found) != (ids, find) or len(talk.turns) >= MAX_TURNS:
                    talk = visitor.conversation = Conversation(ids, find)
            yield from self._answer(talk, question, pictures, length, uncompressed, stop)

    def new_conversation(self, session: str, number: int = 0) -> None:
        """Forget the conversation, and end an answer that is being made.

        Args:
            number: of the new conversation, from 1 on. A question of one before it that arrives later is not answered.
        """
        self._check_count("number", number, 0, MAX_NUMBER)
        with self.visitors.visit(session, keep=number > 0) as visitor:
            visitor.begin_conversation(number)

    def _retrieve(self, visitor: Visitor, question: str, length: int, count: int) -> list[str]:
        hits = self._rank(visitor, self._compress_texts([question]), length, count)
        if not hits:
            raise VisitorError("There is no picture to find. Add one first.")
        return [hit.picture.id for hit in hits]

    def _answer(
        self,
        talk: Conversation,
        question: str,
        pictures: list[Picture],
        length: int,
        uncompressed: bool,
        stop: threading.Event,
    ) -> Iterator[Exchange]:
        summary = Fwd2BotSummary.cat([picture.summary for picture in pictures]).truncate(length)
        earlier = tuple(talk.turns)
        exchange = Exchange(question, pictures, Answer(), earlier=earlier)
        prompt = self._prompt(question, [(turn.question, turn.answer.text) for turn in earlier], len(pictures))
        try:
            for answer in answer_from_summaries(self.model, self.processor, prompt, summary, stop):
                exchange = replace(exchange, summary=answer)
                yield exchange
        except ValueError as error:
            raise VisitorError(f"{error} Begin a new conversation, or choose fewer pictures.") from error
        if uncompressed and not stop.is_set():
            try:
                images = [picture.image() for picture in pictures]
                said = [(one.question, _said_uncompressed(one)) for one in earlier]
                prompt = self._prompt(question, said, len(pictures))
                for answer in answer_uncompressed(self.model, self.processor, prompt, images, stop):
                    exchange = replace(exchange, uncompressed=answer)
                    yield exchange
            except ValueError as error:  # too long, or an original out of reach: the first answer stands
                exchange = replace(exchange, uncompressed=None, note=str(error))
        if stop.is_set():
            raise ConversationEndedError
        talk.turns.append(Turn(question, exchange.summary, exchange.uncompressed))
        yield replace(exchange, complete=True)

    def _prompt(self, question: str, said: list[tuple[str, str]], count: int) -> str:
        messages = []
        for asked, answered in said:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return question_prompt([*messages, {"role": "user", "content": question}], count, self.processor)

    # Look inside

    def look(self, session: str, one: str | None, length: int, texts: Sequence[str]) -> Look:
        """Where each summary token of a picture looked, how close the picture is to texts, and what it weighs.

        The texts are those given, and that which describes the picture, where there is one.

        Raises:
            VisitorError: for no picture, one that is not here, or too many texts.
        """
        self._check_length(length)
        if not one:
            raise VisitorError("No picture is chosen. Choose one below.")
        texts = [self._check_text(text, "text") for text in texts if text.strip()]
        if len(texts) > MAX_TEXTS:
            raise VisitorError(f"{len(texts)} texts are too many; give at most {MAX_TEXTS}, one a line.")
        with self.visitors.visit(session, keep=False) as visitor:
            [picture] = self._find(visitor, [one])
        if picture.described:
            texts = [picture.text, *texts]
        image, maps, note = picture.image(), None, None
        try:
            maps = attention_maps(self.model, self.processor, image, num_summary_tokens=length)
        except ValueError as error:
            note = str(error)
        closeness = []
        if texts:
            scores = self.embed(self._compress_texts(texts), length) @ self.embed(picture.summary, length)[0]
            closeness = sorted(zip(texts, scores.tolist(), strict=True), key=lambda pair: -pair[1])
        inputs = self.processor.process_images([image])
        tokens = int((inputs["input_ids"] == self.model.image_token_id).sum())
        width = self.model.summary_projector.out_features
        return Look(
            picture,
            maps,
            note,
            closeness,
            length * width * STORED.itemsize,
            tokens * width * STORED.itemsize,
            len(encode(image, 75)),
        )

    # Checks

    def _check_length(self, length: Any) -> None:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= self.max_length:
            raise VisitorError(f"The length k must be a whole number from 1 to {self.max_length}, not {length!r}.")

    def _check_count(self, name: str, number: Any, low: int, high: int) -> None:
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise VisitorError(f"{name} must be a whole number from {low} to {high}, not {number!r}.")

    def _check_ids(self, ids: Any) -> tuple[str, ...]:
        """The ids of pictures, each once."""
        if not isinstance(ids, (list, tuple)) or not all(isinstance(one, str) for one in ids):
            raise VisitorError(f'pictures must be a list of ids such as ["gallery-43"], not {shorten(repr(ids), 60)}.')
        if len(ids) > MAX_ASKED:
            raise VisitorError(f"{len(ids)} pictures are too many for one question; choose 1 to {MAX_ASKED}.")
        return tuple(dict.fromkeys(ids))

    def _check_text(self, text: Any, what: str) -> str:
        if text is not None and not isinstance(text, str):
            raise VisitorError(f"The {what} must be text, not {shorten(repr(text), 60)}.")
        if not text or not text.strip():
            raise VisitorError(f"The {what} is empty. Write at least one word.")
        text = " ".join("".join(one if one.isprintable() else " " for one in text).split())
        if len(text) > MAX_TEXT:
            raise VisitorError(f"The {what} has {len(text)} characters; at most {MAX_TEXT} are read. Shorten it.")
        letters = [one for one in text if one.isalpha()]
        latin = [one for one in letters if unicodedata.name(one, "").startswith("LATIN")]
        if self.english_only and 2 * len(latin) < len(letters):
            example = "How many carrots are in the picture?" if what == "question" else "two snowmen on a blue field"
            raise VisitorError(
                f"This checkpoint has read simple English only, and nothing in the script of this {what}. Write it in "
                f"English, such as “{example}”, or start the Space with a checkpoint that knows your language."
            )
        if self.processor.image_token in text:
            raise VisitorError(
                f"The {what} holds {self.processor.image_token!r}, which marks a picture. Leave it out."
            )
        return text


def _said_uncompressed(turn: Turn) -> str:
    """What the uncompressed side of a conversation goes on from: its own answer where there was one."""
    return (turn.uncompressed.text if turn.uncompressed else "") or turn.answer.text
