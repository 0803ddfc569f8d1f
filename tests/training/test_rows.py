import numpy as np
import pytest
import torch
from tiny_recipes import BACKBONE, DATA

from fwd2bot.packing_fwd2bot import packed_attention_mask
from fwd2bot.training.backbone import build_backbone, build_processor
from fwd2bot.training.collator import BackboneCollator
from fwd2bot.training.data import IGNORED, Conversation, Packer, TrainingRows, draw_pictures
from fwd2bot.training.recipe import BackboneData, BackboneModel
from fwd2bot.training.scenes import corpus, render, scene
from fwd2bot.training.tokenizer import train_tokenizer

CONVERSATIONS = [
    Conversation("Is there a star?", "yes"),
    Conversation("What is at the top?", "circle"),
    Conversation("Describe the picture.", "A red field with a small blue star in the middle."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(40, shapes_only=True), 400)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return build_processor(BackboneModel(**BACKBONE), tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return build_backbone(BackboneModel(**BACKBONE), tokenizer).eval()


def picture(index):
    return render(scene("train", index, shapes_only=True))


def labelled(row, index=0):
    return {**row, "pixels": np.asarray(picture(index))[None]}


def test_segment_is_what_the_chat_template_gives(processor):
    packer = Packer(processor.tokenizer, 4)
    for conversation, (segment, _) in zip(CONVERSATIONS, packer.segments(CONVERSATIONS), strict=True):
        text = processor.apply_chat_template(conversation.messages(), tokenize=False)
        ids = processor(images=[picture(0)], text=[text], return_tensors="pt")["input_ids"][0].tolist()
        assert packer.prefix() + segment == ids


def test_padding_of_the_tokenizer_does_not_reach_the_segments(tokenizer):
    expected = Packer(tokenizer, 4).segments(CONVERSATIONS)
    tokenizer(["a dog", "a small dog"], padding="max_length", max_length=90)
    assert Packer(tokenizer, 4).segments(CONVERSATIONS) == expected


def test_labels_are_the_answer_and_its_end(tokenizer):
    for conversation, (_, labels) in zip(CONVERSATIONS, Packer(tokenizer, 4).segments(CONVERSATIONS), strict=True):
        assert tokenizer.decode([label for label in labels if label != IGNORED]) == f" {conversation.answer}</s>"


def test_packed_loss_equals_that_of_single_turns(processor, model):
    packer = Packer(processor.tokenizer, model.config.image_seq_length)
    rows = [labelled(packer.row(CONVERSATIONS, 200), 0), labelled(packer.row(CONVERSATIONS[:2], 200), 1)]
    batch = BackboneCollator(processor, length=190)(rows)
    visible, position_ids = packed_attention_mask(batch["segment_ids"], batch["attention_mask"])
    packed = model(
        input_ids=batch["input_ids"],
        pixel_values=batch["pixel_values"],
        attention_mask=visible,
        position_ids=position_ids,
        labels=batch["labels"],
    ).loss

    total, count = 0.0, 0
    for index, conversations in ((0, CONVERSATIONS), (1, CONVERSATIONS[:2])):
        for conversation in conversations:
            text = processor.apply_chat_template(conversation.messages(), tokenize=False)
            inputs = processor(images=[picture(index)], text=[text], return_tensors="pt")
            answer = len(processor.tokenizer(f" {conversation.answer}</s>", add_special_tokens=False)["input_ids"])
            labels = inputs["input_ids"].clone()
            labels[:, :-answer] = IGNORED
            total += model(**inputs, labels=labels).loss.item() * answer
            count += answer
    assert packed.item() == pytest.approx(total / count, abs=1e-5)


def test_pixels_are_those_of_the_image_processor(processor):
    pictures = [picture(i) for i in range(3)]
    fast = BackboneCollator(processor).pixel_values([{"pixels": np.asarray(one)[None]} for one in pictures])
    slow = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.allclose(fast, torch.as_tensor(slow), atol=1e-6)


def test_conversation_that_does_not_fit_is_left_out(tokenizer):
    packer = Packer(tokenizer, 4)
    short, _ = packer.segments(CONVERSATIONS[:1])[0]
    row = packer.row([CONVERSATIONS[2], CONVERSATIONS[0]], len(packer.prefix()) + len(short))
    assert row["input_ids"] == packer.prefix() + short
    assert set(row["segment_ids"]) == {0, 1}


def test_row_without_room_for_anything_is_refused(tokenizer):
    with pytest.raises(ValueError, match="row_length"):
        Packer(tokenizer, 4).row(CONVERSATIONS, 10)


def test_rows_are_the_same_each_time_and_new_in_every_round(tokenizer, tmp_path):
    data = BackboneData(**DATA)
    rows = TrainingRows(data, draw_pictures(data, tmp_path, num_proc=1), Packer(tokenizer, 4))
    assert len(rows) == 48
    assert rows[3]["input_ids"] == rows[3]["input_ids"]
    assert rows[3]["input_ids"] != rows[3 + 12]["input_ids"]
    assert np.array_equal(rows[3]["pixels"], np.asarray(picture(3))[None])
    assert np.array_equal(rows[3]["pixels"], rows[3 + 12]["pixels"])
