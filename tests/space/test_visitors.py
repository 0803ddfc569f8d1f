"""What is held of visitors, and that it is let go."""

import pytest

from fwd2bot.space_app import visitors
from fwd2bot.space_app.uploads import VisitorError
from fwd2bot.space_app.visitors import Visitor, Visitors


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


def test_pictures_of_a_visitor_are_limited_with_the_remedy():
    visitor = Visitor()
    for index in range(24):
        visitor.add(f"{index}.png", b"", None)
    with pytest.raises(VisitorError, match="You have 24 pictures here and add 1; at most 24.*Remove yours"):
        visitor.add("more.png", b"", None)


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
