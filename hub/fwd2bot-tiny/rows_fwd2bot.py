"""Rows for the backbone's own forward, whatever its family: the queries behind them, every token marked as causal.

Nothing here asks which family it is: what a backbone reads is seen from the signature of its forward.
"""

import inspect
from typing import Any

import torch

from .placeholders_fwd2bot import position_ids_from_mask

# What families read for each token beside its id, and the value of an ordinary word, which sees what is before it.
# Gemma 3 marks image tokens with 1, PaliGemma the prefix, which sees itself both ways, with 0: -1 is neither.
CAUSAL_TOKEN = {"token_type_ids": -1, "mm_token_type_ids": 0}


def reads_token_types(backbone: torch.nn.Module) -> bool:
    return "token_type_ids" in inspect.signature(backbone.forward).parameters


def causal_token_types(tokens: torch.Tensor) -> torch.Tensor:
    """`token_type_ids` of ordinary words for ids `(N, L)` or embeddings `(N, L, d)`."""
    return torch.full(tokens.shape[:2], CAUSAL_TOKEN["token_type_ids"], device=tokens.device)


def with_queries(
    base_model: torch.nn.Module,
    query_ids: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    **inputs: Any,
) -> dict[str, Any]:
    """Inputs of the base model for rows with the queries behind each, as words that see what is before them.

    Args:
        query_ids: `(k,)` ids of the queries.
        input_ids, attention_mask: `(N, L)`, padded on either side; the padding is moved to the left, since a sliding
            window would count it between row and queries.
        inputs: what else the backbone's processor made: pixels, grids, `(N, L)` token types.
    """
    by_token = {"input_ids": input_ids, "attention_mask": attention_mask}
    by_token |= {name: inputs.pop(name) for name in CAUSAL_TOKEN if inputs.get(name) is not None}
    order = attention_mask.long().argsort(dim=1, stable=True)  # (N, L), padding first
    tails = {"input_ids": query_ids, "attention_mask": torch.ones_like(query_ids)}
    for name, values in by_token.items():
        tail = tails[name] if name in tails else torch.full_like(query_ids, CAUSAL_TOKEN[name])
        tail = tail.to(values.dtype).expand(len(values), -1)  # (N, k)
        by_token[name] = torch.cat([values.gather(1, order), tail], 1)  # (N, L + k)
    return {**by_token, **inputs, "position_ids": _position_ids(base_model, by_token, inputs)}


def _position_ids(base_model: torch.nn.Module, by_token: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor:
    """`(N, L + k)` from the mask, or `(3, N, L + k)` where the family places image tokens in a plane (M-RoPE)."""
    place = getattr(base_model, "get_rope_index", None)
    if place is None or not any(name.endswith("grid_thw") for name in inputs):
        return position_ids_from_mask(by_token["attention_mask"])
    known = inspect.signature(place).parameters
    return place(**{name: value for name, value in {**by_token, **inputs}.items() if name in known})[0]
