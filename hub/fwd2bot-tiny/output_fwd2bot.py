"""What the forward pass of a Fwd2Bot returns."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from .summary_fwd2bot import Fwd2BotSummary


@dataclass
class Fwd2BotOutput(ModelOutput):
    """What `forward` returns.

    Args:
        loss: scalar, the weighted sum of the two losses below, as far as their inputs were given.
        autoregressive_loss, contrastive_loss: scalars, unweighted.
        logits: `(N, L', V)`, L' the length of the prompts with their summaries in place.
        summary: [`Fwd2BotSummary`] of the images, with gradients.
        image_embeds: `(N, e)`, text_embeds: `(M, e)`, float32 of unit norm, at the largest length of this batch.
        image_embeds_by_length: `(K, N, e)`, at each length of the contrastive loss: `config.summary_lengths` where
            lengths vary.
    """

    loss: torch.Tensor | None = None
    autoregressive_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    summary: Fwd2BotSummary | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds_by_length: torch.Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
