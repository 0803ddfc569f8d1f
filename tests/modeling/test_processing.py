"""`Fwd2BotProcessor`: pictures and texts to tensors."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from fwd2bot import Fwd2BotProcessor

# process_images


def test_process_images_gives_a_row_per_picture_of_image_and_prompt(processor):
    batch = processor.process_images(tiny.pictures(2))
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    expected = "<s>USER: " + "<image>" * 16 + "\nSummarize the image in a few words. ASSISTANT:"
    assert processor.batch_decode(batch["input_ids"]) == [expected] * 2
    assert batch["attention_mask"].all()


def test_process_images_takes_one_picture_lists_and_lists_of_lists(processor):
    one, two = tiny.pictures(2)
    expected = processor.process_images([one, two])["pixel_values"]
    assert torch.equal(processor.process_images(one)["pixel_values"], expected[:1])
    assert torch.equal(processor.process_images((one, two))["pixel_values"], expected)
    assert torch.equal(processor.process_images([[one], [two]])["pixel_values"], expected)
    assert torch.equal(processor.process_images([[one, two], []])["pixel_values"], expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 3), (4, 3), (1, 500)])
def test_tiny_and_thin_pictures_are_pictures(processor, size):
    """Sizes at which an array's colour axis could be guessed wrong."""
    found = processor.process_images(Image.new("RGB", size, (255, 0, 51)))["pixel_values"]
    expected = torch.tensor([1.0, -1.0, -0.6]).reshape(1, 3, 1, 1).expand(1, 3, 24, 24)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("empty", [[], (), [[]]])
def test_no_picture_is_an_error(processor, empty):
    with pytest.raises(ValueError, match="No image was given: the list is empty"):
        processor.process_images(empty)


# process_texts


def test_process_texts_gives_left_padded_rows_of_text_and_prompt(processor):
    batch = processor.process_texts(["a dog", "x"])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][1, :4].tolist() == [0, 0, 0, 0]
    assert batch["attention_mask"][:, 4:].all()
    decoded = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert decoded[1] == "USER: x\nSummarize the sentence in a few words. ASSISTANT:"


def test_start_token_comes_once_from_template_or_tokenizer(processor):
    assert processor.tokenizer.decode(processor.process_texts("a")["input_ids"][0]).count("<s>") == 1
    backbone_processor = tiny.tiny_backbone_processor()
    backbone_processor.chat_template = tiny.CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    start = [("<s>", backbone_processor.tokenizer.bos_token_id)]
    backbone_processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
    other = Fwd2BotProcessor(backbone_processor)
    for name, inputs in (("process_texts", ["a"]), ("process_images", tiny.pictures(1))):
        one, two = (getattr(which, name)(inputs)["input_ids"] for which in (processor, other))
        assert torch.equal(one, two)
    prompts = [tiny.prompts(which, ["What?"]) for which in (processor, other)]
    assert torch.equal(processor(text=prompts[0])["input_ids"], other(text=prompts[1])["input_ids"])


def test_image_token_in_a_users_text_is_no_image(processor):
    batch = processor.process_texts("what does <image> mean")
    assert (batch["input_ids"] != processor.image_token_id).all()


@pytest.mark.parametrize(
    "texts, error, message",
    [
        ([], ValueError, "No text was given: the list is empty"),
        (["a", " "], ValueError, "Text 1 is empty"),
        ([None], TypeError, "Text 0 must be a str, got NoneType"),
        (["a", 3], TypeError, "Text 1 must be a str, got int"),
        (["a", "b" * 600], ValueError, r"Text 1 has \d+ tokens with its prompt; the model reads 512"),
    ],
)
def test_texts_that_cannot_be_used_are_named(processor, texts, error, message):
    with pytest.raises(error, match=message):
        processor.process_texts(texts)


@pytest.mark.parametrize("words", ["b", "two words ", "é<image>"])
def test_truncation_leaves_out_the_end_of_a_long_text(processor, words):
    batch = processor.process_texts(["a", words * 600], truncation=True)
    assert processor.tokenizer.model_max_length - 2 <= batch["input_ids"].shape[1] <= 512
    alone = processor.tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True)
    text, prompt = alone.removeprefix("USER: ").split("\n")
    assert text and (words * 600).replace("<image>", " ").startswith(text)
    assert prompt == "Summarize the sentence in a few words. ASSISTANT:"
    short = processor.process_texts(["a"])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, -len(short) :], short)


def test_text_that_is_too_long_is_an_error_or_shortened_without_a_warning_beside_it(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    processor = tiny.tiny_processor()  # a tokenizer warns once in its life
    with pytest.raises(ValueError, match="the model reads 512. Shorten it"):
        processor.process_texts("word " * 600)
    processor.process_texts("word " * 600, truncation=True)
    assert caplog.text == ""


def test_truncation_without_room_for_a_text_is_an_error():
    processor = tiny.tiny_processor()
    processor.tokenizer.model_max_length = 20
    with pytest.raises(ValueError, match="model_max_length=20 leaves no room for a text beside its prompt"):
        processor.process_texts("a dog", truncation=True)


# __call__


def test_text_alone_keeps_one_image_token_per_image(processor):
    batch = processor(text=tiny.prompts(processor, ["Which?"], num_images=3))
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (batch["input_ids"] == processor.image_token_id).sum() == 3


def test_images_come_as_compress_inputs(processor):
    pictures = tiny.pictures(2)
    batch = processor(images=pictures, text=tiny.prompts(processor, ["What?", "Why is it?"]))
    expected = processor.process_images(pictures)
    assert set(batch) == {"input_ids", "attention_mask", *(f"compress_{name}" for name in expected)}
    assert all(torch.equal(batch[f"compress_{name}"], value) for name, value in expected.items())
    assert set(batch) <= set(processor.model_input_names)
    assert set(processor(images=pictures)) == {f"compress_{name}" for name in expected}


def test_images_in_lists_belong_to_the_prompts_in_order(processor):
    one, two, three = tiny.pictures(3)
    texts = [*tiny.prompts(processor, ["Which?"], num_images=2), *tiny.prompts(processor, ["What?"])]
    nested = processor(images=[[one, two], [three]], text=texts)
    assert torch.equal(nested["compress_pixel_values"], processor.process_images([one, two, three])["pixel_values"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_is_that_asked_for(processor, side):
    batch = processor(text=["<s>abc", "<s>a"], padding_side=side)
    assert batch["attention_mask"][1].tolist() == ([0, 0, 1, 1] if side == "left" else [1, 1, 0, 0])


def test_wrong_number_of_image_tokens_prints_both_counts(processor):
    prompts = [*tiny.prompts(processor, ["Which?"], num_images=2), *tiny.prompts(processor, ["What?"])]
    with pytest.raises(ValueError, match=r"holds 3 image token.*'<image>' \(\[2, 1\] per prompt\), but 2 image"):
        processor(images=tiny.pictures(2), text=prompts)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "Nothing to process: give text, images or both"),
        ({"text": []}, ValueError, "No text was given"),
        ({"images": []}, ValueError, "No image was given"),
        ({"text": 3}, TypeError, "Text must be a str or a list of them, got int"),
        ({"text": [3]}, TypeError, "Text 0 must be a str, got int"),
        ({"text": "a", "return_tensors": "np"}, ValueError, "return_tensors='np'.*'pt'"),
        ({"text": "a", "paddin": True}, TypeError, r"\['paddin'\]; allowed"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(**arguments)


def test_chat_template_can_tokenize_a_conversation_with_its_picture(processor):
    picture = tiny.pictures(1)[0]
    message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}
    batch = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor(images=[picture], text=tiny.prompts(processor, ["What?"]))
    assert set(batch) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in batch.items())


def test_answers_are_decoded_without_special_tokens(processor):
    ids = processor(text="<s>a dog</s>")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["a dog"]
    assert processor.post_process_image_text_to_text(ids, skip_special_tokens=False) == ["<s>a dog</s>"]


# Construction, saving, loading


def test_saved_processor_comes_back(processor, tmp_path):
    mine = Fwd2BotProcessor(tiny.tiny_backbone_processor(), image_prompt="Sum it up.", text_prompt="In short:")
    mine.save_pretrained(tmp_path)
    for loaded in (Fwd2BotProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, Fwd2BotProcessor)
        assert (loaded.image_prompt, loaded.text_prompt) == ("Sum it up.", "In short:")
        assert type(loaded.backbone_processor) is type(mine.backbone_processor)
        pictures, texts = tiny.pictures(2), ["a", "two words"]
        for name, inputs in (("process_images", pictures), ("process_texts", texts)):
            found, expected = getattr(loaded, name)(inputs), getattr(mine, name)(inputs)
            assert all(torch.equal(value, found[key]) for key, value in expected.items())
        assert tiny.prompts(loaded, ["What?"]) == tiny.prompts(mine, ["What?"])


def test_processor_saved_again_writes_the_same_settings(processor, tmp_path):
    processor.save_pretrained(tmp_path / "one")
    Fwd2BotProcessor.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


class Watched:
    """Stands for `inner`, and notes when two threads are inside a call at once."""

    meeting, overlaps = threading.Barrier(2), []

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        try:
            self.meeting.wait(timeout=0.1)
            self.overlaps.append(type(self.inner).__name__)
        except threading.BrokenBarrierError:  # nobody else came
            self.meeting.reset()
        return self.inner(*args, **kwargs)


def test_threads_use_the_tokenizer_one_after_the_other():
    """A fast tokenizer keeps its padding as a state, so overlapping calls pad each other's texts."""
    processor = tiny.tiny_processor()
    processor.tokenizer = Watched(processor.tokenizer)
    processor.backbone_processor = Watched(processor.backbone_processor)
    with ThreadPoolExecutor(3) as pool:
        texts = pool.submit(processor.process_texts, ["a", "bcd"])
        images = pool.submit(processor.process_images, tiny.pictures(2))
        prompts = pool.submit(processor, text=["abc", "a"])
        found = [future.result()["attention_mask"].shape[0] for future in (texts, images, prompts)]
    assert found == [2, 2, 2]
    assert Watched.overlaps == []


def test_processor_of_another_kind_is_refused(tmp_path):
    tiny.tiny_backbone_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no backbone_processor_class.*Wrap another one"):
        Fwd2BotProcessor.from_pretrained(tmp_path)
    with pytest.raises(
        TypeError, match="must be the processor of a vision-language model.*PreTrainedTokenizer|Backend"
    ):
        Fwd2BotProcessor(tiny.tiny_tokenizer())


def test_backbone_processor_without_chat_template_is_refused():
    backbone_processor = tiny.tiny_backbone_processor()
    backbone_processor.chat_template = backbone_processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template.*Set backbone_processor.chat_template"):
        Fwd2BotProcessor(backbone_processor)


def test_saving_the_processor_where_a_file_is_writes_nothing(processor, tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            processor.save_pretrained(path)
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The image processor that was saved


@pytest.fixture
def saved_with(processor, tmp_path):
    """`saved_with(name)` gives a saved processor that names this image processor as its own."""

    def save(name):
        processor.save_pretrained(tmp_path)
        path = tmp_path / "processor_config.json"
        settings = json.loads(path.read_text())
        assert settings["image_processor_class"] == "SiglipImageProcessorPil"
        path.write_text(json.dumps({**settings, "image_processor_class": name}))
        return tmp_path

    return save


def test_image_processor_that_was_saved_is_loaded_not_the_one_that_transformers_prefers(saved_with):
    loaded = Fwd2BotProcessor.from_pretrained(saved_with("CLIPImageProcessorPil"))
    assert type(loaded.image_processor).__name__ == "CLIPImageProcessorPil"
    assert loaded.backbone_processor.image_processor is loaded.image_processor


def test_image_processor_that_is_not_available_is_replaced_with_a_warning(saved_with, caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("fwd2bot"), "propagate", True)
    loaded = Fwd2BotProcessor.from_pretrained(saved_with("LostImageProcessor"))
    assert type(loaded.image_processor).__name__ in ("SiglipImageProcessorPil", "SiglipImageProcessor")
    assert "made with LostImageProcessor, which is not available" in caplog.text
