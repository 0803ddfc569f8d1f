"""Scores of captions against values worked out by hand."""

import math
import sys

import pytest

from fwd2bot.training.caption_scores import caption_scores, cider

SENTENCES = ["two small cats sit on a mat", "a red car drives to the left", "the snowman is below a big tree"]


def test_the_true_captions_have_the_top_score():
    scores = caption_scores(SENTENCES, [[sentence] for sentence in SENTENCES])
    assert scores == pytest.approx({"cider": 10, "bleu": 1, "chrf": 1, "rouge_l": 1})


def test_captions_of_the_wrong_pictures_score_lower_in_all():
    references = [[sentence] for sentence in SENTENCES]
    wrong = caption_scores(SENTENCES[1:] + SENTENCES[:1], references)
    half = caption_scores([SENTENCES[0], *SENTENCES[:1:-1], SENTENCES[1]], references)
    assert all(value < half[name] < 1 + 9 * (name == "cider") for name, value in wrong.items())


def test_words_in_another_order_score_lower_in_all():
    turned = [" ".join(reversed(sentence.split())) for sentence in SENTENCES]
    scores = caption_scores(turned, [[sentence] for sentence in SENTENCES])
    assert scores["cider"] == pytest.approx(10 / 4)  # the words are right, no pair of them is
    assert scores["bleu"] < 0.3 and scores["chrf"] < 0.9 and scores["rouge_l"] < 0.3


def test_case_does_not_count_nor_does_punctuation_in_cider():
    shouted = [sentence.upper() + "!" for sentence in SENTENCES]
    references = [[sentence] for sentence in SENTENCES]
    assert cider(shouted, references) == pytest.approx(10)
    assert caption_scores([sentence.upper() for sentence in SENTENCES], references)["bleu"] == pytest.approx(1)


def test_bleu_and_rouge_by_hand():
    caption, reference = "the cat sat on the mat", "the cat sat on a mat"
    scores = caption_scores([caption] * 2, [[reference]] * 2)
    # of the caption's 6 words, 5 pairs, 4 triples and 3 quadruples the reference has 5, 3, 2 and 1; 5 words in order
    assert scores["bleu"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert scores["rouge_l"] == pytest.approx(5 / 6)


def test_cider_by_hand():
    # "a" is in both pictures' references and weighs nothing, "dog" and "a dog" weigh log 2; there are no triples
    assert cider(["a dog", "a dog"], [["a dog"], ["a cat"]]) == pytest.approx(10 * (2 / 4 + 0) / 2)
    # "dog" twice helps once: cosines w*w / (2w * w), w*w / (sqrt(2) w * w), 0 and 0; and one word too many
    cosines = 1 / 2 + 1 / math.sqrt(2)
    expected = 10 * (cosines / 4 * math.exp(-1 / 72) + 0) / 2
    assert cider(["a dog dog", "a dog"], [["a dog"], ["a cat"]]) == pytest.approx(expected)


def test_cider_is_that_of_the_coco_caption_evaluation():
    captions = ["a red dog on a green field", "two small cats on a field", "one blue car"]
    references = [
        ["a red dog on a field", "the green field has a dog"],
        ["two cats on a blue field"],
        ["one blue car on the left"],
    ]
    assert cider(captions, references) == pytest.approx(4.026654565582496)  # Cider() of pycocoevalcap 1.2


def test_the_nearest_of_several_references_counts():
    both = caption_scores(SENTENCES[:2], [[SENTENCES[2], SENTENCES[0]], [SENTENCES[1]]])
    assert both["rouge_l"] == pytest.approx(1) and both["bleu"] == pytest.approx(1)


def test_empty_captions_score_nothing():
    assert caption_scores(["", ""], [["a dog"], ["a cat"]]) == {"cider": 0, "bleu": 0, "chrf": 0, "rouge_l": 0}


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        (["a dog"], [["a dog"]], "at least two pictures to weigh words by, got 1"),
        (["a dog", "a cat"], [["a dog"]], r"2 caption\(s\) came with references of 1 picture\(s\)"),
        (["a dog", "a cat"], [["a dog"], []], r"without any reference: \[1\]"),
        (["a dog", "a cat"], ["a dog", "a cat"], "a list of lists of str"),
    ],
)
def test_captions_and_references_that_do_not_fit(captions, references, message):
    for score in (caption_scores, cider):
        with pytest.raises(ValueError, match=message):
            score(captions, references)


@pytest.mark.parametrize("missing", ["sacrebleu.metrics", "rouge_score.rouge_scorer"])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "fwd2bot\[train\]"'):
        caption_scores(["a dog", "a cat"], [["a dog"], ["a cat"]])
    assert cider(["a dog", "a cat"], [["a dog"], ["a cat"]]) == pytest.approx(5)
