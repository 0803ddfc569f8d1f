"""Law 10: what compress, embed and generate refuse, with the bad value, the allowed ones and the remedy."""

import pytest
import tiny
import torch

from fwd2bot import Fwd2BotSummary


@pytest.mark.parametrize("length", [0, -1, 5])
def test_length_out_of_range_names_the_range(model, processor, images, summary, prompts, length):
    expected = rf"num_summary_tokens={length} .*Choose 1 to 4; it was trained at \[1, 2, 4\]"
    with pytest.raises(ValueError, match=expected):
        model.compress(**images, num_summary_tokens=length)
    with pytest.raises(ValueError, match=expected):
        model.embed(summary=summary, num_summary_tokens=length)
    with pytest.raises(ValueError, match=expected):
        model.generate(**processor(images=tiny.pictures(3), text=prompts), num_summary_tokens=length)
    with pytest.raises(ValueError, match=expected):
        model.generate(**processor(text=["No picture."]), num_summary_tokens=length)


@pytest.mark.parametrize("length", ["4", 2.0, True])
def test_length_of_another_type_is_refused(model, images, length):
    with pytest.raises(TypeError, match="must be an integer"):
        model.compress(**images, num_summary_tokens=length)


def test_compress_of_nothing_is_refused(model, images):
    with pytest.raises(TypeError, match="input_ids must be an integer tensor.*NoneType"):
        model.compress()
    with pytest.raises(ValueError, match=r"at least 1, got \(0, 70\)"):
        model.compress(**{key: value[:0] for key, value in images.items()})


def test_compress_of_a_list_is_refused(model, images):
    with pytest.raises(TypeError, match="input_ids must be an integer tensor.*list"):
        model.compress(**{**images, "input_ids": images["input_ids"].tolist()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compress_of_nan_is_refused(model, images, value):
    pixels = images["pixel_values"].clone()
    pixels[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="'pixel_values' holds NaN or infinity"):
        model.compress(**{**images, "pixel_values": pixels})


def test_compress_of_image_tokens_without_pixels_is_refused(model, images):
    with pytest.raises(ValueError, match="image tokens, but no pixels"):
        model.compress(input_ids=images["input_ids"], attention_mask=images["attention_mask"])


def test_compress_with_more_pictures_than_rows_is_refused(model, processor, images):
    more = processor.process_images(tiny.pictures(4))["pixel_values"]
    with pytest.raises(ValueError, match="tokens: 48, features"):
        model.compress(**{**images, "pixel_values": more})


def test_generate_prints_both_counts_before_any_compute(model, processor, prompts, monkeypatch):
    monkeypatch.setattr(type(model), "_compress_pass", None)  # calling it would be a TypeError
    inputs = processor(images=tiny.pictures(3), text=prompts)
    inputs["compress_input_ids"] = inputs["compress_input_ids"][:2]
    with pytest.raises(ValueError, match=r"3 image placeholder\(s\) \(\[1, 1, 1\] per row\), but 2 image\(s\)"):
        model.generate(**inputs)


def test_generate_from_summary_prints_both_counts(model, processor, summary, prompts):
    with pytest.raises(ValueError, match=r"2 image placeholder\(s\) \(\[1, 1\] per row\), but 3 image\(s\)"):
        model.generate_from_summary(summary, **processor(text=prompts[:2]))


def test_generate_with_placeholder_but_no_image_is_refused(model, processor, prompts):
    with pytest.raises(ValueError, match="3 image placeholder.*no image was given"):
        model.generate(**processor(text=prompts))


def test_generate_without_ids_is_refused(model):
    with pytest.raises(ValueError, match="generate.. needs input_ids"):
        model.generate()


def test_ids_of_one_dimension_are_refused(model, processor, summary, prompts):
    ids = processor(text=prompts[0])["input_ids"][0]
    with pytest.raises(ValueError, match=r"shape \(N, L\)"):
        model.generate_from_summary(summary[0], ids)


def test_summary_of_another_width_is_refused(model, processor, prompts):
    with pytest.raises(ValueError, match="16 wide, but this model's summaries are 32 wide"):
        model.generate_from_summary(torch.zeros(3, 2, 16), **processor(text=prompts))


def test_summary_of_another_type_is_refused(model, processor, prompts):
    with pytest.raises(TypeError, match="floating point tensor.*got a torch.int64"):
        model.generate_from_summary(torch.zeros(3, 2, 32, dtype=torch.long), **processor(text=prompts))
    with pytest.raises(TypeError, match="got a list"):
        model.embed(summary=[[1.0]])


def test_summary_with_nan_is_refused(model, summary):
    tokens = summary.tokens.clone()
    tokens[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.embed(summary=tokens)


def test_summary_of_another_model_is_refused_by_name(tiny_fwd2bot, images, summary):
    foreign = Fwd2BotSummary(summary.tokens, metadata={"model": "someone/else", "fingerprint": "theirs"})
    with pytest.raises(ValueError, match="another model: its fingerprint is 'theirs', of model 'someone/else'"):
        tiny_fwd2bot.embed(summary=foreign)


def test_summary_of_another_prompt_is_refused(model, summary):
    foreign = Fwd2BotSummary(summary.tokens, metadata={"prompt": "Draw it."})
    with pytest.raises(ValueError, match="prompt is 'Draw it.'.*'Summarize the image in a few words.'"):
        model.embed(summary=foreign)


def test_embed_wants_either_summary_or_inputs(model, images, summary):
    with pytest.raises(ValueError, match="either `summary` or the tensors"):
        model.embed()
    with pytest.raises(ValueError, match="either `summary` or the tensors"):
        model.embed(summary=summary, **images)


def test_embed_of_different_lengths_asks_for_one(model, summary):
    mixed = Fwd2BotSummary.cat([summary[0], summary[1].truncate(2)])
    with pytest.raises(ValueError, match="lengths 2 to 4.*at most 2"):
        model.embed(summary=mixed)
    assert torch.equal(model.embed(summary=mixed, num_summary_tokens=2), model.embed(summary=summary[:2].truncate(2)))


def test_embed_longer_than_the_summary_is_refused(model, summary):
    with pytest.raises(ValueError, match="Cannot truncate to 3: choose 1 to 2"):
        model.embed(summary=summary.truncate(2), num_summary_tokens=3)


def test_ids_past_the_vocabulary_are_refused(model, summary, processor):
    inputs = dict(processor(text=tiny.prompts(processor, ["What?"])))
    inputs["input_ids"][0, -1] = model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match="the vocabulary is 0 to"):
        model.generate_from_summary(summary[0], **inputs)


def test_mask_of_another_shape_is_refused(model, summary, processor):
    inputs = processor(text=tiny.prompts(processor, ["What?"]))
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        model.generate_from_summary(summary[0], inputs["input_ids"], inputs["attention_mask"][:, 1:])


def test_row_without_a_token_is_refused(model, images):
    images = {**images, "attention_mask": torch.zeros_like(images["attention_mask"])}
    with pytest.raises(ValueError, match="leaves no token in row"):
        model.compress(**images)


@pytest.mark.parametrize("argument", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": object()}])
def test_decoding_that_reads_the_prompt_as_words_is_refused(model, summary, processor, argument):
    inputs = processor(text=tiny.prompts(processor, ["What?"]))
    with pytest.raises(ValueError, match="reads the prompt as words"):
        model.generate_from_summary(summary[0], **inputs, **argument)


def test_forward_refuses_pixels_that_are_not_numbers(model, processor):
    batch = tiny.training_batch(processor, ["a", "b"])
    batch["compress_pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model(**batch)


def test_vocabulary_cannot_be_resized_under_the_queries(model):
    with pytest.raises(NotImplementedError, match="Resize the backbone first"):
        model.resize_token_embeddings(500)


def test_queries_stay_behind_a_vocabulary_that_grew_in_the_backbone(images):
    model = tiny.tiny_fwd2bot()
    expected, words = model.compress(**images).tokens, model.get_input_embeddings().num_embeddings
    model.backbone.resize_token_embeddings(words + 16, mean_resizing=False)
    torch.testing.assert_close(model.compress(**images).tokens, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"the vocabulary is 0 to {words + 15}"):
        model.generate(torch.tensor([[words + 16]]))


def test_forward_on_words_refuses_a_placeholder_and_pixels(tiny_fwd2bot, tiny_processor):
    inputs = tiny_processor(text=tiny.prompts(tiny_processor, ["What?"]))
    with pytest.raises(ValueError, match="hold 1 image placeholder.*no image was given"):
        tiny_fwd2bot(**inputs)
    words, images = tiny_processor.process_texts(["a dog"]), tiny_processor.process_images(tiny.pictures(1))
    with pytest.raises(TypeError, match="pixel_values.*past the compress pass"):
        tiny_fwd2bot(**words, pixel_values=images["pixel_values"])


@pytest.mark.parametrize("typo", [{"num_summary_token": 2}, {"k": 2}])
def test_misspelt_length_is_refused(shared_fwd2bot, tiny_processor, typo):
    with pytest.raises(TypeError, match=f"no argument '{next(iter(typo))}' .=2.; beside num_summary_tokens"):
        shared_fwd2bot.compress(**tiny_processor.process_images(tiny.pictures(1)), **typo)
    with pytest.raises(TypeError, match="no argument"):
        shared_fwd2bot.embed(**tiny_processor.process_texts("a dog"), **typo)


def test_length_of_a_summary_is_not_chosen_in_answering(shared_fwd2bot, tiny_processor):
    summary = shared_fwd2bot.compress(**tiny_processor.process_images(tiny.pictures(1)))
    inputs = tiny_processor(text=tiny.prompts(tiny_processor, ["What?"]))
    with pytest.raises(TypeError, match="give summary.truncate"):
        shared_fwd2bot.generate_from_summary(summary, **inputs, num_summary_tokens=1)


@pytest.mark.parametrize("pad", [260, 9999, -1])
def test_padding_of_answers_that_end_early_must_be_a_row_of_the_embedding(model, processor, summary, prompts, pad):
    inputs = processor(text=prompts)
    with pytest.raises(ValueError, match=rf"pad_token_id={pad} is no row of the input embedding \(0 to 259\)"):
        model.generate_from_summary(summary, **inputs, pad_token_id=pad)
    with pytest.raises(ValueError, match=f"pad_token_id={pad} is no row"):
        model.generate(**processor(text="What?"), pad_token_id=pad, num_return_sequences=2, do_sample=True)
    one = processor(text=prompts[0])
    alone = model.generate_from_summary(summary[0], **one, pad_token_id=pad, max_new_tokens=2)  # nothing is filled
    assert torch.equal(alone, model.generate_from_summary(summary[0], **one, max_new_tokens=2))


def test_mask_that_is_no_tensor_is_refused(model, processor, prompts, summary):
    inputs = processor(text=prompts)
    with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
        model.generate_from_summary(summary, inputs["input_ids"], inputs["attention_mask"].tolist())


@pytest.mark.parametrize("name", ["input_ids", "text_input_ids"])
@pytest.mark.parametrize("word", [260, 9999, -1])  # 260 would be the first query
def test_training_refuses_ids_that_are_no_words(model, processor, name, word):
    batch = tiny.training_batch(processor, ["a dog", "a cat", "two"])
    batch[name][0, -1] = word
    with pytest.raises(ValueError, match=rf"input_ids hold {word}; the vocabulary is 0 to 259"):
        model(**batch)
