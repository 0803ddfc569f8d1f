"""Families of dynamic resolution and M-RoPE."""

from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .tiny_parts import CHATML, WIDTH, Family, family, make_tokenizer, random_model, text_fields, user_turn

QWEN_TEMPLATE = user_turn(image="<|vision_start|><|image_pad|><|vision_end|>", **CHATML)
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}  # for heads of width 16


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(
        "<|im_start|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=QWEN_TEMPLATE,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names}


def _patches() -> dict[str, Any]:
    # 4 to 32 merged patches of 8 x 8 pixels
    return {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 64}}


def _qwen_vision(**fields: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": WIDTH,
        **fields,
    }


@family
def qwen2_vl() -> Family:
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        text_config=text_fields(tokenizer, rope_parameters=MROPE),
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return random_model(transformers.Qwen2VLForConditionalGeneration, config, tokenizer), processor


@family
def qwen2_5_vl() -> Family:
    """Its vocabulary is padded: rows of the embedding that belong to no token."""
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        vision_config=_qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        text_config=text_fields(tokenizer, padded_to=64, rope_parameters=MROPE),
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return random_model(transformers.Qwen2_5_VLForConditionalGeneration, config, tokenizer), processor


@family
def qwen3_vl() -> Family:
    """Tied embeddings, and deepstack: features of both vision layers go into the language model's first two."""
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen3VLConfig(
        vision_config=_qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        text_config=text_fields(tokenizer, head_dim=16, rope_parameters={**MROPE, "mrope_interleaved": True}),
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return random_model(transformers.Qwen3VLForConditionalGeneration, config, tokenizer), processor


@family
def qwen3_vl_moe() -> Family:
    """As Qwen3-VL, with a mixture of experts; its head has weights of its own."""
    tokenizer = _qwen_tokenizer()
    text = text_fields(
        tokenizer,
        head_dim=16,
        rope_parameters={**MROPE, "mrope_interleaved": True},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        tie_word_embeddings=False,
    )
    config = transformers.Qwen3VLMoeConfig(
        vision_config=_qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        text_config=text,
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return random_model(transformers.Qwen3VLMoeForConditionalGeneration, config, tokenizer), processor


@family
def qwen3_5() -> Family:
    """Linear attention in the first layer of the language model, M-RoPE in the second."""
    tokenizer = _qwen_tokenizer()
    rope = {**MROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
    text = text_fields(
        tokenizer,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        rope_parameters=rope,
    )
    config = transformers.Qwen3_5Config(
        vision_config=_qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[]),
        text_config=text,
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return random_model(transformers.Qwen3_5ForConditionalGeneration, config, tokenizer), processor


@family
def glm4v() -> Family:
    template = user_turn(
        "<|user|>\n",
        "<|begin_of_image|><|image|><|end_of_image|>",
        "",
        "<|assistant|>\n",
        start="[gMASK]<sop>",
    )
    tokenizer = make_tokenizer(
        *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
        eos="<|user|>",
        pad="<|endoftext|>",
        template=template,
        image_token="<|image|>",
        video_token="<|video|>",
    )

    def id_of(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    config = transformers.Glm4vConfig(
        vision_config=_qwen_vision(image_size=24),
        text_config=text_fields(
            tokenizer, rope_parameters={**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
        ),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_start_token_id=id_of("<|begin_of_image|>"),
        image_end_token_id=id_of("<|end_of_image|>"),
        video_start_token_id=id_of("<|begin_of_video|>"),
        video_end_token_id=id_of("<|end_of_video|>"),
    )
    processor = transformers.Glm4vProcessor(
        Glm4vImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Glm4vVideoProcessor(**_patches()),
        chat_template=template,
    )
    return random_model(transformers.Glm4vForConditionalGeneration, config, tokenizer), processor
