"""What the Space does, without its page: a visitor's pictures, searching, asking, looking inside. Plain Python."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fwd2bot import Fwd2BotSummary
from fwd2bot.pipelines.answer_inputs import question_prompt
from fwd2bot.training.attention_maps import attention_maps

from .checks import MAX_ASKED, check_ids, check_number, check_text
from .collection import Hit, Shipped, StoreCollection
from .comparison import STORED, Answer, answer_from_summaries, answer_uncompressed
from .results import Added, Exchange, Look
from .uploads import MAX_FILES, Upload, VisitorError, check_count, decode, encode, shown_name
from .visitors import MAX_TURNS, Conversation, ConversationEndedError, Picture, Turn, Visitor, Visitors

CONCURRENCY = 2
BATCH_SIZE = 8
MAX_TEXTS = 10
MAX_HITS = 50
MAX_NUMBER = 2**31  # of a conversation, and of removals


class Service:
    """All that the page calls. Methods may run in several threads at once, for one visitor or for several.

    Args:
        model, processor: a whole Fwd2Bot, in evaluation mode.
        collection: the pictures that every visitor sees.
        is_embedded: whether the checkpoint is that inside the package, which was trained on English and on single
            questions: questions in another script are refused, and follow-ups get a word of warning.
        concurrency: how many run the model at once.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        collection: Shipped | StoreCollection,
        is_embedded: bool = False,
        concurrency: int = CONCURRENCY,
    ):
        self.model, self.processor, self.collection = model, processor, collection
        self.is_embedded = is_embedded
        self.concurrency, self._places = concurrency, threading.BoundedSemaphore(concurrency)
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
        self,
        session: str,
        uploads: Sequence[Upload],
        progress: Callable[[int, int], None] | None = None,
        *,
        removals: int | None = None,
    ) -> Added:
        """Decode, encode anew and compress files; a picture that is here already is not compressed again.

        Args:
            removals: how often the visitor had removed all pictures when these were sent, see `remove_own`.
                Default: as often as is known here.

        Raises:
            VisitorError: for none or too many, or when the visitor's pictures were removed since they were sent.
        """
        if not uploads:
            raise VisitorError("No file came. Choose at least one picture.")
        check_count(len(uploads))
        with self.visitors.visit(session) as visitor:
            if removals is None:
                removals = visitor.removals
            else:
                check_number("removals", removals, 0, MAX_NUMBER)
                visitor.remove_pictures(removals)  # where these have overtaken it
            visitor.check_removals(removals)
            added, read, left_out = Added(), {}, 0
            for number, upload in enumerate(uploads, 1):
                name = shown_name(upload.name)
                try:
                    jpeg = encode(decode(upload))
                except VisitorError as error:
                    added.problems.append(str(error))
                else:
                    here = visitor.same(jpeg)
                    if here is not None:
                        added.again.append((name, here))
                    elif jpeg in read:
                        added.problems.append(f"“{name}” is the same picture as “{read[jpeg]}”, and is taken once.")
                    elif len(read) < visitor.room:
                        read[jpeg] = name
                    else:
                        left_out += 1
                if len(read) == BATCH_SIZE or number == len(uploads) and read:
                    left_out += self._compress_own(
                        visitor, [(name, jpeg) for jpeg, name in read.items()], added, removals
                    )
                    read = {}
                if progress is not None:
                    progress(number, len(uploads))
            if left_out:
                added.problems.append(
                    f"Not added, for want of room: {left_out}. At most {MAX_FILES} pictures of yours are kept. Remove "
                    "them, or choose fewer."
                )
            return added

    def own(self, session: str) -> list[Picture]:
        with self.visitors.visit(session, keep=False) as visitor:
            return list(visitor.pictures.values())

    def remove_own(self, session: str, removals: int | None = None) -> None:
        """Let go of the visitor's pictures, of what was said about them, and of the last search.

        Args:
            removals: which removal of this visitor it is, from 1 on, so that pictures which were sent before it and
                come later are not taken. Default: the next one.
        """
        if removals is not None:
            check_number("removals", removals, 1, MAX_NUMBER)
        with self.visitors.visit(session, keep=removals is not None) as visitor:
            visitor.remove_pictures(removals)
            visitor.begin_search()
            visitor.begin_conversation()

    def compress(self, images: list[Any]) -> Fwd2BotSummary:
        """Summaries of pictures at the largest length, on the CPU."""
        inputs = self.processor.process_images(images).to(self.model.device)
        with self._places:
            return self.model.compress(**inputs, num_summary_tokens=self.max_length).to("cpu")

    def _compress_own(self, visitor: Visitor, read: list[tuple[str, bytes]], added: Added, removals: int) -> int:
        """Compress and keep; returns how many found no room, since another upload has taken it meanwhile."""
        # From what is kept, so that the answer without compression is about the same pixels.
        images = [Picture("", title, "", jpeg, None).image() for title, jpeg in read]
        left_out = 0
        for (title, jpeg), summary in zip(read, self.compress(images), strict=True):
            if (picture := visitor.add(title, jpeg, summary, removals)) is not None:
                added.pictures.append(picture)
            elif (picture := visitor.same(jpeg)) is not None:
                added.again.append((title, picture))
            else:
                left_out += 1
        return left_out

    def _find(self, visitor: Visitor, ids: Sequence[str]) -> list[Picture]:
        found = [visitor.pictures.get(one) or self.collection.get(one) for one in ids]
        missing = [one for one, picture in zip(ids, found, strict=True) if picture is None]
        if missing:
            raise VisitorError(
                f"There is no picture {shown_name(missing[0])!r} in this session. What is brought is forgotten when "
                "the page or the client is closed, or silent for long: add it again, or choose another one."
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
            SupersededError: with `keep`, when the visitor has begun another search meanwhile.
        """
        with self.visitors.visit(session, keep) as visitor:
            number = visitor.begin_search() if keep else 0
            self._check_length(length)
            check_number("top_k", top_k, 1, MAX_HITS)
            if isinstance(query, Upload):
                made = self.compress([decode(query)])
            else:
                made = self._compress_texts([self._check_text(query, "query")])
            if keep:
                visitor.end_search(number, made)
            return self._rank(visitor, made, length, top_k)

    def forget_search(self, session: str) -> None:
        with self.visitors.visit(session, keep=False) as visitor:
            visitor.begin_search()

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
        with self._places:
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
        fresh: bool = False,
        asked_at: float | None = None,
    ) -> Iterator[Exchange]:
        """Answer from summaries, then uncompressed, as a stream; a question about the same pictures is a follow-up.

        Args:
            ids: the pictures, or none with `find`.
            find: how many pictures the question itself shall find. A conversation whose pictures were found goes on
                with these as long as `find` stays the same.
            number: of the conversation that the question belongs to, see `new_conversation`.
            fresh: whether it begins a new conversation, once it can be answered.
            asked_at: when it was asked, by `time.monotonic`, where it may have waited: one that was asked before a
                fresh one that has begun meanwhile is not answered.

        Raises:
            VisitorError: for an empty question, no picture, too many, one that is not here, or pictures together with
                `find`, before any compute.
            AskedTwiceError: when the same question is being answered already.
            ConversationEndedError: when a new conversation has begun, or begins while the answer is made.
        """
        question = self._check_text(question, "question")
        self._check_length(length)
        check_number("find", find, 0, MAX_ASKED)
        check_number("number", number, 0, MAX_NUMBER)
        ids = check_ids(ids)
        if not ids and not find:
            raise VisitorError("No picture is chosen. Tick one below, or let the question find the pictures.")
        if ids and find:
            raise VisitorError(
                f"Pictures are chosen ({len(ids)}), and the question shall find some ({find}): only one of these "
                "goes. Untick yours, or set the number of pictures to find to 0."
            )
        asked = (question, ids, length, find, uncompressed, number)
        with self.visitors.visit(session) as visitor:
            if fresh:
                self._find(visitor, ids)  # what cannot be answered ends no conversation
                visitor.begin_conversation(asked_at=asked_at)
            with visitor.answering(number, asked, asked_at) as stop:
                talk = visitor.conversation
                if find:
                    goes_on = talk.turns and talk.found == find
                    ids = talk.pictures if goes_on else tuple(self._retrieve(visitor, question, length, find))
                pictures = self._find(visitor, ids)
                with visitor.lock:  # a new conversation may have begun meanwhile, and is not to be replaced
                    if stop.is_set():
                        raise ConversationEndedError
                    remark = self._remark(talk, ids, find)
                    if (talk.pictures, talk.found) != (ids, find) or len(talk.turns) >= MAX_TURNS:
                        talk = visitor.conversation = Conversation(ids, find)
                yield from self._answer(talk, question, pictures, length, uncompressed, stop, remark)

    def _remark(self, talk: Conversation, ids: tuple[str, ...], find: int) -> str:
        """What a question of these pictures means for the conversation."""
        if not talk.turns:
            return ""
        if (talk.pictures, talk.found) != (ids, find):
            return "A new conversation, since the pictures are others."
        if len(talk.turns) >= MAX_TURNS:
            return f"A new conversation, since the one before had {MAX_TURNS} questions."
        if self.is_embedded:
            return (
                "This small model was trained on single questions: from the second one on its answers are often "
                "wrong. New conversation asks afresh."
            )
        return ""

    def is_in_conversation(self, session: str) -> bool:
        """Whether something was said to a visitor that stands, or an answer is awaited."""
        with self.visitors.visit(session, keep=False) as visitor:
            return visitor.is_in_conversation

    def new_conversation(self, session: str, number: int = 0) -> None:
        """Forget the conversation, and end an answer that is being made.

        Args:
            number: of the new conversation, from 1 on. A question of one before it that arrives later is not answered.
        """
        check_number("number", number, 0, MAX_NUMBER)
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
        remark: str,
    ) -> Iterator[Exchange]:
        summary = Fwd2BotSummary.cat([picture.summary for picture in pictures]).truncate(length)
        earlier = tuple(talk.turns)
        exchange = Exchange(question, pictures, Answer(), earlier=earlier, remark=remark)
        prompt = self._prompt(question, [(turn.question, turn.answer.text) for turn in earlier], len(pictures))
        try:
            for answer in answer_from_summaries(self.model, self.processor, prompt, summary, stop, self._places):
                exchange = replace(exchange, summary=answer)
                yield exchange
        except VisitorError:
            raise
        except ValueError as error:
            raise VisitorError(f"{error} Begin a new conversation, or choose fewer pictures.") from error
        if uncompressed and not stop.is_set():
            try:
                images = [picture.image() for picture in pictures]
                said = [(one.question, _said_uncompressed(one)) for one in earlier]
                prompt = self._prompt(question, said, len(pictures))
                for answer in answer_uncompressed(self.model, self.processor, prompt, images, stop, self._places):
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
            with self._places:
                maps = attention_maps(self.model, self.processor, image, num_summary_tokens=length)
        except ValueError as error:
            note = str(error)
        closeness = []
        if texts:
            scores = self.embed(self._compress_texts(texts), length) @ self.embed(picture.summary, length)[0]
            closeness = sorted(zip(texts, scores.tolist(), strict=True), key=lambda pair: -pair[1])
        tokens, width = self.image_tokens(image), self.model.summary_projector.out_features
        return Look(
            picture,
            maps,
            note,
            closeness,
            length * width * STORED.itemsize,
            tokens * width * STORED.itemsize,
            len(encode(image, 75)),
        )

    def image_tokens(self, image: Any) -> int:
        """As how many tokens the model reads a picture without compression."""
        return int((self.processor.process_images([image])["input_ids"] == self.model.image_token_id).sum())

    # Checks

    def _check_length(self, length: Any) -> None:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= self.max_length:
            raise VisitorError(f"The length k must be a whole number from 1 to {self.max_length}, not {length!r}.")

    def _check_text(self, text: Any, what: str) -> str:
        return check_text(text, what, self.processor.image_token, latin_only=self.is_embedded)


def _said_uncompressed(turn: Turn) -> str:
    """What the uncompressed side of a conversation goes on from: its own answer where there was one."""
    return (turn.uncompressed.text if turn.uncompressed else "") or turn.answer.text
