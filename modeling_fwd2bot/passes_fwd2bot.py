"""The two passes through the backbone: rows with the queries behind them, and prompts with summaries in them."""

from typing import Any

import torch
from transformers.utils import ModelOutput

from .adapters_fwd2bot import run_stage
from .backbone_fwd2bot import causal_token_types, with_queries
from .last_positions_fwd2bot import only_last_positions
from .mixed_in_fwd2bot import during
from .packing_fwd2bot import check_packable, packed_attention_mask
from .placeholders_fwd2bot import expand_placeholders, position_ids_from_mask
from .summary_fwd2bot import Fwd2BotSummary


class PassesMixin:
    """The passes of [`Fwd2BotForConditionalGeneration`], which checks what goes into them."""

    def _compress_pass(self, num_summary_tokens: int, **inputs: Any) -> torch.Tensor:
        """`[image or text][prompt]` rows `(N, L)` -> summary tokens `(N, k, d)`, with gradients."""
        with only_last_positions(num_summary_tokens), during(without_norm=not self.config.summary_norm):
            hidden = self._read_with_queries(num_summary_tokens, **inputs).last_hidden_state  # (N, L + k, d)
        # What trains may be in float32 on a backbone in lower precision: PEFT's layers cast likewise.
        return self.summary_projector(hidden[:, -num_summary_tokens:].to(self.summary_projector.weight.dtype))

    def _read_with_queries(
        self,
        num_summary_tokens: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """What the base model returns for `[image or text][prompt][queries]` under the compress adapter."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids = input_ids.masked_fill(attention_mask == 0, self._pad_token_id)  # a tokenizer's may be no row
        first_query = self._num_words
        query_ids = torch.arange(first_query, first_query + num_summary_tokens, device=input_ids.device)
        base_model = self.backbone.base_model
        if self._reads_token_types and inputs.get("token_type_ids") is None:
            inputs["token_type_ids"] = causal_token_types(input_ids)
        rows = with_queries(base_model, query_ids, input_ids, attention_mask, **inputs)
        with run_stage("compress"):
            return base_model(**rows, use_cache=False)

    def _tells_all(self, inputs: dict[str, Any]) -> bool:
        """Whether a pass is asked for what it computes at every position, beside the logits."""
        asked = ("output_hidden_states", "output_attentions", "output_router_logits")
        if any(inputs.get(name) for name in asked):
            return True
        kept = (*asked, "_output_attentions")  # as a config keeps them; its attributes are slow to ask for
        configs = (vars(self.backbone.config), vars(self.get_decoder().config))
        return any(config.get(name) for config in configs for name in kept)

    def _insert(self, summary: Fwd2BotSummary, expanded: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(N, L', d)` input embeddings of the expanded prompts, the summary tokens at their slots."""
        with run_stage("generate"):
            embeds = self.get_input_embeddings()(expanded["input_ids"])
        whole = summary.min_summary_tokens == summary.tokens.shape[1]
        tokens = summary.tokens.flatten(0, 1) if whole else summary.tokens[summary.mask]
        tokens = tokens.to(embeds)  # (T, d), T = sum of lengths
        return embeds.masked_scatter(expanded["slots"].to(embeds.device).unsqueeze(-1), tokens)

    def _generate_pass(
        self,
        summary: Fwd2BotSummary | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `(N, L', V)` of the prompts with their summaries in place, and the labels `(N, L')` moved along."""
        lengths = torch.zeros(0, dtype=torch.long) if summary is None else summary.lengths
        expanded = expand_placeholders(
            input_ids, attention_mask, lengths, self.image_token_id, self._pad_token_id, labels, segment_ids
        )
        if summary is None:
            embeds = self.get_input_embeddings()(expanded["input_ids"])
        else:
            embeds = self._insert(summary, expanded)
        mask = expanded["attention_mask"]
        position_ids = position_ids_from_mask(mask)
        if segment_ids is not None:
            check_packable(self.config.get_text_config(), mask.shape[1])
            visible, position_ids = packed_attention_mask(expanded["segment_ids"], mask)
            # Additive: eager attention adds the mask to its scores, and SDPA takes it as well.
            mask = torch.zeros_like(visible, dtype=embeds.dtype)
            mask = mask.masked_fill(~visible, torch.finfo(embeds.dtype).min)  # (N, 1, L', L')
        inputs = {"attention_mask": mask, "position_ids": position_ids}
        if self._reads_token_types:
            inputs["token_type_ids"] = causal_token_types(embeds)
        with run_stage("generate"):
            logits = self.backbone(inputs_embeds=embeds, **inputs, use_cache=False).logits
        return logits, expanded.get("labels")
