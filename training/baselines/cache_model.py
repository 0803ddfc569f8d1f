"""One pass whose tokens keep keys and values in every layer: the answer reads them through a mask, not the image."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.utils import ModelOutput

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotSummary
from fwd2bot.adapters_fwd2bot import run_stage
from fwd2bot.backbone_fwd2bot import with_queries
from fwd2bot.packing_fwd2bot import packed_attention_mask
from fwd2bot.summary_fwd2bot import pool_summary, summary_from


class CacheCompression(Fwd2BotForConditionalGeneration):
    """k tokens behind the image, whose keys and values of all layers are what is kept of it.

    VoCo-LLaMA (arXiv 2406.12275): the text sees these tokens alone, not the image, so that one pass with such a mask
    is the same as two that hand the keys and values on, which is done here. One adapter for both, at the rank of both
    stages together. A "summary" is `(N, k, 2 * layers * heads * head_dim)`: a summary vector of Fwd2Bot has d numbers.

    The tokens stand at positions 0..k-1 and the image before them, so that the text goes on at position k at every k.
    """

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if ".lora_" in name and ".generate." in name or name.endswith(".summary_queries")
        }

    def _compress_pass(self, num_summary_tokens: int, **inputs: Any) -> torch.Tensor:
        if "pixel_values" not in inputs:
            raise ValueError("CacheCompression embeds no texts; it has no retrieval.")
        return self._kept(self._pass(num_summary_tokens, **inputs).past_key_values, num_summary_tokens)

    def _pass(
        self, num_summary_tokens: int, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any
    ) -> ModelOutput:
        """`[image or text][prompt][queries]`, the first query at position 0."""
        first = self.get_input_embeddings().num_embeddings
        queries = torch.arange(first, first + num_summary_tokens, device=input_ids.device)
        rows = with_queries(self.backbone.base_model, queries, input_ids, attention_mask, **inputs)
        rows["position_ids"] = rows["position_ids"] - attention_mask.sum(1, keepdim=True)
        with run_stage("generate"):
            return self.backbone.base_model(**rows, use_cache=True)

    @staticmethod
    def _kept(cache: DynamicCache, num_summary_tokens: int) -> torch.Tensor:
        kept = [part[:, :, -num_summary_tokens:] for layer in cache.layers for part in (layer.keys, layer.values)]
        return torch.stack(kept, 2).permute(0, 3, 2, 1, 4).flatten(2)  # (N, k, 2 * layers * heads * head_dim)

    def _cache(self, tokens: torch.Tensor) -> DynamicCache:
        """Keys and values of each layer, `(N, heads, k, head_dim)`, out of `(N, k, ...)`."""
        text = self.config.get_text_config()
        layers, heads = text.num_hidden_layers, text.num_key_value_heads
        parts = tokens.unflatten(2, (2 * layers, heads, -1)).permute(2, 0, 3, 1, 4)  # (2 * layers, N, heads, k, hd)
        cache = DynamicCache()
        for layer in range(layers):
            cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        return cache

    def _check_summary(self, value: Any) -> Fwd2BotSummary:
        return value

    def _generate_pass(
        self,
        summary: Fwd2BotSummary,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if len(summary) != len(input_ids):
            raise ValueError(f"Each row shows one picture here, got {len(summary)} for {len(input_ids)} rows.")
        segments = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
        visible, position_ids = packed_attention_mask(segments, attention_mask)  # (N, 1, L, L)
        past = summary.mask[:, None, None].expand(-1, -1, input_ids.shape[1], -1)  # (N, 1, L, k)
        embeds = self.get_input_embeddings()(input_ids)
        seen = torch.cat([past, visible], -1)
        mask = torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)
        with run_stage("generate"):
            logits = self.backbone(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids + summary.lengths[:, None],
                past_key_values=self._cache(summary.tokens),
                use_cache=True,
            ).logits
        return logits, labels

    @torch.no_grad()
    def generate_from_summary(
        self, summary: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any
    ) -> Any:
        if len(summary) != len(input_ids) or len(set(summary.lengths.tolist())) > 1:
            raise ValueError("Each prompt shows one picture here, and all at one length.")
        kept = input_ids.new_full(
            (len(input_ids), summary.num_summary_tokens), self._pad_token_id
        )  # whose cache it is
        output = GenerationMixin.generate(
            self,
            torch.cat([kept, input_ids], 1),
            attention_mask=torch.cat([torch.ones_like(kept), attention_mask], 1),
            past_key_values=self._cache(summary.tokens),
            **kwargs,
        )
        if isinstance(output, torch.Tensor):
            return output[:, kept.shape[1] :]
        output.sequences = output.sequences[:, kept.shape[1] :]
        return output


class SingleForward(CacheCompression):
    """Fwd2Bot's task and losses in a single pass: queries are embedded, and the answer reads their keys and values.

    `[image][prompt][queries][question][answer]` is one row under one adapter, whose question and answer see of what is
    before them the queries alone. What a query gives at the end of the pass makes the embedding, as in Fwd2Bot; the
    answer cannot wait for it, and reads the queries in every layer on the way. So what is kept for answers is the
    cache, and for the embedding the summary: `(N, k, 2 * layers * heads * head_dim + d)`. Texts are embedded, so of
    them the summary alone is kept, `(N, k, d)`.
    """

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        named = Fwd2BotForConditionalGeneration.trained_parameters(self)
        return {name: parameter for name, parameter in named.items() if ".compress." not in name}

    def _compress_pass(self, num_summary_tokens: int, **inputs: Any) -> torch.Tensor:
        output = self._pass(num_summary_tokens, **inputs)
        summary = self.summary_projector(output.last_hidden_state[:, -num_summary_tokens:])  # (N, k, d)
        if "pixel_values" not in inputs:
            return summary
        return torch.cat([self._kept(output.past_key_values, num_summary_tokens), summary], -1)

    def _cache(self, tokens: torch.Tensor) -> DynamicCache:
        return super()._cache(tokens[..., : -self.summary_projector.out_features])

    def _pool(self, tokens: torch.Tensor, num_summary_tokens: int) -> torch.Tensor:
        return pool_summary(tokens[..., -self.summary_projector.out_features :], num_summary_tokens)

    def _check_summary(self, value: Any) -> Fwd2BotSummary:
        return summary_from(value)
