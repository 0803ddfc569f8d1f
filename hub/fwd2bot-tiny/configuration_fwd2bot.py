"""`Fwd2BotConfig`: every setting of a Fwd2Bot, validated once."""

import math
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from transformers import AutoConfig, PreTrainedConfig

STAGES = ("compress", "generate")
CONTRASTIVE_LOSSES = ("infonce", "sigmoid")
IMAGE_PROMPT = "Summarize the image in a few words."
TEXT_PROMPT = "Summarize the sentence in a few words."

# What transformers itself hands to a config, beside the dataclass fields of `PreTrainedConfig`.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "bos_token_id",  # this and the other two tokens: by its Trainer, before 5.18
    "custom_pipelines",
    "eos_token_id",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "pad_token_id",
    "torch_dtype",
    "use_cache",
}


class Fwd2BotConfig(PreTrainedConfig):
    r"""
    Settings of a [`Fwd2BotForConditionalGeneration`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`):
            Config of the wrapped LVLM, any model of `AutoModelForImageTextToText`.
        backbone_name_or_path (`str`, *optional*), backbone_revision (`str`, *optional*):
            Where the backbone came from. An adapter-only checkpoint loads it from there; a full one has its own copy.
        num_summary_tokens (`int`):
            Number of learned summary queries, the largest length k of a summary.
        summary_lengths (`list[int]`, *optional*):
            Lengths that training draws from (elastic k), each in 1..num_summary_tokens. Default: the powers of two
            up to `num_summary_tokens`, and `num_summary_tokens` itself.
        image_prompt, text_prompt (`str`):
            What follows the image, or the text, in the compress pass. Source of the image prompt: Fwd2Bot
            (arXiv 2503.21757); the text side through the same pass is this project's choice.
        adapters (`dict[str, dict]`):
            Arguments of `peft.LoraConfig` for the stages "compress" and "generate".
        autoregressive_loss_weight, contrastive_loss_weight (`float`):
            Weights of the two losses in `forward`.
        contrastive_loss (`str`):
            "infonce" (as CLIP) or "sigmoid" (as SigLIP), which has a learnt bias, `logit_bias`, among the weights.
        summary_norm (`bool`):
            Whether a summary is projected from the last hidden states as the language model gives them, or, if False,
            from before its final norm. Source: `before_norm` in the comparison of `docs/results.md`.
        initial_temperature, min_temperature (`float`):
            Temperature of the contrastive loss: where the learnt one starts, and its lower clamp.
        train_connector (`bool`):
            Whether the backbone's own projector trains as well. Then only a full checkpoint can hold the model.
        fingerprint (`str`, *optional*):
            Hash of the trained weights, written by `save_pretrained` and carried by every summary; `None` for a model
            that has been trained since it was saved.
        adapter_only (`bool`):
            Whether the checkpoint leaves the backbone out; written by `save_pretrained`.
        merged_stage (`str`, *optional*):
            "compress" in a checkpoint whose weights hold that stage's adapter, which can do nothing else; written by
            `merge_and_export`.

    Raises:
        ValueError: for an unknown key or a value out of its range, naming both and the allowed ones.
    """

    model_type: ClassVar[str] = "fwd2bot"
    # Read by transformers' Trainer: what it shall not gather in evaluation.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "summary",
        "image_embeds_by_length",
        "hidden_states",
        "attentions",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    num_summary_tokens: int = 16
    summary_lengths: list[int] | None = None
    image_prompt: str = IMAGE_PROMPT
    text_prompt: str = TEXT_PROMPT
    adapters: dict[str, dict] | None = None
    autoregressive_loss_weight: float = 1.0
    contrastive_loss_weight: float = 1.0
    contrastive_loss: str = "infonce"
    train_connector: bool = False
    summary_norm: bool = True
    initial_temperature: float = 0.07
    min_temperature: float = 0.01
    fingerprint: str | None = None
    adapter_only: bool = False
    merged_stage: str | None = None

    def __post_init__(self, **kwargs: Any):
        if __name__.startswith("fwd2bot."):
            # The installed package has registered its pipelines; the copies in a checkpoint are for where it is not.
            kwargs.pop("custom_pipelines", None)
        unknown = sorted(key for key in kwargs if not key.startswith("_") and key not in _TRANSFORMERS_KEYS)
        if unknown:
            raise ValueError(
                f"Unknown Fwd2BotConfig key(s) {unknown}. Allowed: {sorted(own_fields(type(self)))} and the fields "
                "of transformers.PreTrainedConfig. Remove or rename them in the config."
            )
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _config_from_dict(self.backbone_config)
        self._validate()
        if self.summary_lengths is None:
            self.summary_lengths = _powers_of_two(self.num_summary_tokens)
        super().__post_init__(**kwargs)

    def _validate(self) -> None:
        if self.backbone_config is not None and not isinstance(self.backbone_config, PreTrainedConfig):
            raise TypeError(f"backbone_config must be a PreTrainedConfig or its dict, got {self.backbone_config!r}.")
        k_max, lengths = self.num_summary_tokens, self.summary_lengths
        if not _is_integer(k_max) or k_max < 1:
            raise ValueError(f"num_summary_tokens must be an integer of at least 1, got {k_max!r}.")
        is_list = isinstance(lengths, (list, tuple)) and len(lengths) > 0
        if lengths is not None and not (is_list and all(_is_integer(k) and 1 <= k <= k_max for k in lengths)):
            raise ValueError(
                f"summary_lengths must be a non-empty list of integers in 1..{k_max} (num_summary_tokens), "
                f"got {lengths!r}."
            )
        if self.adapters is not None:
            self._validate_adapters()
        for name in ("adapter_only", "summary_norm", "train_connector"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.contrastive_loss not in CONTRASTIVE_LOSSES:
            raise ValueError(
                f"contrastive_loss must be one of {list(CONTRASTIVE_LOSSES)}, got {self.contrastive_loss!r}."
            )
        if self.merged_stage not in (None, "compress"):
            raise ValueError(f"merged_stage must be None or 'compress', got {self.merged_stage!r}.")
        numbers = ("autoregressive_loss_weight", "contrastive_loss_weight", "initial_temperature", "min_temperature")
        for name in numbers:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")
        if not 0 < self.min_temperature <= self.initial_temperature:
            raise ValueError(
                "Temperatures must satisfy 0 < min_temperature <= initial_temperature, got "
                f"min_temperature={self.min_temperature!r}, initial_temperature={self.initial_temperature!r}."
            )
        for name in ("image_prompt", "text_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} must be a non-empty text, got {value!r}.")

    def _validate_adapters(self) -> None:
        if not isinstance(self.adapters, dict) or sorted(self.adapters) != sorted(STAGES):
            raise ValueError(f"adapters must be a dict with the stages {list(STAGES)}, got {self.adapters!r}.")
        allowed = set(LoraConfig.__dataclass_fields__)
        for stage, lora in self.adapters.items():
            unknown = sorted(set(lora) - allowed)
            if unknown:
                raise ValueError(
                    f"adapters[{stage!r}] has unknown key(s) {unknown}; they are arguments of peft.LoraConfig: "
                    f"{sorted(allowed)}."
                )

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The config of the backbone's language model: what caches and generation are built from."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Settings of `generate()` that were put into this config, which transformers refuses.

        Each answer asks for them, and walks through all that there could be; here nearly always none was added.
        """
        added = set(vars(self)) - set(self.__dataclass_fields__) - {"auto_map", "custom_pipelines"}
        return super()._get_generation_parameters() if any(name[0] != "_" for name in added) else {}

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(self.backbone_config, PreTrainedConfig):
            output["backbone_config"] = self.backbone_config.to_dict()
            # How the backbone was quantised is a matter of loading it; what is saved here runs on any.
            output["backbone_config"].pop("quantization_config", None)
        return output


def check_num_summary_tokens(value: int | None, config: Fwd2BotConfig) -> int:
    """`value`, or the configured length where it is None; an error unless it is in 1..num_summary_tokens."""
    if value is None:
        return config.num_summary_tokens
    if not _is_integer(value):
        raise TypeError(f"num_summary_tokens must be an integer, got {value!r} of type {type(value).__name__}.")
    if not 1 <= value <= config.num_summary_tokens:
        raise ValueError(
            f"num_summary_tokens={value} is out of range: this model has {config.num_summary_tokens} summary queries. "
            f"Choose 1 to {config.num_summary_tokens}; it was trained at {config.summary_lengths}."
        )
    return value


def check_lengths(lengths: torch.Tensor, num_images: int, config: Fwd2BotConfig) -> torch.Tensor:
    """`(N,)` lengths of single images as they are; an error unless each is in 1..num_summary_tokens."""
    most = config.num_summary_tokens
    whole = not lengths.is_floating_point() and lengths.dtype != torch.bool
    if not whole or lengths.shape != (num_images,) or not 1 <= int(lengths.min()) <= int(lengths.max()) <= most:
        raise ValueError(
            f"num_summary_tokens as a tensor must hold {num_images} integers in 1..{most}, one for each image, got "
            f"{lengths.tolist()}."
        )
    return lengths


def _config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            "backbone_config has no 'model_type'. Give the backbone's own config, for example "
            "AutoConfig.from_pretrained(backbone).to_dict()."
        )
    return AutoConfig.for_model(model_type, **values)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def own_fields(cls: type) -> set[str]:
    """Names of the fields that a config has beside those of every config of transformers."""
    return set(cls.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)


def _powers_of_two(largest: int) -> list[int]:
    lengths = [2**power for power in range(16) if 2**power <= largest]
    return lengths if largest in lengths else [*lengths, largest]
