"""What a row becomes for its source's use: captions sorted to the losses, encoded conversations, decoded pictures."""

import hashlib
import random
from typing import Any

import numpy as np
from PIL import Image

from fwd2bot.pictures_fwd2bot import load_image

from ..source_recipe import SourcesData
from .conversations import ConversationEncoder


class SamplePreparer:
    """Prepares samples as `RowReader` reads them; called in the workers of the DataLoader.

    A caption of fewer than `contrastive_max_tokens` tokens goes to the contrastive side, another is learnt word by
    word, as the answer to one of `caption_prompts`; with null each goes to both. A source of use `ar` has all its
    captions learnt, one of use `contrastive` only gives those of the contrastive side. Of several captions
    `captions_per_image` are drawn for the contrastive side and one to be learnt.

    Args:
        encoder: of the backbone's chat template.
    """

    def __init__(self, data: SourcesData, encoder: ConversationEncoder):
        self.data, self.encoder = data, encoder
        self.uses = {source.name: source.use for source in data.sources}

    def __call__(self, sample: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
        """The sample for a collator, or None if nothing of it is for its source's use.

        Adds `input_ids`, `labels`, `text` (the conversation, if there is one), `from_caption`, whether that was made
        of a caption, opens `images` and adds `image_groups`, a 64-bit hash of each image's pixels.

        Raises:
            ValueError, OSError: for a broken picture or a row that the chat template cannot write.
        """
        use = self.uses[sample["source"]]
        short, learnt = self._by_length(sample["captions"], use)
        messages = sample["messages"]
        if messages is None and learnt:
            messages = self._caption_conversation(rng.choice(learnt), rng)
        prepared = sample | {"messages": None, "input_ids": None, "labels": None, "text": None}
        prepared["from_caption"] = sample["messages"] is None and messages is not None
        if messages is not None:
            fitted = self.encoder.fitting(messages, self.data.max_length)
            if fitted is not None:
                prepared["messages"], encoded = fitted
                prepared |= {"input_ids": encoded.input_ids, "labels": encoded.labels, "text": encoded.text}
        prepared["captions"] = rng.sample(short, min(len(short), self.data.captions_per_image))
        prepared["negatives"] = sample["negatives"] if short else []
        if prepared["messages"] is None and not prepared["captions"]:
            return None
        if prepared["messages"] is not None:  # pictures of turns that were left out go with them
            shown = sum(part["type"] == "image" for message in prepared["messages"] for part in message["content"])
            prepared["images"] = prepared["images"][:shown]
        prepared["images"] = [self.open_image(image) for image in prepared["images"]]
        prepared["image_groups"] = [content_hash(image) for image in prepared["images"]]
        return prepared

    def _by_length(self, captions: list[str], use: str) -> tuple[list[str], list[str]]:
        """Captions for the contrastive side, and captions to be learnt."""
        if use == "ar":
            return [], captions
        limit = self.data.contrastive_max_tokens
        if limit is None:
            return captions, captions if use == "both" else []
        short = [caption for caption in captions if self.encoder.num_tokens(caption) < limit]
        return short, [caption for caption in captions if caption not in short] if use == "both" else []

    def _caption_conversation(self, caption: str, rng: random.Random) -> list[dict[str, Any]]:
        asked = [{"type": "image"}, {"type": "text", "text": rng.choice(self.data.caption_prompts)}]
        return [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": caption}]},
        ]

    def open_image(self, image: bytes | str) -> Image.Image:
        """The decoded picture, at most `max_image_side` pixels on its longer side."""
        picture = load_image(image)
        side = self.data.max_image_side
        if side is not None and max(picture.size) > side:
            picture.thumbnail((side, side), Image.Resampling.BICUBIC)
        return picture


def content_hash(content: str | Image.Image) -> int:
    """64 bits of a text (case and white space do not count) or of a picture's pixels; the same in every process."""
    if isinstance(content, str):
        parts = [" ".join(content.lower().split()).encode()]
    else:
        parts = [f"{content.size}{content.mode}".encode(), np.ascontiguousarray(content).data]
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)
