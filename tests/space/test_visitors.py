"""What is held of visitors, and that it is let go."""

import threading

import pytest

from fwd2bot.space_app import visitors
from fwd2bot.space_app.uploads import VisitorError
from fwd2bot.space_app.visitors import AskedTwiceError, ConversationEndedError, Visitor, Visitors


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_visitor_who_leaves_is_forgotten():
    held = Visitors()
    with held.visit("a") as visitor:
        visitor.add("a.png", b"", None)
    held.leave("a")
    assert len(held) == 0
    with held.visit("a") as again:
        assert again.pictures == {}


def test_silent_visitor_is_forgotten_and_one_who_is_being_served_is_not():
    clock = Clock()
    held = Visitors(clock)
    with held.visit("served"):
        with held.visit("silent"):
            pass
        clock.now = visitors.IDLE_SECONDS + 1
        held.let_go_silent()
        assert "served" in held and "silent" not in held


def test_the_longest_silent_makes_room_for_a_new_visitor(monkeypatch):
    monkeypatch.setattr(visitors, "MAX_VISITORS", 2)
    clock = Clock()
    held = Visitors(clock)
    for clock.now, name in enumerate("abc"):
        with held.visit(name):
            pass
    assert [name in held for name in "abc"] == [False, True, True]


def test_nobody_is_thrown_out_while_being_served(monkeypatch):
    monkeypatch.setattr(visitors, "MAX_VISITORS", 1)
    held = Visitors()
    with held.visit("a"), pytest.raises(VisitorError, match="Try again in a minute"), held.visit("b"):
        pass
    assert "a" in held


def test_pictures_of_a_visitor_are_limited_and_each_is_held_once():
    visitor = Visitor()
    for index in range(24):
        assert visitor.add(f"{index}.png", b"%d" % index, None).id == f"own-{index + 1}"
        assert visitor.add("again.png", b"%d" % index, None) is None
    assert visitor.room == 0 and visitor.add("more.png", b"more", None) is None
    assert visitor.same(b"3").title == "3.png" and len(visitor.pictures) == 24


def test_one_who_leaves_ends_the_answers_that_are_made_for_them():
    held = Visitors()
    with held.visit("a") as visitor, visitor.answering(0, "What?") as stop:
        assert not stop.is_set()
        held.leave("a")
        assert stop.is_set()


def test_question_waits_for_the_one_before_and_the_same_one_is_not_asked_twice():
    visitor, order, second = Visitor(), [], threading.Event()

    def ask():
        with pytest.raises(AskedTwiceError), visitor.answering(0, "first"):
            pass
        second.set()
        with visitor.answering(0, "second"):
            order.append("second")

    thread = threading.Thread(target=ask)
    with visitor.answering(0, "first"):
        thread.start()
        assert second.wait(10)
        while len(visitor.running) < 2:  # the second has come, and waits
            assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and visitor.running == []


def test_question_that_waits_is_ended_by_a_new_conversation():
    visitor, ended = Visitor(), []

    def ask():
        with pytest.raises(ConversationEndedError), visitor.answering(0, "second"):
            pass
        ended.append(True)

    thread = threading.Thread(target=ask)
    with visitor.answering(0, "first"):
        thread.start()
        while len(visitor.running) < 2:
            assert thread.is_alive()
        visitor.begin_conversation(1)
        thread.join(10)
    assert ended == [True]


def test_those_without_pictures_make_room_before_one_who_has_some(monkeypatch):
    monkeypatch.setattr(visitors, "MAX_VISITORS", 2)
    clock = Clock()
    held = Visitors(clock)
    with held.visit("has pictures") as visitor:
        visitor.add("a.png", b"", None)
    for clock.now in range(1, 200):
        with held.visit(f"cheap call {clock.now}"):
            pass
    assert "has pictures" in held and len(held) == 2


def test_visitor_who_is_only_looked_at_is_not_held():
    held = Visitors()
    with held.visit("a", keep=False) as visitor:
        assert visitor.pictures == {}
    assert len(held) == 0


def test_question_that_is_repeated_after_another_is_answered_again():
    visitor, order = Visitor(), []

    def ask(words):
        with visitor.answering(0, words):
            order.append(words)

    def later(words):
        thread = threading.Thread(target=ask, args=[words])
        before = len(visitor.running)
        thread.start()
        while len(visitor.running) == before and thread.is_alive():
            threading.Event().wait(0.01)
        return thread

    with visitor.answering(0, "first"):
        threads = [later("second"), later("first")]
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["second", "first"]
