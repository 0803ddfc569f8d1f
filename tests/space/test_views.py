"""What the page shows, as HTML."""

import pytest

from fwd2bot.space_app.comparison import Answer
from fwd2bot.space_app.results import Exchange, Look
from fwd2bot.space_app.views import comparison, completed, conversation, looked
from fwd2bot.space_app.visitors import Picture


def answer(seconds=0.1, tokens=8, **more):
    return Answer("a dog", tokens, tokens + 20, tokens * 10, seconds, tokens * 100, True, **more)


@pytest.mark.parametrize(("seconds", "other", "told"), [(0.2, 0.1, True), (0.1, 0.2, False), (0.2, None, False)])
def test_first_token_that_came_later_from_the_summaries_is_explained(seconds, other, told):
    other = None if other is None else answer(other, 64)
    page = comparison(Exchange("What?", [], answer(seconds), other))
    assert ("came later from the summaries, although 56 tokens were left out" in page) == told


def test_saving_is_told_in_a_line_and_only_where_there_is_one():
    exchange = Exchange("What?", [], answer(), answer(tokens=64))
    assert "8 tokens stand for what are 64 uncompressed: <b>8 times less</b>" in comparison(exchange)
    assert "times less" not in comparison(Exchange("What?", [], answer(), None))
    assert "times less" not in comparison(Exchange("What?", [], answer(), answer()))


def test_answer_that_was_cut_off_says_so_to_everybody():
    exchange = Exchange("What?", [], answer(cut=True), answer())
    for shown in (conversation(exchange), completed(exchange)):
        assert shown.count("a dog … (cut off at 48 tokens)") == 1 and shown.count("a dog") == 2


@pytest.mark.parametrize(("described", "caption"), [(True, "Picture 3: a dog"), (False, "Picture 3")])
def test_caption_repeats_nothing(described, caption):
    picture = Picture("store-1", "Picture 3", "a dog" if described else "Picture 3", None, None, described)
    page = looked(Look(picture, None, "unknown", [], 1, 2, 3))
    assert f"<figcaption>{caption}</figcaption>" in page
