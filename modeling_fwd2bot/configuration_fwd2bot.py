"""`Fwd2BotConfig`: every setting of a Fwd2Bot, validated once."""

import math
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

STAGES = ("compress", "generate")

# What transformers itself hands to a config, beside the dataclass fields of `PreTrainedConfig`.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
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
            Where the backbone came from. For the record: a full checkpoint holds its own copy.
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
        initial_temperature, min_temperature (`float`):
            Softmax temperature of the contrastive loss: where the learnt one starts, and its lower clamp.
        fingerprint (`str`, *optional*):
            Hash of the trained weights, written by `save_pretrained` and carried by every summary; `None` for a model
            that has been trained since it was saved.

    Raises:
        ValueError: for an unknown key or a value out of its range, naming both and the allowed ones.
    """

    model_type: ClassVar[str] = "fwd2bot"

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    num_summary_tokens: int = 16
    summary_lengths: list[int] | None = None
    image_prompt: str = "Summarize the image in a few words."
    text_prompt: str = "Summarize the sentence in a few words."
    adapters: dict[str, dict] | None = None
    autoregressive_loss_weight: float = 1.0
    contrastive_loss_weight: float = 1.0
    initial_temperature: float = 0.07
    min_temperature: float = 0.01
    fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any):
        unknown = sorted(key for key in kwargs if not key.startswith("_") and key not in _TRANSFORMERS_KEYS)
        if unknown:
            raise ValueError(
                f"Unknown Fwd2BotConfig key(s) {unknown}. Allowed: {sorted(_own_fields(type(self)))} and the fields of "
                "transformers.PreTrainedConfig. Remove or rename them in the config."
            )
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _config_from_dict(self.backbone_config)
        if self.summary_lengths is None:
            self.summary_lengths = _powers_of_two(self.num_summary_tokens)
        self._validate()
        super().__post_init__(**kwargs)

    def _validate(self) -> None:
        k_max = self.num_summary_tokens
        if not isinstance(k_max, int) or isinstance(k_max, bool) or k_max < 1:
            raise ValueError(f"num_summary_tokens must be an integer of at least 1, got {k_max!r}.")
        lengths = self.summary_lengths
        bad = [k for k in lengths if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= k_max]
        if bad or not lengths:
            raise ValueError(
                f"summary_lengths must be a non-empty list of integers in 1..num_summary_tokens={k_max}, got {lengths}."
            )
        if self.adapters is not None and sorted(self.adapters) != sorted(STAGES):
            raise ValueError(f"adapters must have exactly the stages {list(STAGES)}, got {sorted(self.adapters)}.")
        for name in ("autoregressive_loss_weight", "contrastive_loss_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")
        if not 0 < self.min_temperature <= self.initial_temperature:
            raise ValueError(
                "Temperatures must satisfy 0 < min_temperature <= initial_temperature, got "
                f"min_temperature={self.min_temperature!r}, initial_temperature={self.initial_temperature!r}."
            )
        for name in ("image_prompt", "text_prompt"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must be a non-empty text, got {getattr(self, name)!r}.")

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The config of the backbone's language model: what caches and generation are built from."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(self.backbone_config, PreTrainedConfig):
            output["backbone_config"] = self.backbone_config.to_dict()
        return output


def check_num_summary_tokens(value: int | None, config: Fwd2BotConfig) -> int:
    """`value`, or the configured length where it is None; raises `ValueError`/`TypeError` outside 1..num_summary_tokens."""
    if value is None:
        return config.num_summary_tokens
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"num_summary_tokens must be an integer, got {value!r} of type {type(value).__name__}.")
    if not 1 <= value <= config.num_summary_tokens:
        raise ValueError(
            f"num_summary_tokens={value} is out of range: this model has {config.num_summary_tokens} summary queries. "
            f"Choose 1 to {config.num_summary_tokens}; it was trained at {config.summary_lengths}."
        )
    return value


def _config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError("backbone_config has no 'model_type'. Give the backbone's own config, for example "
                         "AutoConfig.from_pretrained(backbone).to_dict().")
    return AutoConfig.for_model(model_type, **values)


def _own_fields(cls: type) -> set[str]:
    return set(cls.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)


def _powers_of_two(largest: int) -> list[int]:
    lengths = [2**power for power in range(16) if 2**power <= largest]
    return lengths if largest in lengths else [*lengths, largest]
