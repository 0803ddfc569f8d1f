"""Shared-prefix packing: many single-turn conversations about one picture in one row, at the price of one prefix."""

from typing import Any

import torch


def packed_attention_mask(
    segment_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token of a packed row sees, and where it stands.

    A row is `[prefix][segment 1][segment 2] ...`. A token sees, causally, the prefix and its own segment; positions go
    on after the prefix in every segment. So each segment is read as if it alone followed the prefix. Padding may lie
    on either side: it is seen by no one, and sees itself, so that no row of the softmax is empty.

    For a prefix of two tokens and two segments of two, `segment_ids = [[0, 0, 1, 1, 2, 2]]`, the mask is
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 0 0 1 0
        1 1 0 0 1 1
    and the positions are `[[0, 1, 2, 3, 2, 3]]`.

    Args:
        segment_ids: (N, L) long, 0 for the prefix, then 1, 2, ...
        attention_mask: (N, L), 0 for padding.

    Returns:
        (N, 1, L, L) bool, True where the query (row) sees the key (column), and (N, L) long position ids.

    Raises:
        ValueError: the two shapes differ or are not (N, L).
    """
    if segment_ids.dim() != 2 or segment_ids.shape != attention_mask.shape:
        raise ValueError(
            f"segment_ids {tuple(segment_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must both be "
            "(N, L); build them together"
        )
    length = segment_ids.shape[1]
    keys = segment_ids[:, None, :]  # (N, 1, L)
    queries = segment_ids[:, :, None]  # (N, L, 1)
    attended = attention_mask.bool()
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    visible = ((keys == 0) | (keys == queries)) & attended[:, None, :] & causal  # (N, L, L)
    position_ids = (visible.sum(-1) - 1).clamp(min=0)  # a token's place is the number of tokens that it sees before it
    visible = visible | torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    return visible[:, None], position_ids


def check_packable(text_config: Any, length: int) -> None:
    """Raise `ValueError` for a language model that would not see packed rows of this length as single ones.

    Its layers take the (N, 1, L, L) mask as it is, so a sliding window would be ignored; layers without attention
    (recurrent ones) know no mask at all, and flash attention knows padding alone.
    """
    attention = getattr(text_config, "_attn_implementation", None) or ""
    if "flash" in attention:
        raise ValueError(
            f"Rows with segment_ids need a mask of their own, which attn_implementation={attention!r} does not take. "
            "Load the model with 'sdpa', or give each conversation a row of its own, without segment_ids."
        )
    kinds = set(getattr(text_config, "layer_types", None) or ())
    window = getattr(text_config, "sliding_window", None)
    recurrent = sorted(kinds - {"full_attention", "sliding_attention"})
    if recurrent or ("sliding_attention" in kinds and window is not None and length > window):
        reason = f"layers of the kind {recurrent}" if recurrent else f"a sliding window of {window} tokens"
        raise ValueError(
            f"Rows of {length} tokens with segment_ids do not fit a language model with {reason}: conversations that "
            "are packed into one row would see each other. Give each a row of its own, without segment_ids."
        )
