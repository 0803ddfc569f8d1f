"""Use: compress, embed and generate, with the laws that hold for them (1 to 4 and 8)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from fwd2bot import Fwd2BotSummary

GREEDY = {"max_new_tokens": 6, "do_sample": False}


# Law 1: the backbone is untouched


def test_backbone_with_adapters_off_equals_the_original(images):
    original, wrapped = tiny.tiny_backbone(), tiny.tiny_fwd2bot()
    assert torch.equal(wrapped.backbone(**images).logits, original(**images).logits)


def test_adapters_change_the_backbone_when_on(model, processor):
    """The test above would mean nothing if adapters did nothing."""
    text = processor.process_texts(["two dogs"])
    assert not torch.allclose(model(**text).logits, model.backbone(**text).logits, atol=1e-3)


def test_uncompressed_answers_are_those_of_the_original_backbone(model, processor, prompts):
    inputs = processor.backbone_processor(
        images=tiny.pictures(3), text=prompts, padding=True, return_tensors="pt", add_special_tokens=False
    )
    expected = tiny.tiny_backbone().generate(**inputs, **GREEDY)
    assert torch.equal(model.generate_uncompressed(**inputs, **GREEDY), expected)


# Law 2: prefix


@pytest.mark.parametrize("length", [1, 2, 3])
def test_prefix_of_long_summary_equals_short_summary(model, images, summary, length):
    short = model.compress(**images, num_summary_tokens=length)
    assert short.tokens.shape == (3, length, 32)
    torch.testing.assert_close(summary.truncate(length).tokens, short.tokens, atol=1e-5, rtol=0)


def test_summaries_of_different_images_differ(summary):
    assert (summary.tokens[0] - summary.tokens[1]).abs().max() > 0.1


# Law 3: batch invariance


def test_summary_and_embedding_do_not_depend_on_the_batch(model, processor, summary):
    for index, picture in enumerate(tiny.pictures(3)):
        inputs = processor.process_images([picture])
        torch.testing.assert_close(model.compress(**inputs).tokens[0], summary.tokens[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.embed(**inputs)[0], model.embed(summary=summary)[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_summary_does_not_depend_on_the_padding(model, images, summary, side):
    width = (5, 0) if side == "left" else (0, 5)
    padded = {
        "input_ids": torch.nn.functional.pad(images["input_ids"], width, value=7),
        "attention_mask": torch.nn.functional.pad(images["attention_mask"], width),
        "pixel_values": images["pixel_values"],
    }
    torch.testing.assert_close(model.compress(**padded).tokens, summary.tokens, atol=1e-5, rtol=0)


def test_text_embedding_does_not_depend_on_the_batch(model, processor):
    texts = ["a dog", "two cats beside a large red house on a hill", "x"]
    together = model.embed(**processor.process_texts(texts))
    alone = torch.cat([model.embed(**processor.process_texts(text)) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_answer_does_not_depend_on_batch_and_padding_side(model, processor, summary, prompts, side):
    alone = [tiny.answers(model, processor, summary[index], [prompts[index]])[0] for index in range(3)]
    inputs = processor(text=prompts, padding_side=side)
    assert (inputs["attention_mask"] == 0).any()
    together = model.generate_from_summary(summary, **inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert together.tolist() == alone


def test_greedy_answer_depends_on_the_summary(model, processor, summary, prompts):
    """The test above would mean nothing if all answers were the same."""
    same_question = [prompts[0]] * 3
    found = tiny.answers(model, processor, summary, same_question)
    assert len({tuple(ids) for ids in found}) > 1


# Law 4: one path


@pytest.mark.parametrize("length", [None, 2])
def test_generate_from_images_equals_compress_then_generate(model, processor, images, prompts, length):
    direct = model.generate(**processor(images=tiny.pictures(3), text=prompts), num_summary_tokens=length, **GREEDY)
    summary = model.compress(**images, num_summary_tokens=length)
    assert torch.equal(direct, model.generate_from_summary(summary, **processor(text=prompts), **GREEDY))


@pytest.mark.parametrize("length", [None, 1, 3])
def test_embed_of_images_equals_embed_of_their_summary(model, images, summary, length):
    direct = model.embed(**images, num_summary_tokens=length)
    torch.testing.assert_close(direct, model.embed(summary=summary, num_summary_tokens=length), atol=1e-6, rtol=0)


def test_embed_gives_float32_of_unit_norm(model, images):
    embeds = model.embed(**images)
    assert embeds.shape == (3, 32)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))


def test_embedding_is_the_normalised_mean_of_the_first_vectors(model, summary):
    mean = summary.tokens[:, :2].mean(1)
    torch.testing.assert_close(model.embed(summary=summary, num_summary_tokens=2), mean / mean.norm(dim=-1)[:, None])


def test_bare_tensor_is_taken_as_a_summary(model, processor, summary, prompts):
    assert tiny.answers(model, processor, summary.tokens, prompts) == tiny.answers(model, processor, summary, prompts)
    assert torch.equal(model.embed(summary=summary.tokens), model.embed(summary=summary))


def test_compress_and_embed_have_no_gradient(tiny_fwd2bot, images):
    tiny_fwd2bot.train()
    assert not tiny_fwd2bot.compress(**images).tokens.requires_grad
    assert not tiny_fwd2bot.embed(**images).requires_grad


# Prompts


def test_output_is_the_given_prompt_and_the_new_ids(model, processor, summary, prompts):
    inputs = processor(text=prompts)
    output = model.generate_from_summary(summary, **inputs, **GREEDY)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert output.shape[1] == inputs["input_ids"].shape[1] + 6


def test_several_images_per_prompt_of_different_lengths(model, processor, images, summary):
    mixed = Fwd2BotSummary.cat(
        [summary[0], model.compress(**images, num_summary_tokens=1)[1], summary[2].truncate(2), summary[1]]
    )
    texts = [*tiny.prompts(processor, ["Which?"], num_images=3), *tiny.prompts(processor, ["What is it?"])]
    together = tiny.answers(model, processor, mixed, texts)
    alone = [
        *tiny.answers(model, processor, mixed[:3], texts[:1]),
        *tiny.answers(model, processor, mixed[3], texts[1:]),
    ]
    assert together == alone


def test_order_of_the_summaries_matters(model, processor, summary):
    inputs = processor(text=tiny.prompts(processor, ["Which?"], num_images=3))
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    one, other = (
        model.generate_from_summary(summary[order], **inputs, **options).logits[0] for order in ([0, 1, 2], [2, 1, 0])
    )
    assert (one - other).abs().max() > 0.01


def test_summary_takes_the_place_of_its_placeholder(model, processor, summary):
    """What generate() sees, put together by hand."""
    text = tiny.prompts(processor, ["Which?"], num_images=2)
    inputs = processor(text=text)
    ids, embedding = inputs["input_ids"][0], model.get_input_embeddings()
    first, second = (ids == processor.image_token_id).nonzero().flatten().tolist()
    by_hand = torch.cat(
        [
            embedding(ids[:first]),
            summary.tokens[0],
            embedding(ids[first + 1 : second]),
            summary.tokens[1, :2],
            embedding(ids[second + 1 :]),
        ]
    )[None]
    next_id = model(inputs_embeds=by_hand).logits[0, -1].argmax().item()
    two = Fwd2BotSummary.cat([summary[0], summary[1].truncate(2)])
    assert tiny.answers(model, processor, two, text, max_new_tokens=1) == [[next_id]]


def test_images_and_summaries_in_one_prompt_by_compress_and_cat(model, processor, summary):
    fresh = model.compress(**processor.process_images(tiny.pictures(3)[2:]), num_summary_tokens=2)
    text = tiny.prompts(processor, ["Which?"], num_images=2)
    mixed = tiny.answers(model, processor, Fwd2BotSummary.cat([summary[0], fresh]), text)
    expected = tiny.answers(model, processor, Fwd2BotSummary.cat([summary[0], summary[2].truncate(2)]), text)
    assert mixed == expected


def test_prompt_without_image_needs_no_summary(model, processor):
    text = tiny.prompts(processor, ["Hello!"], num_images=0)
    inputs = processor(text=text)
    output = model.generate(**inputs, **GREEDY)
    next_id = model(**inputs).logits[0, -1].argmax()
    assert output[0, inputs["input_ids"].shape[1]] == next_id


def test_prompts_with_and_without_image_in_one_batch(model, processor, summary):
    texts = [*tiny.prompts(processor, ["Hello!"], num_images=0), *tiny.prompts(processor, ["What is it?"])]
    found = tiny.answers(model, processor, summary[0], texts)
    inputs = processor(text=texts[0])
    hello = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    assert found == [hello, *tiny.answers(model, processor, summary[0], texts[1:])]


# Arguments of generate()


def test_streamer_gets_the_answer(model, processor, summary, prompts, capsys):
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    [ids] = tiny.answers(model, processor, summary[0], prompts[:1], streamer=streamer)
    assert capsys.readouterr().out.strip("\n") == processor.tokenizer.decode(ids)


def test_iterator_streamer_gets_the_answer_from_another_thread(model, processor, summary, prompts):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=30)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(tiny.answers, model, processor, summary[0], prompts[:1], streamer=streamer)
        text = "".join(streamer)
    assert text == processor.tokenizer.decode(future.result()[0])


def test_beams_return_several_sequences_per_prompt(model, processor, summary, prompts):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = tiny.answers(model, processor, summary, prompts, **beams)
    alone = [tiny.answers(model, processor, summary[index], [prompts[index]], **beams) for index in range(3)]
    assert together == [ids for pair in alone for ids in pair]
    assert together[0] != together[1]


def test_every_returned_sequence_starts_with_its_own_prompt(model, processor, summary, prompts):
    inputs = processor(text=prompts)
    output = model.generate_from_summary(summary, **inputs, **GREEDY, num_beams=2, num_return_sequences=2)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, 0))


def test_sampling_repeats_with_its_seed(model, processor, summary, prompts):
    sampling = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(tiny.answers(model, processor, summary, prompts, **sampling))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 6


def test_stopping_criteria_stop(model, processor, summary, prompts):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return torch.full((len(input_ids),), self.calls == 3)

    found = tiny.answers(model, processor, summary, prompts, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert [len(ids) for ids in found] == [3, 3, 3]


def test_end_token_ends_a_row_and_pads_it(model, processor, summary, prompts):
    free = tiny.answers(model, processor, summary, prompts)
    end = free[0][1]
    stopped = tiny.answers(model, processor, summary, prompts, eos_token_id=end)
    pad = processor.tokenizer.pad_token_id
    assert stopped[0] == [free[0][0], end, *[pad] * (len(stopped[0]) - 2)]


def test_return_dict_in_generate(model, processor, summary, prompts):
    inputs = processor(text=prompts)
    output = model.generate_from_summary(
        summary, **inputs, **GREEDY, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, model.generate_from_summary(summary, **inputs, **GREEDY)[:, -6:])
    assert torch.equal(torch.stack(output.logits, 1).argmax(-1), new)
    assert len(output.hidden_states) == 6


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_answer_does_not_depend_on_the_cache(model, processor, summary, prompts, options):
    expected = tiny.answers(model, processor, summary, prompts)
    assert tiny.answers(model, processor, summary, prompts, **options) == expected


def test_misspelt_generation_argument_is_an_error(model, processor, summary, prompts):
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate_from_summary(summary, **processor(text=prompts), max_new_token=5)


# Law 8: threads


def test_threads_give_what_one_after_the_other_gives(model, processor, summary, prompts):
    pictures = tiny.pictures(3)

    def compress(index):
        return model.compress(**processor.process_images([pictures[index]])).tokens

    def answer(index):
        return tiny.answers(model, processor, summary[index], [prompts[index]], max_new_tokens=12)

    def uncompressed(index):
        inputs = processor.backbone_processor(
            images=[pictures[index]], text=[prompts[index]], return_tensors="pt", add_special_tokens=False
        )
        return model.generate_uncompressed(**inputs, max_new_tokens=12, do_sample=False)

    jobs = [(function, index) for index in range(3) for function in (compress, answer, uncompressed)] * 2
    expected = [function(index) for function, index in jobs]
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(function, index) for function, index in jobs]
        found = [future.result() for future in futures]
    for (function, _), one, other in zip(jobs, found, expected, strict=True):
        assert one == other if function is answer else torch.equal(one, other)
