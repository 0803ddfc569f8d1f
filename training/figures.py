"""Figures of a Fwd2Bot on a data set: answers, captions and retrieval, uncompressed beside every length k."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from .answer_figures import Asked, answer_figures
from .answering import answer_from_summary, answer_uncompressed
from .caption_scores import caption_scores
from .metrics import recall_at_k
from .source_reader import Judged, SourceReader
from .validation import KS

UNCOMPRESSED = "uncompressed"


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
    retrieval: bool = True,
) -> dict[str, Any]:
    """Figures of a Fwd2Bot on one source: "rows", "pictures", for "uncompressed" and each "k=..." a dict.

    Where there are captions, "captions" counts the true ones.

    Of questions: see `answer_figures`. Of captions: `captions`, the scores of a greedy caption against all true ones
    of the picture (see `caption_scores`), and, compressed only, `text_to_image` and `image_to_text`, recall at 1, 5
    and 10. Rows with the same picture, pixel by pixel, are one picture with the captions of all of them; a caption
    that stands at several pictures is a hit for each. `bytes_per_image` counts two bytes a number; uncompressed, the
    image tokens as they enter the language model, the mean over the pictures.

    Args:
        model, processor: a Fwd2Bot, in evaluation mode.
        lengths: lengths k, each at most `config.num_summary_tokens`; none: the bare backbone alone.
        limit: rows, the first; None is all of them. batch_size: rows at once.
        max_new_tokens: of an answer or a caption.
        uncompressed: whether the backbone on all image tokens is asked as well.
        retrieval: whether captions are searched for, too; not with a model that embeds nothing.

    Raises:
        ValueError: the source has nothing to judge by. UnusableRowsError: too many broken rows.
    """
    settings = ([UNCOMPRESSED] if uncompressed else []) + [f"k={k}" for k in lengths]
    gathered = {setting: _Gathered() for setting in settings}
    asked: list[Asked] = []
    references: dict[int, list[str]] = {}
    image_tokens, groups, rows = [], set(), 0
    for part in batches(tqdm(reader(limit), desc=reader.source.recipe.name, leave=False), batch_size):
        prompts = [
            processor.backbone_processor.apply_chat_template(one.messages, add_generation_prompt=True) for one in part
        ]
        inputs = processor.process_images([image for one in part for image in one.images]).to(model.device)
        image_tokens += num_image_tokens(inputs, model)
        summary = model.compress(**inputs, num_summary_tokens=max(lengths)) if lengths else None
        rows += len(part)
        firsts = _firsts([len(one.images) for one in part])
        for one in part:
            groups.add(one.image_group)
            if one.expected is None:
                own = references.setdefault(one.image_group, [])
                own += [caption for caption in one.captions if caption not in own]
            else:
                asked.append(Asked(one.expected, one.answers, one.group, one.category))
        for setting in settings:
            if setting == UNCOMPRESSED:
                images = [one.images for one in part]
                ids = answer_uncompressed(model, processor.backbone_processor, images, prompts, max_new_tokens)
                embeds = None
            else:
                short = summary.truncate(int(setting.removeprefix("k=")))
                ids = answer_from_summary(model, processor, short, prompts, max_new_tokens)
                embeds = model.embed(summary=short).cpu() if retrieval else None
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
    numbers = summary.tokens.shape[-1] if lengths else width  # of a summary token
    figures: dict[str, Any] = {"rows": rows, "pictures": len(groups)}
    if references:
        figures["captions"] = sum(map(len, references.values()))
    texts = sorted({caption for own in references.values() for caption in own}, key=len)
    text_embeds = embed_texts(model, processor, texts, lengths, batch_size) if retrieval and lengths else {}
    for setting, seen in gathered.items():
        figures[setting] = one = {}
        if asked:
            one |= answer_figures(seen.answers, asked)
        if len(references) > 1:
            one["captions"] = caption_scores([seen.captions[group] for group in references], [*references.values()])
        if references and setting in text_embeds:
            images = torch.stack([seen.embeds[group] for group in references])
            one |= caption_recall(images, text_embeds[setting], [*references.values()], texts)
        if setting == UNCOMPRESSED:
            one["bytes_per_image"] = round(2 * width * sum(image_tokens) / len(image_tokens))
        else:
            one["bytes_per_image"] = 2 * numbers * int(setting.removeprefix("k="))
    return figures


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


def embed_texts(
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


def batches(rows: Iterator[Judged], size: int) -> Iterator[list[Judged]]:
    """The rows in lists of so many."""
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


def num_image_tokens(inputs: Any, model: Any) -> list[int]:
    """Image tokens of each picture, from the inputs of the compress pass."""
    return (inputs["input_ids"] == model.image_token_id).sum(1).tolist()
