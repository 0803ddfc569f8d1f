"""Questions: answers worked out by hand, and no answer to be had from the wording."""

import random
import re
from collections import Counter, defaultdict

import pytest
from hand_made_scene import BY_HAND, thing

from fwd2bot.training.scenes import QUESTION_KINDS, TRAINING_KINDS, Scene, ask, scene
from fwd2bot.training.scenes.things import BACKGROUNDS, COLOURS, KINDS, SHAPES, SIZES


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene("validation", index) for index in range(1000)]


@pytest.fixture(scope="module")
def questions() -> list:
    return [q for i in range(5000) for q in ask(scene("train", i), random.Random(i), 12, TRAINING_KINDS)]


@pytest.fixture(scope="module")
def asked_by_hand() -> dict[str, set[str]]:
    """Every question that was drawn for BY_HAND, with all answers given."""
    answers = defaultdict(set)
    for seed in range(3000):
        for question in ask(BY_HAND, random.Random(seed), 18, TRAINING_KINDS):
            answers[question.text].add(question.answer)
    return answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Is there a dog?", "yes"),
        ("Is there a star?", "no"),
        ("Is there a large bus?", "yes"),
        ("Is there a small bus?", "no"),
        ("Is there a red circle?", "yes"),
        ("Is there a yellow circle?", "no"),
        ("How many dogs are there?", "2"),
        ("How many buses are there?", "1"),
        ("How many stars are there?", "0"),
        ("How many things are there?", "6"),
        ("How many small things are there?", "3"),
        ("How many shapes are there?", "2"),
        ("Is the cat small or large?", "small"),
        ("Is the bus large or small?", "large"),
        ("Is the red circle small or large?", "large"),
        ("What colour is the large circle?", "red"),
        ("What colour is the circle on the right?", "blue"),
        ("What colour is the field?", "green"),
        ("What is in the top left corner?", "dog"),
        ("What is in the middle?", "cat"),
        ("What is on the left?", "circle"),
        ("What is at the bottom?", "nothing"),
        ("What is to the left of the cat?", "circle"),
        ("What is above the cat?", "dog"),
        ("What is below the cat?", "nothing"),
        ("What is above the bus?", "circle"),
        ("What is to the left of the bus?", "nothing"),
        ("What is to the right of the blue circle?", "nothing"),
        ("Are there more dogs than cats?", "yes"),
        ("Are there fewer dogs than cats?", "no"),
        ("Are there as many dogs as circles?", "yes"),
        ("Are there as many dogs as buses?", "no"),
        ("Are there more small things than large things?", "no"),
        ("Where is the bus?", "bottom right"),
        ("Where is the red circle?", "left"),
        ("Where is the star?", "nowhere"),
    ],
)
def test_answer_worked_out_by_hand(asked_by_hand, text, answer):
    assert asked_by_hand[text] == {answer}


def test_same_question_has_one_answer_per_picture(asked_by_hand):
    assert all(len(answers) == 1 for answers in asked_by_hand.values())


def test_things_named_with_the_do_exist_once(asked_by_hand):
    assert not [text for text in asked_by_hand if re.search(r"the (dog|circle)( small|\?)|of the (dog|circle)$", text)]


def test_farther_things_are_not_passed_over_for_nothing(asked_by_hand):
    # Left of the bus lies nothing up to the edge; below the large dog lies the cat, below that nothing.
    one = Scene("test", 0, "white", (thing("cat", 0), thing("bus", 2)))  # cat, empty, bus
    texts = {q.text for seed in range(300) for q in ask(one, random.Random(seed), 8, ["neighbour"])}
    assert texts and not any("left of the bus" in text or "right of the cat" in text for text in texts)


def test_questions_are_distinct_and_their_kinds_take_turns(scenes):
    for index, one in enumerate(scenes[:200]):
        found = ask(one, random.Random(index), 8)
        assert len({q.text for q in found}) == len(found) == 8
        assert max(Counter(q.kind for q in found).values()) <= 4
    assert "where" not in QUESTION_KINDS and "where" in TRAINING_KINDS


def test_answers_are_canonical(questions):
    allowed = {
        "presence": {"yes", "no"},
        "compare": {"yes", "no"},
        "count": set("0123456"),
        "size": set(SIZES),
        "colour": set(COLOURS),
        "background": set(BACKGROUNDS),
        "place": {*KINDS, "nothing"},
        "neighbour": {*KINDS, "nothing"},
    }
    for question in questions:
        assert question.kind == "where" or question.answer in allowed[question.kind], question


def test_about_half_of_yes_no_questions_answer_yes(questions):
    for kind in ("presence", "compare"):
        answers = [q.answer for q in questions if q.kind == kind]
        assert 0.46 < answers.count("yes") / len(answers) < 0.54


def test_yes_is_not_given_away_by_what_is_asked_for(questions):
    """The share of yes is about a half for shapes and others, with and without attribute, for each comparison."""
    shares = defaultdict(list)
    for q in questions:
        if q.kind in ("presence", "compare"):
            said = {w.rstrip("s") for w in re.findall(r"[a-z]+", q.text.lower())}
            group = (
                q.kind,
                bool(said & set(SHAPES)),
                bool(said & set(COLOURS)),
                bool(said & {"small", "little", "large", "big"}),
                *sorted(said & {"more", "fewer", "many"}),
            )
            shares[group].append(q.answer == "yes")
    assert len(shares) >= 9
    for group, answers in shares.items():
        assert len(answers) < 200 or 0.42 < sum(answers) / len(answers) < 0.58, (group, sum(answers) / len(answers))


def test_no_kind_can_be_answered_from_the_question_alone(questions):
    """Guessing, for each wording, the answer that was the most frequent in the first 80%."""
    limits = {
        "presence": 0.56,
        "compare": 0.56,
        "size": 0.56,
        "count": 0.40,
        "colour": 0.20,
        "background": 0.22,
        "place": 0.22,
        "neighbour": 0.30,
        "where": 0.25,
    }
    cut = len(questions) * 4 // 5
    by_text, by_kind = defaultdict(Counter), defaultdict(Counter)
    for q in questions[:cut]:
        by_text[q.text][q.answer] += 1
        by_kind[q.kind][q.answer] += 1
    right = defaultdict(list)
    for q in questions[cut:]:
        seen = by_text[q.text] if by_text[q.text].total() > 3 else by_kind[q.kind]
        right[q.kind].append(seen.most_common(1)[0][0] == q.answer)
    assert set(right) == set(TRAINING_KINDS)
    for kind, hits in right.items():
        assert sum(hits) / len(hits) < limits[kind], (kind, sum(hits) / len(hits))


def test_nothing_is_a_modest_share(questions):
    for kind, most in (("place", 0.2), ("neighbour", 0.3)):
        answers = [q.answer for q in questions if q.kind == kind]
        assert 0.05 < answers.count("nothing") / len(answers) < most


@pytest.mark.parametrize(("count", "kinds"), [(-1, QUESTION_KINDS), (3, ["colour", "smell"])])
def test_bad_question_arguments_are_named(count, kinds):
    with pytest.raises(ValueError, match="-1|smell"):
        ask(BY_HAND, random.Random(0), count, kinds)
