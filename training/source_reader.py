"""The rows of a data set as what is asked of a model about them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from .presence import presence_questions
from .source_recipe import SourcesData
from .sources import ConversationEncoder, MalformedRowError, SamplePreparer, Source, UnusableRowsError, content_hash
from .sources.tables import rows_of
from .validation import question_of

logger = logging.get_logger(__name__)


@dataclass
class Judged:
    """What is asked of a model about one row, its pictures opened.

    Args:
        messages: up to the answer. expected: that answer, or None for a caption, whose true ones are `captions`.
        image_group: hash of the first picture's pixels. negatives: captions that are not true.
        answers, group, category: see `answer_figures.Asked`.
    """

    images: list[Any]
    image_group: int
    messages: list[dict[str, Any]]
    expected: str | None
    captions: list[str]
    negatives: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    group: str | None = None
    category: str | None = None


class SourceReader:
    """The rows of a source, in order, as what is asked; broken rows are logged, counted and left out.

    A row of questions gives its last question; one of captions is asked for a caption, by the first of
    `data.caption_prompts`. Rows without pictures have nothing to compress and are passed over. A row of format objects
    gives the questions of `presence_questions`, whose sort is the category.

    Raises:
        UnusableRowsError: in use, for more than `data.max_broken` broken rows.
    """

    def __init__(self, source: Source, data: SourcesData, processor: Any):
        self.source, self.data = source, data
        self.open_image = SamplePreparer(data, ConversationEncoder(processor)).open_image
        self.num_broken = 0

    def __call__(self, limit: int | None = None) -> Iterator[Judged]:
        if self.source.recipe.format == "objects":
            yield from self._asked_for_objects(limit)
            return
        found = 0
        for number, row in self._rows():
            if found == limit:
                return
            try:
                one = self._judged(row, number)
            except (MalformedRowError, ValueError, OSError) as error:
                self._count(self.source.read.key(row, number), error)
                continue
            if one is not None:
                found += 1
                yield one

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        table = self.source.table
        return enumerate(rows_of(table) if self.source.streamed else (table[index] for index in range(len(table))))

    def _asked_for_objects(self, limit: int | None) -> Iterator[Judged]:
        """The questions about the first so many pictures; what is popular is counted over all rows."""
        numbers, objects = [], []
        for number, row in self._rows():
            try:
                objects.append(self.source.read.objects(row))
            except MalformedRowError as error:
                self._count(self.source.read.key(row, number), error)
                continue
            numbers.append(number)
        asked: dict[int, list[Any]] = {}
        for question in presence_questions(objects):
            asked.setdefault(numbers[question.picture], []).append(question)
        shown = 0
        for number, row in self._rows():
            if shown == limit:
                return
            if number not in asked:
                continue
            try:
                sample = self.source.read(row, number)
                images = [self.open_image(image) for image in sample["images"]]
            except (MalformedRowError, ValueError, OSError) as error:
                self._count(self.source.read.key(row, number), error)
                continue
            shown += 1
            for question in asked[number]:
                text = question.text() + self.source.recipe.question_suffix
                messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                yield Judged(images, content_hash(images[0]), messages, question.answer, [], category=question.sort)

    def _judged(self, row: dict[str, Any], number: int) -> Judged | None:
        sample = self.source.read(row, number)
        about = self.source.read.about(row)
        if not sample["images"]:
            return None
        if sample["captions"]:
            parts = [{"type": "image"}, {"type": "text", "text": self.data.caption_prompts[0]}]
            asked: tuple[list, str | None] = ([{"role": "user", "content": parts}], None)
        else:
            question = question_of(sample)
            if question is None:
                return None
            asked = question
            shown = sum(part["type"] == "image" for message in asked[0] for part in message["content"])
            if not shown:
                return None
            sample["images"] = sample["images"][:shown]
        images = [self.open_image(image) for image in sample["images"]]
        return Judged(images, content_hash(images[0]), *asked, sample["captions"], sample["negatives"], **about)

    def _count(self, key: str, error: Exception) -> None:
        self.num_broken += 1
        name, most = self.source.recipe.name, self.data.max_broken
        logger.warning(f"sources[{name!r}], {key}: {error} ({self.num_broken} of at most {most} broken)")
        if self.num_broken > most:
            raise UnusableRowsError(
                f"{self.num_broken} rows of {name!r} are broken, more than max_broken={most}; the last was {key}: "
                f"{error}. Mend the data, or raise max_broken"
            ) from error
