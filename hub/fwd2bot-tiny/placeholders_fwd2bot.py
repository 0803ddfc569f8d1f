"""Padding and image placeholders: where a summary takes the place of an image in a batch of prompts. Pure tensors."""

import torch

from .summary_fwd2bot import read_range


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """`(N, L)` positions that count tokens, not padding: `[[0, 1, 1]]` -> `[[0, 0, 1]]`."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def count_placeholders(input_ids: torch.Tensor, attention_mask: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """`(N,)` number of image placeholders in each row."""
    return ((input_ids == image_token_id) & attention_mask.bool()).sum(1)


def check_placeholders(per_row: torch.Tensor, num_summaries: int) -> None:
    """Raise `ValueError` unless the prompts hold exactly one placeholder per summary; prints both counts."""
    total = int(per_row.sum())
    if total != num_summaries:
        raise ValueError(
            f"The prompts hold {total} image placeholder(s) ({per_row.tolist()} per row), but {num_summaries} "
            "image(s) or summaries were given. Give one per placeholder, in the order of the prompts."
        )


def check_placeholder_images(placeholder_image: torch.Tensor, per_row: torch.Tensor, num_images: int) -> None:
    """Raise unless each of the prompts' placeholders has the row of an image, 0..num_images - 1."""
    total = int(per_row.sum())
    if placeholder_image.is_floating_point() or placeholder_image.dtype == torch.bool:
        raise TypeError(f"placeholder_image must hold rows of images, integers, got {placeholder_image.dtype}.")
    if placeholder_image.shape != (total,):
        raise ValueError(
            f"placeholder_image must have shape {(total,)}, one image for each of the {total} placeholder(s) of the "
            f"prompts ({per_row.tolist()} per row), got {tuple(placeholder_image.shape)}."
        )
    if total and not 0 <= int(placeholder_image.min()) <= int(placeholder_image.max()) < num_images:
        raise ValueError(
            f"placeholder_image must name rows of the {num_images} image(s), 0..{num_images - 1}, got "
            f"{placeholder_image.tolist()}."
        )


def check_by_token(input_ids: torch.Tensor, **by_token: torch.Tensor | None) -> None:
    """Raise `ValueError` unless what goes with each token, as far as it is given, has the shape of `input_ids`."""
    for name, values in by_token.items():
        if values is not None and values.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(values.shape)}. Pad "
                "both alike."
            )


def expand_placeholders(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    lengths: torch.Tensor,
    image_token_id: int,
    pad_token_id: int,
    labels: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Repeat the i-th image placeholder of the batch `lengths[i]` times, and pad the rows anew on the left.

    Args:
        input_ids, attention_mask: `(N, L)` prompts with one placeholder per summary, padded on either side.
        lengths: `(S,)` number of summary tokens for each placeholder, row by row.
        labels, segment_ids: `(N, L)`, carried along; a label at a placeholder becomes -100.

    Returns:
        `input_ids`, `attention_mask` `(N, L')`, `slots` `(N, L')` bool (true where a summary token goes), and `labels`
        and `segment_ids` where they were given.

    Example: ids `[[9, 5]]`, placeholder 9, lengths `[3]` -> ids `[[9, 9, 9, 5]]`, slots `[[1, 1, 1, 0]]`.

    Raises:
        ValueError: when placeholders and summaries differ in number, or labels or segments are of another shape.
    """
    check_by_token(input_ids, labels=labels, segment_ids=segment_ids)
    keep = attention_mask.bool()
    is_placeholder = (input_ids == image_token_id) & keep
    if int(is_placeholder.sum()) != len(lengths):
        check_placeholders(is_placeholder.sum(1), len(lengths))

    repeats = keep.long().masked_scatter_(is_placeholder, lengths.to(input_ids.device, torch.long))  # (N, L)
    ends = repeats.cumsum(1)  # (N, L)
    shortest, width = read_range(ends[:, -1])  # width is L'
    columns = torch.arange(width, device=input_ids.device).expand(len(ends), -1)  # (N, L')
    padding = None
    if shortest < width:
        ends += width - ends[:, -1:]  # each row to the right
        padding = columns < ends[:, :1] - repeats[:, :1]
    # (N, L'), the column of input_ids that a new one repeats
    source = torch.searchsorted(ends, columns.contiguous(), right=True)

    def spread(values: torch.Tensor, fill: int) -> torch.Tensor:
        spread_out = values.gather(1, source)
        return spread_out if padding is None else spread_out.masked_fill_(padding, fill)

    expanded = {
        "input_ids": spread(input_ids, pad_token_id),
        "attention_mask": spread(attention_mask, 0),
        "slots": spread(is_placeholder, False),
    }
    if labels is not None:
        expanded["labels"] = spread(labels.masked_fill(is_placeholder, -100), -100)
    if segment_ids is not None:
        expanded["segment_ids"] = spread(segment_ids, 0)
    return expanded
