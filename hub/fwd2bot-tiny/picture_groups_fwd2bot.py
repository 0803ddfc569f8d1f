"""Large pictures through a processor in groups, where that gives the same as all at once.

An image processor keeps all pictures of a call as arrays of their full size: 36 MB for a photograph of 12 megapixels.
Groups give the same for a processor that makes the same of a picture whatever comes with it. Two small pictures tell;
and rows of groups that do not fit together tell, too, as those of a processor that fills pictures up to the largest.
One that shared a number of pixels out among large pictures alone would pass: none that the tests build does.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from transformers import BatchFeature

PIXELS_AT_ONCE = 2**24  # of the pictures of a group: 50 MB as bytes
LARGE = 2**20  # pixels of a picture; smaller ones gain nothing
BY_TOKEN = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}  # and what rows are padded with

Run = Callable[[Sequence[Image.Image]], BatchFeature]  # a processor, on pictures with their prompts


def groups_of(pictures: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """The pictures in order, in groups of `PIXELS_AT_ONCE` or of one; a single group where they are not large."""
    groups: list[list[Image.Image]] = []
    room = total = 0
    for picture in pictures:
        size = picture.width * picture.height
        total += size
        if size > room:
            groups.append([])
            room = PIXELS_AT_ONCE
        groups[-1].append(picture)
        room -= size
    return groups if total > LARGE * len(pictures) else [list(pictures)]


def is_by_picture(run: Run, pad_token_id: int | None) -> bool:
    """Whether two small pictures of different shape give one by one what they give together."""
    samples = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((96, 160), (224, 64))]
    try:
        together, alone = run(samples), join_rows((run([sample]) for sample in samples), pad_token_id)
    except Exception:  # it does not take such pictures, which says nothing of those that were given
        return False
    return (
        alone is not None
        and together.keys() == alone.keys()
        and all(torch.equal(torch.as_tensor(together[name]), alone[name]) for name in together)
    )


def join_rows(batches: Iterable[BatchFeature], pad_token_id: int | None) -> BatchFeature | None:
    """The rows of several batches as one, padded on the left; `None` at the first that does not fit those before."""
    kept: list[BatchFeature] = []
    for batch in batches:
        if not all(isinstance(value, torch.Tensor) and value.ndim for value in batch.values()):
            return None
        if kept and _shapes(batch) != _shapes(kept[0]):
            return None
        kept.append(batch)
    length = max(batch["input_ids"].shape[1] for batch in kept)
    if pad_token_id is None and any(batch["input_ids"].shape[1] < length for batch in kept):
        return None
    padding = {"input_ids": pad_token_id, **BY_TOKEN}
    return BatchFeature(
        {
            name: torch.cat(
                [_pad_left(batch[name], length, padding[name]) if name in padding else batch[name] for batch in kept]
            )
            for name in kept[0]
        }
    )


def _shapes(batch: BatchFeature) -> dict[str, torch.Size | None]:
    """Of what a row or a part is, by name; what goes with each token may be of any length."""
    by_token = ("input_ids", *BY_TOKEN)
    return {name: None if name in by_token else value.shape[1:] for name, value in batch.items()}


def _pad_left(rows: torch.Tensor, length: int, value: int | None) -> torch.Tensor:
    missing = length - rows.shape[1]
    return torch.nn.functional.pad(rows, (missing, 0), value=value) if missing else rows
