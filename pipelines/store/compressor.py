"""What ties a store to the model that makes its summaries: checks, and pictures and queries through that model."""

from typing import Any

import numpy as np
import torch

from fwd2bot import Fwd2BotSummary
from fwd2bot.configuration_fwd2bot import check_num_summary_tokens
from fwd2bot.summary_fwd2bot import pool_summary, summary_from

from ..pipeline_batches import check_fit, check_model
from ..retrieval_pipeline import query_item
from .codecs import check_codec
from .table import StoreConfig


def new_config(model: Any, processor: Any, num_summary_tokens: int | None, codec: str) -> StoreConfig:
    """The config of a store that this model fills.

    Raises:
        TypeError, ValueError: for what is no Fwd2Bot, a processor that does not fit it, or a length or codec that
            there is none of.
    """
    check_model(model, "SummaryStore")
    check_fit(processor, model)
    return StoreConfig(
        **model._metadata(model.summary_projector.weight.dtype, model.config.image_prompt),
        text_prompt=model.config.text_prompt,
        num_summary_tokens=check_num_summary_tokens(num_summary_tokens, model.config),
        width=model.summary_projector.out_features,
        codec=check_codec(codec),
    )


class Compressor:
    """A model and its processor beside a store that they made, or None and None.

    Raises:
        ValueError: for a model that did not make the store, naming both.
    """

    def __init__(self, model: Any, processor: Any, config: StoreConfig, path: str):
        self.model, self.processor, self.config = model, processor, config
        if (model is None) != (processor is None):
            raise ValueError("Give both a model and a processor, or neither.")
        if model is None:
            return
        check_model(model, "SummaryStore")
        check_fit(processor, model)
        for what, found, made in (
            ("fingerprint", model.fingerprint, config.fingerprint),
            ("image prompt", model.config.image_prompt, config.prompt),
            ("text prompt", model.config.text_prompt, config.text_prompt),
        ):
            if found != made:
                name = model._metadata(model.dtype, "")["model"]
                raise ValueError(
                    f"The store {path} was made by another model: {config.model!r}, whose {what} is {made!r}; this is "
                    f"{name!r} with {found!r}. Open it with its own model, or make a store with this one."
                )
        largest = model.config.num_summary_tokens
        if config.num_summary_tokens > largest:
            raise ValueError(
                f"The store {path} has summaries of {config.num_summary_tokens} tokens; this model makes at most "
                f"{largest}."
            )

    def require(self, what: str, *stages: str) -> None:
        """Raise `ValueError` without a model of one of these stages (or a whole one) in evaluation mode."""
        if self.model is None:
            raise ValueError(f"The store was opened without a model, which is needed to {what}. Give one to open().")
        if self.model.stage not in (None, *stages):
            raise ValueError(
                f"The model was loaded with stage={self.model.stage!r} and cannot {what}. Load it without `stage`, or "
                f"with stage={stages[0]!r}."
            )
        if self.model.training:
            raise ValueError("The model is in training mode, in which dropout changes summaries. Call model.eval().")

    @property
    def is_on_cpu(self) -> bool:
        """Whether all of the model is; of one in parts some may be."""
        return all(weight.device.type == "cpu" for weight in self.model.parameters())

    def prepare(self, pictures: list[Any]) -> Any:
        """What the model reads of decoded pictures, on the CPU; another thread may do it ahead."""
        return self.processor.process_images(pictures)

    def compress(self, inputs: Any) -> torch.Tensor:
        """What `prepare` gave, or the processor made of texts, through the model: tokens `(N, k, d)` float32."""
        inputs = inputs.to(self.model.device)
        return self.model.compress(**inputs, num_summary_tokens=self.config.num_summary_tokens).tokens.float().cpu()

    def query(self, query: Any) -> torch.Tensor:
        """Tokens `(1, k, d)` float32 of a sentence, a picture or a summary of one picture.

        Raises:
            TypeError, ValueError: for another sort of query, or without the model that it needs.
        """
        item = query_item(query, self.config.width)
        if "summary" in item:
            summary = summary_from(item["summary"])
            check_summary(summary, self.config)
            return summary.truncate(self.config.num_summary_tokens).tokens.float()
        if "text" in item:
            self.require("search by a sentence", "text", "compress")
            return self.compress(self.processor.process_texts([item["text"]]))
        self.require("search by a picture", "compress")
        return self.compress(self.prepare([self.processor.load_image(item["image"])]))


def embed_tokens(tokens: torch.Tensor) -> np.ndarray:
    """Tokens `(N, k, d)` to embeddings `(N, d)` of unit norm: what `model.embed(summary=…)` gives."""
    return pool_summary(tokens, tokens.shape[1]).numpy()


def check_summary(summary: Fwd2BotSummary, config: StoreConfig) -> None:
    """Raise `ValueError` for summaries of another model or width, or shorter than those of the store."""
    if summary.tokens.shape[-1] != config.width:
        raise ValueError(f"The summary is {summary.tokens.shape[-1]} wide, those of the store {config.width}.")
    for name, allowed in (("fingerprint", [config.fingerprint]), ("prompt", [config.prompt, config.text_prompt])):
        found = summary.metadata[name]
        if found is not None and found not in allowed:
            raise ValueError(
                f"The summary was made by another model than the store: its {name} is {found!r}, that of the store "
                f"{allowed[0]!r}. Compress the pictures anew with {config.model!r}."
            )
    shortest = summary.min_summary_tokens
    if shortest < config.num_summary_tokens:
        raise ValueError(
            f"A summary has {shortest} token(s), those of the store have {config.num_summary_tokens}, and embeddings "
            "compare at equal length only. Compress the picture anew."
        )
