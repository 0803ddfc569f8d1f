"""Tiny real models for the tests, built in memory in milliseconds: a random LLaVA, its processor, a Fwd2Bot on it."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} ASSISTANT:{% else %} {{ message['content'][0]['text'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
IMAGE_SIZE, PATCH_SIZE = 24, 6  # 16 image tokens
# transformers 5.23 renamed `gradient_checkpointing` and deprecates the old name.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<s>`, `</s>`, `<pad>` and `<image>`."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
    )


def tiny_backbone_processor() -> LlavaProcessor:
    """The processor of `tiny_backbone()`."""
    tokenizer = tiny_tokenizer()
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def tiny_backbone(seed: int = 0, **overrides: Any) -> LlavaForConditionalGeneration:
    """A random LLaVA of two layers, 32 wide, in float32 and evaluation mode; `overrides` are fields of LlamaConfig."""
    tokenizer = tiny_tokenizer()
    vision_config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=LlamaConfig(**{**text, **overrides}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that every input matters to the output
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def tiny_processor() -> Fwd2BotProcessor:
    """The processor of `tiny_fwd2bot()`."""
    return Fwd2BotProcessor(tiny_backbone_processor())


def tiny_fwd2bot(seed: int = 0, **options: Any) -> Fwd2BotForConditionalGeneration:
    """A Fwd2Bot on `tiny_backbone(seed)`, evaluation mode, at most 4 summary tokens unless `options` say otherwise.

    LoRA's B is random, not zero as in a new model, and queries and projector are larger than there: so it matters
    which adapter runs and which picture was compressed.
    """
    options = {"num_summary_tokens": 4, "lora_rank": 4, **options}
    backbone = tiny_backbone(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1)
        model = Fwd2BotForConditionalGeneration.from_backbone(backbone, **options)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
            elif name.endswith(".summary_queries"):
                parameter.normal_(0, 0.5)
        model.summary_projector.weight.mul_(5)
    return model


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Pictures of coarse random colours, of different sizes; a picture depends on `seed` and its place in the list."""
    drawn = []
    for index in range(count):
        random = np.random.RandomState(1000 * seed + index)
        blocks = Image.fromarray(random.randint(0, 256, (4, 4, 3), dtype=np.uint8))
        drawn.append(blocks.resize((20 + 5 * (index % 3), 30), Image.Resampling.NEAREST))
    return drawn


def conversation(question: str, num_images: int = 1) -> list[dict]:
    """One user turn with so many images before the question, for `apply_chat_template`."""
    images = [{"type": "image"}] * num_images
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def prompts(processor: Fwd2BotProcessor, questions: list[str], num_images: int = 1) -> list[str]:
    """The questions in the chat template, each about so many images."""
    return [
        processor.apply_chat_template(conversation(question, num_images), add_generation_prompt=True)
        for question in questions
    ]


def answers(
    model: Fwd2BotForConditionalGeneration, processor: Fwd2BotProcessor, summary: Any, texts: list[str], **options: Any
) -> list[list[int]]:
    """New ids of a greedy answer to each prompt."""
    inputs = processor(text=texts)
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate_from_summary(summary, **inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def enable_checkpointing(model: PreTrainedModel, checkpoint_kwargs: dict | None = None, **options: Any) -> None:
    """Switch on what keeps no activations of the forward pass and computes them again in the backward pass."""
    getattr(model, f"{CHECKPOINTING}_enable")(checkpoint_kwargs, **options)


def training_batch(
    processor: Fwd2BotProcessor, texts: list[str] | None = None, count: int = 3
) -> dict[str, torch.Tensor]:
    """At most 3 questions on one picture each with their answers as labels, the pictures, and captions if given."""
    questions, answers = prompts(processor, ["What?"] * count), [" a dog</s>", " cats</s>", " no</s>"]
    conversations = [question + answer for question, answer in zip(questions, answers, strict=False)]
    batch = dict(processor(images=pictures(count), text=conversations))
    prompt = processor(text=questions[0])["input_ids"].shape[1]
    start = (batch["attention_mask"] == 0).sum(1) + prompt
    before = torch.arange(batch["input_ids"].shape[1]) < start[:, None]
    batch["labels"] = batch["input_ids"].masked_fill(before, -100)
    if texts:
        batch |= {f"text_{key}": value for key, value in processor.process_texts(texts).items()}
    return batch
