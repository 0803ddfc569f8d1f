"""The drawn world: determinism, pictures, descriptions and the data set."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hand_made_scene import BY_HAND, thing

from fwd2bot.training.scenes import (
    PROMPTS,
    Scene,
    Scenes,
    Thing,
    ask,
    corpus,
    describe,
    drawing,
    hard_negatives,
    has_font,
    render,
    scene,
    short_caption,
)
from fwd2bot.training.scenes.scene import numbered_scene
from fwd2bot.training.scenes.things import BACKGROUNDS, COLOURS, EMOJI, KINDS, SHAPES, SIZES, plural, with_article

needs_font = pytest.mark.skipif(not has_font(), reason="needs the package fonts-noto-color-emoji")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene("validation", index) for index in range(1000)]


# --- scenes ---


def test_scene_follows_from_split_and_index():
    first = scene("train", 17)
    numbered_scene.cache_clear()
    again = scene("train", 17)
    assert again is not first and again == first
    assert first != scene("train", 18)


def test_splits_share_no_picture():
    """Not even by chance, as pictures of a single shape would."""
    train, validation, test = (
        {(s.background, s.things) for s in (scene(split, i, shapes_only=True) for i in range(2000))}
        for split in ("train", "validation", "test")
    )
    assert not (train & validation or train & test or validation & test)


def test_scene_survives_json():
    for index in range(20):
        assert Scene.from_json(scene("test", index).to_json()) == scene("test", index)


@pytest.mark.parametrize("text", ["", "[]", '{"split": "train"}', '{"things": [{"kind": "dog"}]}'])
def test_broken_json_is_named(text):
    with pytest.raises(ValueError, match="not a scene"):
        Scene.from_json(text)


@pytest.mark.parametrize("shapes_only", [False, True])
def test_things_lie_in_cells_of_their_own_inside_the_picture(shapes_only):
    for index in range(500):
        one = scene("train", index, shapes_only=shapes_only)
        assert 1 <= len(one.things) <= 6
        assert len({t.cell for t in one.things}) == len(one.things)
        for t in one.things:
            assert t.pixels / 2 <= min(t.x, t.y) and max(t.x, t.y) <= 96 - t.pixels / 2
            assert abs(t.x - 32 * (t.cell % 3) - 16) <= 4 and abs(t.y - 32 * (t.cell // 3) - 16) <= 4
            assert SIZES[t.size][0] <= t.pixels <= SIZES[t.size][1]
            assert (t.colour is not None) == (t.kind in SHAPES) and t.colour != one.background
            assert not (t.mirrored and t.colour) and not (shapes_only and t.kind not in SHAPES)


def test_numbers_repeats_and_shares_of_kinds(scenes):
    counts = Counter(len(s.things) for s in scenes)
    assert 0.07 < counts[1] / len(scenes) < 0.13
    assert all(0.14 < counts[n] / len(scenes) < 0.22 for n in range(2, 7))
    repeats = sum(max(s.counts.values()) > 1 for s in scenes) / len(scenes)
    assert 0.35 < repeats < 0.45
    assert {t.kind for s in scenes for t in s.things} == set(KINDS)


def test_vocabulary_is_large_enough():
    assert len(EMOJI) >= 60 and len(SHAPES) == 6 and len(COLOURS) == 8 and len(BACKGROUNDS) == 6
    assert len(set(EMOJI.values())) == len(EMOJI)


@pytest.mark.parametrize(("split", "index"), [("dev", 0), ("train", -1), ("train", 1.5)])
def test_unknown_split_or_index_is_named(split, index):
    with pytest.raises(ValueError, match="dev|-1|1.5"):
        scene(split, index)


# --- pictures ---


def test_shapes_are_drawn_where_and_as_the_scene_says():
    one = Scene("test", 0, "white", (thing("circle", 0, "large", "red"), thing("square", 8, "small", "blue")))
    picture = render(one)
    assert picture.size == (96, 96) and picture.mode == "RGB"
    assert picture.getpixel((16, 16)) == COLOURS["red"]
    assert picture.getpixel((80, 80)) == COLOURS["blue"]
    assert np.abs(np.array(picture)[40:60, 40:60].astype(int) - BACKGROUNDS["white"]).max() <= 16


def test_render_gives_the_same_picture_every_time():
    one = scene("train", 3, shapes_only=True)
    assert render(one).tobytes() == render(Scene.from_json(one.to_json())).tobytes()


def test_later_things_cover_earlier_ones():
    near = [Thing("square", colour, "large", cell, 48, 48, 36, False) for colour, cell in (("red", 4), ("blue", 5))]
    assert render(Scene("test", 0, "white", tuple(near))).getpixel((48, 48)) == COLOURS["blue"]


def test_missing_font_names_the_remedy(monkeypatch):
    monkeypatch.setenv(drawing.FONT_VARIABLE, "/nowhere/font.ttf")
    for cached in (drawing._font, drawing._glyph, drawing._emoji):
        cached.cache_clear()
    assert not has_font()
    render(scene("train", 0, shapes_only=True))
    with pytest.raises(FileNotFoundError, match="/nowhere/font.ttf.*apt-get install fonts-noto-color-emoji"):
        render(BY_HAND)


@needs_font
def test_every_emoji_has_a_glyph_of_its_own():
    assert len({drawing._emoji(kind, 40, False).tobytes() for kind in EMOJI}) == len(EMOJI)


@needs_font
def test_mirrored_emoji_is_the_mirror_image():
    plain, mirrored = (np.array(drawing._emoji("bus", 36, flag)) for flag in (False, True))
    np.testing.assert_array_equal(plain[:, ::-1], mirrored)


# --- words ---


def test_plurals_and_articles():
    assert [plural(noun) for noun in ("dog", "bus", "sheep", "snowman", "butterfly", "octopus", "dress")] == [
        *("dogs", "buses", "sheep", "snowmen", "butterflies", "octopuses", "dresses")
    ]
    assert [with_article(w) for w in ("orange star", "apple", "red heart")] == [
        *("an orange star", "an apple", "a red heart")
    ]


def test_no_text_has_a_wrong_article(scenes):
    for index, one in enumerate(scenes[:300]):
        rng = random.Random(index)
        texts = [describe(one, rng), short_caption(one, rng).text, *(q.text for q in ask(one, rng, 10))]
        for text in texts:
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|  | [,.;?]|\{|None", text), text


def test_description_names_every_thing_and_the_field(scenes):
    for index, one in enumerate(scenes):
        text = describe(one, random.Random(index))
        assert one.background in text and text[0].isupper() and text.endswith(".")
        for t in one.things:
            assert t.colour is None or t.colour in text
        sizes = Counter(re.findall(r"\b(small|little|large|big)\b", text)).total()
        assert sizes >= len(one.counts), text


def test_texts_follow_from_the_generator():
    one = scene("train", 5)
    for make in (
        lambda rng: describe(one, rng),
        lambda rng: short_caption(one, rng),
        lambda rng: ask(one, rng, 12),
        lambda rng: hard_negatives(one, rng),
    ):
        assert make(random.Random(1)) == make(random.Random(1))


# --- the tokenizer's texts and the data set ---


def test_corpus_holds_prompts_descriptions_captions_questions_and_answers():
    texts = list(corpus(200))
    assert set(PROMPTS) <= set(texts)
    assert all(text and text.isascii() and "\n" not in text for text in texts)
    assert {"yes", "no", "nothing", "nowhere", "top left", "What colour is the field?"} <= set(texts)
    assert len(texts) > 200 * 15


def test_data_set_holds_the_scenes_of_its_splits(tmp_path):
    builder = Scenes(cache_dir=str(tmp_path), num_train=12, num_validation=0, num_test=3, shapes_only=True)
    builder.download_and_prepare()
    sets = builder.as_dataset()
    assert {split: len(rows) for split, rows in sets.items()} == {"train": 12, "test": 3}
    row = sets["test"][2]
    one = scene("test", 2, shapes_only=True)
    assert Scene.from_json(row["scene"]) == one
    np.testing.assert_array_equal(np.array(row["image"]), np.array(render(one)))
    assert len(row["questions"]) == 5 and set(row["questions"][0]) == {"kind", "text", "answer"}
    assert one.background in row["description"] and row["caption"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_train": -1},
        {"num_test": "3"},
        {"shapes_only": 1},
        dict.fromkeys(("num_train", "num_validation", "num_test"), 0),
    ],
)
def test_bad_data_set_options_are_named(tmp_path, options):
    with pytest.raises(ValueError, match="num_train|num_test|shapes_only"):
        Scenes(cache_dir=str(tmp_path), **options)
