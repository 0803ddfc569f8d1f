"""Fwd2Bot: a vision-language model that compresses its own image tokens, and retrieves and answers from them."""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from fwd2bot.pipelines.registry import register as register_pipelines

from .configuration_fwd2bot import Fwd2BotConfig
from .modeling_fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotOutput
from .processing_fwd2bot import Fwd2BotProcessor
from .summary_fwd2bot import Fwd2BotSummary

try:
    __version__ = version("fwd2bot")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0+unknown"

__all__ = [
    "Fwd2BotConfig",
    "Fwd2BotForConditionalGeneration",
    "Fwd2BotOutput",
    "Fwd2BotProcessor",
    "Fwd2BotSummary",
]

AutoConfig.register(Fwd2BotConfig.model_type, Fwd2BotConfig)
AutoModel.register(Fwd2BotConfig, Fwd2BotForConditionalGeneration)
AutoModelForImageTextToText.register(Fwd2BotConfig, Fwd2BotForConditionalGeneration)
AutoProcessor.register(Fwd2BotConfig, Fwd2BotProcessor)
register_pipelines()
