"""Tiny real models of many families of vision-language models, with their real processors, built in memory.

Every builder gives a random model of the family's own class, a few layers of width 32 in float32 and evaluation mode,
and the processor of the same family, on a byte-level tokenizer that has the family's special tokens and a chat
template that puts the picture where the family's own does. Nothing is read from disk or from the network.
"""

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
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
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
    "smolvlm",
    "internvl",
    "glm4v",
    "mistral3",
    "qwen3_5",
    "lfm2_vl",
}

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


def _family(builder: Callable[[], Family]) -> Callable[[], Family]:
    FAMILIES[builder.__name__] = builder
    return builder


# What the builders share


def _tokenizer(
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


def _text(tokenizer: PreTrainedTokenizerFast, padded_to: int | None = None, **fields: Any) -> dict[str, Any]:
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


def _vision(**fields: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        **fields,
    }


def _random(model_class: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
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


def _user(before: str, image: str, after: str, reply: str, start: str = "", end: str = "") -> str:
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


# LLaVA and its descendants


def _llava(tower: str, strategy: str) -> Family:
    template = _user("USER: ", "<image>\n", " ", "ASSISTANT:", end=" </s>")
    tokenizer = _tokenizer(
        bos="<s>", eos="</s>", pad="<pad>", template=template, start_with_bos=True, image_token="<image>"
    )
    has_cls = tower == "clip"
    vision = transformers.CLIPVisionConfig(**_vision()) if has_cls else transformers.SiglipVisionConfig(**_vision())
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_text(tokenizer)),
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
    return _random(transformers.LlavaForConditionalGeneration, config, tokenizer), processor


@_family
def llava_clip_default() -> Family:
    return _llava("clip", "default")


@_family
def llava_clip_full() -> Family:
    return _llava("clip", "full")


@_family
def llava_siglip_default() -> Family:
    return _llava("siglip", "default")


@_family
def llava_siglip_full() -> Family:
    return _llava("siglip", "full")


@_family
def llava_next() -> Family:
    template = _user("[INST] ", "<image>\n", " [/INST]", "", end="</s>")
    tokenizer = _tokenizer(
        bos="<s>", eos="</s>", pad="<pad>", template=template, start_with_bos=True, image_token="<image>"
    )
    pinpoints = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision()),
        text_config=transformers.MistralConfig(**_text(tokenizer)),
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
    return _random(transformers.LlavaNextForConditionalGeneration, config, tokenizer), processor


@_family
def llava_onevision() -> Family:
    template = _user("<|im_start|>user ", "<image>\n", "<|im_end|>", "<|im_start|>assistant\n", end="<|im_end|>")
    tokenizer = _tokenizer(
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
        vision_config=transformers.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=transformers.Qwen2Config(**_text(tokenizer)),
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
    return _random(transformers.LlavaOnevisionForConditionalGeneration, config, tokenizer), processor


# Dynamic resolution and M-RoPE


QWEN_TEMPLATE = _user(image="<|vision_start|><|image_pad|><|vision_end|>", **CHATML)
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}  # for heads of width 16


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(
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


@_family
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
        text_config=_text(tokenizer, rope_parameters=MROPE),
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return _random(transformers.Qwen2VLForConditionalGeneration, config, tokenizer), processor


@_family
def qwen2_5_vl() -> Family:
    """Its vocabulary is padded: rows of the embedding that belong to no token."""
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        vision_config=_qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        text_config=_text(tokenizer, padded_to=64, rope_parameters=MROPE),
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return _random(transformers.Qwen2_5_VLForConditionalGeneration, config, tokenizer), processor


@_family
def qwen3_vl() -> Family:
    """Tied embeddings, and deepstack: features of both vision layers go into the language model's first two."""
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen3VLConfig(
        vision_config=_qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        text_config=_text(tokenizer, head_dim=16, rope_parameters={**MROPE, "mrope_interleaved": True}),
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    processor = transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**_patches()),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**_patches()),
        chat_template=QWEN_TEMPLATE,
    )
    return _random(transformers.Qwen3VLForConditionalGeneration, config, tokenizer), processor


@_family
def qwen3_5() -> Family:
    """Linear attention in the first layer of the language model, M-RoPE in the second."""
    tokenizer = _qwen_tokenizer()
    rope = {**MROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
    text = _text(
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
    return _random(transformers.Qwen3_5ForConditionalGeneration, config, tokenizer), processor


@_family
def glm4v() -> Family:
    template = _user(
        "<|user|>\n",
        "<|begin_of_image|><|image|><|end_of_image|>",
        "",
        "<|assistant|>\n",
        start="[gMASK]<sop>",
    )
    tokenizer = _tokenizer(
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
        text_config=_text(
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
    return _random(transformers.Glm4vForConditionalGeneration, config, tokenizer), processor


# Tiles and pixel shuffle


def _idefics3_tokenizer(start: str, eos: str = "<end_of_utterance>") -> PreTrainedTokenizerFast:
    template = _user("User:", "<image>", "<end_of_utterance>\n", "Assistant:", start=start, end="<end_of_utterance>\n")
    return _tokenizer(
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


@_family
def idefics3() -> Family:
    tokenizer = _idefics3_tokenizer("<|begin_of_text|>")
    config = transformers.Idefics3Config(
        vision_config=_vision(),
        text_config=transformers.LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(**_tiles()), tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    return _random(transformers.Idefics3ForConditionalGeneration, config, tokenizer), processor


@_family
def smolvlm() -> Family:
    tokenizer = _idefics3_tokenizer("<|im_start|>")
    config = transformers.SmolVLMConfig(
        vision_config=_vision(),
        text_config=transformers.LlamaConfig(**_text(tokenizer)),
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
    return _random(transformers.SmolVLMForConditionalGeneration, config, tokenizer), processor


@_family
def internvl() -> Family:
    template = _user(image="<IMG_CONTEXT>\n", **CHATML)
    tokenizer = _tokenizer(
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
        vision_config=_vision(image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[PATCH_SIZE, PATCH_SIZE]),
        text_config=transformers.Qwen2Config(**_text(tokenizer)),
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
    return _random(transformers.InternVLForConditionalGeneration, config, tokenizer), processor


@_family
def aya_vision() -> Family:
    template = _user(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<image>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        start="{{ bos_token }}",
        end="<|END_OF_TURN_TOKEN|>",
    )
    tokenizer = _tokenizer(
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
        vision_config=transformers.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=transformers.Cohere2Config(
            **_text(tokenizer, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
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
    return _random(transformers.AyaVisionForConditionalGeneration, config, tokenizer), processor


@_family
def lfm2_vl() -> Family:
    """A short convolution in the first layer of the language model; its image processor is torchvision's alone."""
    template = _user(image="<image>", start="{{ bos_token }}", **CHATML)
    tokenizer = _tokenizer(
        *("<|im_start|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        pad="<|pad|>",
        template=template,
        image_token="<image>",
    )
    text = _text(tokenizer, block_multiple_of=8, conv_L_cache=3, layer_types=["conv", "full_attention"])
    vision = {key: value for key, value in _vision(patch_size=4, num_patches=16).items() if key != "image_size"}
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
    return _random(transformers.Lfm2VlForConditionalGeneration, config, tokenizer), processor


@_family
def mistral3() -> Family:
    template = _user("[INST]", "[IMG]", "[/INST]", "", start="<s>", end="</s>")
    tokenizer = _tokenizer(
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
        vision_config=transformers.PixtralVisionConfig(**_vision(image_size=48)),
        text_config=transformers.MistralConfig(**_text(tokenizer, head_dim=16)),
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
    return _random(transformers.Mistral3ForConditionalGeneration, config, tokenizer), processor


# Pictures that attend both ways


GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")


@_family
def gemma3() -> Family:
    """Tied and scaled embeddings, a sliding window of 12 tokens, a padded vocabulary."""
    template = _user(
        "<start_of_turn>user\n",
        "<start_of_image>",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
        start="{{ bos_token }}",
        end="<end_of_turn>\n",
    )
    tokenizer = _tokenizer(
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
    text = _text(
        tokenizer,
        padded_to=64,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=transformers.Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE), tokenizer, chat_template=template, image_seq_length=4
    )
    return _random(transformers.Gemma3ForConditionalGeneration, config, tokenizer), processor


def _paligemma(text_class: type, **fields: Any) -> Family:
    # The family has no chat template: its prompts are pictures and words, to which the processor adds the rest.
    template = _user("", "<image>", "", "")
    tokenizer = _tokenizer(bos="<bos>", eos="<eos>", pad="<pad>", template=template, image_token="<image>")
    images = SiglipImageProcessorPil(size=SQUARE, image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2)
    processor = transformers.PaliGemmaProcessor(images, tokenizer, chat_template=template)  # adds 1152 tokens
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=text_class(**_text(tokenizer, head_dim=16, **fields)),
        image_token_index=tokenizer.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return _random(transformers.PaliGemmaForConditionalGeneration, config, tokenizer), processor


@_family
def paligemma() -> Family:
    return _paligemma(transformers.GemmaConfig)


@_family
def paligemma2() -> Family:
    return _paligemma(
        transformers.Gemma2Config,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )
