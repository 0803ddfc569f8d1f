"""Batches of training rows as the models take them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from .data import IGNORED
from .recipe import Fwd2BotData
from .scenes import truth_table


class BackboneCollator:
    """Rows to `input_ids`, `attention_mask`, `segment_ids`, `labels` (N, L) and `pixel_values` (P, 3, H, W) of
    the P pictures of all rows, row by row.

    L is `length` if given, so that all batches have one shape (compiled models want that), else that of the longest
    row. Padding is on the tokenizer's side.
    """

    def __init__(self, processor: ProcessorMixin, length: int | None = None):
        self.tokenizer, self.image_processor, self.length = processor.tokenizer, processor.image_processor, length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.pack(rows) | {"pixel_values": self.pixel_values(rows)}

    def pack(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max([self.length or 0, *(len(row["input_ids"]) for row in rows)])
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED, "segment_ids": 0, "attention_mask": 0}
        batch = {name: torch.full((len(rows), length), value) for name, value in fill.items()}
        for i, row in enumerate(rows):
            used = len(row["input_ids"])
            place = slice(length - used, length) if self.tokenizer.padding_side == "left" else slice(0, used)
            batch["attention_mask"][i, place] = 1
            for name in ("input_ids", "labels", "segment_ids"):
                batch[name][i, place] = torch.tensor(row[name])
        return batch

    def pixel_values(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        """What the image processor gives for the rows' pictures, in order; at its own size they only need scaling."""
        processor = self.image_processor
        pixels = np.concatenate([row["pixels"] for row in rows])  # (P, H, W, 3) uint8
        size = processor.size
        if pixels.shape[1:3] != (size["height"], size["width"]) or not processor.do_normalize:
            return processor(images=list(pixels), return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float()
        return values.mul_(processor.rescale_factor).sub_(mean).div_(std)


class Fwd2BotCollator(BackboneCollator):
    """Adds the compress inputs of the pictures and the texts of the contrastive side.

    The texts of one batch are all full descriptions or all short captions, either with their hard negatives, so that
    their lengths are alike; every picture of a row has its own. `text_image_mask` is False where a text is true of a
    picture that it was not written for.

    Args:
        processor: a Fwd2BotProcessor.
        data: the recipe's section.
        length: of the packed rows, see BackboneCollator.
        with_texts: whether there is a contrastive side.
        chunk_size: rows in one chunk (see `chunked.Batch`), the texts in as many; None: a batch that is not cut.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        data: Fwd2BotData,
        length: int | None = None,
        with_texts: bool = True,
        chunk_size: int | None = None,
    ):
        super().__init__(processor.backbone_processor, length)
        self.processor, self.data, self.with_texts, self.chunk_size = processor, data, with_texts, chunk_size
        blank = np.zeros((self.image_processor.size["height"], self.image_processor.size["width"], 3), dtype=np.uint8)
        self._prompt = processor.process_images([Image.fromarray(blank)])  # its ids are the same for every picture

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts = self.texts(rows) if self.with_texts else {}
        if self.chunk_size is None:
            return self.shown(rows) | texts
        chunks = [self.shown(rows[i : i + self.chunk_size]) for i in range(0, len(rows), self.chunk_size)]
        ids, mask = (texts.pop(f"text_{name}", torch.zeros(0, 1)) for name in ("input_ids", "attention_mask"))
        size = max(-(-len(ids) // len(chunks)), 1)
        parts = zip(ids.split(size), mask.split(size), strict=True) if len(ids) else ()
        text_chunks = [{"input_ids": part, "attention_mask": part_mask} for part, part_mask in parts]
        return {"chunks": chunks, "text_chunks": text_chunks} | texts

    def shown(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The packed rows and the compress inputs of their pictures."""
        batch = self.pack(rows)
        batch["compress_pixel_values"] = self.pixel_values(rows)
        for name in ("input_ids", "attention_mask"):
            batch[f"compress_{name}"] = self._prompt[name].expand(len(batch["compress_pixel_values"]), -1).contiguous()
        return batch

    def texts(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # the first row's coin: what a batch holds depends on its rows alone, so a resumed run sees the same
        full = rows[0]["coin"] < self.data.full_share
        scenes = [scene for row in rows for scene in row["scenes"]]
        pictures = torch.arange(len(scenes))  # (P,)
        if full:
            negatives = [text for row in rows for text in row["full_negatives"]]
            texts = [text for row in rows for text in row["full"]] + negatives
            text_image = torch.cat([pictures, torch.full((len(negatives),), -1)])
            mask = torch.ones(len(scenes), len(texts), dtype=torch.bool)
        else:
            captions = [caption for row in rows for caption in row["short"]]
            negatives = [text for row in rows for text in row["negatives"]]
            text_image = pictures.repeat_interleave(self.data.short_captions)
            true = torch.from_numpy(truth_table(captions, scenes)).bool()
            own = text_image[None, :] == pictures[:, None]  # (P, captions)
            mask = torch.cat([own | ~true, torch.ones(len(scenes), len(negatives), dtype=torch.bool)], dim=1)
            texts = [caption.text for caption in captions] + negatives
            text_image = torch.cat([text_image, torch.full((len(negatives),), -1)])
        encoded = self.processor.process_texts(texts)
        return {
            "text_input_ids": encoded["input_ids"],
            "text_attention_mask": encoded["attention_mask"],
            "text_image": text_image,
            "text_image_mask": mask,
            "text_kind": "full" if full else "short",  # for the log
        }
