"""Many large pictures through a processor in groups, where that gives the same as all at once.

An image processor keeps all pictures of a call as arrays of their full size: with 16 photographs of 12 megapixels
0.6 GB beside the pictures, and asking the system for so much memory takes longer than the resizing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

PIXELS_AT_ONCE = 2**24  # of the pictures of a group: 50 MB as bytes
BY_TOKEN = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}  # and what rows are padded with

Process = Callable[[Sequence[Image.Image]], BatchFeature]


def process_in_groups(process: Process, pictures: Sequence[Image.Image], pad_token_id: int) -> BatchFeature:
    """What `process(pictures)` gives, by calls of at most `PIXELS_AT_ONCE` or one picture where these give the same.

    Args:
        process: pictures to tensors with a first dimension that counts pictures, or parts of them in their order;
            `input_ids` and what goes with them padded on the left.
        pad_token_id: what `input_ids` are padded with.
    """
    groups = _groups(pictures)
    if len(groups) > 1 and _is_by_picture(process, pad_token_id):
        joined = _join([process(group) for group in groups], pad_token_id)
        if joined is not None:
            return joined
    return process(pictures)


def _groups(pictures: Sequence[Image.Image]) -> list[list[Image.Image]]:
    groups: list[list[Image.Image]] = []
    room = 0
    for picture in pictures:
        size = picture.width * picture.height
        if size > room:
            groups.append([])
            room = PIXELS_AT_ONCE
        groups[-1].append(picture)
        room -= size
    return groups


def _is_by_picture(process: Process, pad_token_id: int) -> bool:
    """Whether two pictures one by one give what they give together: tried with two small ones of different shape.

    A processor that fills pictures up to the largest of a call, or counts their parts, gives something else.
    """
    samples = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((96, 160), (224, 64))]
    together, alone = process(samples), _join([process([sample]) for sample in samples], pad_token_id)
    return (
        alone is not None
        and together.keys() == alone.keys()
        and all(torch.equal(torch.as_tensor(together[name]), alone[name]) for name in together)
    )


def _join(batches: Sequence[BatchFeature], pad_token_id: int) -> BatchFeature | None:
    """The rows of several batches as one; `None` where they do not go together."""
    first = batches[0]
    if any(batch.keys() != first.keys() for batch in batches):
        return None
    length = max(batch["input_ids"].shape[1] for batch in batches)
    joined: dict[str, Any] = {}
    for name in first:
        parts = [batch[name] for batch in batches]
        if name == "input_ids" or name in BY_TOKEN:
            parts = [_pad_left(part, length, BY_TOKEN.get(name, pad_token_id)) for part in parts]
        shapes = {part.shape[1:] if isinstance(part, torch.Tensor) and part.ndim else None for part in parts}
        if shapes == {None} or len(shapes) > 1:
            return None
        joined[name] = torch.cat(parts)
    return BatchFeature(joined)


def _pad_left(rows: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (length - rows.shape[1], 0), value=value)
