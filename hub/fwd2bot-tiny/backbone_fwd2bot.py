"""What a backbone must have, and the rows that its own forward takes, whatever its family.

Nothing here asks which family it is: what a backbone reads is seen from the signature of its forward.
"""

import inspect
import os
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .adapters_fwd2bot import is_adapter_parameter
from .folder_fwd2bot import check_name
from .placeholders_fwd2bot import position_ids_from_mask
from .weights_fwd2bot import check_loading_info

NEEDED = "Give a model of transformers.AutoModelForImageTextToText, or the id or path of one."
# What families read for each token beside its id, and the value of an ordinary word, which sees what is before it.
# Gemma 3 marks image tokens with 1, PaliGemma the prefix, which sees itself both ways, with 0: -1 is neither.
CAUSAL_TOKEN = {"token_type_ids": -1, "mm_token_type_ids": 0}
# How families call their projector from vision to language model, inside the base model.
CONNECTORS = ("multi_modal_projector", "connector", "visual.merger", "vision_tower.merger")


def load_backbone(path: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """`AutoModelForImageTextToText.from_pretrained`, but a missing weight is an error."""
    check_name(path, "backbone")
    try:
        backbone, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise TypeError(f"{path} is no vision-language model that transformers knows. {NEEDED}") from error
    check_loading_info({**info, "unexpected_keys": ()}, path)
    return backbone


def commit_of(path: str | os.PathLike | None, revision: str | None, **hub: Any) -> str | None:
    """The commit of a model on the Hub, as far as its files lie in the local cache; None for a folder."""
    if not path or os.path.isdir(path):
        return None
    hub = {**hub, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    hub |= {"_raise_exceptions_for_connection_errors": False}
    try:
        return extract_commit_hash(cached_file(path, CONFIG_NAME, revision=revision, **hub), None)
    except OSError:  # an id that is none
        return None


def check_backbone(backbone: Any, processor: Any | None = None) -> None:
    """Raise `TypeError` or `ValueError` for what Fwd2Bot cannot wrap, or a processor of another model."""
    if not isinstance(backbone, PreTrainedModel) or not hasattr(backbone.config, "vision_config"):
        raise TypeError(f"{type(backbone).__name__} is no vision-language model. {NEEDED}")
    if backbone.get_output_embeddings() is None:
        raise TypeError(f"{type(backbone).__name__} has no output head, so it cannot answer. {NEEDED}")
    if backbone.config.model_type not in CONFIG_MAPPING:
        raise TypeError(
            f"transformers has no model of type {backbone.config.model_type!r}: {type(backbone).__name__} is code of "
            "its own, which a checkpoint could not be loaded with again. Wrap a family that transformers has."
        )
    name, words = type(backbone).__name__, backbone.get_input_embeddings().num_embeddings
    if any(is_adapter_parameter(parameter) for parameter, _ in backbone.named_parameters()):
        raise ValueError(f"This {name} carries LoRA adapters already. Give it as it was loaded.")
    if any(parameter.is_meta for parameter in backbone.parameters()):
        raise ValueError(
            f"Parts of this {name} are offloaded to the disk or the CPU. Load it without offloading (on several GPUs, "
            "in lower precision or quantised), wrap it, save it in full, and load that with a device_map that "
            "offloads."
        )
    image_token_id = getattr(backbone.config, "image_token_id", None)
    if image_token_id is None or not 0 <= image_token_id < words:
        raise ValueError(
            f"The config of this {name} has image_token_id={image_token_id!r}, which is no row of its input embedding "
            f"(0 to {words - 1}). Fwd2Bot puts summaries in place of that token: resize the embedding, or correct the "
            "config."
        )
    if processor is not None:
        check_processor(backbone, processor)


def check_processor(backbone: PreTrainedModel, processor: Any) -> None:
    """Raise `TypeError` or `ValueError` unless the processor is that of the backbone."""
    name, words = type(backbone).__name__, backbone.get_input_embeddings().num_embeddings
    image_token_id = backbone.config.image_token_id
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise TypeError(
            f"processor must have an image processor and a tokenizer, got {type(processor).__name__}. Load it with "
            "AutoProcessor.from_pretrained."
        )
    tokens = len(processor.tokenizer)
    if tokens > words:
        raise ValueError(
            f"The processor is another model's: its tokenizer has {tokens} tokens, this {name} reads {words}. Load it "
            "from where the backbone comes from."
        )
    found = merged_token_id(processor)
    if found != image_token_id:
        raise ValueError(
            f"The processor is another model's: its image token has the id {found}, that of this {name} is "
            f"{image_token_id}. Load it from where the backbone comes from."
        )


def merged_token_id(processor: Any) -> int:
    """Id of the tokens that the backbone replaces with image features.

    What the chat template writes for a picture may be another one (Gemma 3: `<start_of_image>`, which becomes many
    `<image_soft_token>`).
    """
    tokenizer = processor.tokenizer
    for found in (getattr(tokenizer, "image_token_id", None), getattr(processor, "image_token_id", None)):
        if found is not None:
            return found
    return tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None) or tokenizer.image_token)


def connector_parameters(backbone: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of the backbone's connector, by their names in the backbone.

    Raises:
        ValueError: for a backbone that has none under a known name, or one without its vision tower.
    """
    base = backbone.base_model
    prefix = next((f"{name}." for name, module in backbone.named_modules() if module is base and name), "")
    for connector in CONNECTORS:
        wanted = f"{prefix}{connector}."
        found = {name: value for name, value in backbone.named_parameters() if name.startswith(wanted)}
        if found:
            return found
    raise ValueError(
        f"{type(backbone).__name__} has no connector under a name known here ({', '.join(CONNECTORS)}), so it cannot "
        "train. Leave train_connector out."
    )


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
