"""Rows of training: a picture of the drawn world, and texts about it as packed token ids."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .recipe import BackboneData, Fwd2BotData
from .scenes import Scene, altered, ask, describe, hard_negatives, render, scene, short_caption

IGNORED = -100  # the label of a token that is not learnt
DESCRIBE = "Describe the picture."


@dataclass(frozen=True)
class Conversation:
    """One question about a picture, and its answer."""

    question: str
    answer: str

    def messages(self) -> list[dict[str, Any]]:
        """As chat messages, the picture first."""
        content = [{"type": "image"}, {"type": "text", "text": self.question}]
        return [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": self.answer}]},
        ]


class Packer:
    """Token ids of conversations as the chat template writes them, cut after the image token.

    Args:
        tokenizer: a fast one, with a chat template and an `image_token`.
        num_image_tokens: how many image tokens the prefix holds: all patches for the backbone, 1 for Fwd2Bot.

    Raises ValueError if the chat template does not write image, question and answer in this order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_image_tokens: int):
        # a copy, since a call that pads or truncates leaves the tokenizer doing so
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        image = tokenizer.image_token
        marks = Conversation("[question]", "[answer]")
        prompt = tokenizer.apply_chat_template(marks.messages()[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(marks.messages(), tokenize=False)
        before, found, asked = prompt.partition(image)
        self._asked = asked.split(marks.question)  # what stands around the question
        self._told = whole[len(prompt) :].split(marks.answer)
        if not (found and whole.startswith(prompt) and len(self._asked) == len(self._told) == 2):
            raise ValueError(
                f"the chat template writes {whole!r}; training needs one {image!r}, then the question, then the answer"
            )
        self.prefix: list[int] = tokenizer(before + image * num_image_tokens)["input_ids"]

    def segments(self, conversations: Sequence[Conversation]) -> list[tuple[list[int], list[int]]]:
        """What follows the image tokens: ids, and labels that are IGNORED but for the answer and the end token."""
        texts = [self._asked[0] + one.question + self._asked[1] for one in conversations]
        texts += [self._told[0] + one.answer + self._told[1] for one in conversations]
        ids = [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        pairs = zip(ids[: len(conversations)], ids[len(conversations) :], strict=True)
        return [(asked + told, [IGNORED] * len(asked) + told) for asked, told in pairs]

    def row(self, conversations: Sequence[Conversation], length: int) -> dict[str, list[int]]:
        """Pack the conversations that fit into `length` tokens; no padding yet.

        Raises ValueError if not even one fits.
        """
        ids = list(self.prefix)
        labels = [IGNORED] * len(ids)
        segment_ids = [0] * len(ids)
        number = 0
        for segment, segment_labels in self.segments(conversations):
            if len(ids) + len(segment) > length:
                continue
            number += 1
            ids += segment
            labels += segment_labels
            segment_ids += [number] * len(segment)
        if not number:
            raise ValueError(f"no conversation fits into a row of {length} tokens; raise data.row_length")
        return {"input_ids": ids, "labels": labels, "segment_ids": segment_ids}


class TrainingRows(torch.utils.data.Dataset):
    """Row `i` shows picture `i % pictures`; its texts are drawn from a seed of its own, so every round has new ones.

    Args:
        data: the recipe's section.
        pixels: (pictures, H, W, 3) uint8, from `draw_pictures`.
        packer: the tokeniser of rows.
    """

    def __init__(self, data: BackboneData, pixels: datasets.Dataset, packer: Packer, split: str = "train"):
        self.data, self.pixels, self.packer, self.split = data, pixels, packer, split

    def __len__(self) -> int:
        return len(self.pixels) * self.data.rounds

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = index % len(self.pixels)
        one = scene(self.split, picture, shapes_only=self.data.shapes_only)
        rng = random.Random(f"{self.data.seed}/{self.split}/{index}")
        row = self.packer.row(self._conversations(one, rng), self.data.row_length)
        row["pixels"] = self.pixels[picture]["pixels"]
        row.update(self._texts(one, rng))
        return row

    def _conversations(self, one: Scene, rng: random.Random) -> list[Conversation]:
        told = [Conversation(DESCRIBE, describe(one, rng))] if rng.random() < self.data.descriptions else []
        asked = []
        for kind, number in self.data.questions.items():
            count = int(number) + (rng.random() < number % 1)  # 2.5 of a kind: two or three
            asked += [Conversation(q.text, q.answer) for q in ask(one, rng, count, (kind,))]
        rng.shuffle(asked)
        return told + asked

    def _texts(self, one: Scene, rng: random.Random) -> dict[str, Any]:
        return {}


class CaptionedRows(TrainingRows):
    """Rows with texts for the contrastive side.

    Each adds `scene`, `full` (a description), `full_negatives` (descriptions false in one detail), `short` (Captions),
    `negatives` (short captions false of it), and a `coin` in 0..1, by which the collator chooses among them.
    """

    data: Fwd2BotData

    def _texts(self, one: Scene, rng: random.Random) -> dict[str, Any]:
        negatives = [false for _, false in hard_negatives(one, rng).values()] if self.data.hard_negatives else []
        rng.shuffle(negatives)
        return {
            "scene": one,
            "coin": rng.random(),
            "full": describe(one, rng),
            "full_negatives": [describe(altered(one, rng), rng) for _ in range(self.data.full_negatives)],
            "short": [short_caption(one, rng) for _ in range(self.data.short_captions)],
            "negatives": negatives[: self.data.hard_negatives],
        }


def draw_pictures(data: BackboneData, folder: str | Path, num_proc: int = 2, split: str = "train") -> datasets.Dataset:
    """Render the pictures once into an Arrow cache under `folder`; later runs with the same settings reuse it.

    Returns a dataset of `pixels`, (H, W, 3) uint8 arrays.
    """
    cached = datasets.Dataset.from_generator(
        _render_all,
        gen_kwargs={
            "indices": list(range(data.pictures)),
            "split": split,
            "shapes_only": data.shapes_only,
        },
        features=datasets.Features({"pixels": datasets.Value("binary")}),
        cache_dir=str(folder),
        num_proc=min(num_proc, data.pictures) if num_proc > 1 else None,
        split=split,
    )
    return cached.with_transform(_to_arrays)


def _render_all(indices: list[int], split: str, shapes_only: bool) -> Iterator[dict[str, bytes]]:
    for index in indices:
        yield {"pixels": np.asarray(render(scene(split, index, shapes_only=shapes_only))).tobytes()}


def _to_arrays(rows: dict[str, list[bytes]]) -> dict[str, list[np.ndarray]]:
    arrays = [np.frombuffer(pixels, dtype=np.uint8) for pixels in rows["pixels"]]
    side = int((arrays[0].size // 3) ** 0.5)
    return {"pixels": [array.reshape(side, side, 3) for array in arrays]}
