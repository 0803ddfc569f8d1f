"""Rows of training: a picture of the drawn world, and texts about it as packed token ids."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .recipe import BackboneData, Fwd2BotData
from .scenes import (
    DESCRIBE,
    Scene,
    altered,
    ask,
    ask_several,
    companions,
    describe,
    hard_negatives,
    render,
    scene,
    short_caption,
)

IGNORED = -100  # the label of a token that is not learnt
DESCRIBE_ONE = "Describe picture {}."


@dataclass(frozen=True)
class Conversation:
    """One question about a picture, or about several, and its answer."""

    question: str
    answer: str

    def messages(self, pictures: int = 1) -> list[dict[str, Any]]:
        """As chat messages, the pictures first."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": self.question}]
        return [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": self.answer}]},
        ]


@dataclass(frozen=True)
class _Form:
    """What the chat template writes around a question about some number of pictures, and around its answer."""

    prefix: list[int]  # up to the last image token
    asked: list[str]
    told: list[str]


class Packer:
    """Token ids of conversations as the chat template writes them, cut after the last image token.

    Args:
        tokenizer: a fast one, with a chat template and an `image_token`.
        num_image_tokens: how many image tokens a picture has: all patches for the backbone, 1 for Fwd2Bot.
        pictures: the numbers of pictures that a row may show.

    Raises ValueError if the chat template does not write the images, the question and the answer in this order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_image_tokens: int, pictures: Sequence[int] = (1,)):
        # a copy, since a call that pads or truncates leaves the tokenizer doing so
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._forms = {count: _form(tokenizer, count, num_image_tokens) for count in pictures}

    def prefix(self, pictures: int = 1) -> list[int]:
        """The ids up to the last image token, which the conversations of a row share."""
        return list(self._forms[pictures].prefix)

    def segments(self, conversations: Sequence[Conversation], pictures: int = 1) -> list[tuple[list[int], list[int]]]:
        """What follows the image tokens: ids, and labels that are IGNORED but for the answer and the end token."""
        form = self._forms[pictures]
        texts = [form.asked[0] + one.question + form.asked[1] for one in conversations]
        texts += [form.told[0] + one.answer + form.told[1] for one in conversations]
        ids = [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        pairs = zip(ids[: len(conversations)], ids[len(conversations) :], strict=True)
        return [(asked + told, [IGNORED] * len(asked) + told) for asked, told in pairs]

    def row(self, conversations: Sequence[Conversation], length: int, pictures: int = 1) -> dict[str, list[int]]:
        """Pack the conversations that fit into `length` tokens; no padding yet.

        Raises ValueError if not even one fits.
        """
        ids = self.prefix(pictures)
        labels = [IGNORED] * len(ids)
        segment_ids = [0] * len(ids)
        number = 0
        for segment, segment_labels in self.segments(conversations, pictures):
            if len(ids) + len(segment) > length:
                continue
            number += 1
            ids += segment
            labels += segment_labels
            segment_ids += [number] * len(segment)
        if not number:
            raise ValueError(f"no conversation fits into a row of {length} tokens; raise data.row_length")
        return {"input_ids": ids, "labels": labels, "segment_ids": segment_ids}


def _form(tokenizer: PreTrainedTokenizerFast, pictures: int, num_image_tokens: int) -> _Form:
    image = tokenizer.image_token
    marks = Conversation("[question]", "[answer]")
    messages = marks.messages(pictures)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    before, _, asked = prompt.rpartition(image)
    form = _Form(
        prefix=tokenizer((before + image).replace(image, image * num_image_tokens))["input_ids"],
        asked=asked.split(marks.question),
        told=whole[len(prompt) :].split(marks.answer),
    )
    in_order = whole.startswith(prompt) and len(form.asked) == len(form.told) == 2
    if not in_order or prompt.count(image) != pictures:
        raise ValueError(
            f"the chat template writes {whole!r}; training needs {pictures} times {image!r}, then the question, then "
            "the answer"
        )
    return form


class TrainingRows(torch.utils.data.Dataset):
    """Row `i` shows picture `i % pictures`; its texts are drawn from a seed of its own, so every round has new ones.

    `pixels` of a row is (P, H, W, 3), P the number of its pictures: 1 here.

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
        rng = random.Random(f"{self.data.seed}/{self.split}/{index}")
        shown = self._shown(index % len(self.pixels), rng)
        scenes = [self._scene(picture) for picture in shown]
        row = self.packer.row(self._conversations(scenes, rng), self.data.row_length, len(scenes))
        row["pixels"] = np.stack([self.pixels[picture]["pixels"] for picture in shown])
        row.update(self._texts(scenes, rng))
        return row

    def _scene(self, picture: int) -> Scene:
        return scene(self.split, picture, shapes_only=self.data.shapes_only)

    def _shown(self, picture: int, rng: random.Random) -> list[int]:
        return [picture]

    def _conversations(self, scenes: Sequence[Scene], rng: random.Random) -> list[Conversation]:
        [one] = scenes
        told = [Conversation(DESCRIBE, describe(one, rng))] if rng.random() < self.data.descriptions else []
        return told + self._asked(partial(ask, one, rng), self.data.questions, rng)

    def _asked(self, draw: Callable[..., list], questions: dict[str, float], rng: random.Random) -> list[Conversation]:
        asked = []
        for kind, number in questions.items():
            count = int(number) + (rng.random() < number % 1)  # 2.5 of a kind: two or three
            asked += [Conversation(q.text, q.answer) for q in draw(count, (kind,))]
        rng.shuffle(asked)
        return asked

    def _texts(self, scenes: Sequence[Scene], rng: random.Random) -> dict[str, Any]:
        return {}


class CaptionedRows(TrainingRows):
    """Rows of one picture or several, with texts for the contrastive side.

    Each adds `scenes`, and of all its pictures, in order, `full` (a description), `full_negatives` (descriptions false
    in one detail), `short` (Captions) and `negatives` (short captions false of it); and a `coin` in 0..1, by which the
    collator chooses among them.
    """

    data: Fwd2BotData

    def _shown(self, picture: int, rng: random.Random) -> list[int]:
        several = self.data.several
        if rng.random() >= several.share:
            return [picture]
        return companions(self._scene, len(self.pixels), picture, rng.choice(several.pictures), rng)

    def _conversations(self, scenes: Sequence[Scene], rng: random.Random) -> list[Conversation]:
        if len(scenes) == 1:
            return super()._conversations(scenes, rng)
        asked = self._asked(partial(ask_several, scenes, rng), self.data.several.questions, rng)
        if rng.random() < self.data.descriptions:
            number = rng.randrange(len(scenes)) + 1
            asked.insert(0, Conversation(DESCRIBE_ONE.format(number), describe(scenes[number - 1], rng)))
        return asked

    def _texts(self, scenes: Sequence[Scene], rng: random.Random) -> dict[str, Any]:
        texts = {"scenes": list(scenes), "coin": rng.random(), "full": [], "full_negatives": [], "short": []}
        texts["negatives"] = []
        for one in scenes:
            negatives = [false for _, false in hard_negatives(one, rng).values()] if self.data.hard_negatives else []
            rng.shuffle(negatives)
            texts["negatives"] += negatives[: self.data.hard_negatives]
            texts["full"].append(describe(one, rng))
            texts["full_negatives"] += [describe(altered(one, rng), rng) for _ in range(self.data.full_negatives)]
            texts["short"] += [short_caption(one, rng) for _ in range(self.data.short_captions)]
        return texts


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
