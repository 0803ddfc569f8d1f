"""Fwd2Bot with one thing changed that no setting changes."""

from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.adapters_fwd2bot import run_stage
from fwd2bot.backbone_fwd2bot import with_queries


class SharedAdapter(Fwd2BotForConditionalGeneration):
    """One adapter for both passes: that of the generate stage."""

    compress_stage: str | None = "generate"

    def _read_with_queries(
        self, num_summary_tokens: int, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any
    ) -> ModelOutput:
        first = self.get_input_embeddings().num_embeddings
        queries = torch.arange(first, first + num_summary_tokens, device=input_ids.device)
        rows = with_queries(self.backbone.base_model, queries, input_ids, attention_mask, **inputs)
        with run_stage(self.compress_stage):
            return self.backbone.base_model(**rows, use_cache=False)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in super().trained_parameters().items() if ".compress." not in name}


class NoAdapters(SharedAdapter):
    """Queries and projector alone train; both passes are the bare backbone's."""

    compress_stage = None

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in super().trained_parameters().items() if ".lora_" not in name}


class FullFineTuning(NoAdapters):
    """The language model itself trains in both passes, instead of adapters."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        decoder = {id(parameter) for parameter in self.backbone.get_decoder().parameters()}
        weights = {name: p for name, p in self.named_parameters() if id(p) in decoder and ".lora_" not in name}
        return super().trained_parameters() | weights


class NoProjector(Fwd2BotForConditionalGeneration):
    """The last hidden states at the queries are the summary."""

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        nn.init.eye_(self.summary_projector.weight)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {n: value for n, value in super().trained_parameters().items() if not n.startswith("summary_projector")}


class MlpProjector(Fwd2BotForConditionalGeneration):
    """Two layers instead of one behind the last hidden states."""

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.summary_projector = _MlpProjector(config.get_text_config().hidden_size)


class _MlpProjector(nn.Linear):
    """A linear layer, as the model asks it for width and dtype, beside which an MLP adds to its output."""

    def __init__(self, width: int):
        super().__init__(width, width)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            nn.init.eye_(self.weight)
            self.weight.mul_(0.1)
            self.bias.zero_()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values) + self.out(nn.functional.gelu(self.hidden(values)))
