"""What `lmms-eval` finds by the entry point of this package: the model `fwd2bot`."""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model fwd2bot`; the class itself is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fwd2bot", simple_class_path="fwd2bot.training.lmms_eval_model.Fwd2BotLmms")
