"""What the builders of tiny families share, and the register that they put themselves into."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_torchvision_available

IMAGE_SIZE, PATCH_SIZE = 24, 6  # 16 patches
WIDTH = 32
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
SENTENCES = [
    "Summarize the image in a few words.",
    "Summarize the sentence in a few words.",
    "What is in the picture?",
]

# Their processors carry a video processor, which transformers has for torchvision alone, or ask for it themselves.
NEED_TORCHVISION = {
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "internvl",
    "glm4v",
    "mistral3",
    "qwen3_5",
    "lfm2_vl",
}
if getattr(transformers.Idefics3ImageProcessorPil, "is_dummy", False):
    NEED_TORCHVISION.add("idefics3")  # transformers 5.17 asks it for a processor that does not use it

# What the embeddings are, as in checkpoints of the families: the output head is the input embedding; words are scaled
# on their way in; there are rows past the tokenizer's last id.
TIED = {"aya_vision", "gemma3", "lfm2_vl", "mistral3", "paligemma", "paligemma2", "qwen2_vl", "qwen3_vl"}
SCALED = {"gemma3", "paligemma", "paligemma2"}
PADDED = {"gemma3", "llava_clip_default", "qwen2_5_vl"}
# Whose processor fills pictures, or the number of their tiles, up to the largest of a call.
FILLED_UP = {"idefics3", "llava_next", "llava_onevision", "mistral3", "smolvlm"}

Family = tuple[PreTrainedModel, ProcessorMixin]
FAMILIES: dict[str, Callable[[], Family]] = {}


def build(name: str) -> Family:
    """A model of the family, the caller's own copy, and a processor of it.

    Skips the running test where the family needs torchvision and there is none.
    """
    if name in NEED_TORCHVISION and not is_torchvision_available():
        pytest.skip(f"the processor of {name} needs torchvision")
    return copy.deepcopy(_build_once(name))


def pictures() -> list[Image.Image]:
    """Pictures of coarse random colours: upright, wide, square and small, tall, very wide."""
    sizes = [(40, 50), (72, 30), (24, 24), (26, 75), (90, 22)]
    random = np.random.RandomState(7)
    blocks = [Image.fromarray(random.randint(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in sizes]
    return [block.resize(size, Image.Resampling.NEAREST) for block, size in zip(blocks, sizes, strict=True)]


def conversation(text: str, num_images: int = 1) -> list[dict]:
    """One user turn with so many images before the text, for `apply_chat_template`."""
    return [{"role": "user", "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]}]


def merged_token_id(model: PreTrainedModel) -> int:
    """Id of the tokens that the model replaces with image features."""
    return model.config.image_token_id


@cache
def _build_once(name: str) -> Family:
    return FAMILIES[name]()


def family(builder: Callable[[], Family]) -> Callable[[], Family]:
    FAMILIES[builder.__name__] = builder
    return builder


# What the builders share


def make_tokenizer(
    *specials: str,
    bos: str | None = None,
    eos: str,
    pad: str,
    template: str,
    start_with_bos: bool = False,
    **named: str,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few sentences; `named` tokens become attributes, as `image_token="<image>"` does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([token for token in (bos, eos, pad, *named.values(), *specials) if token])
    if start_with_bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens=named,
        chat_template=template,
    )


def text_fields(tokenizer: PreTrainedTokenizerFast, padded_to: int | None = None, **fields: Any) -> dict[str, Any]:
    """Fields of a language model's config; `padded_to` rounds its vocabulary up, as many checkpoints do."""
    size = len(tokenizer)
    return {
        "vocab_size": size if padded_to is None else -(-(size + 1) // padded_to) * padded_to,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }


def vision_fields(**fields: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        **fields,
    }


def random_model(
    model_class: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).float().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that every input matters to the output
                parameter.normal_(0, 0.15)
        words = model.get_input_embeddings().weight
        if words is model.get_output_embeddings().weight:  # else every word would be followed by itself
            words.mul_(0.2)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def user_turn(before: str, image: str, after: str, reply: str, start: str = "", end: str = "") -> str:
    """A chat template: `start`, then for every turn `before` content `after`, `reply` where an answer begins."""
    return (
        f"{start}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{before}"
        f"{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        f"{after}{{% else %}}{reply}{{{{ message['content'][0]['text'] }}}}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{reply}{{% endif %}}"
    )


CHATML = {
    "before": "<|im_start|>user\n",
    "after": "<|im_end|>\n",
    "reply": "<|im_start|>assistant\n",
    "end": "<|im_end|>\n",
}
