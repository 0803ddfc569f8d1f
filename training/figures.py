"""Figures of a Fwd2Bot on a data set: answers, captions and retrieval, uncompressed beside every length k."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from .answering import answer_from_summary, answer_uncompressed
from .caption_scores import caption_scores
from .metrics import recall_at_k
from .source_recipe import SourcesData
from .sources import ConversationEncoder, MalformedRowError, SamplePreparer, Source, UnusableRowsError, content_hash
from .sources.tables import rows_of
from .validation import KS, normalised, question_of

logger = logging.get_logger(__name__)

UNCOMPRESSED = "uncompressed"


@dataclass
class Judged:
    """What is asked of a model about one row, its pictures opened.

    Args:
        messages: up to the answer. expected: that answer, or None for a caption, whose true ones are `captions`.
        image_group: hash of the first picture's pixels.
    """

    images: list[Any]
    image_group: int
    messages: list[dict[str, Any]]
    expected: str | None
    captions: list[str]


class SourceReader:
    """The rows of a source, in order, as what is asked; broken rows are logged, counted and left out.

    A row of questions gives its last question; one of captions is asked for a caption, by the first of
    `data.caption_prompts`. Rows without pictures have nothing to compress and are passed over.

    Raises:
        UnusableRowsError: in use, for more than `data.max_broken` broken rows.
    """

    def __init__(self, source: Source, data: SourcesData, processor: Any):
        self.source, self.data = source, data
        self.open_image = SamplePreparer(data, ConversationEncoder(processor)).open_image
        self.num_broken = 0

    def __call__(self, limit: int | None = None) -> Iterator[Judged]:
        found = 0
        table = self.source.table
        rows = rows_of(table) if self.source.streamed else (table[index] for index in range(len(table)))
        for number, row in enumerate(rows):
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

    def _judged(self, row: dict[str, Any], number: int) -> Judged | None:
        sample = self.source.read(row, number)
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
        return Judged(images, content_hash(images[0]), *asked, sample["captions"])

    def _count(self, key: str, error: Exception) -> None:
        self.num_broken += 1
        name, most = self.source.recipe.name, self.data.max_broken
        logger.warning(f"sources[{name!r}], {key}: {error} ({self.num_broken} of at most {most} broken)")
        if self.num_broken > most:
            raise UnusableRowsError(
                f"{self.num_broken} rows of {name!r} are broken, more than max_broken={most}; the last was {key}: "
                f"{error}. Mend the data, or raise max_broken"
            ) from error


@dataclass
class _Gathered:
    """What a model said and found in one setting; every different picture counts once in retrieval and captions."""

    answers: list[str] = field(default_factory=list)
    captions: dict[int, str] = field(default_factory=dict)  # by image group
    embeds: dict[int, torch.Tensor] = field(default_factory=dict)  # by image group


@torch.no_grad()
def source_figures(
    model: Any,
    processor: Any,
    reader: SourceReader,
    lengths: Sequence[int],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    uncompressed: bool = True,
) -> dict[str, Any]:
    """Figures of a Fwd2Bot on one source: "rows", "pictures", for "uncompressed" and each "k=..." a dict.

    Where there are captions, "captions" counts the true ones.

    Of questions: `exact_match`, the share of answers that equal the expected one but for case, surrounding white space
    and final punctuation. Of captions: `captions`, the scores of a greedy caption against all true ones of the picture
    (see `caption_scores`), and, compressed only, `text_to_image` and `image_to_text`, recall at 1, 5 and 10. Rows
    with the same picture, pixel by pixel, are one picture with the captions of all of them; a caption that stands at
    several pictures is a hit for each. `bytes_per_image` counts two bytes a number; uncompressed, the image tokens as
    they enter the language model, the mean over the pictures.

    Args:
        model, processor: a Fwd2Bot, in evaluation mode.
        lengths: lengths k, each at most `config.num_summary_tokens`.
        limit: rows, the first; None is all of them. batch_size: rows at once.
        max_new_tokens: of an answer or a caption.
        uncompressed: whether the backbone on all image tokens is asked as well.

    Raises:
        ValueError: the source has nothing to judge by. UnusableRowsError: too many broken rows.
    """
    settings = ([UNCOMPRESSED] if uncompressed else []) + [f"k={k}" for k in lengths]
    gathered = {setting: _Gathered() for setting in settings}
    expected: list[str] = []
    references: dict[int, list[str]] = {}
    image_tokens, groups, rows = [], set(), 0
    for part in _batches(tqdm(reader(limit), desc=reader.source.recipe.name, leave=False), batch_size):
        prompts = [
            processor.backbone_processor.apply_chat_template(one.messages, add_generation_prompt=True) for one in part
        ]
        inputs = processor.process_images([image for one in part for image in one.images]).to(model.device)
        image_tokens += _image_tokens(inputs, model)
        summary = model.compress(**inputs, num_summary_tokens=max(lengths))
        rows += len(part)
        firsts = _firsts([len(one.images) for one in part])
        for one in part:
            groups.add(one.image_group)
            if one.expected is None:
                own = references.setdefault(one.image_group, [])
                own += [caption for caption in one.captions if caption not in own]
            else:
                expected.append(one.expected)
        for setting in settings:
            if setting == UNCOMPRESSED:
                images = [one.images for one in part]
                ids = answer_uncompressed(model, processor.backbone_processor, images, prompts, max_new_tokens)
                embeds = None
            else:
                short = summary.truncate(int(setting.removeprefix("k=")))
                ids = answer_from_summary(model, processor, short, prompts, max_new_tokens)
                embeds = model.embed(summary=short).cpu()
            said = processor.batch_decode(ids, skip_special_tokens=True)
            for one, text, first in zip(part, said, firsts, strict=True):
                if one.expected is not None:
                    gathered[setting].answers.append(text.strip())
                    continue
                gathered[setting].captions.setdefault(one.image_group, text.strip())
                if embeds is not None:
                    gathered[setting].embeds.setdefault(one.image_group, embeds[first])
    if not image_tokens:
        raise ValueError(
            f"sources[{reader.source.recipe.name!r}] has no row with a picture and a question or a caption to judge by"
        )
    width = model.config.get_text_config().hidden_size
    figures: dict[str, Any] = {"rows": rows, "pictures": len(groups)}
    if references:
        figures["captions"] = sum(map(len, references.values()))
    texts = sorted({caption for own in references.values() for caption in own}, key=len)
    text_embeds = _text_embeds(model, processor, texts, lengths, batch_size)
    for setting, seen in gathered.items():
        figures[setting] = one = {}
        if expected:
            one["exact_match"] = _right(seen.answers, expected)
        if len(references) > 1:
            one["captions"] = caption_scores([seen.captions[group] for group in references], [*references.values()])
        if references and setting != UNCOMPRESSED:
            images = torch.stack([seen.embeds[group] for group in references])
            one |= caption_recall(images, text_embeds[setting], [*references.values()], texts)
        tokens = sum(image_tokens) / len(image_tokens) if setting == UNCOMPRESSED else int(setting.removeprefix("k="))
        one["bytes_per_image"] = round(2 * width * tokens)
    return figures


def _right(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal the expected one but for case, white space around it and final punctuation."""
    right = [normalised(one) == normalised(truth) for one, truth in zip(answers, expected, strict=True)]
    return sum(right) / len(right)


def caption_recall(
    images: torch.Tensor, texts: torch.Tensor, captions: Sequence[Sequence[str]], words: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10 (as far as there are so many candidates) from texts to images and back.

    Args:
        images: `(N, e)`, one of each different picture. texts: `(M, e)`, one of each different caption.
        captions: the captions of each picture. words: the caption of each row of `texts`.
    """
    row = {word: index for index, word in enumerate(words)}
    own = torch.zeros(len(images), len(texts), dtype=torch.bool)  # (N, M)
    for index, texts_of_one in enumerate(captions):
        own[index, [row[text] for text in texts_of_one]] = True
    scores = images @ texts.T  # (N, M)

    def recall(scores: torch.Tensor, own: torch.Tensor) -> dict[str, float]:
        return recall_at_k(scores, own, [k for k in KS if k <= scores.shape[1]])

    return {"text_to_image": recall(scores.T, own.T), "image_to_text": recall(scores, own)}


def _text_embeds(
    model: Any, processor: Any, texts: Sequence[str], lengths: Sequence[int], batch_size: int
) -> dict[str, torch.Tensor]:
    """Embeddings `(M, e)` of the texts at each length."""
    embeds: dict[str, list[torch.Tensor]] = {f"k={k}": [] for k in lengths}
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", leave=False):
        inputs = processor.process_texts(list(texts[start : start + batch_size])).to(model.device)
        summary = model.compress(**inputs, num_summary_tokens=max(lengths))
        for k in lengths:
            embeds[f"k={k}"].append(model.embed(summary=summary, num_summary_tokens=k).cpu())
    return {setting: torch.cat(parts) for setting, parts in embeds.items() if parts}


def _batches(rows: Iterator[Judged], size: int) -> Iterator[list[Judged]]:
    batch: list[Judged] = []
    for one in rows:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _firsts(counts: Sequence[int]) -> list[int]:
    """Where each row's pictures begin among those of all rows."""
    return [sum(counts[:index]) for index in range(len(counts))]


def _image_tokens(inputs: Any, model: Any) -> list[int]:
    """Image tokens of each picture, from the inputs of the compress pass."""
    return (inputs["input_ids"] == model.image_token_id).sum(1).tolist()
