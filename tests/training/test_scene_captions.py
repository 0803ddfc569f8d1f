"""Short captions and hard negatives, held against a second, naive reading of their parts."""

import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hand_made_scene import BY_HAND

from fwd2bot.training.scenes import (
    HARD_NEGATIVE_SORTS,
    Caption,
    Scene,
    Thing,
    altered,
    hard_negatives,
    negatives,
    scene,
    short_caption,
    truth_table,
)
from fwd2bot.training.scenes.captions import RELATIONS, Phrase


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene("validation", index) for index in range(1000)]


def naively_true(caption: Caption, one: Scene) -> bool:
    """Read a caption's parts one by one, without claims.py."""

    def matching(p: Phrase) -> list[Thing]:
        parts = ("kind", "colour", "size", "cell")
        return [t for t in one.things if all(getattr(p, n) in (None, getattr(t, n)) for n in parts)]

    for p in caption.phrases:
        if not (len(matching(p)) >= 1 if p.number == 1 else len(matching(p)) == p.number):
            return False
    if caption.relation:
        order = {
            "left": lambda a, b: a.cell % 3 < b.cell % 3,
            "right": lambda a, b: a.cell % 3 > b.cell % 3,
            "above": lambda a, b: a.cell // 3 < b.cell // 3,
            "below": lambda a, b: a.cell // 3 > b.cell // 3,
        }[caption.relation]
        first, second = map(matching, caption.phrases[:2])
        if not any(order(a, b) for a in first for b in second):
            return False
    return caption.field in (None, one.background) and caption.total in (None, len(one.things))


@pytest.mark.parametrize(
    ("caption", "true"),
    [
        (Caption((Phrase("dog"), Phrase("cat", size="small"))), True),
        (Caption((Phrase("dog"), Phrase("cat", size="large"))), False),
        (Caption((Phrase("dog", number=2), Phrase("bus"))), True),
        (Caption((Phrase("dog", number=3), Phrase("bus"))), False),
        (Caption((Phrase("circle", "red"), Phrase("circle", "blue", cell=5))), True),
        (Caption((Phrase("circle", "red", "small"),)), False),
        (Caption((Phrase("dog"), Phrase("bus")), "left"), True),
        (Caption((Phrase("dog"), Phrase("bus")), "below"), False),
        (Caption((Phrase("bus"), Phrase("dog")), "right"), True),
        (Caption((Phrase("cat"), Phrase("circle", "blue")), "above"), False),
        (Caption((Phrase("bus"),), field="green"), True),
        (Caption((Phrase("bus"),), field="pink"), False),
        (Caption((Phrase("bus"),), total=6), True),
        (Caption((Phrase("bus"),), total=5), False),
    ],
)
def test_claim_worked_out_by_hand(caption, true):
    assert caption.is_true_of(BY_HAND) is true
    assert truth_table([caption], [BY_HAND]).tolist() == [[true]]
    assert naively_true(caption, BY_HAND) is true


def test_caption_reads_as_english():
    phrases = (Phrase("apple", style=1), Phrase("star", "orange", "small", 4, style=1))
    assert (
        Caption(phrases, field="blue", style=3).text
        == "an apple and a small orange star in the middle, on a blue field"
    )
    assert Caption(phrases[:1] * 2, "above", style=2).text == "an apple higher than an apple"
    assert Caption((Phrase("sheep", number=2, style=1),), style=27).text == "there are two sheep"


@pytest.mark.parametrize("shapes_only", [False, True])
def test_short_captions_are_true(shapes_only):
    for index in range(1000):
        one = scene("validation", index, shapes_only=shapes_only)
        caption = short_caption(one, random.Random(index))
        assert caption.is_true_of(one) and naively_true(caption, one), caption.text


def test_truth_table_agrees_with_reading_one_by_one(scenes):
    captions = [short_caption(one, random.Random(7)) for one in scenes[:150]]
    table = truth_table(captions, scenes[:150])
    assert table.shape == (150, 150) and table.dtype == bool and table.diagonal().all()
    assert table.tolist() == [[naively_true(c, one) for c in captions] for one in scenes[:150]]
    assert table.tolist() == [[c.is_true_of(one) for c in captions] for one in scenes[:150]]
    assert truth_table([], scenes[:3]).shape == (3, 0) and truth_table(captions, []).shape == (0, 150)


def test_short_captions_are_true_of_at_most_a_hundredth_of_all_pictures(scenes):
    captions = [short_caption(one, random.Random(3)) for one in scenes]
    rates = truth_table(captions, [scene("train", i) for i in range(5000)]).mean(0)
    assert rates.mean() < 0.003
    assert rates.max() < 0.015 and (rates > 0.01).mean() < 0.01  # a rate is known to about 0.2%


def test_captions_are_short_and_varied(scenes):
    captions = [short_caption(one, random.Random(i)) for i, one in enumerate(scenes)]
    assert len({c.text for c in captions}) > 0.99 * len(captions)
    assert np.mean([len(c.text.split()) for c in captions]) < 14
    assert {c.relation for c in captions} == {None, *RELATIONS}
    for part in ("field", "total"):
        assert any(getattr(c, part) for c in captions) and not all(getattr(c, part) for c in captions)


# --- hard negatives ---


@pytest.mark.parametrize("sort", HARD_NEGATIVE_SORTS)
def test_hard_negative_is_false_and_its_caption_true(scenes, sort):
    found = 0
    for index, one in enumerate(scenes[:400]):
        pair = negatives._pair(one, random.Random(index), negatives._EDITS[sort])
        if pair is not None:
            true, false = pair
            found += 1
            assert naively_true(true, one), true.text
            assert not naively_true(false, one), false.text
            assert hard_negatives(one, random.Random(index), [sort]) == {sort: (true, false.text)}
    assert found > 150


def test_hard_negatives_differ_by_their_sort(scenes):
    def words(text: str) -> list[str]:
        return sorted(re.sub(r"[^a-z ]", "", re.sub(r"\ban\b", "a", text.lower())).split())

    for index, one in enumerate(scenes[:300]):
        for sort, (true, false) in hard_negatives(one, random.Random(index)).items():
            assert false != true.text
            if sort.startswith("add"):
                assert len(words(false)) > len(words(true.text))
            if sort.startswith("swap") and all(p.number == 1 and not p.size for p in true.phrases):
                assert words(false) == words(true.text)


def test_hard_negatives_contradict_nothing_but_the_picture(scenes):
    """No two things in one cell, no shape in the colour of its field: false texts are as possible as true ones."""
    for index, one in enumerate(scenes[:300]):
        for sort in HARD_NEGATIVE_SORTS:
            pair = negatives._pair(one, random.Random(index), negatives._EDITS[sort])
            for caption in pair or ():
                cells = [p.cell for p in caption.phrases if p.cell is not None]
                assert len(set(cells)) == len(cells), caption.text
                assert all(p.colour != (caption.field or one.background) for p in caption.phrases), caption.text
                assert caption.total is None or sum(p.number for p in caption.phrases) < caption.total


def test_wording_alone_does_not_tell_an_edit_from_its_caption(scenes):
    """Word counts learnt on 80% of the pairs tell the false one of the rest hardly better than chance."""
    for sort in ("replace_object", "replace_attribute", "swap_object"):
        pairs = [
            (pair[sort][0].text.lower().split(), pair[sort][1].lower().split())
            for index, one in enumerate(scenes)
            if sort in (pair := hard_negatives(one, random.Random(index), [sort]))
        ]
        cut = len(pairs) * 4 // 5
        true, false = (Counter(w for pair in pairs[:cut] for w in pair[side]) for side in (0, 1))

        def score(words, true=true, false=false):
            return sum(np.log((true[w] + 2) / (false[w] + 2)) for w in words)

        right = [np.sign(score(a) - score(b)) / 2 + 0.5 for a, b in pairs[cut:]]
        assert 0.35 < np.mean(right) < 0.65, sort


def test_unknown_sort_is_named():
    with pytest.raises(ValueError, match="swap_colour.*swap_object"):
        hard_negatives(BY_HAND, random.Random(0), ["swap_colour"])


def test_altered_scene_differs_in_one_detail(scenes):
    """Of one thing, of the field, or by two unlike things that have changed cells; and never by none."""
    seen = Counter()
    for index, one in enumerate(scenes[:400]):
        other = altered(one, random.Random(index))
        unlike = [(a, b) for a, b in zip(one.things, other.things, strict=True) if a != b]
        if other.background != one.background:
            assert not unlike
            seen["field"] += 1
        elif len(unlike) == 2:
            (a, new_a), (b, new_b) = unlike
            assert (new_a, new_b) == (replace(a, cell=b.cell), replace(b, cell=a.cell))
            assert (a.kind, a.colour, a.size) != (b.kind, b.colour, b.size)
            seen["exchange"] += 1
        else:
            [(thing, new)] = unlike
            [detail] = [
                name for name in ("kind", "colour", "size", "cell") if getattr(thing, name) != getattr(new, name)
            ]
            if detail == "cell":
                assert new.cell not in one.cells
            seen[detail] += 1
    assert set(seen) == {"field", "exchange", "kind", "colour", "size", "cell"}
