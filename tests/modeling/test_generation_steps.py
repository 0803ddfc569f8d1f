"""What the backbone is given for an answer: positions, the prefill, each step, and what comes in between."""

import pytest
import tiny
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from fwd2bot import Fwd2BotOutput
from fwd2bot.adapters_fwd2bot import answer_words
from fwd2bot.placeholders_fwd2bot import expand_placeholders

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_decoder_receives_positions_that_count_tokens_not_padding(model, processor, summary, prompts):
    seen = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    try:
        inputs = processor(text=prompts)
        model.generate_from_summary(summary, **inputs, max_new_tokens=2, do_sample=False)
    finally:
        hook.remove()
    lengths = inputs["attention_mask"].sum(1) - 1 + summary.lengths  # the placeholder has become k tokens
    assert seen[0][:, -1].tolist() == (lengths - 1).tolist()
    assert seen[1][:, -1].tolist() == lengths.tolist()


def test_text_only_answers_do_not_depend_on_the_padding_side(model, processor):
    questions = ["Why?", "Is it a very large red thing?"]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": question}]}], add_generation_prompt=True
        )
        for question in questions
    ]
    new = []
    for side in ("left", "right"):
        inputs = processor(text=texts, padding_side=side)
        new.append(model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(new[0], new[1])


def test_prefill_computes_logits_of_the_last_position_alone(model, processor, summary, prompts):
    shapes = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    try:
        model.generate_from_summary(summary, **processor(text=prompts), max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
    assert shapes == [1]


def test_step_of_an_answer_is_the_forward_that_anyone_can_call(model, processor, summary, prompts):
    """Inside of `generate()` words are looked up and outputs handed on without what they do not need there."""
    inputs = processor(text=prompts)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    answer = model.generate_from_summary(summary, **inputs, **options)
    new = answer.sequences[:, inputs["input_ids"].shape[1] :]
    start = model.generate_from_summary(summary, **inputs, **{**options, "max_new_tokens": 1, "min_new_tokens": 1})
    cache = start.past_key_values
    mask = torch.ones(len(new), cache.get_seq_length() + 1, dtype=torch.long)
    mask[:, :-1] = _attended(model, summary, inputs)
    with torch.no_grad():
        step = model(
            input_ids=new[:, :1],
            attention_mask=mask,
            position_ids=mask.cumsum(1)[:, -1:] - 1,
            past_key_values=cache,
        )
    assert isinstance(step, Fwd2BotOutput)
    torch.testing.assert_close(step.logits[:, -1], answer.logits[1], rtol=0, atol=1e-5)


def _attended(model, summary, inputs):
    lengths, image = summary.lengths, model.image_token_id
    return expand_placeholders(inputs["input_ids"], inputs["attention_mask"], lengths, image, 0)["attention_mask"]


def test_queries_are_read_outside_of_answers(model):
    first = model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        found = model(torch.tensor([[5, first]])).logits
        with answer_words():
            assert torch.equal(model(torch.tensor([[5, 6]])).logits[:, :1], found[:, :1])
            with pytest.raises(IndexError):
                model(torch.tensor([[5, first]]))
    assert torch.isfinite(found).all()


def test_pictures_can_be_compressed_in_the_midst_of_an_answer(model, processor, images, summary, prompts):
    """By a stopping criterion, in the same thread."""
    found = []

    class Compress(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            found.append(model.compress(**images).tokens)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    expected = tiny.answers(model, processor, summary, prompts)
    stopping = StoppingCriteriaList([Compress()])
    assert tiny.answers(model, processor, summary, prompts, stopping_criteria=stopping) == expected
    assert len(found) == len(expected[0])
    assert all(torch.equal(tokens, summary.tokens) for tokens in found)


def test_max_length_counts_one_placeholder_per_picture(model, processor, summary, prompts):
    inputs = processor(text=prompts)
    length = inputs["input_ids"].shape[1]
    output = model.generate_from_summary(summary, **inputs, max_length=length + 3, min_length=length + 3)
    assert output.shape[1] == length + 3


def test_words_may_be_scored_in_the_midst_of_an_answer(model, processor, summary, prompts):
    """By a stopping criterion, in the same thread: its loss is that of a call outside."""
    words = torch.tensor([[5, 6, 7, 8]])

    def loss():
        return model(words, labels=words).loss

    class Scores(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            found.append(loss())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = []
    tiny.answers(model, processor, summary, prompts, stopping_criteria=StoppingCriteriaList([Scores()]))
    assert found and all(torch.equal(one, loss()) for one in found)
