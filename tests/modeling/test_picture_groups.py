"""Large pictures in groups through a processor: what is joined, and what goes through at once."""

import copy

import pytest
import tiny
import torch
from PIL import Image
from transformers import BatchFeature

from fwd2bot import Fwd2BotProcessor, picture_groups_fwd2bot
from fwd2bot.picture_groups_fwd2bot import groups_of, is_by_picture, join_rows
from fwd2bot.pictures_fwd2bot import load_image

PAD = 7


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch):
    monkeypatch.setattr(picture_groups_fwd2bot, "PIXELS_AT_ONCE", 100 * 100)
    monkeypatch.setattr(picture_groups_fwd2bot, "LARGE", 30 * 30)


def of_sizes(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.effect_noise(size, 80).convert("RGB") for size in sizes]


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


def of_one_size(pictures):
    """Refuses pictures of different size, as a processor does that leaves sizes as they are."""
    ids = torch.zeros(len(pictures), 2).long()
    return {"input_ids": ids, "pixel_values": torch.stack([torch.zeros(one.size) for one in pictures])}


def run_of(rows):
    return lambda pictures: BatchFeature(rows(pictures))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


SIZES = [(90, 50), (40, 60), (100, 90), (200, 100), (30, 30)]


def test_groups_hold_as_many_pixels_as_are_allowed():
    groups = groups_of(of_sizes(*SIZES))
    assert [[one.size for one in group] for group in groups] == [SIZES[:2], SIZES[2:3], SIZES[3:4], SIZES[4:]]
    assert [len(group) for group in groups_of(of_sizes((50, 50), (60, 60)))] == [2]
    assert [len(group) for group in groups_of(of_sizes((500, 500)))] == [1]


def test_many_small_pictures_stay_together():
    assert [len(group) for group in groups_of(of_sizes(*[(30, 30)] * 100))] == [100]
    assert [len(group) for group in groups_of(of_sizes(*[(30, 31)] * 100))] == [10] * 10


def test_rows_of_groups_are_those_of_all_at_once():
    pictures, run = of_sizes(*SIZES), run_of(by_width)
    assert is_by_picture(run, PAD)
    assert_equal(join_rows(map(run, groups_of(pictures)), PAD), run(pictures))


@pytest.mark.parametrize("rows", [filled_up, counted, whole_number, as_list, of_one_size])
def test_a_processor_that_looks_at_the_whole_call_is_found_out(rows):
    assert not is_by_picture(run_of(rows), PAD)


def test_joining_ends_with_the_first_that_does_not_fit():
    calls = []

    def run(pictures):
        calls.append(pictures)
        return BatchFeature(filled_up(pictures))

    pictures = of_sizes((20, 20), (30, 30), (20, 20))
    assert join_rows((run([picture]) for picture in pictures), PAD) is None
    assert len(calls) == 2
    assert join_rows((run([picture]) for picture in pictures[::2]), PAD)["pixel_values"].shape == (2, 20)


def test_rows_of_different_length_need_a_padding():
    run, pictures = run_of(by_width), of_sizes((20, 20), (30, 30))
    assert join_rows((run([picture]) for picture in pictures), None) is None
    assert join_rows((run([picture]) for picture in pictures[:1]), None) is not None


class Watched:
    """The backbone's processor, and the number of pictures in each of its calls."""

    def __init__(self, processor, refuse=None):
        self.processor, self.refuse, self.calls = processor, refuse, []

    def __getattr__(self, name):
        return getattr(self.__dict__["processor"], name)

    def __call__(self, images, **kwargs):
        self.calls.append(len(images))
        batch = self.processor(images=images, **kwargs)
        if self.refuse and any(self.refuse(picture) for [picture] in images):
            batch["pixel_values"] = batch["pixel_values"][..., 1:]
        return batch


def watched(processor, **options):
    return Fwd2BotProcessor(Watched(copy.copy(processor.backbone_processor), **options))


LARGE = [(120, 90), (64, 64), (80, 300)]


def test_the_processor_gives_the_same_and_never_holds_all_large_pictures(tiny_processor, monkeypatch):
    processor, pictures = watched(tiny_processor), of_sizes(*LARGE)
    found = processor.process_images(pictures)
    assert processor.backbone_processor.calls == [2, 1, 1, 1, 1, 1]  # two tried together and alone, then the groups
    processor.process_images(pictures)
    assert processor.backbone_processor.calls[6:] == [1, 1, 1]  # tried before
    monkeypatch.setattr(picture_groups_fwd2bot, "PIXELS_AT_ONCE", 2**24)
    assert_equal(found, processor.process_images(pictures))
    assert processor.backbone_processor.calls[9:] == [3]
    assert torch.isfinite(tiny.tiny_fwd2bot().compress(**found).tokens).all()


def test_groups_that_turn_out_not_to_fit_are_given_up_for_good(tiny_processor):
    processor = watched(tiny_processor, refuse=lambda picture: picture.width == 64)
    pictures = of_sizes(*LARGE)
    assert len(processor.process_images(pictures)["pixel_values"]) == 3
    assert processor.backbone_processor.calls[3:] == [1, 1, 3]
    processor.process_images(pictures)
    assert processor.backbone_processor.calls[6:] == [3]


def test_pictures_that_the_samples_do_not_stand_for_go_through_all_the_same(tiny_processor):
    backbone_processor = copy.deepcopy(tiny_processor.backbone_processor)
    backbone_processor.image_processor.do_resize = False
    processor, pictures = Fwd2BotProcessor(backbone_processor), of_sizes(*[(100, 100)] * 3)
    assert processor.process_images(pictures)["pixel_values"].shape == (3, 3, 100, 100)


def test_a_picture_is_copied_unless_that_is_not_asked_for():
    [picture] = of_sizes((8, 8))
    copied = load_image(picture)
    picture.paste("white", (0, 0, 8, 8))
    assert copied.tobytes() != picture.tobytes()
    assert load_image(picture, copy=False) is picture
    grey = picture.convert("L")
    assert load_image(grey, copy=False).mode == "RGB" and grey.mode == "L"
