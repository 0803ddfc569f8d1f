"""The laws that every family of backbones must keep, one class for all: wrap, compress, answer, save, train."""

import pytest
import tiny
import torch
from torch.nn.utils.rnn import pad_sequence

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor, picture_groups_fwd2bot
from fwd2bot.backbone_fwd2bot import with_queries

from .tiny_families import FAMILIES, FILLED_UP, PADDED, TIED, build, conversation, pictures

# Not ours to mend: transformers' GLM-4V processor hands a tensor to numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLOSE = {"rtol": 0, "atol": 1e-5}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def fwd2bot_on(name):
    """A Fwd2Bot on a family, with adapters that do something, and its processor."""
    backbone, processor = build(name)
    torch.manual_seed(0)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=4, lora_rank=2).eval()
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        model.summary_projector.weight.mul_(5)
    return model, Fwd2BotProcessor(processor)


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def family(request):
    """`fwd2bot_on` a family, and the bare backbone. Do not change them."""
    return *fwd2bot_on(request.param), build(request.param)[0]


@pytest.fixture(scope="module")
def model(family):
    return family[0]


@pytest.fixture(scope="module")
def processor(family):
    return family[1]


@pytest.fixture(scope="module")
def prompts(processor):
    chats = [conversation("What is in the picture?"), conversation("Where?")]
    return [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]


@pytest.fixture(scope="module")
def summary(model, processor):
    """Of all pictures, at the largest length."""
    return model.compress(**processor.process_images(pictures()))


class TestFamilyLaws:
    def test_backbone_is_untouched(self, family):
        model, processor, bare = family
        inputs = processor.process_images(pictures()[:2])
        with torch.no_grad():
            assert torch.equal(model.backbone(**inputs).logits, bare(**inputs).logits)

    def test_compress_pass_reads_the_image_as_the_backbone_does(self, family):
        """Positions in a plane, token types, tiles: the rows before the queries are those of the bare backbone."""
        model, processor, bare = family
        inputs = processor.process_images(pictures())
        first = model.get_input_embeddings().num_embeddings
        rows = with_queries(model.backbone.base_model, torch.arange(first, first + 2), **inputs)
        with torch.no_grad():
            hidden = model.backbone.base_model(**rows, use_cache=False).last_hidden_state[:, :-2]
            expected = bare.base_model(**inputs, use_cache=False).last_hidden_state
        attended = inputs["attention_mask"].bool()
        torch.testing.assert_close(hidden[attended], expected[attended], **CLOSE)

    def test_summary_at_k_is_the_prefix_of_a_longer_one(self, model, processor, summary):
        images = processor.process_images(pictures())
        for k in (1, 2):
            torch.testing.assert_close(
                model.compress(**images, num_summary_tokens=k).tokens, summary.tokens[:, :k], **CLOSE
            )
        texts = processor.process_texts(["the"])  # one row alone: no padding, so no mask
        torch.testing.assert_close(
            model.compress(**texts, num_summary_tokens=2).tokens, model.compress(**texts).tokens[:, :2], **CLOSE
        )

    def test_last_layer_at_the_queries_alone_gives_the_same_summary(self, model, processor, summary):
        with torch.enable_grad():  # with gradients it is computed whole
            whole = model._compress_pass(4, **processor.process_images(pictures()))
        torch.testing.assert_close(summary.tokens, whole.detach(), **CLOSE)

    def test_last_layer_at_the_last_position_alone_gives_the_same_logits(self, model, processor):
        words = processor(text=["the", "What is in the picture?"])
        with torch.no_grad():
            last = model(**words, logits_to_keep=1).logits
            torch.testing.assert_close(last, model(**words).logits[:, -1:], **CLOSE)

    def test_summary_does_not_depend_on_the_batch(self, model, processor, summary):
        for index, picture in enumerate(pictures()):
            alone = model.compress(**processor.process_images(picture))
            torch.testing.assert_close(alone.tokens, summary.tokens[index : index + 1], **CLOSE)

    def test_text_embedding_does_not_depend_on_the_batch(self, model, processor):
        texts = ["the", "What is in the picture? Summarize it."]
        together = model.embed(**processor.process_texts(texts))
        for index, text in enumerate(texts):
            torch.testing.assert_close(
                model.embed(**processor.process_texts(text)), together[index : index + 1], **CLOSE
            )

    def test_summary_does_not_depend_on_the_padding_side(self, model, processor, summary):
        images = processor.process_images(pictures())
        shape = images["input_ids"].shape
        by_token = {name: images.pop(name) for name in list(images) if images[name].shape == shape}
        attended = by_token["attention_mask"].bool()
        moved = {
            name: pad_sequence([row[mask] for row, mask in zip(values, attended, strict=True)], batch_first=True)
            for name, values in by_token.items()
        }
        torch.testing.assert_close(model.compress(**images, **moved).tokens, summary.tokens, **CLOSE)

    def test_pictures_have_summaries_of_their_own(self, summary):
        assert torch.pdist(summary.tokens.flatten(1)).min() > 1e-3

    def test_embeddings_of_images_and_of_their_summaries_are_the_same(self, model, processor, summary):
        embeds = model.embed(**processor.process_images(pictures()))
        assert torch.equal(embeds, model.embed(summary=summary))
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))

    def test_one_path_to_an_answer(self, model, processor, prompts, summary):
        from_images = model.generate(**processor(images=pictures()[:2], text=prompts), **GREEDY)
        from_summary = model.generate_from_summary(summary[:2], **processor(text=prompts), **GREEDY)
        assert torch.equal(from_images, from_summary)

    def test_answer_does_not_depend_on_the_batch(self, model, processor, prompts, summary):
        together = model.generate_from_summary(summary[:2], **processor(text=prompts), **GREEDY)
        for index, prompt in enumerate(prompts):
            alone = model.generate_from_summary(summary[index], **processor(text=prompt), **GREEDY)
            assert torch.equal(alone[0, -5:], together[index, -5:])

    def test_cached_steps_answer_as_the_whole_row_read_anew(self, model, processor, prompts, summary):
        inputs = processor(text=prompts)
        cached = model.generate_from_summary(summary[:2], **inputs, **GREEDY)
        assert torch.equal(cached, model.generate_from_summary(summary[:2], **inputs, **GREEDY, use_cache=False))

    def test_forward_says_what_generation_says(self, model, processor, prompts):
        inputs = processor(images=pictures()[:2], text=prompts)
        ids = model.generate(**inputs, **GREEDY)
        with torch.no_grad():
            output = model(**inputs, labels=inputs["input_ids"])
        assert torch.equal(output.logits[:, -1].argmax(-1), ids[:, inputs["input_ids"].shape[1]])
        assert torch.isfinite(output.loss)

    def test_several_summaries_of_different_length_in_one_prompt(self, model, processor, summary):
        prompt = processor.apply_chat_template(conversation("Which?", 2), add_generation_prompt=True)
        both = type(summary).cat([summary[0].truncate(2), summary[1]])
        ids = model.generate_from_summary(both, **processor(text=prompt), **GREEDY)
        swapped = type(summary).cat([summary[1], summary[0].truncate(2)])
        assert len(ids) == 1
        with torch.no_grad():
            assert not torch.equal(
                model._generate_pass(both, *_ids(processor, prompt), None, None)[0],
                model._generate_pass(swapped, *_ids(processor, prompt), None, None)[0],
            )

    def test_uncompressed_is_the_bare_backbone(self, family, prompts):
        model, processor, bare = family
        inputs = processor.backbone_processor(
            images=[[picture] for picture in pictures()[:2]], text=prompts, padding=True, padding_side="left",
            return_tensors="pt", add_special_tokens=False,
        )  # fmt: skip
        inputs.pop("labels", None)
        assert torch.equal(model.generate_uncompressed(**inputs, **GREEDY), bare.generate(**inputs, **GREEDY))

    def test_adapters_lie_in_the_language_model_alone(self, model):
        decoder = set(model.get_decoder().parameters())
        adapters = {name: value for name, value in model.named_parameters() if ".lora_" in name}
        assert adapters and all(value in decoder for value in adapters.values())
        assert not any("lm_head" in name for name in adapters)

    def test_query_cannot_be_generated(self, family, prompts):
        """Their ids begin where the logits end, and the bare backbone has as many logits."""
        model, processor, bare = family
        with torch.no_grad():
            logits = model(**processor(images=pictures()[:2], text=prompts)).logits
        first_query = model.get_input_embeddings().num_embeddings
        assert logits.shape[-1] == len(bare.get_output_embeddings().weight) == first_query

    def test_queries_go_in_as_they_were_learnt(self, model):
        """Also where words are scaled."""
        words = model.get_input_embeddings()
        queries = torch.arange(words.num_embeddings, words.num_embeddings + 4)
        assert torch.equal(words(queries), words.summary_queries)

    def test_comes_back_from_disk(self, model, processor, summary, tmp_path):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
        again = Fwd2BotProcessor.from_pretrained(tmp_path)
        assert again.image_token_id == processor.image_token_id
        assert torch.equal(loaded.compress(**processor.process_images(pictures())).tokens, summary.tokens)

    def test_stage_without_vision_answers_and_embeds_texts(self, model, processor, prompts, summary, tmp_path):
        model.save_pretrained(tmp_path)
        texts = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, stage="text")
        assert texts.num_parameters() < model.num_parameters()
        inputs = processor(text=prompts)
        assert torch.equal(
            texts.generate_from_summary(summary[:2], **inputs, **GREEDY),
            model.generate_from_summary(summary[:2], **inputs, **GREEDY),
        )
        words = processor.process_texts(["the", "What is it?"])
        assert torch.equal(texts.embed(**words), model.embed(**words))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_large_pictures_go_through_the_processor_in_groups(name, monkeypatch):
    processor = Fwd2BotProcessor(build(name)[1])
    large = [picture.resize((4 * picture.width, 4 * picture.height)) for picture in [*pictures(), pictures()[0]]]
    before = [picture.tobytes() for picture in large]
    together = processor.process_images(large)
    monkeypatch.setattr(picture_groups_fwd2bot, "PIXELS_AT_ONCE", 1)
    monkeypatch.setattr(picture_groups_fwd2bot, "LARGE", 1)
    apart = processor.process_images(large)
    assert apart.keys() == together.keys()
    for key in together:
        assert torch.equal(torch.as_tensor(apart[key]), torch.as_tensor(together[key])), key
    assert processor._takes_groups == (name not in FILLED_UP)
    assert [picture.tobytes() for picture in large] == before


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_summary_may_be_made_of_what_the_last_layer_gives(name):
    backbone, processor = build(name)
    options = {"num_summary_tokens": 2, "lora_rank": 2, "summary_norm": False}
    if not hasattr(backbone.get_decoder(), "norm"):
        with pytest.raises(ValueError, match="summary_norm=False needs"):
            Fwd2BotForConditionalGeneration.from_backbone(backbone, **options)
        return
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, **options).eval()
    given = []
    watch = model.get_decoder().layers[-1].register_forward_hook(lambda layer, inputs, output: given.append(output))
    tokens = model.compress(**Fwd2BotProcessor(processor).process_images(pictures()[:1])).tokens
    watch.remove()
    states = given[0][0] if isinstance(given[0], tuple) else given[0]
    torch.testing.assert_close(tokens, model.summary_projector(states[:, -2:]), **CLOSE)


@pytest.mark.parametrize("name", sorted(PADDED))
def test_rows_of_the_embedding_past_the_tokenizer_are_not_read(name):
    model, processor = fwd2bot_on(name)
    prompt = processor.apply_chat_template(conversation("Where?"), add_generation_prompt=True)
    inputs = processor(images=pictures()[0], text=prompt)
    tokens = len(processor.tokenizer)
    with torch.no_grad():
        before = model(**inputs)
        model.get_input_embeddings().weight[tokens:] = 100.0
        after = model(**inputs)
    assert torch.equal(after.summary.tokens, before.summary.tokens)
    assert torch.equal(after.logits[..., :tokens], before.logits[..., :tokens])


@pytest.mark.parametrize("name", sorted(TIED))
def test_tied_embeddings_are_still_tied_when_they_come_back_from_disk(name, tmp_path):
    model, _ = fwd2bot_on(name)
    model.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    for one in (model, loaded):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().summary_queries, model.get_input_embeddings().summary_queries)


def _ids(processor, prompt):
    inputs = processor(text=prompt)
    return inputs["input_ids"], inputs["attention_mask"]


class TestFamilyTraining:
    @pytest.fixture(params=sorted(FAMILIES))
    def untrained(self, request):
        backbone, processor = build(request.param)
        torch.manual_seed(0)
        model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=2, lora_rank=2).train()
        return model, Fwd2BotProcessor(processor)

    def batch(self, processor):
        chats = [conversation("What is in the picture?"), conversation("Where?")]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(images=pictures()[:2], text=prompts)
        texts = processor.process_texts(["the picture", "What?"])
        return {**inputs, "labels": inputs["input_ids"], **{f"text_{name}": value for name, value in texts.items()}}

    def test_after_three_steps_all_that_trains_has_moved_and_nothing_else(self, untrained):
        model, processor = untrained
        trained = model.mark_trainable()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(**self.batch(processor), num_summary_tokens=2).loss.backward()
            optimizer.step()
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert moved == set(trained)

    def test_gradient_checkpointing_changes_no_gradient(self, untrained):
        model, processor = untrained
        with torch.no_grad():
            for name, parameter in model.trained_parameters().items():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1)
        trained, gradients = model.mark_trainable(), []
        for checkpointing in (False, True):
            if checkpointing:
                tiny.enable_checkpointing(model, {"use_reentrant": False})
            model.zero_grad()
            model(**self.batch(processor), num_summary_tokens=2).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in trained.values()])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)
