"""Questions about several pictures: true of them by another way of finding out, and balanced."""

import random
import re
from collections import Counter

import pytest
from hand_made_scene import BY_HAND, thing

from fwd2bot.training.scenes import SEVERAL_KINDS, Scene, ask_several, companions, scene
from fwd2bot.training.scenes.several import NONE
from fwd2bot.training.scenes.things import PLACE_PHRASES, SYNONYMS

KINDS = {word: kind for kind, word in SYNONYMS.items()}
OTHER = Scene("test", 1, "pink", (thing("cat", 0), thing("star", 1, "large", "red")))
THIRD = Scene("test", 2, "green", (thing("bus", 2), thing("circle", 4, "small", "red"), thing("owl", 7)))
BY_HAND_ROW = [OTHER, BY_HAND, THIRD]  # 2, 6 and 3 things


def scene_at(index: int) -> Scene:
    return scene("validation", index)


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[Scene], list]]:
    """Rows of 2 to 5 scenes, each with its questions."""
    rows = []
    for index in range(1000):
        rng = random.Random(index)
        shown = companions(scene_at, 3000, index, 2 + index % 4, rng)
        scenes = [scene_at(number) for number in shown]
        rows.append((scenes, ask_several(scenes, rng, 12)))
    return rows


@pytest.fixture(scope="module")
def by_hand() -> dict[str, set[str]]:
    """Every question that was drawn for BY_HAND_ROW, with all answers given."""
    answers: dict[str, set[str]] = {}
    for seed in range(1500):
        for question in ask_several(BY_HAND_ROW, random.Random(seed), 18):
            answers.setdefault(question.text, set()).add(question.answer)
    return answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Which pictures show a cat?", "1 and 2"),
        ("Which of these pictures has a bus?", "2 and 3"),
        ("Which pictures show an owl?", "3"),
        ("In which pictures is there a red circle?", "2 and 3"),
        ("Which pictures have a heart?", "none"),
        ("How many pictures show a cat?", "2"),
        ("How many of these pictures have a dog?", "1"),
        ("How many pictures show a square?", "0"),
        ("How many pictures have a green field?", "2"),
        ("Which picture has a pink field?", "1"),
        ("Which pictures have a green background?", "2 and 3"),
        ("Which picture has a white field?", "none"),
        ("Which picture has the most things?", "2"),
        ("Which picture shows the fewest things?", "1"),
        ("Is there a cat in picture 1?", "yes"),
        ("Is there a cat in picture 3?", "no"),
        ("Does picture 3 show a dog?", "no"),
        ("What is at the top of picture 1?", "star"),
        ("What colour is the field of picture 1?", "pink"),
        ("What is at the bottom in picture 3?", "owl"),
        ("How many dogs are in picture 2?", "2"),
        ("Look at picture 1. Is the star small or large?", "large"),
        ("What is above the cat in picture 2?", "dog"),
    ],
)
def test_answer_worked_out_by_hand(by_hand, text, answer):
    assert by_hand[text] == {answer}


def holds(scene: Scene, words: str) -> bool:
    """Whether "red star", "cat" or "pink field" is true of a scene."""
    *colour, noun = words.split()
    if noun in ("field", "background"):
        return scene.background == colour[0]
    noun = KINDS.get(noun, noun)
    return any(thing.kind == noun and (not colour or thing.colour == colour[0]) for thing in scene.things)


def test_every_question_that_looks_for_a_thing_is_answered_by_looking_at_every_picture(asked):
    checked = 0
    for scenes, questions in asked:
        for question in questions:
            if question.kind not in ("which", "field", "how many", "presence"):
                continue
            words = re.search(r"\b(?:an?) ([a-z ]+?)(?: in picture \d)?\?$", question.text).group(1)
            found = [number for number, one in enumerate(scenes, 1) if holds(one, words)]
            if question.kind == "presence":
                expected = "yes" if int(re.search(r"\d", question.text).group()) in found else "no"
            elif question.kind == "how many":
                expected = str(len(found))
            else:
                expected = " and ".join(", ".join(map(str, found)).rsplit(", ", 1)) or NONE
            assert question.answer == expected, question
            checked += 1
    assert checked > 5_000


def test_the_picture_with_the_most_things_is_the_only_one_with_so_many(asked):
    for scenes, questions in asked:
        for question in (one for one in questions if one.kind == "most"):
            numbers = [len(one.things) for one in scenes]
            best = max(numbers) if "most" in question.text else min(numbers)
            assert [i for i, number in enumerate(numbers, 1) if number == best] == [int(question.answer)]


def test_question_about_a_place_is_answered_from_the_picture_that_it_names(asked):
    places = {phrase: cell for cell, phrases in enumerate(PLACE_PHRASES) for phrase in phrases}
    checked = 0
    for scenes, questions in asked:
        for question in questions:
            found = re.fullmatch(
                r"(?:What|Which)(?: thing)? is (?:there )?(.+) (?:of|in) picture (\d)\?", question.text
            )
            if question.kind == "detail" and found and found.group(1) in places:
                thing = scenes[int(found.group(2)) - 1].cells.get(places[found.group(1)])
                assert question.answer == (thing.kind if thing else "nothing"), question
                checked += 1
    assert checked > 100


def test_all_kinds_are_asked_and_no_question_twice(asked):
    counts = Counter(question.kind for _, questions in asked for question in questions)
    assert set(counts) == set(SEVERAL_KINDS)
    assert min(counts.values()) > 500
    for _, questions in asked:
        assert len({question.text for question in questions}) == len(questions)


@pytest.mark.parametrize(("kind", "most_frequent"), [("which", 0.2), ("field", 0.25), ("how many", 0.5)])
def test_no_answer_is_so_frequent_that_it_pays_to_guess_it(asked, kind, most_frequent):
    answers = Counter(q.answer for scenes, questions in asked for q in questions if q.kind == kind)
    assert answers.most_common(1)[0][1] < most_frequent * answers.total()
    nothing = answers[NONE] + answers["0"]
    assert 0.06 < nothing / answers.total() < 0.16


def test_yes_is_as_frequent_as_no(asked):
    answers = Counter(q.answer for _, questions in asked for q in questions if q.kind == "presence")
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.03


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_every_position_is_the_answer_as_often(asked, number):
    answers = [q.answer for scenes, qs in asked if len(scenes) == number for q in qs if q.kind in ("which", "field")]
    positions = Counter(digit for answer in answers for digit in re.findall(r"\d", answer))
    assert set(positions) == {str(position) for position in range(1, number + 1)}
    assert max(positions.values()) < 1.25 * min(positions.values())


def test_the_same_seed_asks_the_same():
    first, second = (ask_several(BY_HAND_ROW, random.Random(7), 12) for _ in range(2))
    assert first == second != ask_several(BY_HAND_ROW, random.Random(8), 12)


def test_companions_are_different_pictures_and_contain_the_first():
    for seed in range(200):
        shown = companions(scene_at, 6, seed % 6, 5, random.Random(seed))
        assert len(set(shown)) == 5 and seed % 6 in shown


def test_pictures_shown_together_often_share_a_thing():
    shared = 0
    for seed in range(300):
        first, second = map(scene_at, companions(scene_at, 3000, seed, 2, random.Random(seed)))
        shared += bool(set(first.counts) & set(second.counts))
    assert shared > 0.4 * 300


def test_more_pictures_than_there_are_is_refused():
    with pytest.raises(ValueError, match="5 different pictures are wanted and there are 4"):
        companions(scene_at, 4, 0, 5, random.Random(0))


def test_a_single_picture_is_refused():
    with pytest.raises(ValueError, match="1 scene.* two or more"):
        ask_several([BY_HAND], random.Random(0), 1)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind of question 'who'.*which, how many"):
        ask_several(BY_HAND_ROW, random.Random(0), 1, ("who",))
