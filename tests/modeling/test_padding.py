"""Padded places: whatever id stands there changes nothing."""

import pytest
import tiny
import torch

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def with_other_padding(batch, processor, pad):
    """A batch whose masked ids are `pad`."""
    batch = dict(batch)
    for name in [name for name in batch if name.endswith("input_ids")]:
        mask = batch[name.replace("input_ids", "attention_mask")]
        assert not mask.all()
        batch[name] = batch[name].masked_fill(mask == 0, pad)
    return batch


@pytest.mark.parametrize("pad", [260, 9999, -1])  # 260 would be the first query
def test_padding_that_is_no_row_of_the_embedding_changes_nothing(processor, pad):
    model, images, questions = tiny.tiny_fwd2bot(), tiny.pictures(2), ["What is it?", "Why?"]
    prompts = processor(text=tiny.prompts(processor, questions))
    texts, words = processor.process_texts(["a dog", "cat"]), processor(text=questions)
    batch = tiny.training_batch(processor, ["a dog", "a cat", "two of them"])
    batch = {name: value for name, value in batch.items() if not name.startswith("compress_")}
    pixels = {f"compress_{name}": value for name, value in processor.process_images(tiny.pictures(3)).items()}
    options = {**GREEDY, "pad_token_id": model.generation_config.pad_token_id}

    def outputs(padded):
        summary = model.compress(**processor.process_images(images))
        answers = model.generate_from_summary(summary, **padded(prompts), **options)
        continued = model.generate(**padded(words), **options)
        return [
            model.embed(**padded(texts)),
            answers[:, prompts["input_ids"].shape[1] :],
            continued[:, words["input_ids"].shape[1] :],
            model(**padded(batch), **pixels).loss,
        ]

    expected = outputs(dict)
    model.generation_config.pad_token_id = pad
    for found, wanted in zip(outputs(lambda batch: with_other_padding(batch, processor, pad)), expected, strict=True):
        assert torch.equal(found, wanted)
