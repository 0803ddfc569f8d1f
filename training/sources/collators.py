"""Batches of prepared samples: cut into chunks for a Fwd2Bot, or whole for a plain backbone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fwd2bot import Fwd2BotProcessor
from fwd2bot.losses_fwd2bot import different_content
from fwd2bot.processing_fwd2bot import adds_special_tokens

from ..data import IGNORED
from .samples import content_hash

Samples = Sequence[dict[str, Any]]


class SourceCollator:
    """Batches for `Fwd2BotTrainer`: chunks of images with their conversations, and the texts of the contrastive side.

    The samples of a batch are put in the order of their conversations' lengths, those without one first, and the texts
    in the order of theirs, so that a chunk is padded little.

    Args:
        processor: of the Fwd2Bot.
        chunk_size: samples (and texts) to a chunk; None: one chunk.
        with_texts: whether there is a contrastive side.

    Returns, when called, a dict of
        chunks: for each the `compress_` tensors of its images, if it has any, and of its conversations, if it has any,
            `input_ids`, `attention_mask`, `labels` (r, L), `placeholder_image` (P,), the image's row in the chunk that
            each image placeholder shows.
        text_chunks: `input_ids`, `attention_mask` (m, T) of captions and hard negatives; empty without any caption.
        text_image: (M,) the image's row in the batch (over all chunks) that each text describes, -1: a hard negative.
        text_image_mask: (N, M) bool, False where a text is no negative of an image, since it is, or equals, a caption
            of it or of an equal image.
        text_group, image_group: (M,), (N,) long, hashes of the content, equal for equal content in every process.
    """

    def __init__(self, processor: Fwd2BotProcessor, chunk_size: int | None = None, with_texts: bool = True):
        self.processor, self.chunk_size, self.with_texts = processor, chunk_size, with_texts

    def __call__(self, samples: Samples) -> dict[str, Any]:
        samples = sorted(samples, key=lambda sample: len(sample["input_ids"] or ()))
        images = [group for sample in samples for group in sample["image_groups"]]
        batch: dict[str, Any] = {"chunks": [self.chunk(part) for part in self._parts(samples)]}
        batch["image_group"] = torch.tensor(images, dtype=torch.long)  # (N,)
        return batch | self.texts(samples)

    def chunk(self, samples: Samples) -> dict[str, torch.Tensor]:
        images = [image for sample in samples for image in sample["images"]]
        chunk = {}
        if images:
            chunk |= {f"compress_{name}": value for name, value in self.processor.process_images(images).items()}
        rows = [sample for sample in samples if sample["input_ids"] is not None]
        if rows:
            chunk |= padded(rows, self.processor.tokenizer.pad_token_id)
            first, shown = 0, []
            for sample in samples:
                if sample["input_ids"] is not None:
                    shown += range(first, first + len(sample["images"]))
                first += len(sample["images"])
            chunk["placeholder_image"] = torch.tensor(shown, dtype=torch.long)  # (P,)
        return chunk

    def texts(self, samples: Samples) -> dict[str, Any]:
        captions, negatives, image = [], [], 0
        for sample in samples if self.with_texts else ():
            captions += [(caption, image) for caption in sample["captions"]]
            negatives += [(text, -1) for text in sample["negatives"]] if sample["captions"] else []
            image += len(sample["images"])
        texts = sorted([*captions, *negatives], key=lambda text: len(text[0])) if captions else []
        text_image = torch.tensor([owner for _, owner in texts], dtype=torch.long)  # (M,)
        text_group = torch.tensor([content_hash(text) for text, _ in texts], dtype=torch.long)
        groups = torch.tensor([group for sample in samples for group in sample["image_groups"]], dtype=torch.long)
        encoded = [self.processor.process_texts([t for t, _ in part], truncation=True) for part in self._parts(texts)]
        return {
            "text_chunks": [dict(one) for one in encoded],
            "text_image": text_image,
            "text_image_mask": different_content(text_image, text_group, groups),
            "text_group": text_group,
        }

    def _parts(self, whole: Sequence[Any]) -> Iterator[Sequence[Any]]:
        size = self.chunk_size or max(len(whole), 1)
        return (whole[start : start + size] for start in range(0, len(whole), size))


class SourceBackboneCollator:
    """Batches for a plain backbone: what its own processor gives for the images and the conversations, and `labels`.

    Args:
        processor: a Fwd2BotProcessor around the backbone's own.

    Raises:
        ValueError: when called, for a processor that does not write the conversation as the chat template has it.
    """

    def __init__(self, processor: Fwd2BotProcessor):
        self.processor = processor

    def __call__(self, samples: Samples) -> dict[str, torch.Tensor]:
        texts = [sample["text"] for sample in samples]
        images = [sample["images"] for sample in samples]
        batch = self.processor.backbone_processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=adds_special_tokens(self.processor.tokenizer, texts),
        )
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for row, sample in enumerate(samples):
            used = batch["attention_mask"][row].bool()
            batch["labels"][row, used] = torch.tensor(self._aligned(batch["input_ids"][row, used].tolist(), sample))
        return dict(batch)

    def _aligned(self, written: list[int], sample: dict[str, Any]) -> list[int]:
        """Labels for ids in which every image token has become what the processor writes for the image."""
        ids, image_token = sample["input_ids"], self.processor.image_token_id
        cuts = [-1, *(place for place, token in enumerate(ids) if token == image_token), len(ids)]
        labels = [IGNORED] * len(written)
        position = 0
        for number, (before, after) in enumerate(zip(cuts, cuts[1:], strict=False)):
            words = ids[before + 1 : after]
            start = self._find(words, written, position, image=number > 0, last=after == len(ids))
            if start is None or (after == len(ids) and start + len(words) != len(written)):
                name = type(self.processor.backbone_processor).__name__
                raise ValueError(
                    f"{name} does not write the words of the chat template as they are, so its labels cannot be told. "
                    "Train this family as the backbone of a Fwd2Bot (kind: fwd2bot), or use another one."
                )
            labels[start : start + len(words)] = sample["labels"][before + 1 : after]
            position = start + len(words)
        return labels

    def _find(self, words: list[int], written: list[int], position: int, image: bool, last: bool) -> int | None:
        """Where words stand: those after an image somewhere after `position`, the first at it, the last at the end."""
        first, end = position, len(written) - len(words)
        if image:
            if self.processor.image_token_id not in written[position:]:
                return None
            first = written.index(self.processor.image_token_id, position) + 1
        starts = range(first, end + 1) if image and not last else [end if image else first]
        return next((s for s in starts if first <= s and written[s : s + len(words)] == words), None)


def padded(rows: Samples, pad_token_id: int | None) -> dict[str, torch.Tensor]:
    """Conversations as `input_ids`, `attention_mask`, `labels` (r, L), padded on the left."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_token_id or 0, "attention_mask": 0, "labels": IGNORED}
    batch = {name: torch.full((len(rows), length), value) for name, value in fill.items()}
    for index, row in enumerate(rows):
        place = slice(length - len(row["input_ids"]), length)
        batch["input_ids"][index, place] = torch.tensor(row["input_ids"])
        batch["labels"][index, place] = torch.tensor(row["labels"])
        batch["attention_mask"][index, place] = 1
    return batch
