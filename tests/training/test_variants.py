"""Ablations of the comparison: each changes the one thing that it names."""

import tiny
import torch
from baseline_models import made
from torch.nn import functional as F

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.adapters_fwd2bot import run_stage
from fwd2bot.backbone_fwd2bot import with_queries
from fwd2bot.training.baselines.cache_model import SingleForward
from fwd2bot.training.baselines.variants import (
    AttentionPooling,
    FullFineTuning,
    LargerProjector,
    LastPooling,
    LayerMix,
    MlpProjector,
    NoAdapters,
    NoProjector,
    NormProjector,
    PromptFirstProcessor,
    SharedAdapter,
)


def pictures(model, processor=None):
    inputs = (processor or tiny.tiny_processor()).process_images(tiny.pictures(2))
    return model.compress(**inputs).tokens, inputs


def test_larger_projector_begins_as_what_it_says():
    larger, usual = made(LargerProjector), made(Fwd2BotForConditionalGeneration)
    assert torch.allclose(pictures(larger)[0], 4.3 * pictures(usual)[0], atol=1e-5)


def test_mix_of_layers_is_the_last_one_where_its_weight_is_all_there_is():
    mix, before = made(LayerMix), made(Fwd2BotForConditionalGeneration, summary_norm=False)
    assert mix.layer_weights.tolist() == [0.5, 0.5] and "layer_weights" in mix.trained_parameters()
    with torch.no_grad():
        for model in (mix, before):
            torch.nn.init.eye_(model.summary_projector.weight)
        mix.layer_weights.copy_(torch.tensor([0.0, 1.0]))
    tokens, _ = pictures(before)
    last = F.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)
    assert torch.allclose(pictures(mix)[0], last, atol=1e-5)
    with torch.no_grad():
        mix.layer_weights.copy_(torch.tensor([1.0, 1.0]))
    first = pictures(mix)[0] - last  # what layer 0 adds
    assert first.std() > 0.1 and not torch.allclose(first, last, atol=0.1)
    assert not any(layer._forward_hooks for layer in mix.get_decoder().layers)


def test_last_vector_is_the_embedding_at_every_length():
    model = made(LastPooling)
    tokens, inputs = pictures(model)
    for k in (1, 2, 4):
        found = model.embed(**inputs, num_summary_tokens=k)
        assert torch.allclose(found, F.normalize(tokens[:, k - 1], dim=-1), atol=1e-6)
    assert torch.equal(model.embed(summary=tokens), model.embed(**inputs))


def test_attention_pooling_begins_as_the_mean_and_can_choose_a_vector():
    model = made(AttentionPooling)
    tokens, inputs = pictures(model)
    assert torch.allclose(model.embed(**inputs), F.normalize(tokens.mean(1), dim=-1), atol=1e-6)
    with torch.no_grad():
        model.pooling_query.copy_(1e4 * (tokens[0, 2] - tokens[0].mean(0)))
    chosen = (tokens[0] @ model.pooling_query).argmax()
    assert torch.allclose(model.embed(**inputs)[0], F.normalize(tokens[0, chosen], dim=-1), atol=1e-5)
    assert torch.allclose(model.embed(**inputs, num_summary_tokens=1), F.normalize(tokens[:, 0], dim=-1), atol=1e-6)


def test_contrastive_loss_of_a_batch_is_over_the_pooling_of_the_variant():
    model = made(LastPooling, summary_lengths=[2, 4])
    tokens, inputs = pictures(model)
    batch = {f"compress_{name}": value for name, value in inputs.items()}
    found = model(**batch, num_summary_tokens=torch.tensor([2, 4])).image_embeds_by_length
    assert torch.allclose(found[0], F.normalize(tokens[:, 1], dim=-1), atol=1e-5)
    assert torch.allclose(found[1], F.normalize(tokens[:, 3], dim=-1), atol=1e-5)


def test_norm_projector_gives_every_vector_one_scale():
    model, processor = made(NormProjector), tiny.tiny_processor()
    tokens, _ = pictures(model)
    prompts = processor(text=tiny.prompts(processor, ["What?"] * 2))
    assert len(model.generate_from_summary(tokens, **prompts, max_new_tokens=2)) == 2
    assert torch.allclose(tokens.pow(2).mean(-1).sqrt(), torch.full((2, 4), 0.1), atol=1e-3)


def test_prompt_comes_before_the_picture_and_texts_stay_as_they_are():
    usual = tiny.tiny_processor()
    changed = PromptFirstProcessor(usual.backbone_processor, "What is it?", usual.text_prompt)
    inputs, plain = changed.process_images(tiny.pictures(2)), usual.process_images(tiny.pictures(2))
    patch = changed.tokenizer.convert_tokens_to_ids("<image>")
    ids = inputs["input_ids"][0]
    places = (ids == patch).nonzero().flatten()
    assert len(places) == 16 and torch.equal(places, torch.arange(16) + places[0])
    assert changed.tokenizer.decode(ids[: places[0]]) == "<s>USER: What is it?\n"
    assert changed.tokenizer.decode(ids[places[-1] + 1 :]) == " ASSISTANT:"
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    texts = ["a dog", "two cats"]
    assert torch.equal(changed.process_texts(texts)["input_ids"], usual.process_texts(texts)["input_ids"])


def test_single_forward_is_one_masked_pass_over_picture_queries_and_question():
    """Logits from the kept keys and values are those of one row, whose question sees the queries but not before."""
    model, processor = made(SingleForward), tiny.tiny_processor()
    model.set_attn_implementation("eager")
    inputs = processor.process_images(tiny.pictures(1))
    question = processor(text=tiny.prompts(processor, ["What?"]))["input_ids"]
    logits, _ = model._generate_pass(model.compress(**inputs), question, torch.ones_like(question), None, None)

    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    first = model.get_input_embeddings().num_embeddings
    queries = torch.arange(first, first + 4)
    rows = with_queries(model.backbone.base_model, queries, ids, torch.ones_like(ids), pixel_values=pixels)
    before, total = ids.shape[1], ids.shape[1] + 4 + question.shape[1]
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    visible[before + 4 :, :before] = False
    with torch.no_grad(), run_stage("generate"):
        embeds = model.get_input_embeddings()(torch.cat([rows["input_ids"], question], 1))
        patches = model.backbone.base_model.get_image_features(pixel_values=pixels).pooler_output[0]
        embeds[0, :before][ids[0] == model.image_token_id] = patches
        whole = model.backbone(
            inputs_embeds=embeds,
            attention_mask=torch.zeros(1, 1, total, total).masked_fill(~visible, torch.finfo(torch.float32).min),
            position_ids=torch.arange(total)[None],
        ).logits
    assert torch.allclose(logits, whole[:, before + 4 :], atol=1e-4)


def test_single_forward_embeds_pictures_and_texts_by_what_the_queries_give_at_the_end():
    model, processor = made(SingleForward), tiny.tiny_processor()
    tokens, inputs = pictures(model)
    assert tokens.shape == (2, 4, 2 * 2 * 16 + 32)  # keys and values of two layers, 16 wide, and the summary
    assert torch.allclose(model.embed(**inputs), F.normalize(tokens[..., -32:].mean(1), dim=-1), atol=1e-6)
    texts = model.compress(**processor.process_texts(["a dog", "two cats"])).tokens
    assert texts.shape == (2, 4, 32)
    assert torch.allclose(
        model.embed(summary=texts, num_summary_tokens=2), F.normalize(texts[:, :2].mean(1), dim=-1), atol=1e-6
    )


def passes(model):
    """The summary of two pictures, and what an answer reads of one."""
    processor = tiny.tiny_processor()
    summary = model.compress(**processor.process_images(tiny.pictures(2)))
    inputs = processor(text=tiny.prompts(processor, ["What?"] * 2))
    with torch.no_grad():
        logits, _ = model._generate_pass(summary, inputs["input_ids"], inputs["attention_mask"], None, None)
    return summary.tokens, logits


def moved(model, part):
    """Which of the two passes change when the parameters with `part` in their names do."""
    tokens, logits = passes(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    new_tokens, new_logits = passes(model)
    return not torch.equal(new_tokens, tokens), not torch.equal(new_logits, logits)


def test_one_shared_adapter_serves_both_passes_and_the_other_none():
    assert moved(made(SharedAdapter), ".generate.") == (True, True)
    assert moved(made(SharedAdapter), ".compress.") == (False, False)
    assert moved(made(Fwd2BotForConditionalGeneration), ".generate.") == (False, True)  # as shipped


def test_without_adapters_none_is_read_in_the_compress_pass_and_none_trains():
    assert not any(moved(made(NoAdapters), stage)[0] for stage in (".compress.", ".generate."))
    names = set(made(NoAdapters).trained_parameters())
    assert names and not any(".lora_" in name for name in names)


def test_full_fine_tuning_trains_the_weights_of_the_language_model_and_nothing_of_the_vision_tower():
    model = made(FullFineTuning)
    names = set(model.trained_parameters())
    decoder = {id(value) for name, value in model.get_decoder().named_parameters() if ".lora_" not in name}
    assert decoder <= {id(value) for value in model.trained_parameters().values()}
    assert not any("vision" in name or ".lora_" in name for name in names)


def test_no_projector_gives_the_last_hidden_states_themselves():
    model = made(NoProjector)
    seen = []
    model.summary_projector.register_forward_hook(lambda layer, given, output: seen.append((given[0], output)))
    tokens, _ = passes(model)
    assert torch.equal(*seen[0]) and torch.equal(seen[0][1], tokens)
    assert not any(name.startswith("summary_projector") for name in model.trained_parameters())


def test_mlp_beside_the_projector_adds_nothing_at_first_and_something_when_it_has_learnt():
    plain, model = made(Fwd2BotForConditionalGeneration), made(MlpProjector)
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # all but the MLP is that of the plain one
            if name in own:
                parameter.copy_(own[name])
    assert torch.equal(passes(model)[0], passes(plain)[0])
    assert {"summary_projector.hidden.weight", "summary_projector.out.weight"} <= set(model.trained_parameters())
    assert moved(model, "summary_projector.out.") == (True, True)
