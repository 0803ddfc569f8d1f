"""Arguments of `generate()` that look at the prompt, count it, or go on from it: the caller's prompt, at every k."""

import logging

import pytest
import tiny
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

GREEDY = {"max_new_tokens": 6, "do_sample": False}
LENGTHS = pytest.mark.parametrize("length", [1, 4])


@pytest.fixture(scope="module")
def summary(model, processor):
    return model.compress(**processor.process_images(tiny.pictures(2)))


@pytest.fixture(scope="module")
def inputs(processor):
    """Two prompts of different lengths."""
    return processor(text=tiny.prompts(processor, ["What is it?", "Why?"]))


@pytest.fixture(scope="module")
def words(processor):
    """A prompt without an image."""
    return processor(text=tiny.prompts(processor, ["Hello, hello, hello!"], num_images=0))


def new_ids(output, inputs):
    return output[:, inputs["input_ids"].shape[1] :]


# What looks at the ids


class Seen(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Keeps the first ids that it is shown, in whichever of these roles."""

    def __init__(self):
        self.ids = None

    def __call__(self, input_ids, scores):
        self.ids = input_ids if self.ids is None else self.ids
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value):
        self.ids = value if self.ids is None else self.ids

    def end(self):
        pass


@LENGTHS
def test_logits_processors_see_the_given_prompt(model, summary, inputs, length):
    seen = Seen()
    model.generate_from_summary(summary.truncate(length), **inputs, **GREEDY, logits_processor=[seen])
    assert torch.equal(seen.ids, inputs["input_ids"])


@LENGTHS
def test_stopping_criteria_see_the_given_prompt_and_the_new_ids(model, summary, inputs, length):
    seen = Seen()
    output = model.generate_from_summary(summary.truncate(length), **inputs, **GREEDY, stopping_criteria=[seen])
    assert torch.equal(seen.ids, output[:, : inputs["input_ids"].shape[1] + 1])


@LENGTHS
def test_streamer_begins_with_the_given_prompt(model, processor, summary, length):
    seen, inputs = Seen(), processor(text=tiny.prompts(processor, ["What is it?"]))
    model.generate_from_summary(summary[0].truncate(length), **inputs, **GREEDY, streamer=seen)
    assert torch.equal(seen.ids, inputs["input_ids"])


@LENGTHS
@pytest.mark.parametrize("num_beams", [1, 2])
def test_prefix_function_sees_its_row_and_restricts_the_answer(model, summary, inputs, length, num_beams):
    width = inputs["input_ids"].shape[1]

    def allowed(row, ids):
        assert torch.equal(ids[:width], inputs["input_ids"][row])
        return [70 + 10 * row + len(ids) - width]

    options = {**GREEDY, "num_beams": num_beams, "prefix_allowed_tokens_fn": allowed}
    output = model.generate_from_summary(summary.truncate(length), **inputs, **options)
    assert new_ids(output, inputs).tolist() == [list(range(70, 76)), list(range(80, 86))]


def scores_of_first_step(model, summary, inputs, **options):
    options |= {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate_from_summary(summary, **inputs, **options)
    return output.scores[0], output.logits[0]


@LENGTHS
def test_repetition_penalty_is_on_the_words_of_the_prompt(model, processor, summary, inputs, length):
    """A summary counts as the one image token in its place, which is no word of an answer."""
    scores, logits = scores_of_first_step(model, summary.truncate(length), inputs, repetition_penalty=2.0)
    in_prompt = torch.zeros_like(logits, dtype=torch.bool).scatter(1, inputs["input_ids"], True)
    expected = torch.where(in_prompt, torch.where(logits < 0, logits * 2, logits / 2), logits)
    words = torch.arange(logits.shape[1]) != processor.tokenizer.pad_token_id  # some versions count padding, too
    torch.testing.assert_close(scores[:, words], expected[:, words])


@LENGTHS
def test_repetition_penalty_may_leave_out_the_prompt(model, summary, inputs, length):
    penalty = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=inputs["input_ids"].shape[1])
    scores, logits = scores_of_first_step(model, summary.truncate(length), inputs, logits_processor=[penalty])
    assert torch.equal(scores, logits)


def test_stop_string_ends_the_answer(model, processor, summary, inputs):
    free = new_ids(model.generate_from_summary(summary[0], inputs["input_ids"][:1], **GREEDY), inputs)[0]
    word = next(token for token in free[1:].tolist() if processor.decode([token]).isascii() and token not in free[:1])
    stopped = model.generate_from_summary(
        summary[0],
        inputs["input_ids"][:1],
        **GREEDY,
        stop_strings=[processor.decode([word])],
        tokenizer=processor.tokenizer,
    )
    assert new_ids(stopped, inputs)[0].tolist() == free[: free.tolist().index(word) + 1].tolist()


def test_transition_scores_are_those_of_the_chosen_ids(model, summary, inputs):
    output = model.generate_from_summary(
        summary, **inputs, **GREEDY, num_beams=3, return_dict_in_generate=True, output_scores=True
    )
    scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    lengths = (output.beam_indices >= 0).sum(1)
    torch.testing.assert_close(scores.sum(1) / lengths, output.sequences_scores)


# What counts the prompt


@LENGTHS
@pytest.mark.parametrize("where", ["arguments", "config", "model"])
def test_lengths_count_the_given_prompt(tiny_fwd2bot, summary, inputs, length, where):
    width = inputs["input_ids"].shape[1]
    lengths = {"max_length": width + 3, "min_length": width + 3}
    config = GenerationConfig(**lengths)
    options = {"arguments": lengths, "config": {"generation_config": config}, "model": {}}[where]
    if where == "model":
        tiny_fwd2bot.generation_config.update(**lengths)
    output = tiny_fwd2bot.generate_from_summary(summary.tokens[:, :length], **inputs, **options)
    assert output.shape[1] == width + 3
    assert config.max_length == width + 3


def test_length_of_the_prompt_alone_is_too_short(model, summary, inputs):
    with pytest.raises(ValueError, match="Input length of input_ids is 34, but `max_length` is set to 34"):
        model.generate_from_summary(summary, **inputs, max_length=inputs["input_ids"].shape[1])


@LENGTHS
def test_fewest_new_tokens_hold_off_the_end(model, summary, inputs, length):
    short = summary.truncate(length)
    end = new_ids(model.generate_from_summary(short, **inputs, **GREEDY), inputs)[0, 0].item()
    output = model.generate_from_summary(short, **inputs, **GREEDY, eos_token_id=end, min_new_tokens=4)
    assert (new_ids(output, inputs)[0, :4] != end).all()


# Going on from an earlier call


def second_turn(processor, first, rows):
    """The ids of the first turn with its answer and of one more question, for so many rows."""
    question = processor(text=["USER: And why? ASSISTANT:"] * rows)["input_ids"]
    return torch.cat([first.sequences, question], 1)


@LENGTHS
@pytest.mark.parametrize("cache", [None, DynamicCache])
def test_second_question_does_not_read_the_summary_again(model, processor, summary, inputs, length, cache):
    short, mask = summary.truncate(length), inputs["attention_mask"]
    start = {} if cache is None else {"past_key_values": cache(config=model.config.get_text_config())}
    first = model.generate_from_summary(short, **inputs, **GREEDY, **start, return_dict_in_generate=True)
    ids = second_turn(processor, first, rows=2)
    mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
    expected = model.generate_from_summary(short, ids, mask, **GREEDY)

    read = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        found = model.generate_from_summary(short, ids, mask, **GREEDY, past_key_values=first.past_key_values)
    finally:
        hook.remove()
    assert torch.equal(found, expected)
    new = ids.shape[1] - first.sequences.shape[1] + 1  # the last id of the answer was chosen, but not read
    assert read == [new, 1, 1, 1, 1, 1]


def test_conversation_without_images_goes_on_too(model, processor, words):
    first = model.generate(**words, **GREEDY, return_dict_in_generate=True)
    ids = second_turn(processor, first, rows=1)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=first.past_key_values), expected)


def test_cache_that_reaches_past_the_prompt_is_refused(model, summary, inputs):
    first = model.generate_from_summary(summary, **inputs, **GREEDY, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="hold 39 tokens, but the prompts have 34.*the whole conversation"):
        model.generate_from_summary(summary, **inputs, **GREEDY, past_key_values=first.past_key_values)


# Decoding with drafts


@pytest.mark.parametrize("draft", ["prompt lookup", "backbone", "another Fwd2Bot"])
def test_drafts_do_not_change_the_answer_to_words(model, words, caplog, draft):
    # Not ours to mend: transformers calls the assistant in a way that it calls deprecated.
    caplog.set_level(logging.ERROR, "transformers.generation.configuration_utils")
    caplog.set_level(logging.ERROR, "transformers.generation.utils")
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "backbone": {"assistant_model": tiny.tiny_backbone(seed=3)},
        "another Fwd2Bot": {"assistant_model": tiny.tiny_fwd2bot(seed=3)},
    }[draft]
    expected = model.generate(**words, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(**words, max_new_tokens=20, do_sample=False, **options), expected)


@pytest.mark.parametrize("name, value", [("prompt_lookup_num_tokens", 2), ("prefill_chunk_size", 8)])
def test_what_reads_the_prompt_as_words_is_refused_in_a_config_too(model, summary, inputs, name, value):
    config = GenerationConfig(**{name: value})
    with pytest.raises(ValueError, match=f"{name} reads the prompt as words.*prompts without images"):
        model.generate_from_summary(summary, **inputs, generation_config=config)
