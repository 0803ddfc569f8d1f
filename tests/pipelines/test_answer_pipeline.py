"""`fwd2bot-answer`: how questions and pictures go together, and that `generate()` gets its arguments."""

import copy

import datasets
import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from fwd2bot.pipelines.answer_inputs import row_to_item
from fwd2bot.pipelines.answer_pipeline import _without_padding

QUESTION = "Where?"
SHORT = {"max_new_tokens": 6, "do_sample": False}


def text(output):
    [answer] = output
    return answer["generated_text"]


@pytest.fixture
def by_model(vivid_fwd2bot, tiny_processor):
    """The model's own answer to a question about a list of pictures."""

    def ask(question, images, **options):
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
        prompt = tiny_processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = tiny_processor(text=[prompt], images=images)
        ids = vivid_fwd2bot.generate(**inputs, **{**SHORT, **options})
        return tiny_processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()

    return ask


def test_answer_is_that_of_the_model(answer, by_model, pictures):
    assert text(answer(QUESTION, images=pictures(1)[0], **SHORT)) == by_model(QUESTION, pictures(1))


def test_answer_from_summary_is_that_from_the_picture(answer, compress, pictures):
    summary = compress(pictures(1)[0])
    expected = answer(QUESTION, images=pictures(1)[0], **SHORT)
    assert answer(QUESTION, summary=summary, **SHORT) == expected
    assert answer(QUESTION, summary=summary.tokens, **SHORT) == expected


def test_one_question_about_several_pictures(answer, compress, by_model, pictures):
    expected = by_model(QUESTION, pictures(3))
    assert text(answer(QUESTION, images=pictures(3), **SHORT)) == expected
    assert text(answer(QUESTION, summary=compress(pictures(3)), **SHORT)) == expected
    assert expected != by_model(QUESTION, pictures(1))


def test_image_tokens_in_the_question_place_the_pictures(answer, vivid_fwd2bot, tiny_processor, pictures):
    question = "Is <image> brighter than <image>?"
    prompt = tiny_processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": question}]}], add_generation_prompt=True
    )
    inputs = tiny_processor(text=[prompt], images=pictures(2))
    ids = vivid_fwd2bot.generate(**inputs, **SHORT)[:, inputs["input_ids"].shape[1] :]
    assert (
        text(answer(question, images=pictures(2), **SHORT))
        == tiny_processor.decode(ids[0], skip_special_tokens=True).strip()
    )


def test_several_questions_about_one_picture_compress_it_once(answer, vivid_fwd2bot, pictures, count_calls):
    expected = [answer(question, images=pictures(1)[0], **SHORT) for question in (QUESTION, "What?")]
    calls = count_calls(vivid_fwd2bot, "compress")
    assert answer([QUESTION, "What?"], images=pictures(1)[0], **SHORT) == expected
    assert len(calls) == 1


def test_one_summary_serves_several_questions(answer, compress, pictures):
    summary = compress(pictures(1)[0])
    expected = [answer(question, summary=summary, **SHORT) for question in (QUESTION, "What?", "Who?")]
    assert answer([QUESTION, "What?", "Who?"], summary=summary, **SHORT) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_question_has_its_own_pictures_whatever_the_batch(answer, compress, pictures, batch_size):
    questions = [QUESTION, "What?", "A much longer question than the others: what do you see?"]
    images = [pictures(1)[0], pictures(3)[1:], [pictures(4)[3]]]
    expected = [answer(question, images=own, **SHORT) for question, own in zip(questions, images, strict=True)]
    assert answer(questions, images=images, batch_size=batch_size, **SHORT) == expected
    summaries = [compress(own) for own in images]
    assert answer(questions, summary=summaries, batch_size=batch_size, **SHORT) == expected


def test_summaries_of_different_lengths_in_one_batch(answer, compress, pictures):
    summaries = [compress(pictures(1)[0], num_summary_tokens=length) for length in (1, 3, 4)]
    expected = [answer(QUESTION, summary=summary, **SHORT) for summary in summaries]
    assert answer([QUESTION] * 3, summary=summaries, batch_size=3, **SHORT) == expected


def test_summary_of_as_many_pictures_as_questions_is_shared_out(answer, compress, pictures):
    summary = compress(pictures(3))
    expected = [answer(QUESTION, summary=one, **SHORT) for one in summary]
    assert answer([QUESTION] * 3, summary=summary, **SHORT) == expected
    assert answer([QUESTION] * 3, summary=summary.tokens, batch_size=3, **SHORT) == expected


def test_rows_bring_their_own_pictures(answer, compress, pictures):
    expected = answer([QUESTION, "What?"], images=pictures(2), **SHORT)
    rows = [
        {"question": QUESTION, "images": pictures(1)},
        {"text": "What?", "summary": compress(pictures(2)[1])},
    ]
    assert answer(rows, batch_size=2, **SHORT) == expected
    assert answer(rows[0], **SHORT) == expected[0]
    assert list(answer((row for row in rows), **SHORT)) == expected


@pytest.mark.parametrize("batch_size", [2, 5])
def test_summaries_with_and_without_a_record_share_a_batch(
    answer, compress, vivid_fwd2bot, tiny_processor, pictures, batch_size
):
    own = compress(pictures(1)[0])
    rows = [
        {"question": QUESTION, "images": pictures(2)[1]},
        {"question": QUESTION, "summary": own.tokens},
        {"question": QUESTION, "summary": type(own)(own.tokens)},
        {"question": QUESTION, "summary": own.truncate(2).tokens},
        {"question": QUESTION, "summary": vivid_fwd2bot.compress(**tiny_processor.process_texts(["a dog"]))},
    ]
    assert answer(rows, batch_size=batch_size, **SHORT) == [answer(row, **SHORT) for row in rows]


def test_summary_of_another_model_in_a_batch_is_refused_before_any_compute(
    answer, compress, vivid_fwd2bot, pictures, count_calls
):
    other = compress(pictures(1)[0])
    other.metadata["fingerprint"] = "0123456789abcdef"
    rows = [{"question": QUESTION, "images": pictures(1)}, {"question": QUESTION, "summary": other}]
    calls = count_calls(vivid_fwd2bot, "compress")
    with pytest.raises(ValueError, match="another model.*0123456789abcdef"):
        answer(rows, batch_size=2, **SHORT)
    assert not calls


def test_data_set_of_questions_gives_an_iterator(answer, pictures):
    data = datasets.Dataset.from_dict({"question": [QUESTION, "What?"], "image": pictures(2), "answer": ["2", "dog"]})
    outputs = answer(data, batch_size=2, **SHORT)
    assert not isinstance(outputs, list)
    assert list(outputs) == answer([QUESTION, "What?"], images=pictures(2), **SHORT)


def test_chat_with_earlier_turns(answer, vivid_fwd2bot, tiny_processor, pictures):
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "Where?"},
    ]
    prompt = "<s>USER: <image>\nWhat? ASSISTANT: a dog</s>USER: Where? ASSISTANT:"
    inputs = tiny_processor(text=[prompt], images=pictures(1))
    ids = vivid_fwd2bot.generate(**inputs, **SHORT)[:, inputs["input_ids"].shape[1] :]
    expected = tiny_processor.decode(ids[0], skip_special_tokens=True).strip()
    assert text(answer(chat, images=pictures(1)[0], **SHORT)) == expected
    plain = [{**chat[0], "content": "What?"}, *chat[1:]]
    assert answer([plain, chat], images=pictures(1)[0], **SHORT) == [[{"generated_text": expected}]] * 2
    [full] = answer(chat, images=pictures(1)[0], return_full_text=True, **SHORT)
    assert full["generated_text"] == [*chat, {"role": "assistant", "content": expected}]


def test_length_is_that_asked_for(answer, by_model, pictures):
    output = answer(QUESTION, images=pictures(1)[0], num_summary_tokens=1, **SHORT)
    assert text(output) == by_model(QUESTION, pictures(1), num_summary_tokens=1)


def test_several_sequences_per_question(answer, pictures):
    options = {"num_beams": 3, "num_return_sequences": 2, **SHORT}
    outputs = answer([QUESTION, "What?"], images=pictures(2), batch_size=2, **options)
    assert [len(output) for output in outputs] == [2, 2]
    assert outputs[1] == answer("What?", images=pictures(2)[1], **options)


def test_generation_config_and_generate_kwargs_are_as_the_arguments(answer, pictures):
    expected = answer(QUESTION, images=pictures(1)[0], **SHORT)
    assert answer(QUESTION, images=pictures(1)[0], generate_kwargs=SHORT) == expected
    assert answer(QUESTION, images=pictures(1)[0], generation_config=GenerationConfig(**SHORT)) == expected


def test_generation_arguments_may_be_set_when_the_pipeline_is_made(vivid_fwd2bot, tiny_processor, pictures):
    pipe = make(vivid_fwd2bot, tiny_processor, max_new_tokens=2)
    assert len(pipe(QUESTION, images=pictures(1)[0], return_tensors=True)[0]["generated_token_ids"]) == 2
    ids = pipe(QUESTION, images=pictures(1)[0], return_tensors=True, max_new_tokens=3)[0]["generated_token_ids"]
    assert len(ids) == 3


def test_generation_config_may_not_be_a_dict(answer, pictures):
    with pytest.raises(TypeError, match="generation_config must be a transformers.GenerationConfig, got dict"):
        answer(QUESTION, images=pictures(1)[0], generation_config=SHORT)


@pytest.fixture
def endless(vivid_fwd2bot, tiny_processor, pictures):
    """How many tokens an answer has that only its greatest length ends; takes fields of the model's own config."""

    def ask(**model_says):
        model = copy.deepcopy(vivid_fwd2bot)
        model.generation_config.update(**model_says, eos_token_id=None, do_sample=False)
        [output] = make(model, tiny_processor)(QUESTION, images=pictures(1)[0], return_tensors=True)
        return len(output["generated_token_ids"])

    return ask


def test_answer_has_at_most_256_tokens_by_default(endless):
    assert endless() == 256


def test_longest_answer_is_that_of_the_models_own_config(endless):
    assert endless(max_new_tokens=5) == 5
    assert 0 < endless(max_length=100) < 100  # which counts the prompt


def test_streamer_sees_the_answer_token_by_token(answer, tiny_processor, pictures):
    streamer = TextIteratorStreamer(tiny_processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    output = answer(QUESTION, images=pictures(1)[0], streamer=streamer, **SHORT)
    assert "".join(streamer).strip() == text(output)


def test_stop_sequence_ends_the_answer(answer, tiny_processor, pictures):
    [output] = answer(QUESTION, images=pictures(1)[0], return_tensors=True, **SHORT)
    ids = output["generated_token_ids"]
    second = tiny_processor.tokenizer.convert_ids_to_tokens(ids.tolist())[1]
    stop = tiny_processor.decode(ids[:2], clean_up_tokenization_spaces=False)
    if "\ufffd" in stop:
        pytest.skip(f"the random model answers with half a character ({second!r})")
    [stopped] = answer(QUESTION, images=pictures(1)[0], return_tensors=True, stop_sequence=stop, **SHORT)
    assert len(stopped["generated_token_ids"]) == 2


def test_arguments_of_generate_given_at_construction_are_kept_in_a_call_that_gives_more(
    vivid_fwd2bot, tiny_processor, pictures
):
    parts = {"model": vivid_fwd2bot, "processor": tiny_processor, "device": "cpu"}
    pipe = pipeline("fwd2bot-answer", **parts, max_new_tokens=2)
    [output] = pipe(QUESTION, images=pictures(1)[0], do_sample=False, return_tensors=True)
    assert len(output["generated_token_ids"]) == 2
    [output] = pipe(QUESTION, images=pictures(1)[0], do_sample=False, max_new_tokens=3, return_tensors=True)
    assert len(output["generated_token_ids"]) == 3


def test_return_tensors_gives_the_new_ids(answer, tiny_processor, pictures):
    [output] = answer(QUESTION, images=pictures(1)[0], return_tensors=True, **SHORT)
    ids = output["generated_token_ids"]
    assert isinstance(ids, torch.Tensor)
    assert tiny_processor.decode(ids, skip_special_tokens=True).strip() == text(
        answer(QUESTION, images=pictures(1)[0], **SHORT)
    )


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 6, 2, 0, 0], [5, 6, 2]),  # 2 ends an answer, 0 is padding
        ([5, 0, 6, 2], [5, 0, 6, 2]),
        ([5, 6, 0, 0], [5, 6]),  # ended by a stop sequence
        ([2, 0], [2]),
        ([0, 0], []),
        ([], []),
    ],
)
def test_ids_of_an_answer_end_with_its_end_token(ids, expected):
    ids = torch.tensor(ids, dtype=torch.long)
    assert _without_padding(ids, torch.tensor([2, 9]), torch.tensor([0])).tolist() == expected


def test_ids_that_end_with_the_token_that_also_pads():
    assert _without_padding(torch.tensor([5, 2, 2]), torch.tensor([2]), torch.tensor([2])).tolist() == [5, 2]


def test_answers_of_a_batch_hold_no_padding(answer, pictures):
    arguments = {"questions": [QUESTION, "What?"], "images": pictures(2), **SHORT}
    first, second = (output["generated_token_ids"].tolist() for [output] in answer(**arguments, return_tensors=True))
    end = next(token for token in first[:-1] if token not in second)
    arguments["eos_token_id"] = end

    def ids(batch_size):
        outputs = answer(**arguments, return_tensors=True, batch_size=batch_size)
        return [output["generated_token_ids"].tolist() for [output] in outputs]

    assert ids(1) == ids(2) == [first[: first.index(end) + 1], second]
    texts = answer(**arguments, skip_special_tokens=False, batch_size=2)
    assert texts == answer(**arguments, skip_special_tokens=False)
    assert "<pad>" not in text(texts[0])


def test_full_text_holds_the_question(answer, pictures):
    expected = f"{QUESTION} {text(answer(QUESTION, images=pictures(1)[0], **SHORT))}"
    assert text(answer(QUESTION, images=pictures(1)[0], return_full_text=True, **SHORT)) == expected


def make(model, processor, **arguments):
    from transformers import pipeline

    return pipeline("fwd2bot-answer", model=model, processor=processor, device="cpu", **arguments)


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("questions", "count", "options", "error", "message"),
    [
        ([], 1, {}, ValueError, "No question was given"),
        ("", 1, {}, ValueError, "question is empty"),
        (["What?", "  "], 2, {}, ValueError, "Question 1: .*empty"),
        (5, 1, {}, TypeError, "int"),
        (["What?", 5], 2, {}, TypeError, "Question 1: A question must be a str or a chat"),
        (QUESTION, 0, {}, ValueError, "No picture was given"),
        ([QUESTION] * 3, 2, {}, ValueError, r"3 question\(s\).*images for 2"),
        ("<image> or <image>?", 1, {}, ValueError, r"2 place\(s\).*1 picture\(s\)"),
        ([{"role": "user", "content": [IMAGE, IMAGE]}], 1, {}, ValueError, r"2 place\(s\).*1 picture\(s\)"),
        ([{"role": "assistant", "content": "Hm."}], 1, {}, ValueError, "no message of the role 'user'"),
        (
            [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A"}],
            1,
            {},
            ValueError,
            "ends with an answer",
        ),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], 1, {}, ValueError, "url.*images or summary"),
        ({"question": "What?", "image": "a.png"}, 1, {}, ValueError, "brings its own pictures"),
        (QUESTION, 1, {"max_new_token": 3}, TypeError, "'max_new_token'.*Did you mean 'max_new_tokens'"),
        (QUESTION, 1, {"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 3}}, ValueError, "given twice"),
        (QUESTION, 1, {"return_tensors": True, "return_full_text": True}, ValueError, "exclude each other"),
        ([QUESTION] * 2, 2, {"streamer": object(), "batch_size": 2}, ValueError, "one question at a time"),
    ],
)
def test_bad_arguments_are_refused_before_any_compute(
    answer, vivid_fwd2bot, pictures, count_calls, questions, count, options, error, message
):
    calls = count_calls(vivid_fwd2bot, "compress")
    with pytest.raises(error, match=message):
        answer(questions, images=pictures(count), **options)
    assert not calls


def test_both_or_neither_of_images_and_summary_is_refused(answer, compress, pictures):
    with pytest.raises(ValueError, match="neither"):
        answer(QUESTION)
    for questions in (QUESTION, [QUESTION, QUESTION]):
        with pytest.raises(ValueError, match="both"):
            answer(questions, images=pictures(1)[0], summary=compress(pictures(1)))


def test_summaries_that_do_not_match_the_questions_are_counted(answer, compress, pictures):
    with pytest.raises(ValueError, match=r"2 question\(s\).*summary for 3"):
        answer([QUESTION] * 2, summary=compress(pictures(3)))


def test_path_of_a_summary_file_is_refused_with_the_remedy(answer):
    with pytest.raises(TypeError, match="got str.*load_file"):
        answer(QUESTION, summary="summaries.safetensors")


@pytest.mark.parametrize(
    ("summary", "error", "message"),
    [
        (torch.zeros(1, 2, 16), ValueError, "16 wide.*32 wide"),
        (torch.zeros(1, 2, 32, dtype=torch.int8), TypeError, "floating point.*got torch.int8"),
        (torch.zeros(2, 32), ValueError, r"\(N, k, d\).*got \(2, 32\)"),
        (torch.tensor(0.0), ValueError, r"\(N, k, d\).*got \(\)"),
        (torch.zeros(1, 0, 32), ValueError, r"\(N, k, d\).*got \(1, 0, 32\)"),
    ],
)
def test_tensor_that_is_no_summary_is_refused_before_any_compute(
    answer, vivid_fwd2bot, pictures, count_calls, summary, error, message
):
    calls = count_calls(vivid_fwd2bot, "compress")
    rows = [{"question": QUESTION, "images": pictures(1)}, {"question": QUESTION, "summary": summary}]
    for questions, options in ((QUESTION, {"summary": summary}), (["A?", "B?"], {"summary": summary}), (rows, {})):
        with pytest.raises(error, match=message):
            answer(questions, **options)
    assert not calls


def test_summary_of_a_row_is_on_the_cpu_before_a_worker_has_it(tiny_processor):
    class OnAccelerator:
        tokens, lengths = torch.zeros(1, 4, 32), torch.tensor([4])

        def to(self, device):
            return f"on the {device}"

    item = row_to_item({"question": QUESTION, "summary": OnAccelerator()}, tiny_processor, summary_width=32)
    assert item["summary"] == "on the cpu"


def test_workers_hand_on_what_they_were_given(answer, compress, pictures):
    summary = compress(pictures(1)[0])
    expected = answer([QUESTION, "What?"], summary=summary, **SHORT)
    assert answer([QUESTION, "What?"], summary=summary, num_workers=1, **SHORT) == expected


@pytest.mark.gpu
def test_workers_hand_on_a_summary_that_was_on_the_gpu(vivid_fwd2bot, tiny_processor, pictures):
    model = copy.deepcopy(vivid_fwd2bot)
    pipe = pipeline("fwd2bot-answer", model=model, processor=tiny_processor, device="cuda")
    shared = pipe([QUESTION, "What?"], images=pictures(1)[0], num_workers=2, **SHORT)
    summary = pipe.compress_pictures(pictures(1), None)
    rows = [{"question": question, "summary": summary} for question in (QUESTION, "What?")]
    assert pipe(rows, num_workers=2, **SHORT) == shared
