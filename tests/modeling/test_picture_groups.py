"""Large pictures in groups through a processor: what is joined, and what goes through at once."""

import pytest
import tiny
import torch
from PIL import Image
from transformers import BatchFeature

from fwd2bot import picture_groups_fwd2bot
from fwd2bot.picture_groups_fwd2bot import process_in_groups
from fwd2bot.pictures_fwd2bot import load_image

PAD = 7


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch):
    monkeypatch.setattr(picture_groups_fwd2bot, "PIXELS_AT_ONCE", 100 * 100)


def of_sizes(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.effect_noise(size, 80).convert("RGB") for size in sizes]


class Processor:
    """Pictures to tensors in one of several ways; keeps the sizes of what it was called with."""

    def __init__(self, rows):
        self.rows, self.calls = rows, []

    def __call__(self, pictures):
        self.calls.append([picture.size for picture in pictures])
        return BatchFeature(self.rows(pictures))


def by_width(pictures):
    """As many ids as a picture has tens of pixels in width, padded on the left; a part of the pixels for each."""
    counts = [picture.width // 10 for picture in pictures]
    ids = [torch.arange(count) for count in counts]
    width = max(counts)
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in ids]),
        "attention_mask": torch.stack([(torch.arange(width) >= width - count).long() for count in counts]),
        "patches": torch.tensor(
            [[picture.height, part] for picture in pictures for part in range(picture.width // 10)]
        ),
    }


def filled_up(pictures):
    """Filled up to the largest of the call."""
    side = max(max(picture.size) for picture in pictures)
    return {"input_ids": torch.zeros(len(pictures), 2).long(), "pixel_values": torch.zeros(len(pictures), side)}


def counted(pictures):
    """With the number of pictures, which tells of the call, not of a picture."""
    return {"input_ids": torch.zeros(len(pictures), 2).long(), "count": torch.tensor([len(pictures)])}


def whole_number(pictures):
    return {"input_ids": torch.zeros(len(pictures), 2).long(), "count": torch.tensor(3)}


def as_list(pictures):
    return {"input_ids": torch.zeros(len(pictures), 2).long(), "sizes": [picture.size for picture in pictures]}


def wider_are_different(pictures):
    wide = pictures[0].width > 300
    return {"input_ids": torch.zeros(len(pictures), 2).long(), "wide" if wide else "narrow": torch.ones(len(pictures))}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


SIZES = [(90, 50), (40, 60), (100, 90), (200, 100), (30, 30)]


def test_groups_hold_as_many_pixels_as_are_allowed_and_give_the_same():
    process, pictures = Processor(by_width), of_sizes(*SIZES)
    found = process_in_groups(process, pictures, PAD)
    assert process.calls[-4:] == [SIZES[:2], SIZES[2:3], SIZES[3:4], SIZES[4:]]
    assert_equal(found, BatchFeature(by_width(pictures)))


def test_few_pixels_go_through_in_one_call():
    process = Processor(by_width)
    process_in_groups(process, of_sizes((50, 50), (60, 60)), PAD)
    assert process.calls == [[(50, 50), (60, 60)]]
    one = Processor(by_width)
    process_in_groups(one, of_sizes((500, 500)), PAD)
    assert one.calls == [[(500, 500)]]


@pytest.mark.parametrize("rows", [filled_up, counted, whole_number, as_list])
def test_a_processor_that_looks_at_the_whole_call_gets_all_at_once(rows):
    process, pictures = Processor(rows), of_sizes(*SIZES)
    found = process_in_groups(process, pictures, PAD)
    assert process.calls[-1] == SIZES and not any(size in call for call in process.calls[:-1] for size in SIZES)
    expected = rows(pictures)
    assert found.keys() == expected.keys() and len(found["input_ids"]) == len(SIZES)


def test_groups_that_turn_out_not_to_go_together_are_given_up():
    sizes = [(90, 90), (400, 90)]
    process, pictures = Processor(wider_are_different), of_sizes(*sizes)
    found = process_in_groups(process, pictures, PAD)
    assert process.calls[-1] == sizes and found.keys() == {"input_ids", "narrow"}


def test_the_processor_gives_the_same_and_never_holds_all_large_pictures(tiny_processor, monkeypatch):
    pictures = of_sizes((120, 90), (64, 64), (80, 300))
    found = tiny_processor.process_images(pictures)
    monkeypatch.setattr(picture_groups_fwd2bot, "PIXELS_AT_ONCE", 2**24)
    assert_equal(found, tiny_processor.process_images(pictures))
    model = tiny.tiny_fwd2bot()
    assert torch.isfinite(model.compress(**found).tokens).all()


def test_a_picture_is_copied_unless_that_is_not_asked_for():
    [picture] = of_sizes((8, 8))
    copy = load_image(picture)
    picture.paste("white", (0, 0, 8, 8))
    assert copy.tobytes() != picture.tobytes()
    assert load_image(picture, copy=False) is picture
    grey = picture.convert("L")
    assert load_image(grey, copy=False).mode == "RGB" and grey.mode == "L"


def test_pictures_that_were_given_stay_as_they_are(tiny_processor):
    pictures = of_sizes((120, 90), (300, 80))
    before = [picture.tobytes() for picture in pictures]
    tiny_processor.process_images(pictures)
    assert [picture.tobytes() for picture in pictures] == before
