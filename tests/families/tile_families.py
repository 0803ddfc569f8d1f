"""Families of tiles and pixel shuffle."""

from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from .tiny_parts import (
    CHATML,
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


def _idefics3_tokenizer(start: str, eos: str = "<end_of_utterance>") -> PreTrainedTokenizerFast:
    template = user_turn(
        "User:", "<image>", "<end_of_utterance>\n", "Assistant:", start=start, end="<end_of_utterance>\n"
    )
    return make_tokenizer(
        "<fake_token_around_image>",
        "<end_of_utterance>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        bos=start,
        eos=eos,
        pad="<|end_of_text|>",
        template=template,
        image_token="<image>",
    )


def _tiles() -> dict[str, Any]:
    return {"size": {"longest_edge": 2 * IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}


@family
def idefics3() -> Family:
    tokenizer = _idefics3_tokenizer("<|begin_of_text|>")
    config = transformers.Idefics3Config(
        vision_config=vision_fields(),
        text_config=transformers.LlamaConfig(**text_fields(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(**_tiles()), tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    return random_model(transformers.Idefics3ForConditionalGeneration, config, tokenizer), processor


@family
def smolvlm() -> Family:
    tokenizer = _idefics3_tokenizer("<|im_start|>")
    config = transformers.SmolVLMConfig(
        vision_config=vision_fields(),
        text_config=transformers.LlamaConfig(**text_fields(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    processor = transformers.SmolVLMProcessor(
        SmolVLMImageProcessorPil(**_tiles()),
        tokenizer,
        transformers.SmolVLMVideoProcessor(
            size={"longest_edge": IMAGE_SIZE},
            max_image_size={"longest_edge": IMAGE_SIZE},
            video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": IMAGE_SIZE}},
        ),
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    return random_model(transformers.SmolVLMForConditionalGeneration, config, tokenizer), processor


@family
def internvl() -> Family:
    template = user_turn(image="<IMG_CONTEXT>\n", **CHATML)
    tokenizer = make_tokenizer(
        "<|im_start|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=template,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = transformers.InternVLConfig(
        vision_config=vision_fields(image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[PATCH_SIZE, PATCH_SIZE]),
        text_config=transformers.Qwen2Config(**text_fields(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=template,
    )
    return random_model(transformers.InternVLForConditionalGeneration, config, tokenizer), processor


@family
def aya_vision() -> Family:
    template = user_turn(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<image>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        start="{{ bos_token }}",
        end="<|END_OF_TURN_TOKEN|>",
    )
    tokenizer = make_tokenizer(
        *("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"),
        *(f"TILE_{tile}" for tile in range(1, 5)),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        template=template,
        image_token="<|IMG_PATCH|>",
    )
    config = transformers.AyaVisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision_fields(vision_use_head=False)),
        text_config=transformers.Cohere2Config(
            **text_fields(tokenizer, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
        ),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        alignment_intermediate_size=48,
    )
    processor = transformers.AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        patch_size=PATCH_SIZE,
        img_size=IMAGE_SIZE,
        downsample_factor=2,
        chat_template=template,
    )
    return random_model(transformers.AyaVisionForConditionalGeneration, config, tokenizer), processor


@family
def lfm2_vl() -> Family:
    """A short convolution in the first layer of the language model; its image processor is torchvision's alone."""
    template = user_turn(image="<image>", start="{{ bos_token }}", **CHATML)
    tokenizer = make_tokenizer(
        *("<|im_start|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        pad="<|pad|>",
        template=template,
        image_token="<image>",
    )
    text = text_fields(tokenizer, block_multiple_of=8, conv_L_cache=3, layer_types=["conv", "full_attention"])
    vision = {key: value for key, value in vision_fields(patch_size=4, num_patches=16).items() if key != "image_size"}
    config = transformers.Lfm2VlConfig(
        vision_config=transformers.Siglip2VisionConfig(**vision),
        text_config=transformers.Lfm2Config(**text),
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=48,
        downsample_factor=2,
    )
    images = transformers.Lfm2VlImageProcessor(
        tile_size=16,
        encoder_patch_size=4,
        downsample_factor=2,
        min_tiles=2,
        max_tiles=4,
        min_image_tokens=4,
        max_image_tokens=16,
        max_num_patches=64,
        do_image_splitting=False,
    )
    processor = transformers.Lfm2VlProcessor(images, tokenizer, chat_template=template)
    return random_model(transformers.Lfm2VlForConditionalGeneration, config, tokenizer), processor


@family
def mistral3() -> Family:
    template = user_turn("[INST]", "[IMG]", "[/INST]", "", start="<s>", end="</s>")
    tokenizer = make_tokenizer(
        *("[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        template=template,
        start_with_bos=True,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**vision_fields(image_size=48)),
        text_config=transformers.MistralConfig(**text_fields(tokenizer, head_dim=16)),
        image_token_index=tokenizer.image_token_id,
        spatial_merge_size=2,
    )
    processor = transformers.PixtralProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE}),
        tokenizer,
        patch_size=PATCH_SIZE,
        spatial_merge_size=2,
        chat_template=template,
    )
    return random_model(transformers.Mistral3ForConditionalGeneration, config, tokenizer), processor
