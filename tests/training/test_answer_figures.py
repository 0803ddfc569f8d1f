"""Figures of answers, worked out by hand and beside the libraries that have them."""

import random

import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from fwd2bot.training.answer_figures import Asked, answer_figures, vqa_accuracy, vqa_normalised, yes_no_figures
from fwd2bot.training.metrics import winoground_scores
from fwd2bot.training.presence import SORTS, presence_questions


def test_three_of_ten_annotators_make_an_answer_nine_tenths_right():
    """Left out in turn: three of ten times two others agree (2/3), seven times three do (1)."""
    answers = ["cat"] * 3 + ["dog"] * 7
    assert vqa_accuracy("cat", answers) == pytest.approx(0.9)
    assert vqa_accuracy("Dog.", answers) == 1.0
    assert vqa_accuracy("cat", ["cat"] + ["dog"] * 9) == pytest.approx(0.3)
    assert vqa_accuracy("cow", answers) == 0.0
    assert vqa_accuracy("cat", ["cat"] * 2) == 1.0  # all of fewer than four


@pytest.mark.parametrize(
    ("one", "other"),
    [("The two dogs.", "2 dogs"), ("isnt", "isn't"), ("1,000", "1000"), ("none", "0"), ("on-off", "on off")],
)
def test_answers_that_vqa_takes_for_equal_are_equal(one, other):
    assert vqa_normalised(one) == vqa_normalised(other)


def test_a_number_keeps_its_point_and_other_words_differ():
    assert vqa_normalised("2.5") == "2.5" != vqa_normalised("25")
    assert vqa_normalised("red") != vqa_normalised("blue")


def test_equal_answers_are_those_of_the_benchmarks_own_code():
    module = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric", reason="needs the extra lmms-eval")
    official = module.EvalAIAnswerProcessor()
    texts = [
        "A dog",
        "the dog.",
        "two",
        "2",
        "dont",
        "don't",
        "yes!",
        "Yes",
        "1,000",
        "1000",
        "3.5",
        "no",
        "none",
        "0",
    ]
    for one in texts:
        for other in texts:
            assert (official(one) == official(other)) == (vqa_normalised(one) == vqa_normalised(other)), (one, other)


def test_yes_and_no_are_judged_as_scikit_learn_does():
    draw = random.Random(0)
    given, expected = ([draw.choice(["yes", "no"]) for _ in range(50)] for _ in range(2))
    precision, recall, f1, _ = precision_recall_fscore_support(expected, given, average="binary", pos_label="yes")
    figures = yes_no_figures([f"{one.title()}, it is." for one in given], expected)
    assert (figures["precision"], figures["recall"], figures["f1"]) == pytest.approx((precision, recall, f1))
    assert figures["yes_share"] == given.count("yes") / 50 and figures["neither"] == 0


def test_an_answer_that_is_neither_yes_nor_no_is_wrong_on_either_side():
    figures = yes_no_figures(["maybe", "maybe", "yes", "no"], ["yes", "no", "yes", "no"])
    assert figures["accuracy"] == 0.5 and figures["neither"] == 0.5
    assert figures["precision"] == 1.0 and figures["recall"] == 0.5


def test_a_group_counts_only_when_all_of_it_is_right():
    asked = [Asked("true", group=group) for group in ("a", "a", "b", "b")] + [Asked("false", group="c")]
    figures = answer_figures(["True", "true.", "true", "false", "false"], asked)
    assert figures["exact_match"] == 0.8
    assert figures["consistency"] == pytest.approx(2 / 3)
    assert figures["yes_no"]["accuracy"] == 0.8
    assert "vqa_accuracy" not in figures and "by_category" not in figures


def test_true_and_false_count_by_the_first_word_in_accuracy_and_in_groups_alike():
    asked = [Asked("true", group="a"), Asked("false", group="a")]
    figures = answer_figures(["True, they are", "false"], asked)
    assert figures["yes_no"]["accuracy"] == figures["consistency"] == 1.0 and figures["exact_match"] == 0.5
    one_sided = [Asked("true", group="a", category="x"), Asked("false", group="b", category="y")]
    figures = answer_figures(["True, they are", "False, they are not"], one_sided)
    assert [figures["by_category"][name]["consistency"] for name in "xy"] == [1.0, 1.0]
    assert "yes_no" not in figures["by_category"]["x"]
    asked = [Asked("two", group="a"), Asked("red", group="a")]
    assert answer_figures(["two, I think", "red"], asked)["consistency"] == 0.0


def test_figures_of_a_category_are_those_of_its_rows():
    asked = [Asked("red", ["red"] * 9 + ["pink"], category="colour"), Asked("2", ["2"] * 10, category="count")]
    figures = answer_figures(["pink", "two"], asked)
    assert figures["by_category"]["colour"] == {"exact_match": 0.0, "vqa_accuracy": pytest.approx(0.3)}
    assert figures["by_category"]["count"] == {"exact_match": 0.0, "vqa_accuracy": 1.0}
    assert figures["vqa_accuracy"] == pytest.approx(0.65)
    assert "yes_no" not in figures


def test_answers_and_questions_that_differ_in_number_are_refused():
    with pytest.raises(ValueError, match="got 1 for 2"):
        answer_figures(["yes"], [Asked("yes"), Asked("no")])


def test_winoground_needs_both_of_a_row():
    scores = torch.tensor(
        [
            [[0.9, 0.1], [0.2, 0.8]],  # text and image
            [[0.9, 0.8], [0.5, 0.6]],  # image 1 is nearer to caption 0: no text; each caption finds its image
            [[0.5, 0.6], [0.1, 0.7]],  # caption 0 is nearer to image 1: no image; each image finds its caption
            [[0.5, 0.5], [0.5, 0.5]],  # equal scores are no hit
        ]
    )
    assert winoground_scores(scores) == {"text": 0.5, "image": 0.5, "group": 0.25}
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        winoground_scores(scores[:, 0])


OBJECTS = [["dog", "car"], ["dog", "tree"], ["dog", "car", "man"], ["man", "car"], ["boat"]]


def test_absent_things_are_popular_or_stand_beside_what_is_there():
    questions = [q for q in presence_questions(OBJECTS) if q.picture == 1]  # dog and tree
    absent = {sort: {q.name for q in questions if q.sort == sort and q.answer == "no"} for sort in SORTS}
    assert absent["popular"] == {"car", "man"}  # three and two pictures have them; boat one
    assert absent["adversarial"] == {"car", "man"}  # beside a dog stand car (twice) and man (once)
    [tree] = [q for q in presence_questions([["tree"], ["tree", "boat"], ["car"], ["car"]]) if _asks(q, 0, "no")]
    assert tree.name == "boat"  # car is more frequent, but never beside a tree


def _asks(question, picture, answer):
    return (question.picture, question.sort, question.answer) == (picture, "adversarial", answer)


def test_every_sort_asks_for_as_many_things_that_are_there_as_are_not():
    questions = presence_questions(OBJECTS, per_picture=2)
    assert questions == presence_questions(OBJECTS, per_picture=2)
    for question in questions:
        assert (question.name in OBJECTS[question.picture]) == (question.answer == "yes")
    for sort in SORTS:
        answers = [q.answer for q in questions if q.sort == sort]
        assert answers.count("yes") == answers.count("no") == 9
    assert questions[0].text().startswith("Is there a ") and questions[0].text().endswith(" in the image?")
