"""Fwd2Bot with one thing changed that no setting changes."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.utils import ModelOutput

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
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


class NormProjector(Fwd2BotForConditionalGeneration):
    """A norm with learned scales instead of the linear layer; it begins at that one's scale."""

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        text = config.get_text_config()
        self.summary_projector = nn.RMSNorm(text.hidden_size, eps=getattr(text, "rms_norm_eps", None))
        self.summary_projector.out_features = text.hidden_size  # as the model asks of its linear layer
        nn.init.constant_(self.summary_projector.weight, 0.1)


class LargerProjector(Fwd2BotForConditionalGeneration):
    """The linear projector begins at 0.43 of the identity, not 0.1: summaries are as large as without the norm."""

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        nn.init.eye_(self.summary_projector.weight)
        with torch.no_grad():
            self.summary_projector.weight.mul_(0.43)


class LayerMix(Fwd2BotForConditionalGeneration):
    """What every layer gives at the queries, scaled to one size and added by learned weights, is projected.

    At first it is the mean of all layers; the weights may take any sum and sign.
    """

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        layers = config.get_text_config().num_hidden_layers
        self.layer_weights = nn.Parameter(torch.full((layers,), 1 / layers))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return super().trained_parameters() | {"layer_weights": self.layer_weights}

    def _compress_pass(self, num_summary_tokens: int, **inputs: Any) -> torch.Tensor:
        states: list[torch.Tensor] = []
        watched = [
            layer.register_forward_hook(lambda layer, given, output: states.append(_first(output)))
            for layer in self.get_decoder().layers
        ]
        try:
            self._read_with_queries(num_summary_tokens, **inputs)
        finally:
            for watch in watched:
                watch.remove()
        ends = [F.rms_norm(state[:, -num_summary_tokens:], state.shape[-1:], eps=1e-6) for state in states]
        mixed = sum(weight * end for weight, end in zip(self.layer_weights, ends, strict=True))
        return self.summary_projector(mixed)  # (N, k, d)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class LastPooling(Fwd2BotForConditionalGeneration):
    """The last of the k vectors is the embedding, instead of their mean."""

    def _pool(self, tokens: torch.Tensor, num_summary_tokens: int) -> torch.Tensor:
        return F.normalize(tokens[:, num_summary_tokens - 1].float(), dim=-1)


class AttentionPooling(Fwd2BotForConditionalGeneration):
    """A learned vector says how much each of the k vectors counts in the embedding; all alike to begin with."""

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.pooling_query = nn.Parameter(torch.zeros(config.get_text_config().hidden_size))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return super().trained_parameters() | {"pooling_query": self.pooling_query}

    def _pool(self, tokens: torch.Tensor, num_summary_tokens: int) -> torch.Tensor:
        tokens = tokens[:, :num_summary_tokens].float()  # (N, k, d)
        weights = (tokens @ self.pooling_query.float()).softmax(1)  # (N, k)
        return F.normalize((weights.unsqueeze(-1) * tokens).sum(1), dim=-1)


class PromptFirstProcessor(Fwd2BotProcessor):
    """The prompt of the compress pass before the picture: `[prompt][image][queries]`. Texts are as they were."""

    def process_images(self, images: Any) -> BatchFeature:
        turn = {"role": "user", "content": [{"type": "text", "text": f"{self.image_prompt}\n{self.image_token}"}]}
        prompt = self.apply_chat_template([turn], add_generation_prompt=True)
        batch = super().process_images(images)
        place = self.tokenizer.convert_tokens_to_ids(self.image_token)
        patches = int((batch["input_ids"][0] == place).sum())
        prompts = [prompt.replace(self.image_token, self.image_token * patches)] * len(batch["pixel_values"])
        return BatchFeature({**batch, **self._tokenize(prompts)})


class MlpProjector(Fwd2BotForConditionalGeneration):
    """An MLP beside the linear projector, to whose output it adds."""

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
