"""Families whose pictures attend both ways."""

from typing import Any

import transformers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .tiny_parts import (
    IMAGE_SIZE,
    PATCH_SIZE,
    SQUARE,
    WIDTH,
    Family,
    family,
    make_tokenizer,
    random_model,
    text_fields,
    user_turn,
    vision_fields,
)

GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")


@family
def gemma3() -> Family:
    """Tied and scaled embeddings, a sliding window of 12 tokens, a padded vocabulary."""
    template = user_turn(
        "<start_of_turn>user\n",
        "<start_of_image>",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
        start="{{ bos_token }}",
        end="<end_of_turn>\n",
    )
    tokenizer = make_tokenizer(
        *GEMMA_TURNS,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        template=template,
        start_with_bos=True,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    text = text_fields(
        tokenizer,
        padded_to=64,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**vision_fields(vision_use_head=False)),
        text_config=transformers.Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE), tokenizer, chat_template=template, image_seq_length=4
    )
    return random_model(transformers.Gemma3ForConditionalGeneration, config, tokenizer), processor


def _paligemma(text_class: type, **fields: Any) -> Family:
    # The family has no chat template: its prompts are pictures and words, to which the processor adds the rest.
    template = user_turn("", "<image>", "", "")
    tokenizer = make_tokenizer(bos="<bos>", eos="<eos>", pad="<pad>", template=template, image_token="<image>")
    images = SiglipImageProcessorPil(size=SQUARE, image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2)
    processor = transformers.PaliGemmaProcessor(images, tokenizer, chat_template=template)  # adds 1152 tokens
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**vision_fields(vision_use_head=False)),
        text_config=text_class(**text_fields(tokenizer, head_dim=16, **fields)),
        image_token_index=tokenizer.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return random_model(transformers.PaliGemmaForConditionalGeneration, config, tokenizer), processor


@family
def paligemma() -> Family:
    return _paligemma(transformers.GemmaConfig)


@family
def paligemma2() -> Family:
    return _paligemma(
        transformers.Gemma2Config,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )
