"""The small backbone: a standard LLaVA (SigLIP tower, Llama text model) of some million parameters; its processor."""

import copy

import torch
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .recipe import BackboneModel


def build_processor(sizes: BackboneModel, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """A LLaVA processor that resizes to the tower's size and scales to -1..1, without torchvision."""
    image_processor = SiglipImageProcessorPil(
        size={"height": sizes.image_size, "width": sizes.image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def build_backbone(sizes: BackboneModel, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """An untrained LLaVA in fp32; one image token per patch.

    Raises ValueError if the image is not a whole number of patches.
    """
    if sizes.image_size % sizes.patch_size:
        raise ValueError(
            f"image_size {sizes.image_size} is not a multiple of patch_size {sizes.patch_size}; change either"
        )
    vision_config = SiglipVisionConfig(
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_size=sizes.vision_hidden_size,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        intermediate_size=sizes.vision_intermediate_size,
        vision_use_head=False,
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.intermediate_size,
        max_position_embeddings=sizes.max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=sizes.tie_word_embeddings,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=sizes.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration._from_config(
        config, attn_implementation=sizes.attn_implementation, dtype=torch.float32
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def resample_patches(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, patch_size: int
) -> LlavaForConditionalGeneration:
    """A LLaVA that cuts the same pictures into patches of other `patch_size` pixels; its processor is changed to fit.

    The kernel of the patches and the embeddings of their places are resampled (bicubic); everything else is as it was.
    That is a start to train on from, no finished model.

    Raises:
        ValueError: the picture is no whole number of such patches, or the vision tower is no SigLIP.
    """
    config = copy.deepcopy(model.config)
    vision = config.vision_config
    if vision.model_type != "siglip_vision_model":
        raise ValueError(f"patches are resampled for SigLIP towers, not for {vision.model_type}; train without")
    if patch_size < 1 or vision.image_size % patch_size:
        raise ValueError(
            f"model.resample_patches is {patch_size}, but the pictures are {vision.image_size} pixels wide; give a "
            "divisor of that"
        )
    old, side = vision.patch_size, vision.image_size // patch_size
    vision.patch_size, config.image_seq_length, processor.patch_size = patch_size, side**2, patch_size
    state = model.state_dict()
    [kernel] = [name for name in state if name.endswith("embeddings.patch_embedding.weight")]  # (D, 3, old, old)
    [places] = [name for name in state if name.endswith("embeddings.position_embedding.weight")]  # (T, D)
    scale = (old / patch_size) ** 2  # as many pixels fewer are summed
    state[kernel] = scale * F.interpolate(state[kernel], size=(patch_size, patch_size), mode="bicubic")
    plane = state[places].T.unflatten(1, (vision.image_size // old, -1)).unsqueeze(0)  # (1, D, S, S)
    state[places] = F.interpolate(plane, size=(side, side), mode="bicubic")[0].flatten(1).T
    resampled = LlavaForConditionalGeneration._from_config(
        config, attn_implementation=model.config._attn_implementation, dtype=model.dtype
    )
    resampled.load_state_dict(state)
    resampled.generation_config = model.generation_config
    return resampled
