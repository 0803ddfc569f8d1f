"""Rows of several pictures: as the chat template writes them, pictures in the order of the prompts, the loss."""

import numpy as np
import pytest
import tiny
import torch
from tiny_recipes import DATA

from fwd2bot.training.collator import Fwd2BotCollator
from fwd2bot.training.data import IGNORED, CaptionedRows, Conversation, Packer, draw_pictures
from fwd2bot.training.recipe import Fwd2BotData, SeveralData
from fwd2bot.training.scenes import render, truth_table

NUMBERS = (1, 2, 3, 4, 5)
CONVERSATIONS = [
    Conversation("Which pictures show a star?", "1 and 2"),
    Conversation("Describe picture 2.", "A red field with a small blue star in the middle."),
    Conversation("Is there a heart in picture 1?", "no"),
]


@pytest.fixture(scope="module")
def processor():
    return tiny.tiny_processor()


@pytest.fixture(scope="module")
def data():
    return Fwd2BotData(**DATA | {"row_length": 420}, full_share=0.5, several=SeveralData(share=0.7))


@pytest.fixture(scope="module")
def rows(data, processor, tmp_path_factory):
    drawn = draw_pictures(data, tmp_path_factory.mktemp("pictures"), num_proc=1)
    return CaptionedRows(data, drawn, Packer(processor.tokenizer, 1, NUMBERS))


@pytest.mark.parametrize("number", NUMBERS)
def test_segments_are_what_the_chat_template_gives(processor, number):
    packer = Packer(processor.tokenizer, 1, NUMBERS)
    for conversation, (segment, _) in zip(CONVERSATIONS, packer.segments(CONVERSATIONS, number), strict=True):
        text = processor.apply_chat_template(conversation.messages(number), tokenize=False)
        assert packer.prefix(number) + segment == processor(text=text)["input_ids"][0].tolist()


def test_template_that_writes_one_image_for_several_is_refused(processor):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ 'USER: <image>\\n' + messages[0]['content'][-1]['text'] + ' ASSISTANT:' }}" + (
        "{% if messages | length > 1 %}{{ messages[1]['content'][0]['text'] + eos_token }}{% endif %}"
    )
    Packer(tokenizer, 1)
    with pytest.raises(ValueError, match="training needs 2 times '<image>'"):
        Packer(tokenizer, 1, (1, 2))


def test_rows_show_one_picture_or_several_as_the_recipe_says(rows, data):
    numbers = [len(rows[index]["scenes"]) for index in range(len(rows))]
    assert set(numbers) == set(NUMBERS)
    assert 0.5 < sum(number > 1 for number in numbers) / len(numbers) < 0.9


def test_row_has_a_placeholder_and_a_picture_for_each_of_its_scenes(rows, processor):
    for index in range(12):
        row = rows[index]
        assert row["input_ids"].count(processor.image_token_id) == len(row["scenes"])
        for pixels, one in zip(row["pixels"], row["scenes"], strict=True):
            assert np.array_equal(pixels, np.asarray(render(one)))


def test_rows_are_the_same_each_time(rows):
    first, second = rows[5], rows[5]
    assert first["input_ids"] == second["input_ids"]
    assert first["short"] == second["short"]


def test_every_row_shows_the_picture_of_its_index(rows):
    for index in range(12):
        assert index in [one.index for one in rows[index]["scenes"]]


def test_pictures_of_a_batch_are_in_the_order_of_the_placeholders(rows, data, processor):
    chosen = [rows[index] for index in range(5)]
    scenes = [one for row in chosen for one in row["scenes"]]
    batch = Fwd2BotCollator(processor, data)(chosen)
    expected = processor.process_images([render(one) for one in scenes])
    assert torch.allclose(batch["compress_pixel_values"], expected["pixel_values"], atol=1e-6)
    assert torch.equal(batch["compress_input_ids"], expected["input_ids"])
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [len(row["scenes"]) for row in chosen]


@pytest.mark.parametrize("coin", [0.0, 1.0], ids=["full", "short"])
def test_texts_describe_the_picture_that_they_are_said_to(coin, rows, data, processor):
    chosen = [rows[index] for index in range(5)]
    chosen[0] = {**chosen[0], "coin": coin}
    scenes = [one for row in chosen for one in row["scenes"]]
    texts = Fwd2BotCollator(processor, data).texts(chosen)
    written = [text for row in chosen for text in (row["full"] if coin == 0 else [one.text for one in row["short"]])]
    owned = [index for index in texts["text_image"].tolist() if index >= 0]
    assert texts["text_image_mask"].shape == (len(scenes), len(texts["text_image"]))
    per_picture = 1 if coin == 0 else data.short_captions
    assert owned == [picture for picture in range(len(scenes)) for _ in range(per_picture)]
    for number, text in enumerate(written):
        assert text in processor.tokenizer.decode(texts["text_input_ids"][number])
    if coin:
        captions = [one for row in chosen for one in row["short"]]
        true = torch.from_numpy(truth_table(captions, scenes)).bool()
        assert all(true[picture, number] for number, picture in enumerate(owned))


def test_packed_loss_of_several_pictures_equals_that_of_single_conversations(processor, data):
    """Rows of different numbers of pictures, one batch: the same answers, each as a prompt of its own."""
    model = tiny.tiny_fwd2bot()
    packer = Packer(processor.tokenizer, 1, NUMBERS)
    pictures = [np.asarray(one.resize((24, 24))) for one in tiny.pictures(6)]
    shown = [pictures[:3], pictures[3:4], pictures[4:]]
    texts = [CONVERSATIONS, CONVERSATIONS[1:], CONVERSATIONS[:2]]
    collator = Fwd2BotCollator(processor, data)
    packed_rows = [
        packer.row(asked, 420, len(row)) | {"pixels": np.stack(row)} for row, asked in zip(shown, texts, strict=True)
    ]
    batch = collator.pack(packed_rows) | {"compress_pixel_values": collator.pixel_values(packed_rows)}
    for name in ("input_ids", "attention_mask"):
        batch[f"compress_{name}"] = collator._prompt[name].expand(6, -1)
    packed = model(**batch, num_summary_tokens=3).loss

    total, count = 0.0, 0
    for row, asked in zip(shown, texts, strict=True):
        for conversation in asked:
            text = processor.apply_chat_template(conversation.messages(len(row)), tokenize=False)
            inputs = processor(images=row, text=text)
            answer = len(processor.tokenizer(f" {conversation.answer}</s>", add_special_tokens=False)["input_ids"])
            labels = inputs["input_ids"].clone()
            labels[:, :-answer] = IGNORED
            total += model(**inputs, labels=labels, num_summary_tokens=3).loss.item() * answer
            count += answer
    assert packed.item() == pytest.approx(total / count, abs=1e-5)


def test_another_order_of_the_pictures_is_another_loss(processor):
    model = tiny.tiny_fwd2bot()
    text = processor.apply_chat_template(CONVERSATIONS[0].messages(2), tokenize=False)
    losses = []
    for pictures in (tiny.pictures(2), tiny.pictures(2)[::-1]):
        inputs = processor(images=pictures, text=text)
        losses.append(model(**inputs, labels=inputs["input_ids"], num_summary_tokens=3).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-4
