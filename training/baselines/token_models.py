"""Image tokens made fewer before the language model reads them: pooled, pruned, merged, or queried.

Each is a Fwd2Bot without a compress pass: what the backbone's connector gives for a picture is reduced to k vectors,
which stand in place of the image as a summary does. So trainer, data, generate pass and evaluation are those of
Fwd2Bot. One adapter trains, in the generate pass, at the rank of both stages together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.adapters_fwd2bot import run_stage


class TokenBaseline(Fwd2BotForConditionalGeneration):
    """k vectors of `(N, T, d)` image tokens, by `reduce`."""

    def reduce(self, tokens: torch.Tensor, num_tokens: int, scores: torch.Tensor | None) -> torch.Tensor:
        """`(N, T, d)` image tokens to `(N, k, d)`.

        Args:
            scores: `(N, T)` attention that each token received in the vision tower's layer that the tokens are from,
                if `reads_scores`: from the class token if the connector leaves that out, else from all, on average.
        """
        raise NotImplementedError

    reads_scores = False

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if ".lora_" in name and ".generate." in name or name.startswith("reducer.")
        }

    def _compress_pass(self, num_summary_tokens: int, **inputs: Any) -> torch.Tensor:
        if "pixel_values" not in inputs:
            raise ValueError(f"{type(self).__name__} embeds no texts; it has no retrieval.")
        base = self.backbone.base_model
        with torch.no_grad(), run_stage(None):  # vision tower and connector are frozen
            seen = base.get_image_features(pixel_values=inputs["pixel_values"], output_attentions=self.reads_scores)
            tokens = torch.stack(list(seen.pooler_output))  # (N, T, d)
            scores = self._scores(seen.attentions) if self.reads_scores else None
        return self.reduce(tokens, num_summary_tokens, scores)

    def _scores(self, attentions: Sequence[torch.Tensor]) -> torch.Tensor:
        """`(N, T)` of the attentions `(N, heads, readers, tokens)` of all layers.

        Raises:
            ValueError: tokens from before the first layer, where there is no attention yet.
        """
        layer = self.config.backbone_config.vision_feature_layer
        layer = layer[-1] if isinstance(layer, Sequence) else layer
        if layer == 0 or layer < -len(attentions):
            raise ValueError(f"vision_feature_layer {layer} is before the first layer, whose attention pruning needs.")
        attention = attentions[layer - 1 if layer > 0 else layer].mean(1)  # hidden state 1 is what layer 0 gives
        if self.config.backbone_config.vision_feature_select_strategy == "default":
            return attention[:, 0, 1:]
        return attention.mean(1)


class AllTokens(TokenBaseline):
    """All image tokens as they are: the backbone uncompressed, with LoRA on the same data."""

    def reduce(self, tokens: torch.Tensor, num_tokens: int, scores: torch.Tensor | None) -> torch.Tensor:
        if num_tokens != tokens.shape[1]:
            raise ValueError(f"All {tokens.shape[1]} image tokens are kept, not {num_tokens}.")
        return tokens


class AveragePooling(TokenBaseline):
    """Means over a grid of k rectangles, as square as can be."""

    def reduce(self, tokens: torch.Tensor, num_tokens: int, scores: torch.Tensor | None) -> torch.Tensor:
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ValueError(f"Pooling needs a square of image tokens, got {tokens.shape[1]}.")
        rows = next(rows for rows in range(int(num_tokens**0.5), 0, -1) if num_tokens % rows == 0)
        plane = tokens.transpose(1, 2).unflatten(2, (side, side))  # (N, d, S, S)
        return F.adaptive_avg_pool2d(plane, (rows, num_tokens // rows)).flatten(2).transpose(1, 2)  # (N, k, d)


class AttentionPruning(TokenBaseline):
    """The k tokens that received most attention in the vision tower, in the order of the image.

    The idea of VisionZip (arXiv 2412.04467), without the merged rest that it adds to them, and of FastV
    (arXiv 2403.06764), which takes the language model's attention.
    """

    reads_scores = True

    def reduce(self, tokens: torch.Tensor, num_tokens: int, scores: torch.Tensor | None) -> torch.Tensor:
        best = scores.topk(num_tokens, dim=1).indices.sort(1).values  # (N, k)
        return _take(tokens, best)


class TokenMerging(TokenBaseline):
    """Tokens merged with their most similar ones, a few at a time, until k are left, in the order of the image.

    Bipartite soft matching of ToMe (arXiv 2210.09461): every second token looks for the most similar one of the
    others, the most similar pairs become their mean, weighted by how many tokens each is made of. ToMe merges some
    tokens in every layer of the vision tower; here an eighth of what is left at every step, behind the connector.
    """

    def reduce(self, tokens: torch.Tensor, num_tokens: int, scores: torch.Tensor | None) -> torch.Tensor:
        sizes = tokens.new_ones(*tokens.shape[:2], 1)  # (N, T, 1)
        while (length := tokens.shape[1]) > num_tokens:
            tokens, sizes = _merge(tokens, sizes, min(length - num_tokens, max(1, length // 8)))
        return tokens


def _merge(tokens: torch.Tensor, sizes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` of every second token merged into those between; `(N, T - count, d)` and their sizes, in their order."""
    unit = F.normalize(tokens, dim=-1)
    similar, partner = (unit[:, 1::2] @ unit[:, ::2].transpose(1, 2)).max(-1)  # (N, T // 2), the even one of each odd
    order = similar.argsort(dim=1, descending=True)  # (N, T // 2)
    merged, kept = order[:, :count], order[:, count:]
    width = tokens.shape[-1]

    odd, odd_sizes = tokens[:, 1::2], sizes[:, 1::2]
    into = partner.gather(1, merged).unsqueeze(-1)  # (N, count, 1)
    moved = _take(odd_sizes, merged)  # (N, count, 1)
    total = (tokens[:, ::2] * sizes[:, ::2]).scatter_add(1, into.expand(-1, -1, width), _take(odd, merged) * moved)
    weight = sizes[:, ::2].scatter_add(1, into, moved)
    evens = torch.arange(0, tokens.shape[1], 2, device=tokens.device).expand(len(tokens), -1)
    places = torch.cat([evens, 2 * kept + 1], 1).argsort(dim=1)  # (N, T - count)
    left, left_sizes = torch.cat([total / weight, _take(odd, kept)], 1), torch.cat([weight, _take(odd_sizes, kept)], 1)
    return _take(left, places), _take(left_sizes, places)


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`(N, M, d)`: of `(N, T, d)` those at `places` `(N, M)`."""
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class QueryTransformer(TokenBaseline):
    """k learned queries that read the image tokens by cross-attention; any first k of them serve.

    Matryoshka Query Transformer (arXiv 2405.19315): one layer; queries do not see each other; k is drawn in training.
    """

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        width = config.get_text_config().hidden_size
        heads = config.get_text_config().num_attention_heads
        self.reducer = _Resampler(config.num_summary_tokens, config.backbone_config.image_seq_length, width, heads)

    def reduce(self, tokens: torch.Tensor, num_tokens: int, scores: torch.Tensor | None) -> torch.Tensor:
        return self.reducer(tokens, num_tokens)


class _Resampler(nn.Module):
    """One layer of cross-attention and an MLP.

    What it gives is at first a mean of the image tokens, which the language model reads as it is, each head's share of
    the width weighted by each query in its own way: values pass unchanged, and the MLP adds nothing yet. Keys have a
    place besides, a fixed one of sines.
    """

    def __init__(self, num_queries: int, num_tokens: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.before_queries, self.before, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        for layer in (self.value, self.out):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)
        self.register_buffer("places", _places(num_tokens, width))

    def forward(self, tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
        queries = self.query(self.before_queries(self.queries[:num_tokens])).expand(len(tokens), -1, -1)  # (N, k, d)
        keys, values = self.key(self.before(tokens) + self.places), self.value(tokens)  # (N, T, d)
        parts = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
        read = self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))  # (N, k, d)
        return read + self.mlp(self.after(read))


def _places(num_tokens: int, width: int) -> torch.Tensor:
    """`(T, d)`: sines and cosines of row and column, or of the number in a line of tokens that make no square."""
    side = round(num_tokens**0.5)
    numbers = torch.arange(num_tokens, dtype=torch.float32)
    axes = [numbers // side, numbers % side] if side * side == num_tokens else [numbers]
    count = width // (2 * len(axes))
    waves = 10000 ** (-torch.arange(count, dtype=torch.float32) / count)
    angles = [axis[:, None] * waves for axis in axes]
    places = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
    return F.pad(places, (0, width - places.shape[1]))
