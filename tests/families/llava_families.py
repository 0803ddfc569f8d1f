"""LLaVA and its descendants."""

from typing import Any

import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .tiny_parts import (
    IMAGE_SIZE,
    PATCH_SIZE,
    SQUARE,
    Family,
    family,
    make_tokenizer,
    random_model,
    text_fields,
    user_turn,
    vision_fields,
)


def _llava(
    tower: str,
    strategy: str,
    padded_to: int | None = None,
    text: type[transformers.PreTrainedConfig] = transformers.LlamaConfig,
    **fields: Any,
) -> Family:
    template = user_turn("USER: ", "<image>\n", " ", "ASSISTANT:", end=" </s>")
    tokenizer = make_tokenizer(
        bos="<s>", eos="</s>", pad="<pad>", template=template, start_with_bos=True, image_token="<image>"
    )
    has_cls = tower == "clip"
    vision = (
        transformers.CLIPVisionConfig(**vision_fields())
        if has_cls
        else transformers.SiglipVisionConfig(**vision_fields())
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text(**text_fields(tokenizer, padded_to, **fields)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    if has_cls:
        images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE)
    else:
        images = SiglipImageProcessorPil(size=SQUARE)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_cls),
        chat_template=template,
    )
    return random_model(transformers.LlavaForConditionalGeneration, config, tokenizer), processor


@family
def llava_clip_default() -> Family:
    """As LLaVA-1.5, also in that its vocabulary is padded to a multiple of 64."""
    return _llava("clip", "default", padded_to=64)


@family
def llava_clip_full() -> Family:
    return _llava("clip", "full")


@family
def llava_siglip_default() -> Family:
    return _llava("siglip", "default")


@family
def llava_siglip_full() -> Family:
    return _llava("siglip", "full")


@family
def llava_mixtral() -> Family:
    """A mixture of experts: 2 of 4 for each token, their weights in one tensor that takes no LoRA."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _llava("clip", "default", text=transformers.MixtralConfig, **experts)


@family
def llava_next() -> Family:
    template = user_turn("[INST] ", "<image>\n", " [/INST]", "", end="</s>")
    tokenizer = make_tokenizer(
        bos="<s>", eos="</s>", pad="<pad>", template=template, start_with_bos=True, image_token="<image>"
    )
    pinpoints = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_fields()),
        text_config=transformers.MistralConfig(**text_fields(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
    )
    processor = transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return random_model(transformers.LlavaNextForConditionalGeneration, config, tokenizer), processor


@family
def llava_onevision() -> Family:
    template = user_turn("<|im_start|>user ", "<image>\n", "<|im_end|>", "<|im_start|>assistant\n", end="<|im_end|>")
    tokenizer = make_tokenizer(
        "<|im_start|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=template,
        image_token="<image>",
        video_token="<video>",
    )
    sides = (IMAGE_SIZE, 2 * IMAGE_SIZE)
    pinpoints = [[height, width] for height in sides for width in sides]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision_fields(vision_use_head=False)),
        text_config=transformers.Qwen2Config(**text_fields(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    processor = transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=pinpoints),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return random_model(transformers.LlavaOnevisionForConditionalGeneration, config, tokenizer), processor
