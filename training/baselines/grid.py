"""The rows of the comparison, in the order of what they decide, and the methods that they compare."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

from .cache_model import CacheCompression, SingleForward
from .token_models import AllTokens, AttentionPruning, AveragePooling, QueryTransformer, TokenMerging
from .variants import (
    AttentionPooling,
    FullFineTuning,
    LargerProjector,
    LastPooling,
    LayerMix,
    MlpProjector,
    NoAdapters,
    NoProjector,
    NormProjector,
    PromptFirstProcessor,
    SharedAdapter,
)

LENGTHS = [1, 2, 4, 8, 16]
BARE = "uncompressed"  # nothing trains


@dataclass(frozen=True)
class Method:
    """How a picture becomes k tokens.

    Args:
        model: the class; None is the bare backbone.
        embeds: whether it embeds pictures and texts, so that there is a contrastive loss and retrieval.
        shares: whether the rank of both stages goes into one adapter.
        processor: the class, around the backbone's processor.
    """

    model: type | None
    embeds: bool = False
    shares: bool = True
    about: str = ""
    processor: type = Fwd2BotProcessor


METHODS = {
    "fwd2bot": Method(
        Fwd2BotForConditionalGeneration,
        embeds=True,
        shares=False,
        about="the base: the summary from behind the final norm",
    ),
    BARE: Method(None, about="the bare backbone on all image tokens"),
    "uncompressed_lora": Method(AllTokens, about="all image tokens, LoRA on the same data"),
    "pooling": Method(AveragePooling, about="means over a grid of k rectangles"),
    "pruning": Method(AttentionPruning, about="the k tokens that the vision tower attends to most"),
    "merging": Method(TokenMerging, about="similar tokens merged until k are left"),
    "query_transformer": Method(QueryTransformer, about="k learned queries at the connector, elastic"),
    "cache": Method(CacheCompression, about="one pass; keys and values of k tokens in every layer"),
    "shared_adapter": Method(SharedAdapter, embeds=True, about="one adapter for both passes"),
    "no_adapters": Method(NoAdapters, embeds=True, about="queries and projector alone train"),
    "full_fine_tuning": Method(FullFineTuning, embeds=True, about="the language model trains, no adapters"),
    "no_projector": Method(NoProjector, embeds=True, shares=False, about="no summary projector"),
    "norm_projector": Method(NormProjector, embeds=True, shares=False, about="a norm, not a linear projector"),
    "larger_projector": Method(
        LargerProjector, embeds=True, shares=False, about="the linear projector begins 4.3 times as large"
    ),
    "mlp_projector": Method(MlpProjector, embeds=True, shares=False, about="an MLP beside the linear projector"),
    "single_forward": Method(
        SingleForward, embeds=True, about="one pass, one adapter: the answer reads the queries in every layer"
    ),
    "prompt_first": Method(
        Fwd2BotForConditionalGeneration,
        embeds=True,
        shares=False,
        about="the prompt before the picture in the compress pass",
        processor=PromptFirstProcessor,
    ),
    "before_norm": Method(
        Fwd2BotForConditionalGeneration, embeds=True, shares=False, about="the summary from before the final norm"
    ),
    "layer_mix": Method(LayerMix, embeds=True, shares=False, about="a weighted sum of all layers, weights learned"),
    "last_pooling": Method(LastPooling, embeds=True, shares=False, about="embedding: the last vector, not the mean"),
    "attention_pooling": Method(
        AttentionPooling, embeds=True, shares=False, about="embedding: a weighted mean, the weights learned"
    ),
}


@dataclass(frozen=True)
class Row:
    """One training and its evaluation.

    Args:
        name: of its result. method: of `METHODS`.
        lengths: k, several for one elastic training, none for all image tokens.
        config: fields of `Fwd2BotConfig`. rank: times the recipe's LoRA rank. rate: times its learning rates.
    """

    name: str
    method: str
    lengths: list[int] = field(default_factory=lambda: LENGTHS)
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    rank: float = 1.0
    rate: float = 1.0

    @property
    def file(self) -> str:
        return f"{self.name}-seed{self.seed}.json"


def rows() -> list[Row]:
    """All rows: methods, lower learning rates, what Fwd2Bot is made of, other k, seeds of some methods, details."""
    head = [Row("fwd2bot", "fwd2bot"), Row(BARE, BARE, [])]
    head += [Row("pooling-k4", "pooling", [4]), Row("query_transformer", "query_transformer")]
    head += [Row("uncompressed_lora", "uncompressed_lora", []), Row("pruning-k4", "pruning", [4])]
    head += [Row("cache", "cache"), Row("merging-k4", "merging", [4])]
    ablations = [
        Row("autoregressive_only", "fwd2bot", config={"contrastive_loss_weight": 0.0}),
        Row("contrastive_only", "fwd2bot", config={"autoregressive_loss_weight": 0.0}),
        Row("shared_adapter", "shared_adapter"),
        Row("no_adapters", "no_adapters"),
        Row("full_fine_tuning", "full_fine_tuning"),
        Row("fixed-k4", "fwd2bot", [4]),
    ]
    variants = (
        "single_forward",
        "layer_mix",
        "prompt_first",
        "last_pooling",
        "attention_pooling",
        "norm_projector",
    )
    ablations += [Row(name, name) for name in variants]
    ablations += [Row("before_norm", "before_norm", config={"summary_norm": False})]
    more = [Row(f"{name}-k{k}", name, [k]) for k in (1, 16, 2, 8) for name in ("pooling", "merging", "pruning")]
    details = [
        *(Row(f"contrastive_weight-{w:g}", "fwd2bot", config={"contrastive_loss_weight": w}) for w in (0.03, 1.0)),
        Row("no_projector", "no_projector"),
        Row("mlp_projector", "mlp_projector"),
        Row("larger_projector", "larger_projector"),
        Row("rank-half", "fwd2bot", rank=0.5),
        Row("rank-double", "fwd2bot", rank=2.0),
        Row("prompt", "fwd2bot", config={"image_prompt": "Remember:", "text_prompt": "Remember:"}),
        Row("fixed-k16", "fwd2bot", [16]),
        Row("fixed-k1", "fwd2bot", [1]),
    ]
    named = ("fwd2bot", "pooling-k4", "query_transformer", "uncompressed_lora")
    seeds = [Row(r.name, r.method, r.lengths, seed) for seed in (1, 2) for r in head if r.name in named]
    rates = [Row(f"{r.name}-rate0.3", r.method, r.lengths, rate=0.3) for r in head if r.method != BARE]
    rates += [Row("uncompressed_lora-rate0.1", "uncompressed_lora", [], rate=0.1)]
    rates += [Row("full_fine_tuning-rate0.1", "full_fine_tuning", rate=0.1)]
    return [*head, *rates, *ablations, *more, *seeds, *details]


def chosen_rows(names: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Row]:
    """Rows of the grid, all or those of `names` and `seeds`; where both are given, every name with every seed.

    The bare backbone, of which nothing trains, has one seed alone.

    Raises:
        ValueError: the grid has no such name, or no row of one of these seeds.
    """
    every = rows()
    unknown = sorted(set(names or ()) - {row.name for row in every})
    if unknown:
        raise ValueError(f"unknown row {', '.join(unknown)}; choose from {', '.join(sorted({r.name for r in every}))}")
    if names and seeds:
        first = [row for row in every if row.name in names and row.seed == 0]
        pairs = [(row, seed) for seed in dict.fromkeys(seeds) for row in first]
        return [replace(row, seed=seed) for row, seed in pairs if row.method != BARE or seed == 0]
    planned = sorted({row.seed for row in every})
    others = sorted(set(seeds or ()) - set(planned))
    if others:
        asked, has = (", ".join(map(str, values)) for values in (others, planned))
        raise ValueError(f"no row is planned with seed {asked}, but with {has}; name the rows that shall have it")
    return [row for row in every if row.name in (names or [row.name]) and row.seed in (seeds or [row.seed])]
