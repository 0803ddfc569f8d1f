"""Batches in chunks on the tiny model: what a collator would give, with fixed content."""

import tiny
import torch
from transformers import PreTrainedModel

CAPTIONS = ["a dog", "two cats on a hill", "nothing", "a red door", "a boat", "snow", "a dog on a door", "rain"]


def conversation_chunk(processor, drawn: list, numbers: list[int], talks: list[bool] | None = None) -> dict:
    """A chunk of the pictures of these numbers, one in four with two conversations and one in four with none."""
    images = processor.process_images([drawn[number] for number in numbers])
    chunk = {f"compress_{name}": value for name, value in images.items()}
    talks = [True] * len(numbers) if talks is None else talks
    shown = [
        place for place, number in enumerate(numbers) for _ in range({0: 2, 1: 0}.get(number % 4, 1)) if talks[place]
    ]
    if not shown:
        return chunk
    texts = [
        question + f" answer {numbers[place]}</s>"
        for question, place in zip(tiny.prompts(processor, ["What?"] * len(shown)), shown, strict=True)
    ]
    encoded = processor(text=texts)
    labels = encoded["input_ids"].clone()
    labels[:, :-8] = -100  # padding is on the left, so these are the last tokens of each row, whatever the chunk
    return chunk | {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
        "placeholder_image": torch.tensor(shown),
    }


def batch(processor, images: int = 6, chunk: int = 2, text_chunk: int = 3, texts: int | None = None) -> dict:
    """A collated batch; with one more text than images, which is a hard negative, unless `texts` says otherwise."""
    drawn, numbers = tiny.pictures(images), list(range(images))
    chunks = [
        conversation_chunk(processor, drawn, numbers[first : first + chunk]) for first in range(0, images, chunk)
    ]
    texts = images + 1 if texts is None else texts
    captions = CAPTIONS[:texts]
    return {"chunks": chunks} | text_side(processor, captions, images, text_chunk)


def text_side(processor, captions: list[str], images: int, text_chunk: int) -> dict:
    pieces = [captions[i : i + text_chunk] for i in range(0, len(captions), text_chunk)]
    owner = torch.tensor([i if i < images else -1 for i in range(len(captions))], dtype=torch.long)
    mask = torch.ones(images, len(captions), dtype=torch.bool)
    if captions:
        mask[0, -1] = False
    return {
        "text_chunks": [dict(processor.process_texts(piece)) for piece in pieces],
        "text_image": owner,
        "text_image_mask": mask,
    }


def joined(model: PreTrainedModel, collated: dict, lengths: torch.Tensor) -> torch.Tensor:
    """The loss of a collated batch in one graph, chunk by chunk but for the contrastive loss: what is to be equalled.

    It goes through `forward`, `contrastive_loss` and plain autograd alone.
    """
    labels = sum(int((chunk["labels"][:, 1:] != -100).sum()) for chunk in collated["chunks"] if "labels" in chunk)
    sizes = [len(chunk["compress_input_ids"]) for chunk in collated["chunks"]]
    outputs = [
        model(**chunk, num_summary_tokens=own, num_items_in_batch=labels)
        for chunk, own in zip(collated["chunks"], lengths.split(sizes), strict=True)
    ]
    loss = sum(output.autoregressive_loss for output in outputs if output.autoregressive_loss is not None)
    if not collated["text_chunks"]:
        return loss
    texts = [
        model(
            **{f"compress_{name}": value for name, value in chunk.items()},
            num_summary_tokens=torch.ones(len(chunk["input_ids"]), dtype=torch.long),
        )
        for chunk in collated["text_chunks"]
    ]
    embeds = [torch.cat([o.image_embeds_by_length for o in side], 1) for side in (outputs, texts)]
    return loss + model.contrastive_loss(*embeds, collated["text_image"], collated["text_image_mask"])
