"""Every family's other kinds of checkpoint: adapters alone, and each stage merged for a process of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.processing_fwd2bot import adds_special_tokens

from .tiny_families import FAMILIES, build, conversation, pictures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # as in test_family_laws

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def family(request):
    """Its name, a Fwd2Bot with adapters that do something, its processor and a summary. Do not change them."""
    backbone, processor = build(request.param)
    torch.manual_seed(0)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=4, lora_rank=2).eval()
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    processor = Fwd2BotProcessor(processor)
    return request.param, model, processor, model.compress(**processor.process_images(pictures()))


class TestFamilyCheckpoints:
    def test_adapters_come_back_upon_their_backbone(self, family, tmp_path):
        name, model, processor, summary = family
        model.save_pretrained(tmp_path, adapter_only=True)
        loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, backbone=build(name)[0])
        assert torch.equal(loaded.compress(**processor.process_images(pictures())).tokens, summary.tokens)
        prompt = processor.apply_chat_template(conversation("Where?"), add_generation_prompt=True)
        inputs = processor(text=prompt)
        assert torch.equal(
            loaded.generate_from_summary(summary[0], **inputs, **GREEDY),
            model.generate_from_summary(summary[0], **inputs, **GREEDY),
        )

    def test_one_stage_loaded_alone_has_its_adapter_in_the_weights(self, family, tmp_path):
        _, model, processor, summary = family
        model.save_pretrained(tmp_path)
        compressor = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, stage="compress")
        assert not any(".lora_" in name for name, _ in compressor.named_parameters())
        found = compressor.compress(**processor.process_images(pictures())).tokens
        torch.testing.assert_close(found, summary.tokens, rtol=0, atol=1e-5)
        answerer = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, stage="generate")
        inputs = processor(text=processor.apply_chat_template(conversation("Where?"), add_generation_prompt=True))
        expected = model.generate_from_summary(summary[0], **inputs, **GREEDY)
        assert torch.equal(answerer.generate_from_summary(summary[0], **inputs, **GREEDY), expected)

    def test_compress_export_compresses(self, family, tmp_path):
        _, model, processor, summary = family
        model.merge_and_export("compress", tmp_path, processor)
        loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
        again = Fwd2BotProcessor.from_pretrained(tmp_path)
        found = loaded.compress(**again.process_images(pictures()))
        torch.testing.assert_close(found.tokens, summary.tokens, rtol=0, atol=1e-4)
        assert not any(".lora_" in name for name, _ in loaded.named_parameters())

    def test_generate_export_is_a_language_model_that_says_the_same(self, family, tmp_path):
        _, model, processor, summary = family
        prompt = processor.apply_chat_template(conversation("Where?"), add_generation_prompt=True)
        inputs = processor(text=prompt)
        expected = model.generate_from_summary(summary[0], **inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        model.merge_and_export("generate", tmp_path, processor)

        language_model = AutoModelForCausalLM.from_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        info = language_model.config.fwd2bot
        prompt = prompt.replace(info["image_token"], tokenizer.convert_ids_to_tokens(info["image_token_id"]))
        ids = tokenizer(
            prompt, return_tensors="pt", add_special_tokens=adds_special_tokens(tokenizer, [prompt])
        ).input_ids
        [place] = (ids[0] == info["image_token_id"]).nonzero()
        embeds = language_model.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:, :place], summary.tokens[:1], embeds[:, place + 1 :]], 1)
        assert torch.equal(language_model.generate(inputs_embeds=embeds, **GREEDY), expected)
        assert len(list(language_model.parameters())) < len(list(model.backbone.parameters()))
