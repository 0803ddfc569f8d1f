"""Quantised backbones: what is quantised is the backbone and nothing else.

Queries, adapters and summary projector train, so they stay in a floating point dtype; and a checkpoint describes them,
whatever the backbone that they run on was quantised with. No line here imports a quantisation library.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

# Patterns of what `from_pretrained(quantization_config=...)` must leave alone: ours, and the output head, which
# transformers leaves alone only where no other part is named.
_KEPT = (r".*\.lora_[AB]\.\w+", "summary_projector", r".*\.lm_head")
# How the libraries call the list of modules that they leave alone: bitsandbytes, HQQ, and the others.
_SKIP_LISTS = ("llm_int8_skip_modules", "skip_modules", "modules_to_not_convert")
# What transformers notes down on the model that it quantised, and PEFT reads on the one that it adapts.
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")


def is_quantized(backbone: PreTrainedModel) -> bool:
    return getattr(backbone, "is_quantized", False)


def check_gradients(backbone: PreTrainedModel) -> None:
    """Raise `ValueError` where bitsandbytes would lose the gradient without a word.

    On CPUs with AVX512-BF16 it repacks 4 bit weights at the first pass without gradients, for a kernel that has none.
    """
    if not is_quantized(backbone):
        return
    for module in backbone.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "This model in 4 bit has run without gradients, and bitsandbytes has repacked its weights for the CPU "
                "in a way that has no gradient. Load it anew and train before anything else, or train on a GPU."
            )


def quantize_backbone_only(quantization_config: Any) -> Any:
    """A copy of the argument `quantization_config` of `from_pretrained` that leaves alone what Fwd2Bot adds.

    Raises:
        ValueError: for a library whose configuration cannot leave modules alone.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    quantization_config = copy.deepcopy(quantization_config)
    name = next((name for name in _SKIP_LISTS if hasattr(quantization_config, name)), None)
    if name is None:
        raise ValueError(
            f"A {type(quantization_config).__name__} cannot leave modules alone (it has none of {list(_SKIP_LISTS)}), "
            "so it would quantise what trains. Load the backbone alone with it, and put the model around that."
        )
    setattr(quantization_config, name, [*(getattr(quantization_config, name) or ()), *_KEPT])
    return quantization_config


def mark_backbone(model: Any) -> None:
    """Move what the loader noted down on a Fwd2Bot to its backbone, which is what it quantised.

    On the whole model it would say that nothing of it can train, and that its weights are saved in the way of the
    quantisation library.
    """
    for name in _MARKS:
        if name in vars(model):
            setattr(model.backbone, name, vars(model).pop(name))
    if hasattr(model.config, "quantization_config"):
        model.backbone.config.quantization_config = model.config.quantization_config
        del model.config.quantization_config


@contextmanager
def shown_to_peft(backbone: PreTrainedModel) -> Iterator[nn.Module]:
    """The language model of a backbone, marked as its quantiser marked the backbone.

    PEFT chooses its LoRA layers by the marks of the model that it gets, and that is only the language model here.
    """
    decoder = backbone.get_decoder()
    marks = [name for name in _MARKS if hasattr(backbone, name) and not hasattr(decoder, name)]
    for name in marks:
        setattr(decoder, name, getattr(backbone, name))
    try:
        yield decoder
    finally:
        for name in marks:
            delattr(decoder, name)
